"""Goes through Megatron-Core again and again, each time in a fork of its own with one patch left out.

Prints one JSON object: {what is left out: {stage: "done" or the error}}.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

# torch is imported in functions: Megatron-Core's asynchronous save starts a process that imports this file.

PARTS = ("nothing", "tracker-filter", "tensor-type", "tensor-cuda", "group-step-adam", "writer-threads")
FORMAT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}


def import_counting_compile() -> int:
    """Imports megatron.core as it is; returns how often it called torch.compile."""
    import torch

    real, calls = torch.compile, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return real(*args, **kwargs)

    torch.compile = counted
    import megatron.core.optimizer  # noqa: F401

    torch.compile = real
    return len(calls)


def count_compiled() -> int:
    """Functions of megatron.core that torch.compile has wrapped."""
    import sys

    modules = [module for name, module in sys.modules.items() if name.startswith("megatron.core")]
    return sum(
        "_torchdynamo_orig_callable" in getattr(f, "__dict__", {}) for m in modules for f in vars(m).values()
    )


def leave_out(part: str) -> None:
    """Takes one part of the patches back."""
    import megatron.core.optimizer as optimizer
    import torch
    from megatron.core.optimizer import distrib_optimizer

    if part == "tensor-type":
        torch.Tensor.type = torch.Tensor.type.__wrapped__
    if part == "tensor-cuda":
        torch.Tensor.cuda = torch._C.TensorBase.cuda
    if part == "tracker-filter":
        logging.getLogger("megatron.core.tensor_parallel.random").filters.clear()
    if part == "writer-threads":
        from megatron.core.dist_checkpointing.strategies import filesystem_async as upstream

        upstream._get_write_results_queue = upstream._get_write_results_queue.__wrapped__
        writer = upstream.FileSystemWriterAsync
        writer.write_preloaded_data_multiproc = staticmethod(
            writer.write_preloaded_data_multiproc.__wrapped__
        )
    if part == "group-step-adam":
        optimizer.Adam = distrib_optimizer.Adam = torch.optim.AdamW
        optimizer.USING_PYTORCH_OPTIMIZER = True
        distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = False


def stages(groups: Any, folder: str) -> dict[str, Callable[[], Any]]:
    """Seeding, wrapping, a step of the distributed optimizer, saving, loading; each needs those before it."""
    import torch
    from megatron.core import dist_checkpointing, tensor_parallel
    from megatron.core.dist_checkpointing.mapping import ShardedTensor
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer import TransformerConfig

    transformer = TransformerConfig(
        num_layers=1, hidden_size=4, num_attention_heads=1, use_cpu_initialization=True
    )
    metadata = {**FORMAT, "dp_cp_group": groups.dp_cp}
    built: dict[str, Any] = {}

    def seed() -> None:
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        with tensor_parallel.get_cuda_rng_tracker().fork():
            torch.rand(1)

    def wrap() -> None:
        model = torch.nn.Linear(4, 4)
        for parameter in model.parameters():
            tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
        ddp = DistributedDataParallelConfig(use_distributed_optimizer=True)
        built["model"] = DistributedDataParallel(transformer, ddp, model, pg_collection=groups)

    def step() -> None:
        built["optimizer"] = get_megatron_optimizer(
            OptimizerConfig(optimizer="adam", lr=0.1, use_distributed_optimizer=True),
            [built["model"]],
            use_gloo_process_groups=False,
            pg_collection=groups,
        )
        built["model"](torch.ones(2, 4)).sum().backward()
        built["model"].finish_grad_sync()
        assert built["optimizer"].step()[0]

    def state(is_loading: bool) -> dict[str, Any]:
        named = built["model"].module.named_parameters()
        model = {name: ShardedTensor.from_rank_offsets(name, value) for name, value in named}
        sharded = built["optimizer"].sharded_state_dict(model, is_loading=is_loading, metadata=metadata)
        return {"optimizer": sharded}

    def save() -> None:
        dist_checkpointing.save(state(False), folder, ("torch_dist", 1), content_metadata=FORMAT)

    def load() -> None:
        wrap()
        step()
        built["optimizer"].load_state_dict(dist_checkpointing.load(state(True), folder)["optimizer"])

    return {"seed": seed, "wrap": wrap, "step": step, "save": save, "load": load}


def go_through(report: dict[str, Any]) -> None:
    """Runs the stages in a world of one until the first that fails."""
    import torch
    from megatron.core import parallel_state  # noqa: TID251  (this program stands in for parallel/)
    from megatron.core.process_groups_config import ProcessGroupCollection

    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    started, start = [], multiprocessing.process.BaseProcess.start

    def counted(process: Any) -> None:
        started.append(process.name)
        start(process)

    multiprocessing.process.BaseProcess.start = counted  # type: ignore[method-assign]
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    with tempfile.TemporaryDirectory() as folder:
        for name, run in stages(ProcessGroupCollection.use_mpu_process_groups(), folder).items():
            try:
                run()
                report[name] = "done"
            except Exception as error:
                report[name] = f"{type(error).__name__}: {error}"
                break
    report["rng_warnings"] = sum("CPU RNG state" in record.getMessage() for record in records)
    report["helper_processes"] = len(started)


def in_a_fork(work: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """What `work` reports from a child of its own."""
    context = multiprocessing.get_context("fork")
    reader, writer = context.Pipe(duplex=False)

    def run() -> None:
        report: dict[str, Any] = {}
        try:
            work(report)
        finally:
            writer.send(report)

    child = context.Process(target=run)
    child.start()
    child.join()  # a report fits into the pipe
    return reader.recv()


def main() -> None:
    warnings.simplefilter("ignore")
    import torch  # noqa: F401

    def bare(report: dict[str, Any]) -> None:
        report["compiled_at_import"] = import_counting_compile()
        go_through(report)

    def without(part: str) -> Callable[[dict[str, Any]], None]:
        def work(report: dict[str, Any]) -> None:
            leave_out(part)
            go_through(report)

        return work

    reports = {"everything": in_a_fork(bare)}
    from xdlm_megatron.parallel import patches  # importing it applies the patches

    reports |= {part: in_a_fork(without(part)) for part in PARTS}
    print(json.dumps({**reports, "applied": patches.apply_patches(), "compiled": count_compiled()}))


if __name__ == "__main__":
    main()
