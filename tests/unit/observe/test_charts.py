"""Ticks, thinning and the SVG of a chart."""

import json
import math
import re
from html import unescape
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.observe.report.charts import (
    CHARACTER,
    HEIGHT,
    MAX_POINTS,
    WIDTH,
    Chart,
    Series,
    figure,
    label,
    labels,
    nice_ticks,
    running_mean,
    thinned,
)

finite = st.floats(-1e12, 1e12, allow_nan=False)


def parse(svg: str) -> ElementTree.Element:
    """The figure as XML. It fails if a tag is left open or a character is not escaped."""
    return ElementTree.fromstring(svg)


@given(finite, st.floats(1e-6, 1e12))
def test_ticks_are_round_few_and_enclose_the_data(low: float, width: float) -> None:
    high = low + width
    if (high - low) <= 1e-9 * max(abs(high), abs(low)):
        return
    ticks = nice_ticks(low, high)
    step = ticks[1] - ticks[0]
    assert ticks[0] <= low + 1e-6 * step
    assert ticks[-1] >= high - 1e-6 * step
    assert 3 <= len(ticks) <= 8
    mantissa = step / 10 ** math.floor(math.log10(step) + 1e-9)
    assert min(abs(mantissa - m) for m in (1, 2, 2.5, 5, 10)) < 1e-3


@pytest.mark.parametrize(
    ("value", "step", "text"),
    [
        (0.0, 0.2, "0"),
        (0.6000000001, 0.2, "0.6"),
        (0.25, 0.25, "0.25"),
        (0.005, 0.005, "0.005"),
        (1.0002, 0.0001, "1.0002"),
        (-40.0, 20.0, "-40"),
        (5000.0, 5000.0, "5k"),
        (12500.0, 2500.0, "12.5k"),
        (2e6, 1e6, "2M"),
        (4e-6, 2e-6, "4e-6"),
    ],
)
def test_tick_labels(value: float, step: float, text: str) -> None:
    assert label(value, step) == text


EXTREMES: tuple[tuple[float, ...], ...] = (
    (0.999998, 1.000001),
    (0.9999981, 0.9999984),
    (1e-9, 3e-9),
    (-1e-9, 1e-9),
    (123456.0, 123457.5),
    (123456.0001, 123456.0005),
    (-0.0001, 0.0001),
    (-0.0001, 7.0),
    (-123456.0, 3.0),
    (0.00123, 0.001232),
    (0.0123, 0.012302),
    (1e12, 1e12 + 5e3),
    (-2.5e9, 4e9),
    (1e-30, 2e-30),
    (5.0, 5.0),
    (0.04, 0.04 * (1 + 2e-9)),
)


def boxes(svg: ElementTree.Element, style: str) -> list[tuple[str, float, float, float]]:
    """(text, left, right, y) of the texts of a class, each as wide as its characters at most are."""
    places = []
    for text in svg.iter("text"):
        if text.attrib["class"] == style:
            width, x = CHARACTER * len(text.text or ""), float(text.attrib["x"])
            left = {"end": x - width, "middle": x - width / 2, "start": x}[
                text.attrib.get("text-anchor", "start")
            ]
            places.append((text.text or "", left, left + width, float(text.attrib["y"])))
    return places


@pytest.mark.parametrize("steps", [(1, 2), (1, 2000), (123450, 123456), (999_990, 1_000_000)], ids=str)
@pytest.mark.parametrize("values", EXTREMES, ids=str)
def test_every_label_is_whole_in_the_picture_and_one_of_a_kind(
    values: tuple[float, ...], steps: tuple[int, int]
) -> None:
    points = tuple(zip(map(float, steps), values, strict=True))
    svg = parse(figure(Chart("t", (Series("a", points),))))
    ticks = boxes(svg, "tick")
    across = {y for *_, y in ticks if y > HEIGHT - 20}
    beside, below = ([box for box in ticks if (box[3] in across) is flag] for flag in (False, True))
    for box in (beside, below):
        texts = [text for text, *_ in box]
        assert len(set(texts)) == len(texts) >= 1, texts
    for text, left, right, y in (*ticks, *boxes(svg, "base")):
        assert left >= 0 and right <= WIDTH and 0 <= y <= HEIGHT, (text, left, right)
    rows = sorted(below, key=lambda box: box[1])
    assert all(before[2] < after[1] for before, after in pairwise(rows)), "labels run into each other"


