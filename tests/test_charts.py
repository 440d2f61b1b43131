"""Charts: each point where it belongs and with its words, the same text each time, nothing that a page must fear."""

import itertools
import math
import re
import subprocess
import sys
from dataclasses import replace
from typing import Any
from xml.etree import ElementTree as ET

import matplotlib as mpl
import pytest

from hptool import charts
from hptool.charts import Chart, Limit, Point, Series


def point(x: float, y: float, **others: Any) -> Point:
    return Point(x=x, y=y, title=f"at {x:g} and {y:g}", **others)


def chart(*series: Series, **others: Any) -> Chart:
    values: dict[str, Any] = {"log_x": True, **others}
    return Chart(name="tried", alt="What was tried.", x_label="latency", y_label="rate", series=series, **values)


def two() -> Chart:
    return chart(
        Series(name="one", points=[point(10, 100, expected=(12, 90)), point(20, 300, faint=True)]),
        Series(name="two", points=[point(15, 200)]),
        frontier=[(15, 200), (10, 100)],
        limits=[Limit(x=18, name="limit: 18 ms")],
    )


def parsed(made: Chart) -> ET.Element:
    return ET.fromstring(charts.svg(made))  # noqa: S314 (our own)


def texts(root: ET.Element) -> list[str]:
    return [element.text or "" for element in root.iter("text")]


def places(root: ET.Element) -> dict[str, tuple[float, float]]:
    """Where each titled marker stands, by its title."""
    found = {}
    for group in root.iter("g"):
        title, marker = group.find("title"), next(group.iter("use"), None)
        if title is not None and title.text and marker is not None:
            found[title.text] = float(marker.attrib["x"]), float(marker.attrib["y"])
    return found


def test_each_point_stands_where_it_belongs_with_its_words() -> None:
    at = places(parsed(two()))
    assert set(at) == {"at 10 and 100", "at 15 and 200", "at 20 and 300", "predicted for at 10 and 100"}
    low, middle, high, expected = (at[name] for name in sorted(at))
    assert low[0] < expected[0] < middle[0] < high[0]
    assert expected[1] > low[1] > middle[1] > high[1], "what is more stands higher: nearer to 0"
    # On a log axis equal ratios are equal lengths, and on a plain one equal differences.
    assert (middle[0] - low[0]) / (high[0] - low[0]) == pytest.approx(math.log(1.5) / math.log(2), abs=1e-3)
    assert (low[1] - middle[1]) == pytest.approx(middle[1] - high[1], abs=1e-3)


def test_a_plain_axis_is_plain() -> None:
    at = places(parsed(replace(two(), log_x=False)))
    low, middle, high = (at[name][0] for name in ("at 10 and 100", "at 15 and 200", "at 20 and 300"))
    assert middle - low == pytest.approx(high - middle, abs=1e-3)


def test_the_legend_names_what_is_there_and_nothing_else() -> None:
    assert {"one", "two", "predicted", "frontier", "limit: 18 ms", "does not count"} <= set(texts(parsed(two())))
    alone = texts(parsed(chart(Series(name="one", points=[point(1, 1)]))))
    assert "one" in alone
    assert not {"predicted", "frontier", "does not count"} & set(alone)


def test_the_limit_and_the_frontier_are_drawn_with_their_words() -> None:
    titles = [title.text for title in parsed(two()).iter("title")]
    assert {"limit: 18 ms", "frontier"} <= set(titles)


@pytest.mark.parametrize(
    "series",
    [
        (),
        (Series(name="none", points=[]),),
        (Series(name="one", points=[point(5, 7)]),),
        (Series(name="zero", points=[point(5, 0)]),),
        (Series(name="same", points=[point(5, 7), point(5, 7)]),),
        (Series(name="odd", points=[point(0, 7), point(-1, 7), point(math.nan, 7), point(5, math.inf)]),),
        (Series(name="odd", points=[point(5, 7, expected=(math.inf, 7))]),),
    ],
)
@pytest.mark.parametrize("log_x", [True, False])
def test_little_or_nothing_is_a_chart_too(series: tuple[Series, ...], log_x: bool) -> None:  # noqa: FBT001 (a parameter)
    root = parsed(chart(*series, log_x=log_x))
    shown = [
        p for s in series for p in s.points if math.isfinite(p.x) and math.isfinite(p.y) and (p.x > 0 or not log_x)
    ]
    assert ("nothing measured" in texts(root)) == (not shown)
    assert not re.search(r"nan|inf\b", " ".join(texts(root)))


@pytest.mark.parametrize("low", [0.013, 1.0, 99.0, 123456.0])
@pytest.mark.parametrize("ratio", [1.0001, 1.3, 4.0, 5.5, 30.0, 1e6])
def test_every_axis_has_ticks_and_not_too_many(low: float, ratio: float) -> None:
    root = parsed(chart(Series(name="s", points=[point(low, 1), point(low * ratio, 2)])))
    ticks = [text for text in texts(root) if re.fullmatch(r"[\d,.e+-]+", text)]
    # Those of y are 0 to 2 in steps of 0.4 or so.
    assert 2 + 4 <= len(ticks) <= 8 + 8


