"""Small SVG charts for the report: lines over steps, a labelled scatter, a before-after strip.

Every chart is one `<svg>` element as markup, in which each text is escaped. Colours come from CSS classes, so that one
drawing serves light and dark pages; series are labelled where they end instead of in a legend. Widths are CSS pixels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from markupsafe import Markup

FONT = 12  # px; must match `svg text` in the style sheet, since label widths are estimated from it
GLYPH = 0.62 * FONT  # mean width of a character


@dataclass(frozen=True)
class Series:
    """A curve. `css` names its colour class; `band` holds (x, low, high)."""

    label: str
    points: Sequence[tuple[float, float]]
    css: str
    band: Sequence[tuple[float, float, float]] = ()


@dataclass(frozen=True)
class Rule:
    """A horizontal reference line."""

    label: str
    value: float
    css: str = "muted"


@dataclass(frozen=True)
class Point:
    """A labelled point of the scatter with optional intervals; `shape` is circle, diamond or square."""

    label: str
    x: float
    y: float
    css: str
    shape: str = "circle"
    x_interval: tuple[float, float] | None = None
    y_interval: tuple[float, float] | None = None


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten apart) inside [low, high], about `count` of them."""
    if high <= low:
        return [low]
    rough = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten inside [low, high]; with 2 and 5 between them where there are fewer than three."""
    exponents = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    for factors in ((1,), (1, 2, 5)):
        ticks = [f * 10.0**e for e in exponents for f in factors if low * 0.999 <= f * 10.0**e <= high * 1.001]
        if len(ticks) >= 3:
            break
    if len(ticks) < 2:
        return nice_ticks(low, high, 4)  # less than half a decade, where a linear scale reads the same
    stride = math.ceil(len(ticks) / 7)
    return ticks[::stride]


def tick_text(value: float) -> str:
    """'1,600', '0.05', '2.5': as short as the value allows."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) < 1e-3:
        return f"{value:.0e}".replace("e-0", "e−").replace("e-", "e−")
    return f"{value:.6g}".replace("-", "−")


def percent_text(value: float) -> str:
    return f"{100 * value:.0f}%"


def text_width(text: str) -> float:
    return GLYPH * len(text)


