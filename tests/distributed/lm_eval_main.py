"""tools/run_lm_eval.py, offline, in the folder of the local tasks; writes every answer to answers.json.

Arguments: as the launcher gives them, a verb (not used) and the tool's.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ |= {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

from tools import run_lm_eval
from xdlm_megatron.evaluation import harness

TASKS = Path(__file__).with_name("lm_eval_tasks")
generate_until = harness.DiffusionLM.generate_until


def recorded(self, requests) -> list[str]:
    texts = generate_until(self, requests)
    if self._completer.mesh.is_main:
        Path(os.environ["ANSWERS"]).write_text(json.dumps(texts))
    return texts


if __name__ == "__main__":
    harness.DiffusionLM.generate_until = recorded
    del sys.argv[1]
    os.chdir(TASKS)
    sys.exit(run_lm_eval.main())
