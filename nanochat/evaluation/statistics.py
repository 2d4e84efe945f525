"""Counts of right answers to scores, and how far chance moves them.

Source: the unbiased pass@k: Chen et al., 2021, arXiv 2107.03374, section 2.1.
"""

import math


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return the probability that one of k samples is right, drawn from n of which c are: 1 - C(n-c, k) / C(n, k)."""
    assert 0 <= c <= n, f"{c} right samples of {n}"
    assert 1 <= k <= n, f"{k} samples drawn from {n}"
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def standard_error(accuracy: float, n: int) -> float:
    """Return the standard error of an accuracy, from 0 to 1, of n independent problems."""
    return math.sqrt(accuracy * (1 - accuracy) / n)