def bin_points(
    points: Sequence[tuple[float, float]], bins: int = 120
) -> tuple[list[tuple[float, float]], list[tuple[float, float, float]]]:
    """At most `bins` means of neighbouring points, and per bin (x, lowest, highest); unchanged if already few."""
    if len(points) <= bins:
        return list(points), []
    means, band = [], []
    for i in range(bins):
        chunk = points[i * len(points) // bins : (i + 1) * len(points) // bins]
        x = sum(p[0] for p in chunk) / len(chunk)
        values = [p[1] for p in chunk]
        means.append((x, sum(values) / len(values)))
        band.append((x, min(values), max(values)))
    return means, band


def spread(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move 1-D label positions apart to at least `gap`, each as little as a single sweep allows, within [low, high]."""
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    placed = [positions[i] for i in order]
    for i in range(1, len(placed)):
        placed[i] = max(placed[i], placed[i - 1] + gap)
    if placed:
        placed[-1] = min(placed[-1], high)
    for i in range(len(placed) - 2, -1, -1):
        placed[i] = min(placed[i], placed[i + 1] - gap)
    if placed and placed[0] < low:
        placed[0] = low
        for i in range(1, len(placed)):
            placed[i] = max(placed[i], placed[i - 1] + gap)
    result = [0.0] * len(positions)
    for rank, i in enumerate(order):
        result[i] = placed[rank]
    return result


def _open(width: float, height: float, description: str, css: str) -> str:
    return (
        f'<svg class="{css}" viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(description)}">'
        f"<title>{escape(description)}</title>"
    )


def _text(x: float, y: float, text: str, css: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{css}" text-anchor="{anchor}">{escape(text)}</text>'


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def line_chart(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    description: str,
    y_range: tuple[float, float] | None = None,
    log: bool = False,
    in_percent: bool = False,
    rules: Sequence[Rule] = (),
    dots: bool = False,
    x_ticks: Sequence[tuple[float, str]] | None = None,
    width: float = 340,
    height: float = 250,
) -> Markup:
    """Curves over steps.

    Args:
        y_range: the y axis; from the data (and from 0, unless `log`) where not given.
        log: logarithmic y axis; values at or below 0 are left out.
        in_percent: y ticks of fractions as percentages.
        dots: mark the measured points.
        x_ticks: (x, text) of the x axis where x is no number of steps; as many are drawn as fit, the last one always.
    """
    if log:
        series = [
            Series(
                s.label,
                [p for p in s.points if p[1] > 0],
                s.css,
                [b for b in s.band if b[1] > 0],
            )
            for s in series
        ]
    series = [s for s in series if s.points]
    xs = [p[0] for s in series for p in s.points]
    ys = [p[1] for s in series for p in s.points] + [v for s in series for b in s.band for v in b[1:]]
    ys += [rule.value for rule in rules]
    x_low, x_high = min(xs), max(xs)
    if 0 < x_low <= 0.05 * x_high:
        x_low = 0.0  # steps count from 1, but an axis that begins at 0 reads better
    if x_high == x_low:
        x_low, x_high = x_low - 0.5, x_high + 0.5
    if y_range is not None:
        y_low, y_high = y_range
    elif log:
        y_low, y_high = min(ys) / 1.2, max(ys) * 1.2
    else:
        y_low, y_high = min(0.0, *ys), max(*ys, 0.0) * 1.05
        if y_high <= y_low:
            y_high = y_low + 1.0

    as_text = percent_text if in_percent else tick_text
    y_ticks = log_ticks(y_low, y_high) if log else nice_ticks(y_low, y_high, 4)
    left = max(text_width(as_text(t)) for t in y_ticks) + 10
    labels = [s.label for s in series] + [r.label for r in rules]
    right = max((text_width(label) for label in labels if label), default=0.0) + 12
    top, bottom = 30.0, 40.0

    def at_x(x: float) -> float:
        return left + (x - x_low) / (x_high - x_low) * (width - left - right)

    def at_y(y: float) -> float:
        share = math.log(y / y_low) / math.log(y_high / y_low) if log else (y - y_low) / (y_high - y_low)
        return height - bottom - share * (height - top - bottom)

    out = [_open(width, height, description, "chart")]
    out.append(_text(0, FONT, y_label, "axis"))
    for tick in y_ticks:
        y = at_y(tick)
        out.append(f'<line class="grid" x1="{left:.1f}" x2="{width - right:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        out.append(_text(left - 6, y + 4, as_text(tick), "tick", "end"))
    base = height - bottom
    out.append(f'<line class="base" x1="{left:.1f}" x2="{width - right:.1f}" y1="{base:.1f}" y2="{base:.1f}"/>')
    for tick, text in _x_ticks(x_low, x_high, x_ticks, width - left - right):
        out.append(f'<line class="base" x1="{at_x(tick):.1f}" x2="{at_x(tick):.1f}" y1="{base}" y2="{base + 4}"/>')
        out.append(_text(at_x(tick), base + 17, text, "tick", "middle"))
    out.append(_text((left + width - right) / 2, height - 4, x_label, "axis", "middle"))

    for rule in rules:
        y = at_y(rule.value)
        out.append(
            f'<line class="rule {rule.css}" x1="{left:.1f}" x2="{width - right:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
    for s in series:
        if s.band:
            outline = [(at_x(x), at_y(high)) for x, _, high in s.band]
            outline += [(at_x(x), at_y(low)) for x, low, _ in reversed(s.band)]
            out.append(f'<path class="band {s.css}" d="{_path(outline)}Z"/>')
    for s in series:
        path = [(at_x(x), at_y(y)) for x, y in s.points]
        out.append(f'<path class="curve {s.css}" d="{_path(path)}"/>')
        if dots or len(path) == 1:
            for (x, y), (step, value) in zip(path, s.points, strict=True):
                name = dict(x_ticks)[step] if x_ticks else f"{x_label} {tick_text(step)}"
                tip = f"{s.label or y_label}, {name}: {as_text(value)}"
                title = f"<title>{escape(tip)}</title>"
                out.append(f'<circle class="dot {s.css}" cx="{x:.1f}" cy="{y:.1f}" r="3">{title}</circle>')
    ends = [(s.label, at_y(s.points[-1][1]), s.css) for s in series] + [(r.label, at_y(r.value), r.css) for r in rules]
    ends = [end for end in ends if end[0]]
    for (label, _, css), y in zip(ends, spread([e[1] for e in ends], FONT + 2, top, base), strict=True):
        out.append(_text(width - right + 8, y + 4, label, f"label {css}"))
    out.append("</svg>")
    return Markup("".join(out))


def _x_ticks(
    low: float, high: float, named: Sequence[tuple[float, str]] | None, room: float
) -> list[tuple[float, str]]:
    if named is None:
        return [(tick, tick_text(tick)) for tick in nice_ticks(low, high, 4)]
    widest = max(text_width(text) for _, text in named) + 6
    stride = max(1, math.ceil(len(named) * widest / room))
    return list(named[(len(named) - 1) % stride :: stride])


@dataclass(frozen=True)
class _Box:
    x0: float
    y0: float
    x1: float
    y1: float

    def overlap(self, other: "_Box") -> float:
        wide = min(self.x1, other.x1) - max(self.x0, other.x0)
        high = min(self.y1, other.y1) - max(self.y0, other.y0)
        return max(0.0, wide) * max(0.0, high)


def _along(start: tuple[float, float], end: tuple[float, float]) -> list[_Box]:
    """Small boxes along a line, for labels to keep off it."""
    count = max(1, round(math.dist(start, end) / 8))
    shares = [i / count for i in range(count + 1)]
    centres = [(start[0] + s * (end[0] - start[0]), start[1] + s * (end[1] - start[1])) for s in shares]
    return [_Box(x - 4, y - 4, x + 4, y + 4) for x, y in centres]


def _place_labels(
    anchors: Sequence[tuple[float, float]], labels: Sequence[str], taken: Sequence[_Box], area: _Box
) -> list[tuple[float, float]]:
    """Left end and baseline of each label: near its point, off the other points, labels and the border (greedy)."""
    boxes = [_Box(x - 7, y - 7, x + 7, y + 7) for x, y in anchors] + list(taken)
    placed = []
    for (x, y), label in zip(anchors, labels, strict=True):
        wide = text_width(label)
        best, best_cost = _Box(0, 0, 0, 0), math.inf
        for distance in (11.0, 20.0, 32.0, 46.0, 62.0):
            for i in range(16):
                angle = 2 * math.pi * i / 16
                dx, dy = distance * math.cos(angle), distance * math.sin(angle)
                # The label hangs off the circle by the side that faces the point.
                x0 = x + dx - wide * (1 - math.cos(angle)) / 2
                y0 = y + dy - FONT / 2
                box = _Box(x0, y0, x0 + wide, y0 + FONT)
                inside = box.overlap(area) / max(1e-9, wide * FONT)
                cost = sum(box.overlap(other) for other in boxes) + 1000 * (1 - inside) + 2 * distance
                cost += 3 * abs(math.sin(angle))  # beside a point reads better than above or below it
                if cost < best_cost:
                    best, best_cost = box, cost
        boxes.append(best)
        placed.append((best.x0, best.y1 - 2))
    return placed


def scatter_chart(
    points: Sequence[Point],
    *,
    x_label: str,
    y_label: str,
    description: str,
    chance: float,
    goal: tuple[float, float, float],
    arrow: tuple[int, int] | None = None,
    width: float = 640,
    height: float = 420,
    css: str = "chart",
) -> Markup:
    """Two accuracies against each other, axes in percent.

    Args:
        chance: x of the vertical chance line.
        goal: (x low, x high, y low) of the shaded corner where a point should lie.
        arrow: indices of two points to join, from before to after.
    """
    lowest = min([p.y for p in points] + [p.y_interval[0] for p in points if p.y_interval] + [goal[2]])
    y_low = max(0.0, math.floor((lowest - 0.05) * 10) / 10)
    left, right, top, bottom = 44.0, 14.0, 48.0, 42.0
    base = height - bottom

    def at_x(x: float) -> float:
        return left + x * (width - left - right)

    def at_y(y: float) -> float:
        return base - (y - y_low) / (1 - y_low) * (base - top)

    out = [_open(width, height, description, css), _text(0, FONT, y_label, "axis")]
    for tick in nice_ticks(y_low, 1, 5):
        y = at_y(tick)
        out.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        out.append(_text(left - 6, y + 4, percent_text(tick), "tick", "end"))
    out.append(f'<line class="base" x1="{left}" x2="{width - right}" y1="{base}" y2="{base}"/>')
    for tick in nice_ticks(0, 1, 4):
        out.append(_text(at_x(tick), base + 18, percent_text(tick), "tick", "middle"))
    out.append(_text((left + width - right) / 2, height - 4, x_label, "axis", "middle"))

    x0, x1 = at_x(max(0.0, goal[0])), at_x(min(1.0, goal[1]))
    y0, y1 = at_y(1.0), at_y(goal[2])
    out.append(f'<rect class="goal" x="{x0:.1f}" y="{y0 - 8:.1f}" width="{x1 - x0:.1f}" height="{y1 - y0 + 8:.1f}"/>')
    out.append(f'<line class="rule muted" x1="{at_x(chance):.1f}" x2="{at_x(chance):.1f}" y1="{top - 8}" y2="{base}"/>')
    chance_label = f"chance {percent_text(chance)}"
    out.append(_text(at_x(chance) + 6, base - 8, chance_label, "label muted"))
    out.append(_text((x0 + x1) / 2, y0 - 14, "goal", "label muted", "middle"))
    taken = [
        _Box(at_x(chance), base - 20, at_x(chance) + text_width(chance_label) + 6, base - 4),
    ]
    anchors = [(at_x(p.x), at_y(p.y)) for p in points]
    if arrow:
        out.append(_arrow(anchors[arrow[0]], anchors[arrow[1]]))
        taken += _along(anchors[arrow[0]], anchors[arrow[1]])
    for point in points:
        x, y = at_x(point.x), at_y(point.y)
        if point.x_interval:
            low, high = (at_x(v) for v in point.x_interval)
            taken += _along((low, y), (high, y))
            out.append(f'<line class="interval {point.css}" x1="{low:.1f}" x2="{high:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        if point.y_interval:
            low, high = (at_y(v) for v in point.y_interval)
            taken += _along((x, low), (x, high))
            out.append(f'<line class="interval {point.css}" x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>')
    for point in points:
        tip = f"{point.label}: {x_label} {100 * point.x:.1f}%, {y_label} {100 * point.y:.1f}%"
        out.append(_marker(at_x(point.x), at_y(point.y), point.shape, point.css, tip))
    taken += _along((at_x(chance), top), (at_x(chance), base))
    area = _Box(left + 2, top - 8, width, base)
    placed = _place_labels(anchors, [p.label for p in points], taken, area)
    for point, (x, y), (px, py) in zip(points, placed, anchors, strict=True):
        nearest = (min(max(px, x), x + text_width(point.label)), min(max(py, y - FONT), y))
        if math.dist(nearest, (px, py)) > 16:
            out.append(f'<path class="leader" d="{_path([(px, py), nearest])}"/>')
        out.append(_text(x, y, point.label, f"label {point.css}"))
    out.append("</svg>")
    return Markup("".join(out))


def _arrow(start: tuple[float, float], end: tuple[float, float]) -> str:
    length = math.dist(start, end)
    if length < 40:
        return ""
    ux, uy = (end[0] - start[0]) / length, (end[1] - start[1]) / length
    tail = (start[0] + 10 * ux, start[1] + 10 * uy)
    tip = (end[0] - 11 * ux, end[1] - 11 * uy)
    wings = [(tip[0] - 8 * ux + s * 4 * uy, tip[1] - 8 * uy - s * 4 * ux) for s in (1, -1)]
    return f'<path class="arrow" d="{_path([tail, tip])}{_path([wings[0], tip, wings[1]])}"/>'


def _marker(x: float, y: float, shape: str, css: str, tip: str) -> str:
    title = f"<title>{escape(tip)}</title>"
    if shape == "diamond":
        corners = [(x, y - 7), (x + 7, y), (x, y + 7), (x - 7, y)]
        return f'<path class="dot {css}" d="{_path(corners)}Z">{title}</path>'
    if shape == "square":
        return f'<rect class="dot {css}" x="{x - 4.5:.1f}" y="{y - 4.5:.1f}" width="9" height="9">{title}</rect>'
    return f'<circle class="dot {css}" cx="{x:.1f}" cy="{y:.1f}" r="6">{title}</circle>'


def strip(
    before: float,
    after: float,
    *,
    chance: float | None,
    css: str,
    description: str,
    interval: tuple[float, float] | None = None,
) -> Markup:
    """A 0-100 % line with a hollow dot before, a filled one after, the interval after, and a tick at chance.

    Positions are percentages of the element's own width, so it fits any column.
    """

    def at(x: float) -> str:
        return f"{100 * x:.1f}%"

    out = [
        f'<svg class="strip" width="100%" height="18" role="img" aria-label="{escape(description)}">'
        f"<title>{escape(description)}</title>",
        '<line class="grid" x1="0" x2="100%" y1="9" y2="9"/>',
    ]
    if chance is not None:
        out.append(f'<line class="rule muted" x1="{at(chance)}" x2="{at(chance)}" y1="0" y2="18"/>')
    if interval:
        out.append(f'<line class="range {css}" x1="{at(interval[0])}" x2="{at(interval[1])}" y1="9" y2="9"/>')
    out.append(f'<line class="move {css}" x1="{at(before)}" x2="{at(after)}" y1="9" y2="9"/>')
    out.append(f'<circle class="hollow {css}" cx="{at(before)}" cy="9" r="4.5"/>')
    out.append(f'<circle class="dot {css}" cx="{at(after)}" cy="9" r="5"/>')
    out.append("</svg>")
    return Markup("".join(out))
