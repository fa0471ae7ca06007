"""Jobs done, some at a time, each in a process that keeps its scorer."""

from __future__ import annotations

import functools
import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from xdlm_megatron.checkpoint.integrity import CheckpointError
from xdlm_megatron.config.load import ConfigError
from xdlm_megatron.data.errors import DataError
from xdlm_megatron.study.protocol import Job

if TYPE_CHECKING:
    from xdlm_megatron.evaluation.scorer import Scored


def measure(jobs: Sequence[Job], at_once: int, log: Path) -> None:
    """Does what is not done yet, with a progress bar; what the instruments print goes to `log`.

    Raises whatever a job raises, at once; the others' results stay.
    """
    todo = [job for job in jobs if job.read() is None]
    if not todo:
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that start now
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(at_once, mp_context=context) as pool,
        tqdm(total=len(jobs), initial=len(jobs) - len(todo), desc="measure", disable=None) as bar,
    ):
        futures = [pool.submit(do, job, log) for job in todo]
        try:
            for future in as_completed(futures):
                future.result()
                bar.update()
        except (ConfigError, DataError, CheckpointError) as error:  # raised here: it is a message, not a bug
            raise type(error)(str(error)) from None
        finally:
            pool.shutdown(cancel_futures=True)


def do(job: Job, log: Path) -> None:
    """One job, in this process."""
    if job.protocol.scorer is not None:
        os.environ["HF_HUB_OFFLINE"] = "1"
    import xdlm_megatron.parallel  # noqa: F401, first: its patches of Megatron-Core

    with log.open("a", encoding="utf-8") as stream, redirect_stdout(stream), redirect_stderr(stream):
        print(f"== {job.result}", flush=True)
        if job.sampling is None:
            _evaluate(job)
        else:
            _sample_and_score(job)


def _evaluate(job: Job) -> None:
    from xdlm_megatron.evaluation.evaluate import EvaluateOptions, evaluate

    evaluate(job.config, EvaluateOptions(reconstruction=job.reconstruction), str(job.checkpoint))


def _sample_and_score(job: Job) -> None:
    from xdlm_megatron.evaluation.generation import SampleOptions
    from xdlm_megatron.evaluation.records import write_record
    from xdlm_megatron.evaluation.run import sample
    from xdlm_megatron.evaluation.scoring import held_out_texts, read_samples, score_samples, to_record

    config, protocol = job.config, job.protocol
    scorer = None if protocol.scorer is None else _scorer(protocol.scorer, protocol.scorer_dtype)
    options = SampleOptions(num_samples=protocol.num_samples, seed=config.run.seed)
    sample(config, options, str(job.checkpoint))
    reference = None if config.data.valid_prefix is None else held_out_texts(config, protocol.num_samples)
    samples = read_samples(job.samples)
    found = score_samples(samples, reference, scorer)
    aside = job.result.with_suffix(f".{os.getpid()}.tmp")  # whole, or not there
    write_record(aside, to_record(samples, scorer, found))
    aside.replace(job.result)


class _RememberingScorer:
    """A scorer that reads each text once: the held-out texts stand beside every file of samples."""

    def __init__(self, path: Path, dtype: str) -> None:
        import torch

        from xdlm_megatron.evaluation.scorer import CausalScorer

        scorer = CausalScorer(path, "cuda" if torch.cuda.is_available() else "cpu", dtype)
        self.name, self.fingerprint = scorer.name, scorer.fingerprint
        self._score = functools.cache(scorer)

    def __call__(self, text: str) -> Scored:
        return self._score(text)


@functools.cache
def _scorer(path: Path, dtype: str) -> _RememberingScorer:
    print(f"scorer {path} in {dtype}", file=sys.stderr, flush=True)
    return _RememberingScorer(path, dtype)
