"""Charts as inline SVG: matplotlib draws them, the page around them gives its text colour, its font and its width."""

import io
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Okabe and Ito's colours for the colour-blind (Color Universal Design, 2008): those with a contrast of three to one
#: and more both to white and to the dark grey of browsers.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")

#: Beside colours, so that prints and eyes without them tell series apart. Four colours and seven shapes are 28 pairs.
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

#: Stands for the page's text colour in what matplotlib draws, which has no word for it.
_INK = "#010203"

#: Width, least height and height of text: readable where a telephone shrinks it, and not huge up to the widest.
_WIDTH, _HEIGHT, _TEXT, _WIDEST = 432, 290, 11.5, "37.5rem"

#: Ticks of each decade of a log axis, by the ratio of its ends: below the first they are the plain ones.
_WIDE = 5.0
_TICKS = ((20.0, (1, 2, 3, 5, 7)), (1e3, (1, 2, 5)), (math.inf, (1,)))

#: How opaque a point is that does not count.
_FAINT = 0.45

_SVG, _HREF = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}href"


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A measured place; `expected` is where it was predicted, `title` what is said where a pointer rests on either.

    One that is `faint` is there and does not count.
    """

    x: float
    y: float
    title: str
    expected: tuple[float, float] | None = None
    faint: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Points of one kind, joined in their order."""

    name: str
    points: Sequence[Point]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """A value of x that should not be passed."""

    x: float
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """What to draw. `name` is its own within a page; `alt` says in words what the picture shows.

    `frontier` are places beyond which (less x, more y) there is nothing, rising. Where x is logarithmic (`log_x`) what
    is not above 0 is left out.
    """

    name: str
    alt: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    frontier: Sequence[tuple[float, float]] = ()
    limits: Sequence[Limit] = ()
    log_x: bool = False
    faint_label: str = "does not count"


