"""`python -m xdlm_megatron`, whose local sweeps start fake_train.py."""

import sys
from pathlib import Path

from xdlm_megatron.__main__ import main
from xdlm_megatron.launch.local import LocalRuns

_command = LocalRuns._command


def fake_command(self: LocalRuns, name: str) -> list[str]:
    python, *_, verb, recipe = [part for part in _command(self, name) if part != "--resume"]
    assert verb == "train"
    resume = ["--resume"] if "--resume" in _command(self, name) else []
    return [python, str(Path(__file__).with_name("fake_train.py")), recipe, *resume]


LocalRuns._command = fake_command  # type: ignore[method-assign]

if __name__ == "__main__":
    sys.exit(main())
