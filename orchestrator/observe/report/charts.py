"""Line charts as inline SVG: no library, no network, readable without JavaScript, which adds a hover
readout."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float | None]
"""(x, y). y is None if the value is not finite: the line has a gap there."""

WIDTH, HEIGHT = 420, 220
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 24
CHARACTER = 6.7
"""Width of a digit in a tick's label, in the widest font of the style."""
MAX_LABEL = 9
"""Most characters of a tick's label. If labels need more, the axis shows a value to add to all of them."""
MAX_POINTS = 600
"""Most points that are drawn of a series; longer ones are thinned."""
DOTS_BELOW = 30
"""Series of at most this many points get a dot for each."""
SMOOTH_ABOVE = 40
"""Series of more points get a running mean, if the chart is smooth."""
COLOURS = 6


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a chart."""

    name: str
    points: tuple[Point, ...]


@dataclass(frozen=True, slots=True)
class Chart:
    """One line chart."""

    title: str
    series: tuple[Series, ...]
    smooth: bool = False
    """Long series get a running mean over a pale line."""
    from_zero: bool = False
    """The y axis starts at 0."""


@dataclass(frozen=True, slots=True)
class Frame:
    """Maps data to SVG units. Example: with x from 0 to 10, x(0) is the left border of the plot."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float
    left: float = LEFT

    def x(self, value: float) -> float:
        return self.left + (value - self.x_low) / (self.x_high - self.x_low) * (WIDTH - self.left - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y_low) / (self.y_high - self.y_low) * (HEIGHT - TOP - BOTTOM)


