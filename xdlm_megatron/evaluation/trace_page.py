"""A sampling run as one HTML file that needs nothing else: a slider over the steps, and a map of all of them.

Opening it as PAGE.html#7 shows step 7. Shape suffixes as in trace.py.
"""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from xdlm_megatron.evaluation.trace import TokenStrings

TEMPLATE = Path(__file__).with_name("trace_page.html")


def write_trace_page(
    snapshots_TS: Sequence[NDArray[np.integer]],
    times_T: Sequence[float],
    token_strings: TokenStrings,
    mask_id: int | None,
    observed_S: NDArray[np.bool_],
    path: Path,
    title: str,
    facts: str = "",
) -> None:
    """Writes the page. observed_S: positions that were given. facts: a line below the title.

    The file holds the start and what each step changed. Raises ValueError on fewer than two snapshots.
    """
    if len(snapshots_TS) < 2 or len(snapshots_TS) != len(times_T):
        raise ValueError(
            f"{len(snapshots_TS)} snapshots with {len(times_T)} times; give two or more, one time each"
        )
    ids = np.unique(np.stack(snapshots_TS)).tolist()
    changes = []
    for before_S, after_S in pairwise(snapshots_TS):
        where = np.flatnonzero(before_S != after_S)
        changes.append(np.stack([where, after_S[where]], axis=1).ravel().tolist())
    data = {
        "title": title,
        "facts": facts,
        "mask": -1 if mask_id is None else mask_id,
        "strings": dict(zip(ids, token_strings(ids), strict=True)),
        "observed": np.flatnonzero(observed_S).tolist(),
        "times": list(times_T),
        "start": snapshots_TS[0].tolist(),
        "changes": changes,
    }
    # Text of a sample must not end the script that holds it.
    page = TEMPLATE.read_text().replace("__DATA__", json.dumps(data).replace("<", "\\u003c"))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page)
