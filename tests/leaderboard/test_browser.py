"""The site in a real browser: no errors, sorting sorts, and a narrow window needs no sideways scrolling of the page."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess

import pytest

from distillbench.leaderboard.site import build
from distillbench.leaderboard.table import boards

CHROMIUM = next((p for name in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(name))), None)
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync --virtual-time-budget=8000 --window-size=1200,900"
pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")]

# Goes before everything else in a copy of the page; tells the page around it what it saw.
PROBE = """<script>
const errors = [];
addEventListener("error", (e) => errors.push(String(e.message || e.target.src || e.target.href)), true);
console.error = (...words) => errors.push(words.join(" "));
addEventListener("load", () => {
  const sorted = [];
  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, i) => {
      const button = head.querySelector("button");
      if (!button) return;
      for (let click = 0; click < 2; click++) {
        button.click();
        const values = [...table.tBodies[0].rows].map((r) => r.cells[i].dataset.value);
        const marked = heads.filter((h) => h.hasAttribute("aria-sort")).length;
        sorted.push([button.textContent, head.classList.contains("num"), head.getAttribute("aria-sort"), marked, values]);
      }
    });
  }
  const root = document.documentElement;
  const small = [...document.querySelectorAll("main *")].filter(
    (e) => e.childNodes.length && !e.closest("svg, .sr") && e.textContent.trim() && parseFloat(getComputedStyle(e).fontSize) < 12);
  parent.postMessage(JSON.stringify({name: document.body.dataset.page, errors, sorted, wide: root.scrollWidth, window: innerWidth,
    small: small.map((e) => e.outerHTML.slice(0, 80))}), "*");
});
</script>"""


@pytest.fixture(scope="module")
def seen(make, tmp_path_factory):
    """(page, width) -> what its probe saw; one start of the browser for all of them."""
    folder = tmp_path_factory.mktemp("site")
    judge = make.suite(settings=("digits", "blobs"))
    build(boards(make.full_board(judge) + make.full_board(judge, "blobs") + make.full_board(make.suite(examples=9_000)))[0], folder)
    frames = []
    for page in sorted(folder.rglob("*.html")):
        for width in (400, 1200):
            name = f"{page.relative_to(folder)} {width}"
            text = page.read_text().replace("<head>", f"<head>{PROBE}").replace("<body>", f'<body data-page="{html.escape(name)}">')
            copy = page.with_name(f"{page.stem}.probe-{width}.html")
            copy.write_text(text)
            # A headless window is never narrower than 500 px; a frame can be.
            frames.append(f'<iframe src="{copy.relative_to(folder)}" style="width:{width}px;height:900px;border:0"></iframe>')
    script = "<script>const all = []; addEventListener('message', (e) => { all.push(e.data); document.title = all.length; "
    script += "document.getElementById('out').textContent = JSON.stringify(all); });</script>"
    (folder / "outer.html").write_text(f"<!doctype html>{script}<pre id=out></pre>{''.join(frames)}")
    command = [
        CHROMIUM,
        *FLAGS.split(),
        f"--user-data-dir={tmp_path_factory.mktemp('profile')}",
        "--dump-dom",
        (folder / "outer.html").as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    out = re.search(r'<pre id="out">(.*?)</pre>', done.stdout, re.DOTALL)
    assert out, done.stderr[-2000:]
    messages = [json.loads(m) for m in json.loads(html.unescape(out[1]))]
    assert len(messages) == len(frames)
    return {tuple(m["name"].rsplit(" ", 1)): m for m in messages}


def test_no_page_has_an_error(seen):
    assert {k: m["errors"] for k, m in seen.items() if m["errors"]} == {}


def test_no_page_scrolls_sideways(seen):
    assert {k: (m["wide"], m["window"]) for k, m in seen.items() if m["wide"] > m["window"]} == {}
    assert {m["window"] for m in seen.values()} >= {400}


def test_no_text_is_tiny(seen):
    assert {k: m["small"] for k, m in seen.items() if m["small"]} == {}


def test_headings_sort_their_tables(seen):
    clicks = 0
    for message in seen.values():
        for heading, numeric, order, marked, values in message["sorted"]:
            clicks += 1
            assert marked == 1, heading
            present = [float(v) if numeric else v for v in values if v != ""]
            assert values[: len(present)] == [v for v in values if v != ""], f"{heading}: what is missing comes last"
            assert present == sorted(present, reverse=order == "descending"), heading
    assert clicks > 100