def svg(chart: Chart) -> Markup:
    """The chart as an `svg` element. The same chart gives the same text."""
    # Half a second that no command without a page should wait for.
    import matplotlib as mpl  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    # A user's own matplotlibrc has no say in a report.
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(
            {
                "svg.fonttype": "none",
                "svg.hashsalt": chart.name,
                "text.parse_math": False,
                "font.size": _TEXT,
                **dict.fromkeys(
                    ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK
                ),
            }
        )
        titles = dict(_titles(chart))
        labels = [_plain(s.name) for s in chart.series]
        columns = max(1, min(3, 60 // (max(map(len, labels), default=0) + 8)))
        rows = -(-(len(labels) + 3) // columns)
        figure = Figure(figsize=(_WIDTH / 72, (_HEIGHT + 16 * rows) / 72), layout="constrained")
        axes = figure.subplots()
        _draw(chart, axes)
        handles = axes.get_legend_handles_labels()
        if handles[0]:
            figure.legend(*handles, loc="outside lower center", ncols=columns, frameon=False, handlelength=1.5)
        drawn = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(drawn, format="svg", transparent=True, metadata=nothing)
    return _for_a_page(drawn.getvalue(), chart, titles)


# ---------------------------------------------------------------- drawing


def _draw(chart: Chart, axes: "Axes") -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.set_xlabel(_plain(chart.x_label))
    axes.set_ylabel(_plain(chart.y_label))
    axes.grid(color=_INK, alpha=0.12, linewidth=0.6)
    axes.set_axisbelow(True)
    frontier = sorted(place for place in chart.frontier if _shown(chart, *place))
    if frontier:
        x, y = zip(*frontier, strict=True)
        axes.plot(
            x, y, drawstyle="steps-post", color=_INK, alpha=0.3, linewidth=3.5, gid=f"{chart.name}-frontier",
            label="frontier",
        )  # fmt: skip
    some: dict[str, bool] = {"predicted": False, "faint": False}
    for i, series in enumerate(chart.series):
        _draw_series(chart, i, series, axes, some)
    if some["predicted"]:
        axes.plot([], [], "o", color=_INK, markerfacecolor="none", markersize=5, label="predicted")
    if some["faint"]:
        axes.plot([], [], "o", color=_INK, alpha=_FAINT, markersize=5, label=_plain(chart.faint_label))
    for i, limit in enumerate(chart.limits):
        if _shown(chart, limit.x, 0.0):
            gid = f"{chart.name}-limit-{i}"
            axes.axvline(limit.x, color=_INK, linestyle=(0, (5, 3)), linewidth=1.2, gid=gid, label=_plain(limit.name))
    _set_axes(chart, axes)


def _draw_series(chart: Chart, i: int, series: Series, axes: "Axes", some: dict[str, bool]) -> None:
    colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
    shown = [(j, p) for j, p in enumerate(series.points) if _shown(chart, p.x, p.y)]
    axes.plot([p.x for _, p in shown], [p.y for _, p in shown], color=colour, alpha=0.7, linewidth=1)
    for j, point in shown:
        gid = f"{chart.name}-{i}-{j}"
        if point.expected is not None and _shown(chart, *point.expected):
            some["predicted"] = True
            x, y = point.expected
            axes.plot([point.x, x], [point.y, y], color=colour, linewidth=0.7, linestyle=(0, (2, 2)))
            axes.plot([x], [y], marker, color=colour, markerfacecolor="none", markersize=5, gid=f"{gid}-expected")
        some["faint"] |= point.faint
        axes.plot(
            [point.x], [point.y], marker, color=colour, alpha=_FAINT if point.faint else 1, markersize=6.5, gid=gid
        )
    axes.plot([], [], marker, linestyle="-", linewidth=1, color=colour, markersize=6.5, label=_plain(series.name))


def _set_axes(chart: Chart, axes: "Axes") -> None:
    """Ends with room around all that is shown, and ticks that say something however near the ends are."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator  # noqa: PLC0415

    places = [place for s in chart.series for p in s.points for place in ((p.x, p.y), p.expected) if place is not None]
    places = [place for place in places if _shown(chart, *place)]
    x = [x for x, _ in places] + [limit.x for limit in chart.limits if _shown(chart, limit.x, 0.0)]
    axes.set_ylim(min([0.0, *(y for _, y in places)]), 1.08 * max((y for _, y in places), default=0.0) or 1.0)
    axes.yaxis.set_major_locator(MaxNLocator(6))
    words = FuncFormatter(lambda value, _: f"{value:,.10g}")
    axes.yaxis.set_major_formatter(words)
    if not places:
        axes.text(0.5, 0.5, "nothing measured", transform=axes.transAxes, ha="center", va="center")
    if not chart.log_x:
        if x:
            around = 0.06 * (max(x) - min(x)) or abs(max(x)) / 5 or 1.0
            axes.set_xlim(min(x) - around, max(x) + around)
        axes.xaxis.set_major_formatter(words)
        return
    low, high = (min(x), max(x)) if x else (1.0, 10.0)
    room = max((high / low) ** 0.06, 1.06)
    axes.set_xscale("log")
    axes.set_xlim(low / room, high * room)
    wide = high * room / (low / room)
    # A log axis has no tick at all between two of its own; a plain one would crowd them over several decades.
    if wide < _WIDE:
        axes.xaxis.set_major_locator(MaxNLocator(5))
    else:
        axes.xaxis.set_major_locator(LogLocator(subs=next(subs for most, subs in _TICKS if wide < most)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(words)


def _shown(chart: Chart, x: float, y: float) -> bool:
    return math.isfinite(x) and math.isfinite(y) and (x > 0 or not chart.log_x)


def _titles(chart: Chart) -> Iterator[tuple[str, str]]:
    """What is said of each drawn group, by its id."""
    for i, series in enumerate(chart.series):
        for j, point in enumerate(series.points):
            yield f"{chart.name}-{i}-{j}", point.title
            yield f"{chart.name}-{i}-{j}-expected", f"predicted for {point.title}"
    for i, limit in enumerate(chart.limits):
        yield f"{chart.name}-limit-{i}", limit.name
    yield f"{chart.name}-frontier", "frontier"


def _plain(text: str) -> str:
    """A line of text that XML can hold; matplotlib keeps labels that begin with _ to itself."""
    printable = "".join(c if c.isprintable() else " " for c in text)
    return f" {printable}" if printable.startswith("_") else printable


# ---------------------------------------------------------------- for a page


def _for_a_page(drawn: str, chart: Chart, titles: dict[str, str]) -> Markup:
    """What matplotlib wrote as an element of HTML: as wide as there is room, themed, with words for who cannot see it.

    ElementTree escapes all text that comes from outside.
    """
    root = ET.fromstring(drawn)  # noqa: S314 (matplotlib wrote it, nobody outside)
    for element in root.iter():
        if (title := titles.get(element.get("id", ""))) is not None:
            found = ET.Element("title")
            found.text = _plain(title)
            element.insert(0, found)
    used = set(re.findall(r"#([\w.-]+)", " ".join(value for e in root.iter() for value in e.attrib.values())))
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        if _HREF in element.attrib:
            element.set("href", element.attrib.pop(_HREF))
        # Ids that nothing refers to would be there once for each chart of a page.
        if element.get("id", "") not in used:
            element.attrib.pop("id", None)
        if style := element.get("style"):
            themed = re.sub(r"font-family:[^;]*;?\s*", "", style).replace(_INK, "currentColor")
            element.set("style", themed)
    for defs in root.findall("defs"):
        for rule in defs.findall("style"):
            defs.remove(rule)
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    # What matplotlib's rule said, for this element alone; its own would hold for the whole page.
    lines = "stroke-linejoin: round; stroke-linecap: butt"
    root.set("style", f"display: block; width: 100%; height: auto; max-width: {_WIDEST}; break-inside: avoid; {lines}")
    root.set("role", "img")
    root.set("aria-label", _plain(chart.alt))
    described = ET.Element("desc")
    described.text = _plain(chart.alt)
    root.insert(0, described)
    return Markup(ET.tostring(root, encoding="unicode"))  # noqa: S704 (ElementTree escaped it)
