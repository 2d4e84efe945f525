"""The runs of a sweep to a table for the terminal, sweep.csv, and report.html with the iso-FLOP picture.

A curve is the runs that differ in the model's shape alone. Where they share a FLOP budget, a parabola through the loss
over log(parameters) gives the best size for it. Source: Hoffmann et al., arXiv:2203.15556, section 3.2 (approach 2);
parameters are those of `model/scaling.py`: matrices and head.
"""

import csv
import io
from typing import Any

import numpy as np

from nanochat import storage
from nanochat.config.sweep import exact
from nanochat.pages.charts import Point, Series, line_chart, short_number
from nanochat.pages.page import duration, write_page
from nanochat.storage import RunFolder

SHAPE = ("depth", "n_embd", "head_dim", "n_kv_head")
COLUMNS = ("parameters", "steps", "trained_tokens", "trained_flops", "val_bpb", "trained_s", "state", "reason")
Row = dict[str, Any]
"""Of a run: `run`, its name; `overrides`; and COLUMNS, None where there is no value yet."""


def write_sweep(run_dir: str, rows: list[Row]) -> list[str]:
    """Write sweep.csv and report.html of a sweep, atomically; returns the table's lines for a terminal."""
    folder = RunFolder(run_dir)
    names = list(dict.fromkeys(name for row in rows for name in row["overrides"]))
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["run", *names, *COLUMNS])
    for row in rows:
        writer.writerow([row["run"], *(row["overrides"].get(name) for name in names), *(row[name] for name in COLUMNS)])
    with storage.atomic_write(folder.table) as file:
        file.write(text.getvalue().encode())
    shown = [_shown(row) for row in rows]
    values = {
        "title": storage.name_of(run_dir), "chart": picture(rows), "heads": list(shown[0]), "rows": shown,
        "best": [
            {"curve": name, "size": short_number(best[0]), "val_bpb": f"{best[1]:.4f}"}
            for name, points in curves(rows).items() if "flops=" in name and (best := minimum(points))
        ],
    }  # fmt: skip
    write_page(folder.report, "sweep.html", values)
    widths = {head: max(len(head), *(len(row[head]) for row in shown)) for head in list(shown[0])[:-1]}
    lines = [{head: head for head in shown[0]}, *shown]
    return ["  ".join([*(row[head].ljust(width) for head, width in widths.items()), row["state"]]) for row in lines]


def curves(rows: list[Row]) -> dict[str, list[Point]]:
    """Return (parameters, validation bits per byte) of the runs that are done, by what they share beside the shape."""
    found: dict[str, list[Point]] = {}
    for row in sorted(rows, key=lambda row: row["parameters"]):
        if row["val_bpb"] is not None:
            shared = sorted(row["overrides"].keys() - set(SHAPE))
            name = " ".join(f"{key}={exact(row['overrides'][key])}" for key in shared)
            found.setdefault(name, []).append((row["parameters"], row["val_bpb"]))
    return found


def parabola(points: list[Point]) -> np.ndarray | None:
    """Return the coefficients, highest first, of loss over log10(parameters), fitted by least squares.

    None if there are fewer than three sizes, or it has no minimum.
    """
    sizes, losses = zip(*points, strict=True)
    if len(set(sizes)) < 3:
        return None
    found = np.polyfit(np.log10(sizes), losses, 2)
    return found if found[0] > 0 else None


def minimum(points: list[Point]) -> Point | None:
    """Return the best size and its loss by the parabola; None if there is none between the sizes that were trained."""
    found = parabola(points)
    if found is None:
        return None
    place = -found[1] / (2 * found[0])
    size = float(10**place)
    within = points[0][0] <= size <= points[-1][0]
    return (size, float(np.polyval(found, place))) if within else None


def picture(rows: list[Row]) -> str:
    """Return the chart of loss over parameters; the curves of FLOP budgets have their parabola and its minimum."""
    series = []
    for name, points in curves(rows).items():
        found = parabola(points) if "flops=" in name else None
        series.append(Series(name or "loss", points, "dotted", name))
        if found is not None:
            places = np.linspace(np.log10(points[0][0]), np.log10(points[-1][0]), 41)
            drawn = [(float(10**place), float(np.polyval(found, place))) for place in places]
            series.append(Series(f"{name}, fitted", drawn, "faint"))
        if found is not None and (best := minimum(points)):
            series.append(Series(f"{name}, minimum of the fit", [best], "dotted", short_number(best[0])))
    return line_chart("Validation bits per byte over parameters", series, log_x=True, over="parameters")


def _shown(row: Row) -> dict[str, str]:
    """Return a row for people; the last one is how it ended."""
    forms = {"parameters": short_number, "trained_tokens": short_number, "trained_flops": "{:.4g}".format,
             "val_bpb": "{:.4f}".format, "trained_s": duration}  # fmt: skip
    heads = ("parameters", "tokens", "FLOPs", "val bpb", "training")
    shown = {
        head: "-" if row[name] is None else forms[name](row[name]) for head, name in zip(heads, forms, strict=True)
    }
    return {"run": row["run"]} | shown | {"state": row["state"] + (f": {row['reason']}" if row["reason"] else "")}
