"""How parallel a sample was made, and in what order: from the step that last changed each token.

After the two dimensions of "Parallelism and Generation Order in Masked Diffusion Language Models" (average
finalisation parallelism and Kendall's tau); a token that is masked again or refined counts when it is final.

Shape suffix: S positions.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.stats import kendalltau


def parallelism(free_S: NDArray[np.bool_], num_steps: int) -> float:
    """Tokens made final per step: free positions / steps; 1 is a token a step. NaN without steps."""
    return float(free_S.sum() / num_steps) if num_steps else float("nan")


def kendall_tau(last_change_S: NDArray[np.integer], free_S: NDArray[np.bool_]) -> float:
    """Tau-b between position and step of the last change, over free positions: 1 is left to right, -1 right
    to left. NaN where all were made final in one step, or there is but one.
    """
    steps = last_change_S[free_S]
    if len(np.unique(steps)) < 2:
        return float("nan")
    return float(kendalltau(np.flatnonzero(free_S), steps, variant="b").statistic)
