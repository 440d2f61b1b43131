"""The report in a real browser, headless: what a reader sees, on a desk and on a phone."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from hptool import report
from hptool.candidates import Layout
from hptool.measurement import FailureKind
from tests import samples

NASTY = "<img src=x onerror=\"document.title='pwned'\"> " + "no blanks to break at ".replace(" ", "_") * 20
ROWS = [
    samples.row(Layout(tp=2), samples.measurement(0.9, 0.006)),
    samples.row(Layout(pp=2, mbs=2), samples.measurement(0.5, 0.011)),
    samples.row(Layout(mbs=2), samples.failure(FailureKind.CRASH, NASTY)),
]

# Run by the browser itself: what is on the page, and whether the page is wider than the window.
PROBE = """<script>
const rows = id => [...document.querySelectorAll(`#${id} tbody tr`)].map(r => r.innerText.replace(/\\s+/g, ' '));
document.documentElement.setAttribute('data-seen', JSON.stringify({
  title: document.title, winner: document.querySelector('#winner')?.innerText, measured: rows('measured'),
  failed: rows('failed'), rejected: rows('rejected'), images: document.images.length,
  overflow: document.documentElement.scrollWidth - window.innerWidth}));
</script>"""


def seen(page: str, directory: Path, width: int) -> str:
    """What the probe found in this page in a window of this width, as JSON text."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.fail("chromium is not installed; `make browser` installs it")
    path = directory / "report.html"
    path.write_text(page.replace("</body>", f"{PROBE}</body>"))
    done = subprocess.run(
        [
            chromium, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
            "--disable-background-networking", "--disable-component-update", f"--user-data-dir={directory / 'profile'}",
            f"--window-size={width},900", "--dump-dom", path.as_uri(),
        ],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    found = re.search(r'data-seen="([^"]*)"', done.stdout)
    assert found is not None
    return html.unescape(found[1])


@pytest.mark.parametrize("width", [1400, 500])
def test_what_a_reader_sees(width: int, tmp_path: Path) -> None:
    page = json.loads(seen(report.html(samples.sample_report(ROWS)), tmp_path, width))
    assert page["winner"] == "tp1-pp2-vpp1-cp1-mbs2-none"
    assert [row.split()[1] for row in page["measured"]] == ["tp1-pp2-vpp1-cp1-mbs2-none", "tp2-pp1-vpp1-cp1-mbs1-none"]
    assert "onerror" in page["failed"][0]
    assert page["images"] == 0
    assert page["title"] == "hptool: gpt3_tiny on local"
    assert page["overflow"] <= 0, "the page scrolls sideways as a whole"


def test_the_page_of_a_search_without_a_winner(tmp_path: Path) -> None:
    text = seen(report.html(samples.sample_report(ROWS[2:])), tmp_path, 1000)
    assert '"measured":[]' in text
    assert '"winner"' not in text
