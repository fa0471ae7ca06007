"""Every patch of Megatron-Core, with its reason and the versions it was needed for.

Applied once, on import of `xdlm_megatron.parallel`. Each has a test in tests/unit/parallel/test_patches.py
that fails once upstream makes it needless.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

from xdlm_megatron.parallel import cpu_view, gpu_packages
from xdlm_megatron.parallel.adam import GroupStepAdamW


@dataclass(frozen=True)
class Patch:
    """One change of Megatron-Core. `needed` is asked once, when it would be applied."""

    name: str
    reason: str
    versions: str
    needed: Callable[[], bool]
    apply: Callable[[], None]


def _no_cuda() -> bool:
    return not torch.cuda.is_available()


def _import_without_compile() -> None:
    """First import of megatron.core with @torch.compile as the identity, its fused helpers left eager."""
    real_compile = torch.compile
    if cpu_view.PACKAGE not in sys.modules:
        torch.compile = lambda model=None, **_: model if model is not None else (lambda f: f)  # type: ignore
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # apex and Transformer Engine are optional: absence is no news
            import megatron.core
            import megatron.core.jit
            import megatron.core.optimizer
    finally:
        torch.compile = real_compile
    megatron.core.jit.disable_jit_fuser()


def _uses_torch_adam() -> bool:
    import megatron.core.optimizer as optimizer

    return bool(optimizer.USING_PYTORCH_OPTIMIZER)


def _use_group_step_adam() -> None:
    import megatron.core.optimizer as optimizer
    from megatron.core.optimizer import distrib_optimizer

    optimizer.Adam = GroupStepAdamW
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.Adam = GroupStepAdamW
    distrib_optimizer.HAVE_APEX_OR_TE = True
    distrib_optimizer.USING_APEX_OPTIMIZER = True


def _write_in_threads() -> None:
    from xdlm_megatron.parallel import (
        writers,
    )  # it imports megatron.core, which the patches above come before

    writers.use_threads()


PATCHES = (
    Patch(
        name="hide-unusable-packages",
        reason="megatron.core takes any Transformer Engine or apex that imports, broken or without a GPU",
        versions=">=0.16,<0.17",
        needed=lambda: True,
        apply=gpu_packages.hide_unusable_packages,
    ),
    Patch(
        name="import-without-compile",
        reason="without CUDA, @torch.compile costs seconds at import and needs a compiler at run time",
        versions=">=0.16,<0.17",
        needed=_no_cuda,
        apply=_import_without_compile,
    ),
    Patch(
        name="cpu-view",
        reason="megatron.core has no CPU mode",
        versions=">=0.16,<0.17",
        needed=_no_cuda,
        apply=cpu_view.install,
    ),
    Patch(
        name="group-step-adam",
        reason="DistributedOptimizer cannot load a checkpoint into torch's AdamW, which has no group step",
        versions=">=0.16,<0.17",
        needed=_uses_torch_adam,
        apply=_use_group_step_adam,
    ),
    Patch(
        name="writer-threads",
        reason="checkpoints are written by helper processes that outlive a kill -9 and die of its signals",
        versions=">=0.16,<0.17",
        needed=lambda: True,
        apply=_write_in_threads,
    ),
)


@functools.cache
def apply_patches() -> tuple[str, ...]:
    """Applies what this machine needs, once a process; returns the names of the patches applied."""
    applied = []
    for patch in PATCHES:
        if patch.needed():
            patch.apply()
            applied.append(patch.name)
    return tuple(applied)
