"""The page in a real browser, without a network: it draws itself, and every control does what it says."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_multinorm.report.command import write_report
from lightning_multinorm.report.runs import open_runs
from report import logs

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no chromium on the PATH (apt-get install chromium)")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright comes with the extra test")

FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking")
DRAWN = "document.body.dataset.drawn"


class Page:
    """An open page, and what it complained of."""

    def __init__(self, browser: sync_api.Browser, path: Path, **options: object) -> None:
        self.context = browser.new_context(offline=True, **options)
        self.tab = self.context.new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.tab.on("console", lambda message: self.complaints.append(message.text))
        self.tab.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.tab.on("request", lambda request: self.requests.append(request.url))
        self.tab.goto(path.as_uri())
        self.tab.wait_for_function(DRAWN)

    def redrawn(self, act: object) -> None:
        """Act, and wait until the figures have been drawn anew."""
        before = self.tab.evaluate(DRAWN)
        act()  # type: ignore[operator]
        self.tab.wait_for_function(f"{DRAWN} > {before}")

    def figure(self, name: str) -> str:
        """Its SVG."""
        return re.sub(r"clip\d+", "clip", self.tab.inner_html(f"#{name}"))  # they are numbered over the page's life

    def of_lines(self, attribute: str) -> list[str]:
        """Of every line in the figure of the loss."""
        return list(self.tab.eval_on_selector_all("#loss .mark-line path", f"(all) => all.map((x) => x.{attribute})"))

    def colour(self, selector: str, of: str = "color") -> str:
        return str(self.tab.evaluate(f"getComputedStyle(document.querySelector('{selector}')).{of}"))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of two runs, one of them with a name that is long, and that is markup."""
    folder = tmp_path_factory.mktemp("browser")
    names = {"sinkgd": 3.0, "adamw <i>with a name that is long, as they are": 3.5}
    runs = [logs.write(folder, name, final=final, config={"x": {name: 1}}) for name, final in names.items()]
    write_report(open_runs(runs), folder / "report.html", figures=False)
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def page(browser: sync_api.Browser, path: Path) -> Page:
    return Page(browser, path, viewport={"width": 1280, "height": 900}, color_scheme="light")


def test_it_draws_every_figure_from_itself_alone(page: Page, path: Path) -> None:
    count = "(plots) => plots.map((plot) => plot.querySelectorAll('svg path').length)"
    drawn = page.tab.eval_on_selector_all(".plot", count)
    assert len(drawn) > 20 and min(drawn) > 4
    assert page.complaints == [] and page.requests == [path.as_uri()]
    assert "role-legend" not in page.figure("loss")  # the toggles are the legend
    assert "sinkgd reached adamw <i>with a name that is long, as they are’s 4.5" in page.tab.inner_text(".headline")
    assert page.tab.locator("main i >> text=long").count() == 0


def test_the_axis_is_chosen(page: Page) -> None:
    titles = {"time": "Training time (min)", "step": "Optimizer step", "tokens": "Tokens"}
    for axis, title in titles.items():
        page.redrawn(lambda axis=axis: page.tab.select_option("#axis", axis))
        for name in ("loss", "norm_convergence_row_by_layer_0"):
            assert f">{title}</text>" in page.figure(name)
    assert page.complaints == []


def test_smoothing_and_the_logarithm_change_the_loss(page: Page) -> None:
    smoothed = page.figure("loss")
    slide = "(value) => { smoothing.value = value; smoothing.dispatchEvent(new Event('change')); }"
    page.redrawn(lambda: page.tab.evaluate(slide, "0"))
    lines = page.of_lines("getAttribute('d')")
    assert lines[0] == lines[2] and lines[1] == lines[3]  # as logged, and its mean over one point
    page.redrawn(lambda: page.tab.evaluate(slide, "3"))
    assert page.figure("loss") == smoothed
    bits = page.figure("bits_per_byte")
    page.redrawn(lambda: page.tab.check("#log"))
    assert page.figure("loss") != smoothed and page.figure("bits_per_byte") != bits
    page.redrawn(lambda: page.tab.uncheck("#log"))
    assert page.figure("loss") == smoothed and page.complaints == []


def test_a_run_is_hidden_and_shown(page: Page) -> None:
    colours = page.of_lines("getAttribute('stroke')")
    assert len(set(colours)) == 2
    page.redrawn(lambda: page.tab.locator(".chip").nth(1).click())
    assert page.of_lines("getAttribute('stroke')") == [colour for colour in colours if colour == colours[0]]
    assert not page.tab.locator(".card").nth(1).is_visible() and page.tab.locator(".card").nth(0).is_visible()
    assert not page.tab.locator("#norm_convergence_row_by_layer_1").is_visible()
    page.redrawn(lambda: page.tab.locator(".chip").nth(1).click())
    assert page.of_lines("getAttribute('stroke')") == colours and page.tab.locator(".card").nth(1).is_visible()


def test_a_point_tells_what_it_is(page: Page) -> None:
    page.tab.locator("#loss svg").hover()
    page.tab.wait_for_selector("#vg-tooltip-element.visible")
    tooltip = page.tab.inner_text("#vg-tooltip-element")
    assert all(word in tooltip for word in ("Run", "Loss", "Tokens", "Training time", "Optimizer step"))


def test_the_theme_is_the_systems_or_chosen(page: Page, browser: sync_api.Browser, path: Path) -> None:
    light, ink = page.colour("body", "backgroundColor"), page.colour("#loss text", "fill")
    page.tab.select_option("#theme", "dark")
    dark = page.colour("body", "backgroundColor")
    assert dark != light and page.colour("#loss text", "fill") != ink  # figures follow without being drawn anew
    page.tab.select_option("#theme", "")
    assert page.colour("body", "backgroundColor") == light
    page.tab.emulate_media(color_scheme="dark")
    assert page.colour("body", "backgroundColor") == dark
    page.tab.select_option("#theme", "light")
    assert page.colour("body", "backgroundColor") == light
    page.tab.emulate_media(color_scheme="dark", media="print")
    assert page.colour("body", "backgroundColor") == "rgb(255, 255, 255)" and not page.tab.locator("nav").is_visible()
    page.tab.emulate_media(color_scheme="light", media="screen")
    page.tab.select_option("#theme", "")


def test_a_phone_is_wide_enough(browser: sync_api.Browser, path: Path) -> None:
    page = Page(browser, path, viewport={"width": 390, "height": 844}, color_scheme="dark")
    assert page.tab.evaluate("document.documentElement.scrollWidth") == 390
    rights = page.tab.eval_on_selector_all(".plot svg", "(all) => all.map((x) => x.getBoundingClientRect().right)")
    assert max(rights) <= 390 and page.complaints == []
    page.context.close()
