"""The built site in a headless browser: `make test-docs` builds it and runs these tests.

They need Chromium or Chrome: the program that the environment variable REGJAX_BROWSER names, or the
first that is found on the path. Without one, the tests are skipped, but fail in CI.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NoReturn

import pytest

from tests.browser.page import BROWSERS, VARIABLE, context, faults, find_browser, serve, visit

pytestmark = pytest.mark.slow

LINKS = "links => links.map(link => link.href)"

SITE = Path(__file__).parents[2] / "docs" / "_build" / "html"
PAGES = sorted(str(path.relative_to(SITE)) for path in SITE.rglob("*.html"))


def unavailable(reason: str) -> NoReturn:
    """Skip a test on a developer's machine, and fail it in CI."""
    if "CI" in os.environ:
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def browser():
    if (path := find_browser()) is None:
        unavailable(f"no browser found. Install one of {BROWSERS}, or set {VARIABLE} to its path.")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        unavailable("Playwright is not installed. Run `make test-docs`.")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def site():
    if not PAGES:
        unavailable(f"the site is not built in {SITE}. Run `make test-docs`.")
    with serve(SITE) as address:
        yield address


@pytest.fixture(scope="session")
def desktop(browser, site):
    with context(browser, site) as window:
        yield window


@pytest.fixture(scope="session")
def phone(browser, site):
    with context(browser, site, phone=True) as window:
        yield window


# A link to a section or a name highlights it.
TARGETS = ["api/regjax.html#regjax.dropout", "coming_from_pytorch.html#a-training-step"]


@pytest.mark.parametrize("path", [*PAGES, *TARGETS] if PAGES else ["index.html"])
def test_a_page_has_no_fault(desktop, phone, site, path):
    found = faults(desktop, phone, site + path, site)
    assert not found, "\n".join(["", *found])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("dropout", "api/regjax.html#regjax.dropout"),
        ("packed", "api/regjax.html#regjax.packed_bernoulli"),
        ("weight_decay", "api/regjax.optim.html#regjax.optim.add_independent_weight_decay"),
        ("overfitting", "lesson/1_overfitting.html"),
        ("过拟合", "lesson_zh/1_overfitting.html"),
    ],
)
def test_the_search_box_finds(desktop, site, words, expected):
    with visit(desktop, site) as (page, loading):
        page.get_by_role("textbox", name="Search").fill(words)
        page.keyboard.press("Enter")
        page.wait_for_selector("#search-results .search-summary")  # written when it is complete
        results = page.locator("#search-results li > a").evaluate_all(LINKS)
        assert site + expected in results[:8]
        page.goto(results[0])
    assert not loading


def test_the_menu_of_a_phone_leads_to_a_page(phone, site):
    from playwright.sync_api import expect

    with visit(phone, site) as (page, loading):
        menu, contents = page.locator(".sidebar-tree"), page.locator(".toc-tree")
        link = menu.get_by_role("link", name="Coming from PyTorch")
        expect(link).not_to_be_in_viewport()
        page.locator(".nav-overlay-icon").tap()
        expect(link).to_be_in_viewport()
        link.tap()
        page.wait_for_url(site + "coming_from_pytorch.html")
        section = contents.get_by_role("link", name="A training step")
        expect(section).not_to_be_in_viewport()
        page.locator(".toc-header-icon").tap()
        expect(section).to_be_in_viewport()
        section.tap()
        expect(page.get_by_role("heading", name="A training step")).to_be_in_viewport()
    assert not loading


def test_a_chosen_theme_is_remembered(browser, site):
    color = "getComputedStyle(document.body).backgroundColor"
    with context(browser, site) as window, visit(window, site) as (page, loading):
        light = page.evaluate(color)
        button = page.locator(".theme-toggle-content button")
        button.click()
        dark = page.evaluate(color)
        page.reload()
        assert page.evaluate(color) == dark != light
        button.click()
        assert page.evaluate(color) == light
        page.emulate_media(color_scheme="dark")
        assert page.evaluate(color) == light
    assert not loading


# The test of the test: a page without a fault, and one fault at a time.

GOOD = Path(__file__).with_name("good.html").read_text()
PLOT = "<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'>{}</svg>"
PLOTS = {
    "plot.svg": PLOT.format("<rect width='9' height='9' fill='white'/>"),
    "transparent.svg": PLOT.format(""),
}
FAULTS = {
    "link to missing.html is broken": "<a href='missing.html'>a</a>",
    "link to index.html#absent has no anchor": "<a href='index.html#absent'>a</a>",
    "leaves the site without https": "<a href='http://example.org'>a</a>",
    "image missing.png does not load": "<img src='missing.png' alt='plot'>",
    "status 404 of": "<link rel='stylesheet' href='missing.css'>",
    "has no alternative text": "<img src='plot.svg' alt=''>",
    "dark: image transparent.svg has a dark": "<img src='transparent.svg' alt='plot'>",
    "no answer from https://example.org/a.js": "<script src='https://example.org/a.js'></script>",
    "no answer from https://example.org/a.css": "<style>@import 'https://example.org/a.css'</style>",
    "console: wrong": "<script>console.error('wrong')</script>",
    "error of a script: wrong": "<script>throw Error('wrong')</script>",
    "the page has 2 h1": "<h1>Second</h1>",
    "desktop, light: color-contrast": "<p style='color: #aaa; background: #fff'>pale</p>",
    "narrow phone, dark: color-contrast": "<p style='color: #222'>dark in the dark</p>",
    "phone, light: text of p has 11.0 px": "<p style='font-size: 11px'>small</p>",
    "phone, light: the page is 700 px wide": "<table style='width: 692px'><td>wide</table>",
    "p reaches from 8 to 708": "<div style='overflow: hidden'><p style='width: 700px'>cut</div>",
    "scrollable-region-focusable": f"<pre>{'wide ' * 60}</pre>",
    "signature of f is not parsed": "<dl><dt class=sig id=f>f(x=&lt;factory>)</dt><dd>a</dl>",
    "heading-order": "<h4>Fourth</h4>",
}


@pytest.fixture(scope="session")
def planted(browser, tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    for name, plot in PLOTS.items():
        (folder / name).write_text(plot)
    with (
        serve(folder) as address,
        context(browser, address) as desktop,
        context(browser, address, phone=True) as phone,
    ):

        def plant(html: str) -> list[str]:
            (folder / "index.html").write_text(html)
            return faults(desktop, phone, address + "index.html", address)

        yield plant


def test_a_good_page_has_no_fault(planted):
    assert planted(GOOD) == []


@pytest.mark.parametrize("expected", FAULTS)
def test_a_fault_is_detected(planted, expected):
    found = planted(GOOD.replace("</article>", f"{FAULTS[expected]}</article>"))
    assert any(expected in fault for fault in found), found


@pytest.mark.parametrize(
    ("part", "expected"),
    [(' lang="en"', "the page has no lang"), ("<title>Title</title>", "the page has no title")],
)
def test_a_missing_part_is_detected(planted, part, expected):
    assert expected in " ".join(planted(GOOD.replace(part, "")))
