"""A real browser, a server of the built book, and what one visit to a page finds out."""

import functools
import http.server
import os
import shutil
import threading
from dataclasses import dataclass, field
from importlib.metadata import distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
HTML = ROOT / "_build" / "html"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
QUIET = (  # nothing that the browser does for itself may reach the network or look like the page's
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
)


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("site")


def pages():
    """Every page of the built book, by its path; not the redirect at the root."""
    found = sorted(p.relative_to(HTML).as_posix() for p in HTML.rglob("*.html"))
    return [p for p in found if not p.startswith("_static/") and p != "index.html"]


@pytest.fixture(scope="session")
def html():
    if not (HTML / "book" / "index.html").exists():
        pytest.fail("the book is not built: run `make book`")
    return HTML


@pytest.fixture(scope="session")
def browser():
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        reason = f"no browser is installed: looked for {', '.join(BROWSERS)}"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=QUIET)
        yield browser
        browser.close()


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


def serve(folder):
    """Serve `folder` on a free port; a generator that yields the address, then shuts down."""
    handler = functools.partial(Handler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="session")
def address(html):
    yield from serve(html)


@dataclass
class Visit:
    """What was seen on one page."""

    errors: list = field(default_factory=list)  # on the console, or thrown
    foreign: list = field(default_factory=list)  # requests that left the host
    formulas: int = 0
    unrendered: list = field(default_factory=list)
    nameless_images: list = field(default_factory=list)
    sideways: list = field(default_factory=list)  # what sticks out at 360 pixels
    violations: dict = field(default_factory=dict)  # color scheme -> what axe calls serious


TYPESET = """async () => {
  if (!window.MathJax || !MathJax.startup) return;
  await MathJax.startup.promise;
  if (MathJax.startup.document.lazyTypesetAll) await MathJax.startup.document.lazyTypesetAll();
}"""

UNRENDERED = r"""() => {
  const wrong = [...document.querySelectorAll("mjx-merror")].map((e) => "error: " + e.textContent);
  for (const e of document.querySelectorAll(".bd-article .math"))
    if (!e.querySelector("mjx-container > *")) wrong.push("left as TeX: " + e.textContent);
  const text = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (text.nextNode()) {
    const skip = "pre, code, script, style, mjx-container";
    const inside = text.currentNode.parentElement.closest(skip);
    if (!inside && /\$\$|\\\(|\\\[|\\begin\{/.test(text.currentNode.data))
      wrong.push("raw: " + text.currentNode.data.trim());
  }
  return wrong;
}"""

SIDEWAYS = """() => {
  const width = document.documentElement.clientWidth;
  if (document.documentElement.scrollWidth <= width) return [];
  const out = [...document.querySelectorAll(".bd-main *")].filter(
    (e) => e.getBoundingClientRect().right > width + 1);
  return ["the page is " + document.documentElement.scrollWidth + " pixels wide",
          ...out.slice(0, 5).map((e) => e.tagName + "." + e.className + ": " +
                                        e.textContent.trim().slice(0, 60))];
}"""

# The night differs from the day in its colors only.
AXE = """async (scheme) => {
  const tags = {type: "tag", values: ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]};
  const runOnly = scheme === "dark" ? {type: "rule", values: ["color-contrast"]} : tags;
  const found = await axe.run(document, {runOnly, resultTypes: ["violations"], preload: false});
  return found.violations.filter((v) => ["serious", "critical"].includes(v.impact)).map(
    (v) => v.id + ": " + v.nodes.slice(0, 4).map((n) => n.target.join(" ")).join(", "));
}"""


@functools.cache
def axe_source():
    package = distribution("axe-playwright-python")
    return Path(package.locate_file("axe_playwright_python/axe.min.js")).read_text(encoding="utf-8")


def look(browser, url, *, axe=True, listings=True):
    """Open a page as a reader would, on a desk and on a phone, by day and by night.

    Without `axe` its accessibility is not looked into, without `listings` that of code is not.
    """
    visit = Visit()
    host = url.split("/")[2] if url.startswith("http") else None
    page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme="light")

    def on_request(request):
        local = ("data:", "blob:", f"http://{host}/" if host else "file:")
        if not request.url.startswith(local):
            visit.foreign.append(request.url)

    page.on("request", on_request)
    page.on("pageerror", lambda error: visit.errors.append(str(error)))

    def on_console(message):
        if message.type in ("error", "warning"):
            visit.errors.append(f"{message.text} ({message.location['url']})")

    page.on("console", on_console)
    page.goto(url)
    page.evaluate(TYPESET)
    visit.formulas = page.locator("mjx-container").count()
    visit.unrendered = page.evaluate(UNRENDERED)
    visit.nameless_images = page.evaluate(
        "() => [...document.images].filter((i) => !i.alt.trim()).map((i) => i.src)"
    )
    page.set_viewport_size({"width": 360, "height": 740})
    visit.sideways = page.evaluate(SIDEWAYS)
    if axe:
        page.set_viewport_size({"width": 1280, "height": 900})
        # What MathJax draws is tested where MathJax is made; and listings are colored alike.
        away = "mjx-container" if listings else "mjx-container, pre"
        # They are hidden, not removed: MathJax may still be at work on them.
        page.add_style_tag(content=f":is({away}) {{display: none !important}}")
        # Colors are looked at when they have arrived, not on their way.
        page.add_style_tag(content="*, ::before, ::after {transition: none !important}")
        page.evaluate(axe_source())
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            page.wait_for_function(
                "scheme => (document.documentElement.dataset.theme ?? scheme) === scheme",
                arg=scheme,
            )
            visit.violations[scheme] = page.evaluate(AXE, scheme)
    page.close()
    return visit


@pytest.fixture(scope="session")
def seen(browser, address):
    """seen(path) is the Visit of that page; each is opened once.

    axe takes its time on code, so it looks into that of one chapter and of one page of source.
    """
    every = pages()
    source = [page for page in every if page.startswith("_modules/compresskit/")]
    chapters = [page for page in every if page.startswith("notebooks/")]

    @functools.cache
    def visit(path):
        return look(
            browser,
            f"{address}/{path}",
            axe=path not in source[1:],
            listings=path not in chapters[1:],
        )

    return visit