def figure(chart: Chart) -> str:
    """A <figure> with title, legend (last values) and the SVG; "" if no series has a finite value."""
    values = [y for s in chart.series for _, y in s.points if y is not None]
    if not values:
        return ""
    shown = [Series(s.name, thinned(s.points)) for s in chart.series]
    frame, y_ticks = _frame(chart, values)
    window = _window(chart)
    layers = [_axes(frame, y_ticks)]
    for place, (series, full) in enumerate(zip(shown, chart.series, strict=True)):
        layers.append(_line(frame, series, place, "raw" if window else ""))
        if window:
            means = thinned(running_mean(full.points, window))
            layers.append(_line(frame, Series(series.name, means), place, "mean"))
    marks = "".join(
        f'<circle class="mark c{i % COLOURS}" r="3.5" cx="-9" cy="-9"/>' for i in range(len(shown))
    )
    note = f'<p class="small">bold line: mean over {window} steps</p>' if window else ""
    return (
        f'<figure class="chart" data-chart="{_data(shown, frame)}">'
        f"<figcaption><h3>{escape(chart.title)}</h3>{_legend(chart.series)}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(chart.title)}">{"".join(layers)}'
        f'<line class="guide" x1="-9" x2="-9" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>{marks}</svg>{note}</figure>'
    )


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers; the first is <= low, the last >= high. Example: 0.1, 0.93 -> 0, 0.2, ...
    1."""
    raw = (high - low) / max(1, count - 1)
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(m * size for m in (1, 2, 2.5, 5, 10) if m * size >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def label(value: float, step: float, largest: float | None = None) -> str:
    """A tick in few characters. Example: 0.25, 15k, 5e-6.

    step: distance of the ticks; it and the largest tick decide the unit.
    """
    if abs(value) < step / 1000:
        return "0"
    largest = max(abs(value), step) if largest is None else largest
    if step >= 1e9 or (step < 1e-3 and largest < 1e-2):
        exponent = math.floor(math.log10(largest) + 1e-9)
        return f"{value / 10.0**exponent:.{_decimals(step / 10.0**exponent)}f}e{exponent}"
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if step >= size:
            return f"{value / size:.{_decimals(step / size)}f}{letter}"
    return f"{value:.{_decimals(step)}f}"


def labels(ticks: Sequence[float]) -> tuple[list[str], str]:
    """(the label of each tick, the value to add to all of them). Labels differ, and none is longer than
    MAX_LABEL.

    Example: 123456.0001, 123456.0002 -> ["0", "1e-4"], "123456.0001 +"
    """
    step = _gap(ticks)
    texts = _labels(ticks, step)
    if max(map(len, texts)) <= MAX_LABEL:
        return texts, ""
    digits = min(17, max(1, math.ceil(math.log10(max(abs(ticks[0]), step) / step)) + 2))
    return _labels([i * step for i in range(len(ticks))], step), f"{ticks[0]:.{digits}g} +"


def _labels(ticks: Sequence[float], step: float) -> list[str]:
    largest = max(step, *(abs(tick) for tick in ticks))
    return [label(tick, step, largest) for tick in ticks]


def thinned(points: Sequence[Point], most: int = MAX_POINTS) -> tuple[Point, ...]:
    """At most about `most` points: the lowest and the highest of each stretch, so that no spike is lost."""
    if len(points) <= most:
        return tuple(points)
    size = math.ceil(2 * len(points) / most)
    kept: list[Point] = []
    for start in range(0, len(points), size):
        stretch = [(i, p) for i, p in enumerate(points[start : start + size]) if p[1] is not None]
        if not stretch:
            kept.append(points[start])
            continue
        ends = {min(stretch, key=lambda ip: ip[1][1] or 0.0), max(stretch, key=lambda ip: ip[1][1] or 0.0)}
        kept += [p for _, p in sorted(ends)]
    return tuple(kept)


def running_mean(points: Sequence[Point], window: int) -> tuple[Point, ...]:
    """Mean of the `window` points around each point. Gaps stay gaps, and do not count in the mean."""
    half, means = window // 2, []
    for place, (x, y) in enumerate(points):
        values = [v for _, v in points[max(0, place - half) : place + half + 1] if v is not None]
        means.append((x, None if y is None else sum(values) / len(values)))
    return tuple(means)


def _window(chart: Chart) -> int:
    """An odd number of steps to average over; 0 for no running mean."""
    longest = max(len(s.points) for s in chart.series)
    return max(5, longest // 25 | 1) if chart.smooth and longest > SMOOTH_ABOVE else 0


def _frame(chart: Chart, values: Sequence[float]) -> tuple[Frame, list[float]]:
    low, high = min(values), max(values)
    if chart.from_zero:
        low = min(low, 0.0)
    if high - low <= 1e-9 * max(abs(high), abs(low)):
        pad = abs(high) * 0.5 or 1.0
        low, high = low - pad, high + pad
    ticks = nice_ticks(low, high)
    steps = [x for s in chart.series for x, _ in s.points]
    first, last = min(steps), max(steps)
    left = max(LEFT, 8 + CHARACTER * max(map(len, labels(ticks)[0])))
    return Frame(first, last if last > first else first + 1, ticks[0], ticks[-1], left), ticks


def _axes(frame: Frame, y_ticks: Sequence[float]) -> str:
    x_step = max(1.0, _gap(nice_ticks(frame.x_low, frame.x_high, 6)))
    x_ticks = [
        i * x_step for i in range(math.ceil(frame.x_low / x_step), math.floor(frame.x_high / x_step) + 1)
    ]
    left, texts, base_value = f"{frame.left:.1f}", *labels(y_ticks)
    parts = []
    for tick, text in zip(y_ticks, texts, strict=True):
        y = f"{frame.y(tick):.1f}"
        parts.append(f'<line class="grid" x1="{left}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(
            f'<text class="tick" x="{frame.left - 6:.1f}" y="{y}" dy="3.5" text-anchor="end">{text}</text>'
        )
    if base_value:
        parts.append(f'<text class="base" x="{frame.left + 4:.1f}" y="{TOP + 9}">{base_value}</text>')
    base = HEIGHT - BOTTOM
    for tick in x_ticks:
        x, text = frame.x(tick), label(tick, x_step)
        inside = min(x, WIDTH - 1 - CHARACTER * len(text) / 2)
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{base}" y2="{base + 4}"/>')
        parts.append(
            f'<text class="tick" x="{inside:.1f}" y="{base + 16}" text-anchor="middle">{text}</text>'
        )
    parts.append(f'<line class="axis" x1="{left}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
    return "".join(parts)


def _line(frame: Frame, series: Series, place: int, style: str) -> str:
    commands, pen_down = [], False
    for x, y in series.points:
        if y is None:
            pen_down = False
            continue
        # h0: the round line cap draws a single point as a dot
        commands.append(
            f"{'L' if pen_down else 'M'}{frame.x(x):.1f} {frame.y(y):.1f}{'' if pen_down else 'h0'}"
        )
        pen_down = True
    colour = f"c{place % COLOURS}"
    path = (
        f'<path class="line {colour} {style}" '
        f'd="{"".join(commands)}"><title>{escape(series.name)}</title></path>'
    )
    if len(series.points) > DOTS_BELOW:
        return path
    return path + "".join(
        f'<circle class="dot {colour}" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="2.4"><title>step '
        f"{x:g}: {y:.4g}</title></circle>"
        for x, y in series.points
        if y is not None
    )


def _legend(series: Sequence[Series]) -> str:
    keys = []
    for place, line in enumerate(series):
        last = next((y for _, y in reversed(line.points) if y is not None), None)
        value = "–" if last is None else f"{last:,.0f}" if abs(last) >= 1e4 else f"{last:.4g}"
        keys.append(
            f'<span class="key"><i class="swatch c{place % COLOURS}"></i>{escape(line.name)} '
            f"<b>{value}</b></span>"
        )
    return f'<div class="legend">{"".join(keys)}<span class="at"></span></div>'


def _data(series: Sequence[Series], frame: Frame) -> str:
    """Data of the hover readout, as an attribute: the steps and the values of each series, null for gaps."""
    steps = sorted({x for s in series for x, _ in s.points})
    columns = [dict(s.points) for s in series]
    rounded = [[None if (y := c.get(x)) is None else float(f"{y:.5g}") for x in steps] for c in columns]
    plot = [frame.left, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM]
    box = [frame.x_low, frame.x_high, frame.y_low, frame.y_high]
    return escape(
        json.dumps(
            {"x": steps, "y": rounded, "box": box, "plot": plot, "width": WIDTH}, separators=(",", ":")
        )
    )


def _gap(ticks: Sequence[float]) -> float:
    return ticks[1] - ticks[0] if len(ticks) > 1 else 1.0


def _decimals(step: float) -> int:
    """Digits after the point that make ticks differ. Example: 0.2 -> 1, 0.25 -> 2, 5 -> 0."""
    return next(d for d in range(20) if abs(round(step, d) - step) < step * 1e-6)


SCRIPT = """
for (const figure of document.querySelectorAll("figure[data-chart]")) {
  const data = JSON.parse(figure.dataset.chart), svg = figure.querySelector("svg");
  const guide = svg.querySelector(".guide"), marks = [...svg.querySelectorAll(".mark")];
  const values = [...figure.querySelectorAll(".key b")], at = figure.querySelector(".at");
  const [left, right, top, base] = data.plot, [x0, x1, y0, y1] = data.box;
  const last = values.map(v => v.textContent);
  const px = x => left + (x - x0) / (x1 - x0) * (right - left);
  const py = y => base - (y - y0) / (y1 - y0) * (base - top);
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect();
    const pointer = (event.clientX - box.left) / box.width * data.width;
    const distance = i => Math.abs(px(data.x[i]) - pointer);
    let near = 0;
    data.x.forEach((x, i) => { if (distance(i) < distance(near)) near = i; });
    guide.setAttribute("x1", px(data.x[near])); guide.setAttribute("x2", px(data.x[near]));
    at.textContent = "step " + data.x[near];
    data.y.forEach((ys, i) => {
      const y = ys[near], seen = y !== null;
      values[i].textContent = seen ? Number(y.toPrecision(4)) : "\\u2013";
      marks[i].setAttribute("cx", seen ? px(data.x[near]) : -9);
      marks[i].setAttribute("cy", seen ? py(y) : -9);
    });
    figure.classList.add("hover");
  });
  svg.addEventListener("pointerleave", () => {
    values.forEach((v, i) => { v.textContent = last[i]; });
    at.textContent = ""; figure.classList.remove("hover");
  });
}
"""

STYLE = """
.chart { margin: 0; padding: 16px 16px 10px; background: var(--card);
  border: 1px solid var(--edge); border-radius: 12px; }
