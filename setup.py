"""Installs xdlm_megatron. Needs no CUDA, no compiler and no network beyond the packages below."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "([^"]+)"', (HERE / "xdlm_megatron/__init__.py").read_text()).group(1)

INSTALL_REQUIRES = [
    "megatron-core>=0.16,<0.20",  # tested with 0.16.1 alone, the last release for Python 3.11
    "torch>=2.6,<2.14",  # tested with 2.13.0 alone; Megatron-Core needs 2.6
    "numpy>=1.26",
    "psutil>=5",  # Megatron-Core needs it to write checkpoints and does not ask for it
    "pydantic>=2.7,<3",
    "pyyaml>=6",
    "sentencepiece>=0.2",
    "tokenizers>=0.20",
    "mlflow-skinny>=3.17,<4",  # the client; sqlalchemy and alembic give it a local SQLite store
    "sqlalchemy>=2",
    "alembic>=1.13",
    "matplotlib>=3.8",
    "tqdm>=4.66",
]

# NVIDIA's apex is used where it is found, but no extra names it: the PyPI project `apex` is another one.
EXTRAS_REQUIRE = {
    "gpu": ["transformer-engine[pytorch]>=2.9; platform_system == 'Linux'"],
    "image": ["nvidia-dali-cuda120>=1.40; platform_system == 'Linux'", "pillow>=10"],
    "slurm": ["submitit>=1.5"],
    "eval": ["lm-eval>=0.4.9"],
    "ui": ["mlflow>=3.17,<4"],
    "dev": [
        "pytest>=8",
        "pytest-xdist>=3.5",
        "ruff>=0.14",
        "mypy>=1.13",
        "import-linter>=2.1",
        "codespell>=2.3",
        "pre-commit>=4",
        "scipy>=1.11",
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
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
    entry_points={"console_scripts": ["xdlm-megatron=xdlm_megatron.__main__:main"]},
)
