"""The report in a real browser: a phone and a desk, light and dark, with nothing but the file itself."""

import json
import os
import re
import shutil
import signal
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from smol_post.report import write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="not run: no Chromium installed")

RUNS = {"base": [], "long_context": ["base"], "apo_seed0": ["long_context"], "merge": ["apo_seed0", "base"]}
METRICS = [*(f"needle_{n}x" for n in (1, 4, 8)), *(f"multi_key_{n}" for n in (4096, 65536)), "think_greedy",
           "mode_think", "no_think_greedy", "mode_no_think", "preference_accuracy", "perplexity"]  # fmt: skip
SECTIONS = ["The chain", "What each checkpoint can do", "Gates", "Merge sweep", "Proofs before step 1",
            "Each run", "Data by source", "Data by mode", "Transcripts", "Make it again",
            "Digests"]  # fmt: skip
PHONE, DESK = "390", "1280"  # CSS pixels
LEGIBLE = 4.5  # WCAG 2.2, 1.4.3: contrast of text, level AA
MEASURE = """
var errors = {}, seen = {}  // of the window: frames write into errors
const brush = Object.assign(document.createElement("canvas"), {width: 1, height: 1})
  .getContext("2d", {willReadFrequently: true})
function mixed(colours) {  // one over another
  brush.clearRect(0, 0, 1, 1)
  for (const colour of colours) { brush.fillStyle = colour; brush.fillRect(0, 0, 1, 1) }
  return [...brush.getImageData(0, 0, 1, 1).data.slice(0, 3)]
}
function colours(element) {  // [of the text, of what is behind it]
  const behind = []
  for (let one = element; one; one = one.parentElement) behind.unshift(getComputedStyle(one).backgroundColor)
  const style = getComputedStyle(element)
  return [mixed([...behind, element.closest("svg") ? style.fill : style.color]), mixed(behind)]
}
function measure(page, root) {
  page.querySelectorAll("details").forEach(one => one.open = true)
  const all = [...page.body.querySelectorAll("*")]
  const said = one => [...one.childNodes].filter(node => node.nodeType == 3 && node.data.trim())
  const texts = {}
  for (const one of all.filter(one => said(one).length)) {
    const [ink, paper] = colours(one)
    texts[[ink, paper]] = [ink, paper, one.outerHTML.slice(0, 90)]
  }
  const boxes = all.filter(one => one.matches(".scroll"))
  return {
    overflow: page.documentElement.scrollWidth - page.documentElement.clientWidth,
    scrolled: boxes.filter(one => one.scrollWidth > one.clientWidth).length,
    loaded: root.performance.getEntriesByType("resource").map(one => one.name),
    headings: [...page.querySelectorAll("h2")].filter(one => one.offsetHeight).map(one => one.textContent),
    page: colours(page.body)[1],
    texts: Object.values(texts),
    heat: [...page.querySelectorAll("td.heat")].map(one => [parseFloat(one.textContent), ...colours(one)]),
  }
}
addEventListener("load", () => setTimeout(() => {
  for (const frame of document.querySelectorAll("iframe")) {
    seen[frame.width] = measure(frame.contentDocument, frame.contentWindow)
    seen[frame.width].errors = errors[frame.width] || []
  }
  document.body.textContent = JSON.stringify(seen)
}, 500))
"""
LISTEN = """<head><script>addEventListener("error", event => {
  (parent.errors[WIDTH] ||= []).push(event.message || event.target.outerHTML)
}, true)</script>"""


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_root(root: Path) -> None:
    """Every section has content, some of it long and without a place to break."""
    counts = {"num_documents": 12, "num_tokens": 1234567890, "num_trained_tokens": 678901234}
    data = {**counts, "by_source": {"a-source-with-a-long-name": counts}, "by_mode": {"think": counts}}
    for at, (run, parents) in enumerate(RUNS.items()):
        digest = f"sha256:{at:064x}"
        metrics = {name: {"value": at / 3, "stderr": 0.005} for name in METRICS}
        gates = {"needle_8x": {"min": 0.9, "max": None}}
        sweep = [
            {"weight": w, "keeps": True, "chosen": w == 0.1, "metrics": metrics} for w in (0.05, 0.1, 0.2)
        ]
        manifest = {
            "run": run, "stage": run.split("_seed")[0], "digest": digest, "seed": 1, "seconds": 3661.0,
            "recipe": {"gates": gates, "path": "x" * 200}, "recipe_file": f"recipes/{'long' * 20}/{run}.yaml",
            "parents": [{"path": f"../{name}", "digest": ""} for name in parents],
            "data": data, "versions": {"torch": "2.13.0"},
            "metrics": {"num_tokens_seen": 5, "train_loss": 0.5, "sweep": sweep if run == "merge" else []},
        }  # fmt: skip
        write_json(root / run / "manifest.json", manifest)
        log = [json.dumps({"step": step, "loss": 3 / step}) for step in range(1, 20)]
        (root / run / "train_log.jsonl").write_text("\n".join(log))
        proofs = [
            {"name": "documents do not see each other", "status": "passed", "found": {"others": "y" * 90}},
            {"name": "numbers are kept in full precision", "status": "failed", "found": {"bfloat16": 3}},
        ]
        write_json(root / run / "verify.json", {"level": "quick", "step": 0, "proofs": proofs})
        samples = [
            {"mode": mode, "prompt": "p" * 300, "output": "o" * 300, "right": mode == "think"}
            for mode in ("think", "no_think")
        ]
        found = {"checkpoint_digest": digest, "metrics": metrics, "samples": samples}
        write_json(root / "evals" / f"{run}.json", found)


