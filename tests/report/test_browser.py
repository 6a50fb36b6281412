"""Pages in a real browser: nothing leaves them, nothing fails, clicks and sliders work, axe finds no fault."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pages import HOSTILE, Run, make_run

import dask_imgcurator as dic
from dask_imgcurator.results import ConditionCount

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (the extra test)")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("there is no chromium (apt-get install chromium)", allow_module_level=True)

TEXT_HEIGHT = """cell => {
  const text = document.createRange();
  text.selectNodeContents(cell);
  return text.getBoundingClientRect().height;
}"""
THEMES = [("light", 1200), ("dark", 1200), ("light", 390)]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def report(run: Run) -> Path:
    """A report with all its sections, of rows with hostile texts."""
    ok = [r for r in run.rows if r["status"] == "ok"]
    groups = pd.DataFrame(
        {"group": 0, "key": r["key"], "shard": r["shard"], "sample_offset": 0, "kept": i == 0, "in_reference": False}
        | {"tier": None if i == 0 else "perceptual", "similarity": 1 - i / 100, "distance": i}
        for i, r in enumerate(ok[3:6])
    )
    scores = []
    for url in run.tables:
        table = pq.read_table(url)
        scores.append(url.replace(".parquet", "-offsets.parquet"))
        pq.write_table(table.append_column("sample_offset", pa.array([0] * len(table), pa.int64())), scores[-1])
    out = run.folder / "all.html"
    dic.write_report(scores, out, ["width >= 100", "top 60% by aesthetic_score"], groups=groups)
    dic.compare_selections("width >= 100", "aesthetic_score >= 5", run.folder / "compared.html", scores)
    dic.search(scores, embedding=[1.0, 0.0], k=12, html=run.folder / "found.html")
    return out


@pytest.fixture
def visit(browser: Any) -> Iterator[Any]:
    """Open a page; at the end, whatever it asked for or complained of is a failure."""
    contexts, seen = [], list[str]()

    def opened(path: Path, theme: str = "light", width: int = 1200, scripts: bool = True) -> Any:
        context = browser.new_context(
            color_scheme=theme, viewport={"width": width, "height": 900}, java_script_enabled=scripts
        )
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda r: seen.append(r.url) if not r.url.startswith(("data:", path.as_uri())) else None)
        page.on("console", lambda message: seen.append(message.text))
        page.on("pageerror", lambda error: seen.append(str(error)))
        page.on("dialog", lambda dialog: (seen.append(dialog.message), dialog.dismiss()))
        page.goto(path.as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert seen == []


@pytest.mark.parametrize(("theme", "width"), THEMES, ids=lambda v: str(v))
@pytest.mark.parametrize("name", ["all.html", "compared.html", "found.html"])
def test_axe_finds_no_fault(visit: Any, report: Path, name: str, theme: str, width: int) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    page = visit(report.with_name(name), theme, width)
    found = axe.Axe().run(page).response["violations"]
    assert [(v["id"], [n["html"][:200] for n in v["nodes"][:3]]) for v in found] == []
    # Nothing is wider than the window.
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_every_picture_is_shown(visit: Any, report: Path) -> None:
    page = visit(report)
    sizes = page.evaluate("[...document.images].map(image => [image.naturalWidth, image.clientWidth])")
    assert len(sizes) > 60 and all(natural > 0 and shown > 20 for natural, shown in sizes)
    assert HOSTILE.split("\u202e")[0] in page.inner_text("body")  # and no dialog: see `visit`


def test_a_blurred_picture_is_shown_by_a_click_and_by_the_keyboard(visit: Any, report: Path) -> None:
    page = visit(report)
    veil, other = page.locator(".veil").nth(0), page.locator(".veil").nth(1)

    def blur(of: Any) -> str:
        return of.locator("img").evaluate("image => getComputedStyle(image).filter")

    assert "blur" in blur(veil) and "blur" in blur(other)
    veil.click()
    assert blur(veil) == "none" and "blur" in blur(other)
    other.locator("input").focus()
    page.keyboard.press("Space")
    assert blur(other) == "none"


def cut_scores(run: Run, column: str) -> np.ndarray:
    return np.array([r[column] for r in run.rows if r[column] is not None])


def test_the_slider_says_what_its_cut_keeps(visit: Any, report: Path, run: Run) -> None:
    page = visit(report)
    figure = page.locator("figure", has=page.locator("h3", has_text="aesthetic_score"))
    slider, output = figure.locator("input[type=range]"), figure.locator("output")
    slider.focus()
    page.keyboard.press("ArrowRight")
    at = int(slider.input_value())
    value, x, alone, both = json.loads(figure.locator(".try").get_attribute("data-tries"))[at]
    assert output.inner_text() == f"aesthetic_score >= {value} keeps about {alone}; {both}"
    assert slider.get_attribute("aria-valuetext") == output.inner_text()
    assert figure.locator(".moved").get_attribute("d") == f"M{x} 18V150"
    assert abs(int(alone.split()[0]) - (cut_scores(run, "aesthetic_score") >= float(value)).sum()) <= 1
    untried = page.locator("figure", has=page.locator("h3", has_text="nsfw_score")).locator("output")
    assert untried.inner_text() == "Move it to see what a cut would keep."


def test_a_slider_stands_at_its_cut(visit: Any, report: Path, run: Run) -> None:
    page = visit(report)
    figure = page.locator("figure", has=page.locator("h3", has_text="width"))
    kept = (cut_scores(run, "width") >= 100).sum()
    assert figure.locator("output").inner_text().startswith(f"width >= 100 keeps about {kept} of ")
    line = figure.locator("path.cut").bounding_box()
    slider = figure.locator("input[type=range]")
    box, share = slider.bounding_box(), int(slider.input_value()) / int(slider.get_attribute("max"))
    thumb = box["x"] + 8 + share * (box["width"] - 16)  # whose middle goes from 8 pixels inside to 8 pixels inside
    assert abs(thumb - (line["x"] + line["width"] / 2)) < 3


def test_a_picture_is_enlarged_and_says_its_shard(visit: Any, report: Path, run: Run) -> None:
    page = visit(report)
    row = next(r for r in run.kept if r["nsfw_score"] == 0.0)
    key = row["key"]
    card = page.locator("#pictures ~ ul li").filter(has_text=key).first
    image, dialog = card.locator("img"), page.locator("dialog")
    assert f"in {Path(row['shard']).name}" in card.inner_text() and row["shard"] not in card.inner_text()
    small = image.bounding_box()
    image.click()
    assert dialog.is_visible()
    assert dialog.locator("img").bounding_box()["width"] > 2.5 * small["width"]
    assert key in dialog.inner_text() and row["shard"] in dialog.inner_text()
    page.keyboard.press("Escape")
    assert not dialog.is_visible()
    for press in ("Enter", "Space"):
        image.focus()
        page.keyboard.press(press)
        assert dialog.is_visible()
        page.keyboard.press("Enter")  # on the button
        assert not dialog.is_visible()
        assert image.evaluate("image => image === document.activeElement")


def test_a_blurred_picture_is_enlarged_only_once_it_is_shown(visit: Any, report: Path) -> None:
    page = visit(report)
    veil, dialog = page.locator(".veil").first, page.locator("dialog")
    assert veil.locator("img").get_attribute("tabindex") is None
    veil.locator("img").click()
    assert not dialog.is_visible() and veil.locator("input").is_checked()
    veil.locator("img").click()
    assert dialog.is_visible() and veil.locator("input").is_checked()


def test_numbers_stay_on_one_line_and_bars_begin_below_each_other(visit: Any, tmp_path: Path, run: Run) -> None:
    many = 123_456_789_012
    funnel = [ConditionCount("aesthetic_score >= 5", many // 2, many // 2), ConditionCount("width >= 100", 7, 7)]
    run.page(samples=many, by_status={"ok": many}, kept=7, funnel=funnel)
    for width in (1200, 390):
        page = visit(run.folder / "report.html", width=width)
        lefts = page.evaluate(
            "[...document.querySelectorAll('#selection ~ .wide .bar')].map(b => b.getBoundingClientRect().left)"
        )
        assert len(lefts) >= 4 and len({round(x, 1) for x in lefts[:4]}) == 1
        for cell in page.locator("td.n, .share, .cards dd").all():
            if cell.inner_text():
                height = cell.evaluate(TEXT_HEIGHT)
                assert height < 40, cell.inner_text()
        assert page.evaluate("[...document.querySelectorAll('.cards div')].every(d => d.scrollWidth <= d.clientWidth)")
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_contents_lead_to_every_section(visit: Any, report: Path) -> None:
    page = visit(report)
    links = page.locator("nav[aria-label=Contents] a")
    assert links.all_inner_texts() == page.locator("main h2").all_inner_texts()
    links.last.click()
    assert page.locator("main h2").last.evaluate("h => h.getBoundingClientRect().top < innerHeight")


def test_pictures_of_the_explorer_stand_in_one_row(browser: Any, run: Run, tmp_path: Path) -> None:
    pytest.importorskip("ipywidgets")
    cut = dic.explore(dic.read_scores(run.tables), "aesthetic_score")
    page = browser.new_page(viewport={"width": 700, "height": 900})
    page.set_content(cut._walls.value)
    for wall in page.locator(".wall").all():
        tops = [card.bounding_box()["y"] for card in wall.locator("li").all()]
        assert len(tops) == 6 and len(set(tops)) == 1
    page.close()


def test_without_scripts_the_page_is_whole(visit: Any, report: Path) -> None:
    page = visit(report, scripts=False)
    figure = page.locator("figure", has=page.locator("h3", has_text="aesthetic_score"))
    assert not figure.locator(".try").is_visible()
    figure.locator("summary").click()
    assert "A cut at its start keeps" in figure.locator("thead").inner_text()
    page.locator(".veil").first.click()
    assert page.locator(".veil input").first.is_checked()