@given(finite, st.floats(1e-9, 1e12))
def test_labels_are_few_characters_and_add_up_to_their_ticks(low: float, width: float) -> None:
    if width <= 1e-8 * abs(low):
        return
    ticks = nice_ticks(low, low + width)
    texts, base = labels(ticks)
    assert len(set(texts)) == len(texts) and max(map(len, texts)) <= 9
    start = float(base.removesuffix(" +")) if base else 0.0
    for tick, text in zip(ticks, texts, strict=True):
        scale = {"k": 1e3, "M": 1e6}.get(text[-1], 1.0)
        assert start + float(text.rstrip("kM")) * scale == pytest.approx(
            tick, abs=0.05 * (ticks[1] - ticks[0])
        )


def test_thinning_keeps_every_spike_and_the_order() -> None:
    points = [(float(i), 0.0) for i in range(20_000)]
    points[12_345] = (12_345.0, 99.0)
    points[777] = (777.0, -99.0)
    kept = thinned(points)
    assert len(kept) <= MAX_POINTS + 2
    assert {99.0, -99.0} <= {y for _, y in kept}
    assert [x for x, _ in kept] == sorted(x for x, _ in kept)


def test_the_running_mean_leaves_gaps_alone() -> None:
    assert running_mean([(0, 1.0), (1, None), (2, 3.0), (3, 5.0)], 3) == (
        (0, 1.0),
        (1, None),
        (2, 4.0),
        (3, 4.0),
    )


def test_points_are_where_the_axes_say() -> None:
    svg = parse(figure(Chart("t", (Series("loss", ((0.0, 0.0), (5.0, 0.5), (10.0, 1.0))),))))
    circles = [
        (float(c.attrib["cx"]), float(c.attrib["cy"]))
        for c in svg.iter("circle")
        if c.attrib["class"].startswith("dot")
    ]
    assert circles == [(46.0, 196.0), (228.0, 103.0), (410.0, 10.0)]
    assert [t.text for t in svg.iter("title")] == ["loss", "step 0: 0", "step 5: 0.5", "step 10: 1"]
    assert {"0", "0.25", "1.00", "10"} <= {t.text for t in svg.iter("text")}


def test_a_missing_value_breaks_the_line() -> None:
    svg = parse(
        figure(Chart("t", (Series("a", tuple((float(i), None if i == 2 else 1.0 * i) for i in range(6))),)))
    )
    (path,) = (p.attrib["d"] for p in svg.iter("path"))
    assert len(re.findall("M", path)) == 2
    assert len(re.findall("L", path)) == 3


@pytest.mark.parametrize(
    "values", [[0.0], [5.0, 5.0], [0.0, 0.0, 0.0], [-1e-30, 1e-30], [1e30, 2e30], [1.0, 1.0 + 1e-12]]
)
def test_flat_tiny_and_huge_values_are_drawn_inside_the_plot(values: list[float]) -> None:
    text = figure(Chart("t", (Series("a", tuple((float(i), v) for i, v in enumerate(values, 1))),)))
    for circle in parse(text).iter("circle"):
        if circle.attrib["class"].startswith("dot"):
            assert 9.9 <= float(circle.attrib["cy"]) <= 196.1
    assert "nan" not in text
    assert "inf" not in text


def test_nothing_finite_is_no_chart() -> None:
    assert figure(Chart("t", (Series("a", ((1.0, None),)),))) == ""


def test_long_noisy_series_get_a_mean_line() -> None:
    noisy = Series("a", tuple((float(i), float(i % 2)) for i in range(100)))
    assert [p.attrib["class"] for p in parse(figure(Chart("t", (noisy,), smooth=True))).iter("path")] == [
        "line c0 raw",
        "line c0 mean",
    ]
    assert len(list(parse(figure(Chart("t", (noisy,)))).iter("path"))) == 1


def test_names_are_escaped_and_the_hover_data_is_json() -> None:
    text = figure(
        Chart('<script>"&', (Series("</svg>'", ((1.0, 2.0), (2.0, None))), Series("b", ((2.0, 4.0),))))
    )
    root = parse(text)
    assert [h.text for h in root.iter("h3")] == ['<script>"&']
    assert next(t.text for t in root.iter("title")) == "</svg>'"
    attribute = re.search(r'data-chart="([^"]*)"', text)
    assert attribute is not None
    data = json.loads(unescape(attribute.group(1)))
    assert (data["x"], data["y"]) == ([1.0, 2.0], [[2.0, None], [None, 4.0]])