def browse(page: Path, *, dark: bool) -> dict[str, Any]:
    """What MEASURE saw of the page, in a frame of either width; the browser gets 60 seconds."""
    text, frames = page.read_text(encoding="utf-8"), ""
    for width in (PHONE, DESK):
        inner = text.replace("<head>", LISTEN.replace("WIDTH", width), 1)
        inner = inner.replace("&", "&amp;").replace('"', "&quot;")
        frames += f'<iframe width="{width}" height="800" srcdoc="{inner}"></iframe>'
    head = '<!doctype html><meta charset="utf-8"><meta name="color-scheme" content="light dark">'
    wrapper = page.with_name("wrapper.html")
    wrapper.write_text(f"{head}<script>{MEASURE}</script><body>{frames}", encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--dump-dom",
             "--disable-background-networking", "--disable-component-update", "--disable-sync",
             "--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=10000", "--window-size=1400,900",
             f"--blink-settings=preferredColorScheme={int(not dark)}",
             f"--user-data-dir={page.parent / f'profile{int(dark)}'}"]  # fmt: skip
    process = subprocess.Popen(
        [str(BROWSER), *flags, wrapper.as_uri()],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    try:
        dom = process.communicate(timeout=60)[0]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    body = re.search(r"<body>(\{.*\})\s*</body>", dom, re.DOTALL)
    assert body, dom[-2000:]
    return json.loads(unescape(body[1]))


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """(scheme and width) -> what a reader has before him."""
    root = tmp_path_factory.mktemp("report")
    write_root(root)
    page = write_report(root, runs=list(RUNS))[0]
    found = {scheme: browse(page, dark=scheme == "dark") for scheme in ("light", "dark")}
    return {f"{scheme} {width}": one for scheme, both in found.items() for width, one in both.items()}


def luminance(colour: list[int]) -> float:
    """[255, 255, 255] -> 1.0, as WCAG defines it."""
    parts = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def contrast(one: list[int], other: list[int]) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_as_defined() -> None:
    assert contrast([0, 0, 0], [255, 255, 255]) == pytest.approx(21)
    assert contrast([118, 118, 118], [255, 255, 255]) == pytest.approx(4.54, abs=0.01)


def test_a_phone_and_a_desk_scroll_down_only_and_wide_tables_in_their_own_box(seen: dict[str, Any]) -> None:
    assert sorted(seen) == ["dark 1280", "dark 390", "light 1280", "light 390"]
    assert {name: one["overflow"] for name, one in seen.items()} == dict.fromkeys(seen, 0)
    assert all(one["scrolled"] for one in seen.values())


def test_the_page_loads_nothing_and_raises_nothing(seen: dict[str, Any]) -> None:
    assert {name: one["loaded"] + one["errors"] for name, one in seen.items()} == {name: [] for name in seen}


def test_every_section_is_there(seen: dict[str, Any]) -> None:
    assert {name: one["headings"] for name, one in seen.items()} == dict.fromkeys(seen, SECTIONS)


def test_every_text_can_be_read_in_the_light_and_in_the_dark(seen: dict[str, Any]) -> None:
    """Body text, notes, marks, texts of plots: whatever colours meet."""
    for name, one in seen.items():
        assert (luminance(one["page"]) > 0.5) == name.startswith("light"), name
        assert len(one["texts"]) > 5, name
        assert [text for ink, paper, text in one["texts"] if contrast(ink, paper) < LEGIBLE] == [], name


def test_the_colour_of_a_needle_says_how_many_are_found_and_leaves_the_number_legible(
    seen: dict[str, Any],
) -> None:
    for name, one in seen.items():
        assert [value for value, *_ in one["heat"]] == [v for v in (0.0, 0.333, 0.667, 1.0) for _ in range(5)]
        assert min(contrast(ink, paper) for _, ink, paper in one["heat"]) >= LEGIBLE, name
        none, some, most, every = (luminance(one["heat"][at][2]) for at in (0, 5, 10, 15))
        assert none > some > most > every if name.startswith("light") else none < some < most < every, name
