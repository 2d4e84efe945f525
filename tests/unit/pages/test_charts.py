import math
import xml.etree.ElementTree as ET

import pytest

from nanochat.pages import charts
from nanochat.pages.charts import Series, line_chart, short_number, smooth, ticks


def drawn(figure):
    return ET.fromstring(str(figure)[str(figure).index("<svg") : str(figure).index("</figure>")])


def places(figure, style):
    line = next(line for line in drawn(figure).iter("polyline") if line.get("class") == style)
    return [tuple(map(float, place.split(","))) for place in line.get("points").split()]


def test_points_lie_where_the_axes_say():
    figure = line_chart("Loss", [Series("loss", [(0, 4.0), (50, 3.0), (100, 2.0)])])
    (x0, y0), (x1, y1), (x2, y2) = places(figure, "line")
    assert (x0, x2) == (charts.LEFT, charts.WIDTH - charts.RIGHT)
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.1)
    assert y0 < y1 < y2, "a larger value stands higher, and SVG counts downwards"
    assert y1 == pytest.approx((y0 + y2) / 2, abs=0.1)
    labels = {text.text: float(text.get("y")) for text in drawn(figure).iter("text") if text.get("class") == "y"}
    assert labels["3"] == pytest.approx(y1, abs=0.1)
    assert labels["4"] == pytest.approx(y0, abs=0.1)


def test_from_zero_begins_at_the_bottom():
    figure = line_chart("Rate", [Series("rate", [(0, 0.0), (1, 10.0)])], from_zero=True)
    assert places(figure, "line")[0][1] == charts.HEIGHT - charts.BOTTOM


def test_percentages():
    labels = [
        t.text for t in drawn(line_chart("Wait", [Series("w", [(0, 0.0), (1, 0.01)])], percent=True)).iter("text")
    ]
    assert "1%" in labels


def test_values_that_are_not_finite_are_left_out():
    figure = line_chart("Loss", [Series("loss", [(0, 4.0), (1, math.nan), (2, math.inf), (3, 2.0)])])
    assert len(places(figure, "line")) == 2


@pytest.mark.parametrize("points", [[], [(0, math.nan)]])
def test_a_chart_without_values_says_so(points):
    assert "no values" in line_chart("Loss", [Series("loss", points)])


@pytest.mark.parametrize("points", [[(5, 1.0)], [(5, 0.0)], [(0, 2.0), (10, 2.0)]])
def test_one_point_and_a_flat_line_are_drawn(points):
    figure = drawn(line_chart("Loss", [Series("loss", points)]))
    assert all(math.isfinite(float(dot.get("cy"))) for dot in figure.iter("circle"))
    assert list(figure.iter("circle" if len(points) == 1 else "polyline"))


def test_text_is_escaped():
    figure = line_chart('<script>"', [Series("<i>", [(0, 1.0), (1, 2.0)])])
    assert "<script>" not in figure
    assert "<i>" not in figure
    assert drawn(figure).get("aria-label").startswith('<script>":')


def test_smoothing_by_hand():
    # span 3: each average takes half of the new value, weights 1/2, 3/4, 7/8 in all.
    assert smooth([4.0, 8.0, 8.0], span=3) == pytest.approx([4.0, (1 + 4) / 0.75, (0.5 + 2 + 4) / 0.875])


def test_smoothing_keeps_a_constant_and_its_length():
    assert smooth([3.0] * 100) == pytest.approx([3.0] * 100)
    assert smooth([]) == []


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (7.1, 9.5, [7.5, 8, 8.5, 9, 9.5]),
        (0, 0.0101, [0, 0.002, 0.004, 0.006, 0.008, 0.01]),
    ],
)
def test_ticks_are_round(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


def test_short_numbers():
    assert [short_number(value) for value in (0, 0.25, 999, 1500, 11_534_441, 2e9)] == [
        "0", "0.25", "999", "1.5k", "11.53M", "2G",
    ]  # fmt: skip


def test_a_logarithmic_axis_has_equal_steps_for_equal_factors():
    figure = line_chart("Loss", [Series("loss", [(1e6, 3.0), (1e7, 2.0), (1e8, 1.0)], label="end")], log_x=True)
    (x0, _), (x1, _), (x2, _) = places(figure, "line")
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.1)
    texts = {text.text: text for text in drawn(figure).iter("text")}
    assert {"1M", "2M", "5M", "10M", "20M", "50M", "100M"} <= texts.keys()
    assert float(texts["end"].get("x")) == x2


def test_a_logarithmic_axis_of_less_than_a_factor_of_two_has_round_numbers():
    assert charts.log_ticks(1.1e6, 1.9e6) == ticks(1.1e6, 1.9e6)
    assert charts.log_ticks(1e6, 5e6) == [1e6, 2e6, 5e6]