def test_the_same_chart_gives_the_same_text_whatever_the_user_has_set() -> None:
    first = charts.svg(two())
    with mpl.rc_context():
        mpl.rcParams.update({"font.size": 30, "lines.markersize": 40, "axes.facecolor": "red", "svg.fonttype": "path"})
        assert charts.svg(two()) == first
        assert mpl.rcParams["font.size"] == 30, "what a program around has set is left as it was"
    assert charts.svg(two()) == first
    assert not re.search(r"20\d\d-\d\d-\d\d|matplotlib", first), "no date and no maker"


def test_colours_are_the_page_s_but_for_those_of_series() -> None:
    drawn = charts.svg(two())
    assert set(re.findall(r"#[0-9a-f]{6}\b", drawn)) == set(charts.COLOURS[:2])
    assert "currentColor" in drawn
    assert "font-family" not in drawn


def luminance(colour: str) -> float:
    """As WCAG 2.1 defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("colour", charts.COLOURS)
@pytest.mark.parametrize("page", ["#ffffff", "#121212"])
def test_series_are_seen_on_light_and_dark(colour: str, page: str) -> None:
    """Three to one is what WCAG 2.1 (1.4.11) asks of graphics."""
    high, low = sorted((luminance(colour), luminance(page)), reverse=True)
    assert (high + 0.05) / (low + 0.05) >= 3


def test_28_series_differ_in_colour_or_shape() -> None:
    n = len(charts.COLOURS) * len(charts.MARKERS)
    pairs = {(charts.COLOURS[i % len(charts.COLOURS)], charts.MARKERS[i % len(charts.MARKERS)]) for i in range(n)}
    assert n == len(pairs) == 28
    root = parsed(chart(*(Series(name=f"layout {i}", points=[point(i + 1, i + 1)]) for i in range(n))))
    assert sum(text.startswith("layout") for text in texts(root)) == n


NASTY = "</title></desc></svg><script>alert(1)</script> $x_1$ \x00\x1b[31m \"'&amp;"


def test_nothing_that_it_is_given_becomes_markup() -> None:
    made = Chart(
        name="nasty",
        alt=NASTY,
        x_label=NASTY,
        y_label=NASTY,
        series=[
            Series(name=NASTY, points=[Point(x=1, y=1, title=NASTY, expected=(2, 2), faint=True)]),
            Series(name="_hidden", points=[point(2, 2)]),
        ],
        limits=[Limit(x=1, name=NASTY)],
        log_x=True,
        faint_label=NASTY,
    )
    drawn = charts.svg(made)
    assert "<script" not in drawn
    assert "\x1b" not in drawn
    root = ET.fromstring(drawn)  # noqa: S314 (our own)
    assert {element.tag for element in root.iter()} <= {
        "svg", "desc", "title", "defs", "g", "path", "use", "text", "clipPath", "rect",
    }  # fmt: skip
    assert "</svg><script>" in root.attrib["aria-label"]
    assert any("$x_1$" in text for text in texts(root)), "what looks like mathematics stays as it is"
    assert any(text.strip() == "_hidden" for text in texts(root))


def test_two_charts_of_a_page_do_not_share_an_id_and_refer_only_to_their_own() -> None:
    ids = []
    for name in ("first", "second"):
        root = parsed(replace(two(), name=name))
        own = {element.attrib["id"] for element in root.iter() if "id" in element.attrib}
        values = " ".join(value for element in root.iter() for value in element.attrib.values())
        assert set(re.findall(r"(?:^| |\()#([A-Za-z][\w-]*)", values)) - {c[1:] for c in charts.COLOURS} <= own
        ids.append(own)
    assert ids[0]
    assert not ids[0] & ids[1]


def test_it_scales_and_says_what_it_is() -> None:
    root = parsed(two())
    assert root.attrib["role"] == "img"
    assert root.attrib["aria-label"] == "What was tried."
    description = root.find("desc")
    assert description is not None
    assert description.text == "What was tried."
    assert root.find("title") is None, "a title of all would be shown wherever the pointer rests"
    assert not {"width", "height"} & set(root.attrib)
    assert root.attrib["viewBox"].startswith("0 0 432 ")
    assert "width: 100%" in root.attrib["style"]
    assert not list(root.iter("style")), "a rule in it would hold for the whole page"


def test_a_legend_of_long_names_stays_within_the_picture() -> None:
    names = [f"tp16-pp{i}-bf16-graphs" for i in range(3)]
    root = parsed(chart(*(Series(name=name, points=[point(1, 1)]) for name in names)))
    at = {e.text: float(e.attrib["x"]) for e in root.iter("text") if e.text in names}
    assert len(at) == 3
    # 0.6 of the height of text is a generous width of a letter.
    assert all(x > 0 and x + 0.6 * 11.5 * len(names[0]) < 432 for x in at.values())
    first, second = itertools.islice(sorted(set(at.values())), 2)
    assert second - first > 0.6 * 11.5 * len(names[0])


def test_the_global_state_of_pyplot_is_left_alone_and_matplotlib_comes_late() -> None:
    code = (
        "import sys\nfrom hptool import charts\nassert 'matplotlib' not in sys.modules\n"
        "charts.svg(charts.Chart(name='x', alt='', x_label='', y_label='', series=[]))\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
