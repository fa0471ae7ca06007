"""Which of NVIDIA's packages this process can use: Transformer Engine and apex. Neither is required.

megatron.core takes what it can import, and dies or goes wrong where that is a broken build, a build for GPUs
on a machine without one, or the PyPI project that shares apex's name. So each is tried here first, before
megatron.core is imported, and what cannot be used is hidden from it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import sys
from dataclasses import dataclass

import torch
from packaging.version import Version

ENGINE, APEX = "transformer_engine", "apex"
LAYERS, ADAM, FUSION, NORM = "layers", "fused Adam", "gradient accumulation fusion", "layer norm"
# What apex may have been built with, and the modules that do it; megatron.core imports each for itself.
APEX_PARTS = {
    ADAM: ("amp_C", "apex.multi_tensor_apply", "apex.optimizers"),
    FUSION: ("fused_weight_gradient_mlp_cuda",),
    NORM: ("fused_layer_norm_cuda",),
}


@dataclass(frozen=True)
class Package:
    """parts: what of it can be used. problem: why not the rest, or all of it; None where all can."""

    name: str
    parts: tuple[str, ...] = ()
    problem: str | None = None
    version: str | None = None

    def __str__(self) -> str:
        title = " ".join(filter(None, (self.name, self.version)))
        usable = f"{title} with {', '.join(self.parts)}" if self.parts else title
        return usable if self.problem is None else f"{usable}: {self.problem}"


@functools.cache
def transformer_engine() -> Package:
    """NVIDIA's Transformer Engine, as far as this process can use it."""
    name = "Transformer Engine"
    if not _is_installed(ENGINE):
        return Package(name, problem="not installed")
    if not torch.cuda.is_available():
        return Package(name, problem="needs a GPU, and there is none")
    problem = _import_problem(f"{ENGINE}.pytorch")
    if problem is not None:
        return Package(name, problem=problem)
    try:
        version = _engine_version()
    except Exception as error:
        return Package(name, problem=f"broken installation without a version, {_in_one_line(error)}")
    return Package(name, (LAYERS, ADAM, FUSION), version=version)


@functools.cache
def apex() -> Package:
    """NVIDIA's apex, as far as this process can use it.

    Raises:
        ValueError: `import apex` would find another project, which megatron.core would take for NVIDIA's.
    """
    installed = _is_installed(APEX)
    if installed:
        _refuse_namesake()
    built = [part for part, modules in APEX_PARTS.items() if _is_installed(modules[0])]
    if not installed and not built:
        return Package(APEX, problem="not installed")
    if not torch.cuda.is_available():
        return Package(APEX, problem="needs a GPU, and there is none")
    problems = {part: next(filter(None, map(_import_problem, APEX_PARTS[part])), None) for part in built}
    if ADAM not in built:
        problems[ADAM] = "built without amp_C"
    broken = [f"no {part} ({problem})" for part, problem in problems.items() if problem is not None]
    usable = tuple(part for part in built if problems[part] is None)
    return Package(APEX, usable, "; ".join(broken) or None)


def hide_unusable_packages() -> None:
    """Makes `import` of what cannot be used fail as if it were not installed."""
    if not transformer_engine().parts:
        _hide(ENGINE)
    for part, modules in APEX_PARTS.items():
        if part not in apex().parts:
            _hide(modules[0])
    if ADAM not in apex().parts:
        _hide(APEX)


def _is_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _import_problem(name: str) -> str | None:
    """Why a module cannot be imported. A broken build may raise anything, and is done without."""
    try:
        importlib.import_module(name)
    except Exception as error:
        return f"broken build, {_in_one_line(error)}"
    return None


def _engine_version() -> str:
    """As megatron.core looks for it, whose import fails where it finds none."""
    version = getattr(sys.modules[ENGINE], "__version__", None) or importlib.metadata.version(ENGINE)
    return str(Version(str(version)))


def _in_one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _refuse_namesake() -> None:
    """By its files, for its import may have effects: NVIDIA's has had this subpackage in every version."""
    spec = importlib.util.find_spec(APEX)
    roots = list((spec and spec.submodule_search_locations) or ())
    if not importlib.machinery.PathFinder.find_spec("apex.multi_tensor_apply", roots):
        where = roots[0] if roots else (spec and spec.origin)
        raise ValueError(
            f"'import apex' finds {where}, which is not NVIDIA's apex and would be taken for it; remove it: "
            "pip uninstall apex (NVIDIA's is never required, and is built from source: no index has it)"
        )


def _hide(name: str) -> None:
    for module in [m for m in sys.modules if m.startswith(name + ".")]:
        del sys.modules[module]
    sys.modules[name] = None  # type: ignore[assignment]
