"""Counts of right answers to scores, and how far chance moves them.

Source: the unbiased pass@k: Chen et al., 2021, arXiv 2107.03374, section 2.1.
"""

import math
from collections.abc import Sequence


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return the probability that one of k samples is right, drawn from n of which c are: 1 - C(n-c, k) / C(n, k)."""
    assert 0 <= c <= n, f"{c} right samples of {n}"
    assert 1 <= k <= n, f"{k} samples drawn from {n}"
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def standard_error(accuracy: float, n: int) -> float:
    """Return the standard error of an accuracy, from 0 to 1, of n independent problems."""
    return math.sqrt(accuracy * (1 - accuracy) / n)


def centered(accuracy: float, chance: float) -> float:
    """Return an accuracy on the scale where a guess gives 0 and knowledge 1."""
    return (accuracy - chance) / (1 - chance)


def mean_of_centered(accuracies: Sequence[tuple[float, int, float]]) -> dict[str, float]:
    """Return mean and standard error of centred accuracies from (accuracy, n, chance) of independent tasks."""
    errors = [standard_error(accuracy, n) / (1 - chance) for accuracy, n, chance in accuracies]
    return {
        "value": sum(centered(accuracy, chance) for accuracy, _, chance in accuracies) / len(accuracies),
        "stderr": sum(error**2 for error in errors) ** 0.5 / len(errors),
    }
