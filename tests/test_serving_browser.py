"""The report of a serving search in a real browser, headless: on a desk and on a telephone, in light and in dark."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from hptool import serving_report
from hptool.measurement import Failure, FailureKind
from tests import serving_samples as samples
from tests.serving_samples import GRAPHS, LONG, ONE, SHORT

NASTY = "<img src=x onerror=\"document.title='pwned'\"> " + "no_blanks_to_break_at_" * 20

# Run by the browser itself. A window cannot be as narrow as a telephone, so the page is in a frame that is: what is
# seen is written where it is dumped, around the frame.
PROBE = """<script>
const charts = [...document.querySelectorAll('svg')], box = c => c.getBoundingClientRect();
parent.document.documentElement.setAttribute('data-seen', JSON.stringify({
  title: document.title, width: window.innerWidth, images: document.images.length,
  best: [...document.querySelectorAll('.best')].map(e => e.innerText),
  overflow: document.documentElement.scrollWidth - window.innerWidth,
  charts: charts.map(c => ({
    width: box(c).width, ratio: box(c).width / box(c).height, left: box(c).left, right: box(c).right,
    name: c.getAttribute('aria-label'), ink: getComputedStyle(c.querySelector('text')).fill,
    text: box(c.querySelector('text')).height, font: getComputedStyle(c.querySelector('text')).fontFamily,
    outside: [...c.querySelectorAll('text')].filter(t =>
      box(t).right > box(c).right + 1 || box(t).left < box(c).left - 1 || box(t).bottom > box(c).bottom + 1).length,
    titles: [...c.querySelectorAll('g > title')].map(t => t.textContent),
    marks: [...c.querySelectorAll('g > title ~ g use')].filter(u => box(u).width > 3 && box(u).height > 3).length,
  })),
}));
</script>"""


def seen(page: str, directory: Path, width: int, *, dark: bool = False) -> dict[str, Any]:
    """What the probe finds in this page in a frame of this width."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.fail("chromium is not installed; `make browser` installs it")
    probed = html.escape(page.replace("</body>", f"{PROBE}</body>"))
    path = directory / "frame.html"
    path.write_text(
        f'<!doctype html><meta name="color-scheme" content="light dark"><body style="margin:0">'
        f'<iframe srcdoc="{probed}" style="border:0;width:{width}px;height:900px"></iframe></body>'
    )
    done = subprocess.run(
        [
            chromium, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
            "--disable-background-networking", "--disable-component-update", f"--user-data-dir={directory / 'profile'}",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--window-size=1600,900", "--dump-dom",
            path.as_uri(),
        ],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    found = re.search(r'^<html[^>]* data-seen="([^"]*)"', done.stdout, flags=re.MULTILINE)
    assert found is not None
    told: dict[str, Any] = json.loads(html.unescape(found[1]))
    return told


def page() -> str:
    rows = [
        *samples.rows(),
        samples.failed(GRAPHS, 32, Failure(kind=FailureKind.CRASH, message=NASTY)),
        samples.row(ONE, 4, 3000.0, LONG, meets_targets=False),
    ]
    return serving_report.html(samples.report(rows, [SHORT, LONG], notes=[NASTY]))


@pytest.mark.parametrize("width", [1400, 400])
@pytest.mark.parametrize("dark", [False, True])
def test_what_a_reader_sees(width: int, dark: bool, tmp_path: Path) -> None:  # noqa: FBT001 (a parameter)
    told = seen(page(), tmp_path, width, dark=dark)
    assert told["width"] == width
    assert told["title"] == "hptool: serving gpt3_tiny on local"
    assert told["best"][0] == "tp1-pp1-bf16, batch 8"
    assert told["images"] == 0
    assert told["overflow"] <= 0, "the page scrolls sideways as a whole"
    first, second = told["charts"]
    for chart in (first, second):
        assert chart["ink"] == ("rgb(255, 255, 255)" if dark else "rgb(0, 0, 0)"), "text is as the page's"
        assert chart["left"] >= 0
        assert chart["right"] <= width
        assert min(width - 50, 550) <= chart["width"] <= 600
        assert 1 < chart["ratio"] < 2
        assert chart["text"] >= 10, "text stays readable"
        assert chart["outside"] == 0, "no text is cut off"
        assert "system-ui" in chart["font"]
    assert "60:20" in first["name"]
    assert first["marks"] == 2 * 6, "six measured points, each beside its prediction"
    assert second["marks"] == 2
    assert any("tp1-pp1-bf16, batch 8: 252 ms, 666.7 tokens/s per GPU" in title for title in first["titles"])


def test_the_page_of_a_search_where_nothing_was_measured(tmp_path: Path) -> None:
    told = seen(serving_report.html(samples.report([])), tmp_path, 400)
    assert told["charts"] == []
    assert told["overflow"] <= 0
