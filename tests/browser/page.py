"""Pages as a reader sees them in a browser, and the faults that a reader would see."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING
from urllib.error import HTTPError
from urllib.parse import unquote, urldefrag
from urllib.request import urlopen

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

BROWSERS = ["chromium", "google-chrome", "google-chrome-stable", "chromium-browser", "chrome"]
VARIABLE = "REGJAX_BROWSER"
DESKTOP = {"width": 1440, "height": 900}
PHONE = {"width": 390, "height": 844}
NARROW_PHONE = {"width": 360, "height": 740}
# Sphinx's own lists: a signature of several lines, and the packages on the page of all sources.
SPHINX = ["dt.sig > dl", "ul:has(> ul)"]
# A table that compares rows with columns has an empty corner.
OPTIONS = {"resultTypes": ["violations"], "rules": {"empty-table-header": {"enabled": False}}}
FAULTS = (Path(__file__).parent / "faults.js").read_text()


def find_browser() -> str | None:
    """Return the path of the browser of the environment variable, or of the first on the path."""
    if path := os.environ.get(VARIABLE):
        return path
    return next(filter(None, map(shutil.which, BROWSERS)), None)


class Handler(SimpleHTTPRequestHandler):
    """Serves files and no listings of folders, as hosts of static sites do, without a log."""

    def list_directory(self, path):  # noqa: D102
        self.send_error(404)

    def log_message(self, format, *args):  # noqa: A002, D102
        pass


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    """Serve a folder at a free port of this machine, and yield its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder))
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def context(browser: Browser, address: str, *, phone: bool = False) -> BrowserContext:
    """Return a window of a desktop or a phone without a network: only `address` can be reached."""
    context = browser.new_context(
        viewport=PHONE if phone else DESKTOP,  # pyright: ignore[reportArgumentType]
        has_touch=phone,
        is_mobile=phone,
        reduced_motion="reduce",
    )
    context.route(lambda url: not url.startswith(address), lambda route: route.abort())
    return context


@contextmanager
def visit(context: BrowserContext, url: str) -> Iterator[tuple[Page, list[str]]]:
    """Yield the page of an address, and the list of the faults of its loading, which can grow."""
    page, faults = context.new_page(), []
    page.on("pageerror", lambda error: faults.append(f"error of a script: {error}"))
    page.on(
        "console",
        lambda message: (
            faults.append(f"console: {message.text}")
            if message.type in ("error", "warning")
            else None
        ),
    )
    page.on("requestfailed", lambda request: faults.append(f"no answer from {request.url}"))
    page.on(
        "response",
        lambda response: (
            faults.append(f"status {response.status} of {response.url}")
            if response.status >= 400
            else None
        ),
    )
    page.goto(url)
    # Images below the window load when they come into view.
    page.evaluate("for (const image of document.images) image.loading = 'eager'")
    page.wait_for_function("[...document.images].every(image => image.complete)")
    try:
        yield page, faults
    finally:
        page.close()


class Ids(HTMLParser):
    """Collects the anchors of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: set[str | None] = {"", "top"}
        self.feed(text)

    def handle_starttag(self, tag, attrs):  # noqa: D102
        self.found |= {value for name, value in attrs if name in ("id", "name")}


@cache
def anchors(url: str) -> set[str | None] | None:
    """Return the anchors of a page, or `None` if it does not exist."""
    try:
        with urlopen(url) as answer:
            html = answer.headers.get_content_type() == "text/html"
            return Ids(answer.read().decode()).found if html else {""}
    except HTTPError:
        return None


def broken_links(page: Page, address: str) -> Iterator[str]:
    """Yield the faults of the links of a page to this site, and insecure links to others."""
    urls = page.eval_on_selector_all(
        "a[href], area[href], link[href]", "links => links.map(link => link.href)"
    )
    for url in dict.fromkeys(map(str, urls)):
        target, anchor = urldefrag(url)
        if not target.startswith(address):
            if not target.startswith("https://"):
                yield f"link to {url} leaves the site without https"
        elif (ids := anchors(target)) is None:
            yield f"link to {url.removeprefix(address)} is broken"
        elif unquote(anchor) not in ids:
            yield f"link to {url.removeprefix(address)} has no anchor"


def violations(page: Page) -> Iterator[str]:
    """Yield the violations of the rules of axe-core, which include the contrast of text."""
    from axe_playwright_python.sync_playwright import Axe

    results = Axe().run(page, {"exclude": SPHINX}, OPTIONS)
    for violation in results.response["violations"]:
        for node in violation["nodes"]:
            reasons = [check["message"] for check in node["any"] + node["all"] + node["none"]]
            yield f"{violation['id']}: {node['target'][-1]}: {reasons[0]}"


def faults(desktop: BrowserContext, phone: BrowserContext, url: str, address: str) -> list[str]:
    """Return every fault of a page, on a desktop and on a phone, in the light and dark theme."""
    found: list[str] = []

    def look(view: str, page: Page) -> None:
        size = page.viewport_size
        assert size
        found.extend(f"{view}: {fault}" for fault in page.evaluate(FAULTS, size["width"]))

    def audit(view: str, page: Page) -> None:
        look(view, page)
        found.extend(f"{view}: {fault}" for fault in violations(page))

    with visit(desktop, url) as (page, loading):
        audit("desktop, light", page)
        page.emulate_media(color_scheme="dark")
        look("desktop, dark", page)
        found += broken_links(page, address)
    found += loading
    with visit(phone, url) as (page, loading):
        look("phone, light", page)
        page.emulate_media(color_scheme="dark")
        page.set_viewport_size(NARROW_PHONE)  # pyright: ignore[reportArgumentType]
        audit("narrow phone, dark", page)
    found += loading
    return list(dict.fromkeys(found))
