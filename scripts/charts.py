"""Small charts as SVG, to stand in a page whose style gives the colours: --s0 to --s7 of series, --head, --copy and
--target of where tokens came from.

    svg = intervals([("eagle-tuned", 2.15, 2.06, 2.25)])
    svg = lines({"eagle-tuned": [0.78, 0.68]}, ["1", "2"], low=0, high=1, label="acceptance by depth")
    svg = stacks([("eagle-tuned", {"head": 21, "copy": 47, "target": 32})])

Names are escaped here. Lengths are in units of the drawing, which is WIDTH wide.
"""
import math
from html import escape

WIDTH, ROW = 340, 34
N_COLOUR = 8        # of series; more series begin again


def intervals(rows: list[tuple[str, float, float, float]], one: float = 1.0) -> str:
    """A dot with its interval for each (name, value, low, high), on a scale from 0, with a mark at `one`."""
    scale = (WIDTH - 12) / max([one, *(row[3] for row in rows)])
    parts = []
    for n, (name, value, low, high) in enumerate(rows):
        top, y = ROW * n + 14, ROW * n + 24
        spread = f" ({low:.2f}-{high:.2f})" if low < high else ""
        at, begin, end, unit = (f"{6 + x * scale:.1f}" for x in (value, low, high, one))
        parts += [text(6, top, name), text(WIDTH - 6, top, f"{value:.2f}x{spread}", "end"),
                  f'<line class="grid" x1="6" x2="{WIDTH - 6}" y1="{y}" y2="{y}"/>',
                  f'<line class="one" x1="{unit}" x2="{unit}" y1="{y - 5}" y2="{y + 5}"/>',
                  f'<line class="s" style="stroke: var(--text)" x1="{begin}" x2="{end}" y1="{y}" y2="{y}"/>',
                  f'<circle style="fill: var(--text)" cx="{at}" cy="{y}" r="4"/>']
    return svg(parts, ROW * len(rows), "speedup over plain decoding, with 95% intervals")


def lines(series: dict[str, list[float | None]], ticks: list[str], low: float, high: float, label: str) -> str:
    """A line for each series, whose values stand above the ticks of the x axis. None leaves a gap at the end."""
    left, top, bottom = 30, 8, 158
    step = (WIDTH - left - 12) / max(len(ticks), 1)
    at_x = [left + step * (n + 0.5) for n in range(len(ticks))]
    parts = []
    for value in marks(low, high):
        y = bottom - (value - low) / (high - low) * (bottom - top)
        parts += [f'<line class="grid" x1="{left}" x2="{WIDTH - 6}" y1="{y:.1f}" y2="{y:.1f}"/>',
                  text(left - 6, y + 4, f"{value:g}", "end", "tick")]
    parts += [text(x, bottom + 16, tick, "middle", "tick") for x, tick in zip(at_x, ticks)]
    for n, (name, values) in enumerate(series.items()):
        aside = 4 * (n - (len(series) - 1) / 2)     # so that equal lines are seen side by side
        points = [(x + aside, bottom - (value - low) / (high - low) * (bottom - top), value)
                  for x, value in zip(at_x, values) if value is not None]
        drawn = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{escape(name)}: {value:.2f}</title></circle>'
                        for x, y, value in points)
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in points)
        parts.append(f'<g style="stroke: {colour(n)}; fill: {colour(n)}"><polyline class="s" points="{path}"/>'
                     f"{drawn}</g>")
    return svg(parts, bottom + 24, label)


def marks(low: float, high: float) -> list[float]:
    """Four to six round values from low to high, for an axis."""
    step = next(step for size in range(-3, 9) for step in (10.0 ** size, 2 * 10.0 ** size, 5 * 10.0 ** size)
                if (high - low) / step <= 5)
    return [low + step * n for n in range(math.floor((high - low) / step + 1e-9) + 1)]


def stacks(rows: list[tuple[str, dict[str, int]]], label: str = "where tokens came from") -> str:
    """A bar for each name, in parts as long as their shares; parts have the names of colours."""
    parts = []
    for n, (name, counts) in enumerate(rows):
        total, y, x = max(sum(counts.values()), 1), ROW * n, 0.0
        shares = ", ".join(f"{part} {count / total:.0%}" for part, count in counts.items())
        parts += [text(0, y + 14, name), text(WIDTH, y + 14, shares, "end", "tick")]
        for part, count in counts.items():
            width = WIDTH * count / total
            parts.append(f'<rect style="fill: var(--{part})" x="{x:.1f}" y="{y + 20}" width="{max(width - 1, 0):.1f}" '
                         f'height="9"/>')
            x += width
    return svg(parts, ROW * len(rows) + 2, label)


def legend(names: list[str], colours: list[str] | None = None) -> str:
    """The colours of series, as HTML above a chart."""
    items = zip(names, colours or map(colour, range(len(names))))
    return '<ul class="legend">' + "".join(f'<li><i style="background: {of}"></i>{escape(name)}</li>'
                                           for name, of in items) + "</ul>"


def colour(n: int) -> str:
    return f"var(--s{n % N_COLOUR})"


def text(x: float, y: float, content: str, anchor: str = "start", kind: str = "") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(content)}</text>'


def svg(parts: list[str], height: int, label: str) -> str:
    return (f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">'
            + "".join(parts) + "</svg>")