.chart figcaption { margin-bottom: 8px; }
.chart h3 { margin: 0; font-size: 15px; font-weight: 600; }
.chart svg { display: block; width: 100%; height: auto; touch-action: pan-y; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; min-height: 20px;
  font-size: 13px; color: var(--soft); }
.legend b { color: var(--ink); font-weight: 600; font-variant-numeric: tabular-nums; }
.legend .at { margin-left: auto; font-variant-numeric: tabular-nums; }
.swatch { display: inline-block; width: 10px; height: 3px; border-radius: 2px; margin-right: 6px;
  vertical-align: middle; background: var(--c); }
.grid { stroke: var(--grid); } .axis { stroke: var(--axis); }
.tick, .base { font-size: 10.5px; fill: var(--soft); font-variant-numeric: tabular-nums; }
.line { fill: none; stroke: var(--c); stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; }
.line.raw { stroke-width: 1; opacity: .32; }
.dot, .mark { fill: var(--c); } .mark { stroke: var(--card); stroke-width: 1.5; }
.guide { stroke: var(--axis); stroke-dasharray: 3 3; }
.guide, .mark { opacity: 0; pointer-events: none; } .hover .guide, .hover .mark { opacity: 1; }
.c0 { --c: var(--c-0); } .c1 { --c: var(--c-1); } .c2 { --c: var(--c-2); }
.c3 { --c: var(--c-3); } .c4 { --c: var(--c-4); } .c5 { --c: var(--c-5); }
"""
