"""The runs of a sweep to a table, a CSV and the iso-FLOP picture."""

import csv
import math
import re
from pathlib import Path

import pytest

from nanochat.pages.sweep import curves, minimum, parabola, write_sweep


def loss(size, best):
    return 0.8 + 0.1 * math.log10(size / best) ** 2


def row(flops, size, best, **changes):
    return {
        "run": f"flops={flops:g},depth={size}", "overrides": {"flops": flops, "depth": size}, "parameters": size,
        "steps": 10, "trained_tokens": 1000, "trained_flops": 1.01 * flops, "val_bpb": loss(size, best),
        "trained_s": 2.5, "state": "done", "reason": "",
    } | changes  # fmt: skip


LOST = dict.fromkeys(("steps", "trained_tokens", "trained_flops", "val_bpb", "trained_s")) | {"state": "failed"}
ROWS = [
    *(row(1e15, size, 3e6) for size in (10_000_000, 1_000_000, 2_000_000, 5_000_000)),
    *(row(4e15, size, 8e6) for size in (2_000_000, 5_000_000, 20_000_000)),
    row(4e15, 40_000_000, 8e6, **LOST, reason="TrainingDivergedError: <loss>=nan"),
]


def test_curves_are_of_one_budget_each_in_the_order_of_size():
    found = curves(ROWS)
    assert {name: [size for size, _ in points] for name, points in found.items()} == {
        "flops=1e+15": [1e6, 2e6, 5e6, 10e6], "flops=4e+15": [2e6, 5e6, 20e6],
    }  # fmt: skip


def test_curves_are_told_apart_by_every_digit_and_not_by_the_order_of_names():
    overrides = [
        {"matrix_lr": 0.01234, "seed": 1}, {"matrix_lr": 0.012341, "seed": 1}, {"seed": 1, "matrix_lr": 0.01234},
        {"seed": 1, "matrix_lr": 0.01234567},
    ]  # fmt: skip
    rows = [row(1e15, 10**6 * place, 3e6, overrides=one) for place, one in enumerate(overrides, start=1)]
    assert {name: [size for size, _ in points] for name, points in curves(rows).items()} == {
        "matrix_lr=0.01234 seed=1": [1e6, 3e6], "matrix_lr=0.012341 seed=1": [2e6],
        "matrix_lr=0.01234567 seed=1": [4e6],
    }  # fmt: skip


@pytest.mark.parametrize(("name", "best"), [("flops=1e+15", 3e6), ("flops=4e+15", 8e6)])
def test_the_minimum_of_a_parabola_over_log_parameters_is_found(name, best):
    size, lowest = minimum(curves(ROWS)[name])
    assert size == pytest.approx(best, rel=1e-6)
    assert lowest == pytest.approx(0.8)


@pytest.mark.parametrize("sizes", [[1e6, 2e6], [1e6, 2e6, 2e6]])
def test_two_sizes_have_no_parabola(sizes):
    assert parabola([(size, loss(size, 3e6)) for size in sizes]) is None


def test_a_minimum_outside_the_sizes_or_a_maximum_is_no_best_size():
    beyond = [(size, loss(size, 30e6)) for size in (1e6, 2e6, 5e6)]
    assert parabola(beyond) is not None
    assert minimum(beyond) is None
    assert minimum([(size, -value) for size, value in curves(ROWS)["flops=1e+15"]]) is None


@pytest.fixture
def written(tmp_path):
    lines = write_sweep(str(tmp_path), ROWS)
    return lines, tmp_path


def test_the_table_has_a_line_for_each_run_and_the_reason_of_a_failed_one(written):
    lines, _ = written
    assert len(lines) == 1 + len(ROWS)
    assert re.fullmatch(r"flops=1e\+15,depth=1000000 +1M +1k +1\.01e\+15 +0\.8228 +2 s +done", lines[2])
    assert re.search("-  +failed: TrainingDivergedError: <loss>=nan$", lines[-1])


def test_the_csv_has_the_overrides_and_the_measured_values_apart(written):
    _, folder = written
    with open(folder / "sweep.csv", newline="") as file:
        read = list(csv.DictReader(file))
    assert [one["run"] for one in read] == [one["run"] for one in ROWS]
    assert (read[0]["flops"], read[0]["depth"]) == ("1000000000000000.0", "10000000")
    assert float(read[0]["trained_flops"]) == 1.01e15
    assert float(read[0]["val_bpb"]) == ROWS[0]["val_bpb"]
    assert (read[-1]["val_bpb"], read[-1]["state"]) == ("", "failed")


def test_the_page_is_one_file_with_curves_fits_and_minima(written):
    _, folder = written
    page = Path(folder / "report.html").read_text()
    assert page.count('class="dotted"') == 2 + 2, "two curves and their two minima"
    assert page.count('class="faint"') == 2
    assert ">3M<" in page
    assert ">8M<" in page
    assert "&lt;loss&gt;=nan" in page
    assert not re.search(r"<script|src=|href=|https?:", page)


def test_without_a_best_size_the_page_says_so(tmp_path):
    write_sweep(str(tmp_path), [row(1e15, 1_000_000, 3e6), row(1e15, 9_000_000, 3e6, **LOST, reason="")])
    page = (tmp_path / "report.html").read_text()
    assert "no best size is given" in page
    assert 'class="faint"' not in page
