"""Megatron-Core's checkpoint writers as threads of the process that saves.

Upstream writes through helper processes, and collects their results through a manager process of its own.
A kill -9 of the trainer leaves them writing behind the back of the run that resumes, signals meant for the
trainer end them, and the manager imports torch anew at the first save. Threads end with their process.
"""

from __future__ import annotations

import queue
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async as upstream


def write_in_threads(
    transforms: list[Any], use_msc: bool, rank: int, buckets: list[Any], results: queue.Queue[Any]
) -> None:
    """Upstream's `write_preloaded_data_multiproc`: each bucket becomes a file; `results` gets one answer.

    The answer is {index of the bucket: what was written}, or the first exception.
    """
    answers: queue.Queue[Any] = queue.Queue()
    unfinished: queue.Queue[int] = queue.Queue()
    with ThreadPoolExecutor(max_workers=max(1, len(buckets))) as pool:
        for index, bucket in enumerate(buckets):
            unfinished.put(index)
            pool.submit(
                upstream.FileSystemWriterAsync.write_preloaded_data,
                transforms,
                local_proc_idx=index,
                write_bucket=bucket,
                results_queue=answers,
                count_queue=unfinished,
                use_fsync=True,
                use_msc=use_msc,
            )
    written = dict(answers.get_nowait() for _ in buckets)
    errors = [answer for answer in written.values() if isinstance(answer, Exception)]
    results.put(errors[0] if errors else written)


def new_queue() -> queue.Queue[Any]:
    """In the place of upstream's queue in a manager process, which all writers share."""
    return queue.Queue()


def use_threads() -> None:
    """Each writer gets a queue of its own and writes by `write_in_threads`."""
    writer = upstream.FileSystemWriterAsync
    if writer.write_preloaded_data_multiproc is write_in_threads:
        return
    write_in_threads.__wrapped__ = writer.write_preloaded_data_multiproc  # type: ignore[attr-defined]
    new_queue.__wrapped__ = upstream._get_write_results_queue  # type: ignore[attr-defined]
    writer.write_preloaded_data_multiproc = staticmethod(write_in_threads)
    upstream._get_write_results_queue = new_queue
