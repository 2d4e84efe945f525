"""pass@k against drawing every set of k samples, and standard errors by hand."""

import itertools

import pytest

from nanochat.evaluation.statistics import pass_at_k, standard_error


def test_pass_at_k_is_the_share_of_draws_with_a_right_sample():
    for n in range(1, 8):
        for c in range(n + 1):
            samples = [True] * c + [False] * (n - c)
            for k in range(1, n + 1):
                draws = [any(draw) for draw in itertools.combinations(samples, k)]
                assert pass_at_k(n, c, k) == pytest.approx(sum(draws) / len(draws), abs=1e-12)


def test_pass_at_k_of_many_samples():
    assert pass_at_k(100_000, 50_000, 1) == pytest.approx(0.5)
    assert pass_at_k(2_000, 1, 1_000) == pytest.approx(0.5)
    assert pass_at_k(2_000, 1_001, 1_000) == 1.0


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 1, 0), (4, 1, 5)])
def test_counts_that_cannot_be_are_caught(n, c, k):
    with pytest.raises(AssertionError):
        pass_at_k(n, c, k)


@pytest.mark.parametrize(("accuracy", "n", "percent"), [(0.046, 1319, 0.57), (0.076, 1319, 0.73), (0.076, 400, 1.32)])
def test_standard_errors(accuracy, n, percent):
    assert 100 * standard_error(accuracy, n) == pytest.approx(percent, abs=0.01)
    assert standard_error(1.0, n) == standard_error(0.0, n) == 0.0
