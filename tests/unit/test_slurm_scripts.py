"""The sbatch scripts are headers over a recipe: they differ in their recipe, name, nodes and time alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
SCRIPTS = sorted((REPOSITORY / "slurm").glob("pretrain_*.sh"))


def test_all_sizes_have_one() -> None:
    names = {path.stem.removeprefix("pretrain_") for path in SCRIPTS}
    assert names == {"160m", "400m", "1b", "3b", "8b", "llada_8b_cpt"}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_is_a_header_over_its_recipe(path: Path) -> None:
    text = path.read_text()
    (recipe,) = set(re.findall(r"examples/\w+\.yaml", text))
    assert recipe.removeprefix("examples/").removesuffix(".yaml") in (
        path.stem.removeprefix("pretrain_"),
        path.stem.replace("pretrain_", "xdlm_"),
    )
    assert (REPOSITORY / recipe).is_file()
    assert path.stat().st_mode & 0o111
    assert header(text) == header(SCRIPTS[0].read_text())


def header(text: str) -> list[str]:
    """What all of them share."""
    free = r"^(#   *sbatch|# Options|# Trains|#SBATCH --(job-name|nodes|time)=|exec )"
    return [line for line in text.splitlines() if not re.match(free, line)]
