"""The built book in a real browser: complete, offline, readable, accessible."""

import os
import re
import subprocess
import sysconfig
from pathlib import Path

import pytest
from conftest import TYPESET, look, pages, serve

# Flaws of the theme that these pages cannot mend: rule of axe -> where it may occur.
KNOWN = {}

PAGES = pages() or ["book/index.html"]
CHAPTERS = [page for page in PAGES if page.startswith("notebooks/")]
TEXT = [page for page in PAGES if page.startswith(("notebooks/", "book/"))]
# Listings of source code are all made alike, so one of them stands for their accessibility.
ALIKE = [page for page in PAGES if page.startswith("_modules/compresskit/")]
every_page = pytest.mark.parametrize("path", PAGES)
every_chapter = pytest.mark.parametrize("path", CHAPTERS)


@every_page
def test_page_loads_without_errors(seen, path):
    assert seen(path).errors == []


@every_page
def test_page_asks_nothing_of_other_hosts(seen, path):
    assert seen(path).foreign == []


@every_page
def test_mathematics_is_rendered(seen, path):
    assert seen(path).unrendered == []
    assert seen(path).formulas > 0 or path not in CHAPTERS


@every_page
def test_every_image_has_a_text_in_its_place(seen, path):
    assert seen(path).nameless_images == []


@every_page
def test_page_does_not_scroll_sideways_on_a_phone(seen, path):
    assert seen(path).sideways == []


@pytest.mark.parametrize("path", [page for page in PAGES if page not in ALIKE[1:]])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_has_no_serious_barrier(seen, path, scheme):
    found = seen(path).violations[scheme]
    unknown = [v for v in found if KNOWN.get(v.split(": ")[0]) != v.split(": ")[1]]
    assert unknown == []


@every_chapter
def test_numbers_carry_the_chapter(html, path):
    number = int(re.search(r"/(\d\d)_", path)[1])
    text = (html / path).read_text(encoding="utf-8")
    assert re.search(rf'<h1><span class="section-number">{number}\. </span>', text)
    for kind in ("Theorem", "Exercise", "Fig."):
        found = re.findall(rf'caption-number">{re.escape(kind)} (\d+)\.\d+ ?<', text)
        assert found, kind
        assert set(found) == {str(number)}, kind
    equations = re.findall(r'<span class="eqno">\((\d+)\.\d+\)', text)
    assert set(equations) <= {str(number)}


def check_links(folder):
    """lychee's verdict on every link and anchor between the pages of `folder`."""
    program = Path(sysconfig.get_path("scripts"), "lychee")
    return subprocess.run(
        [
            program,
            "--offline",
            "--include-fragments",
            "--no-progress",
            f"--root-dir={folder}",
            "--exclude-path=_static",
            f"{folder}/**/*.html",
        ],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=120,
    )


def test_links_and_anchors_resolve(html):
    result = check_links(html)
    assert result.returncode == 0, result.stdout
    assert int(re.search(r"(\d+) Total", result.stdout)[1]) > 100, result.stdout


@pytest.mark.parametrize("link", ["second.html#nowhere", "third.html"])
def test_a_broken_link_is_noticed(tmp_path, link):
    (tmp_path / "first.html").write_text(f'<p id="here"><a href="{link}">x</a></p>')
    (tmp_path / "second.html").write_text('<p id="there"><a href="first.html#here">x</a></p>')
    assert check_links(tmp_path).returncode != 0
    (tmp_path / "first.html").write_text('<p id="here"><a href="second.html#there">x</a></p>')
    assert check_links(tmp_path).returncode == 0


def found_by_search(browser, url, word):
    page = browser.new_page()
    page.goto(f"{url}/search.html?q={word}")
    page.wait_for_function("/finished|did not match/.test(document.body.innerText)")
    links = page.locator("#search-results li a").evaluate_all("all => all.map(a => a.href)")
    page.close()
    return links


@pytest.mark.parametrize("kind", ["server", "file"])
def test_search_finds_pinsker(browser, address, html, kind):
    url = address if kind == "server" else html.as_uri()
    assert any(
        "02_bits_nats_divergences" in link for link in found_by_search(browser, url, "Pinsker")
    )
    assert found_by_search(browser, url, "xyzzyplugh") == []


def test_the_dark_theme_can_be_chosen_and_stays(browser, address):
    page = browser.new_page(color_scheme="light")
    page.goto(f"{address}/book/index.html")
    luminance = """() => { const [r, g, b] = getComputedStyle(document.body).backgroundColor
      .match(/[\\d.]+/g).map(Number); return (r + g + b) / 765; }"""
    theme = "document.documentElement.dataset.theme"
    assert page.evaluate(theme) == "light"
    assert page.evaluate(luminance) > 0.9
    for _ in range(3):
        page.locator(".theme-switch-button:visible").first.click()
        if page.evaluate("document.documentElement.dataset.mode") == "dark":
            break
    assert page.evaluate(theme) == "dark"
    assert page.evaluate(luminance) < 0.2
    page.goto(f"{address}/{TEXT[-1]}")
    assert page.evaluate(theme) == "dark"
    page.close()


@every_chapter
def test_solutions_are_folded_and_open_when_their_title_is_clicked(browser, address, path):
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(f"{address}/{path}")
    page.evaluate(TYPESET)  # formulas that appear later would move what is being clicked
    solutions = page.locator(".admonition.solution")
    count = solutions.count()
    assert count >= 3
    for index in range(count):
        solution = solutions.nth(index)
        text = solution.locator(":scope > :not(.admonition-title)").first
        assert not text.is_visible()
    solution = solutions.first
    text = solution.locator(":scope > :not(.admonition-title)").first
    title = solution.locator(".admonition-title")
    title.click(position={"x": 3, "y": 12})  # on the words, not on the button at the right
    text.wait_for(state="visible", timeout=5000)
    title.click(position={"x": 3, "y": 12})
    text.wait_for(state="hidden", timeout=5000)
    solution.locator(".toggle-button").click()
    text.wait_for(state="visible", timeout=5000)
    title.locator("a").click()
    assert page.url.split("#")[1].startswith("ex-")
    page.close()


@pytest.mark.parametrize("path", TEXT)
def test_page_opens_from_a_folder(browser, html, path):
    visit = look(browser, (html / path).as_uri(), axe=False)
    assert visit.errors == []
    assert visit.foreign == []
    assert visit.unrendered == []
    assert visit.formulas > 0 or path not in CHAPTERS


def test_the_first_page_leads_to_the_book(browser, html):
    page = browser.new_page()
    page.goto((html / "index.html").as_uri())
    page.wait_for_url("**/book/index.html")
    assert page.locator(".bd-article h1").inner_text().startswith("Model Compression")
    assert page.locator(".planned a").count() == 0
    page.close()


def test_only_the_publisher_s_address_is_claimed(html):
    text = (html / "book" / "index.html").read_text(encoding="utf-8")
    claimed = re.findall(
        r'rel="canonical" href="([^"]*)"|property="og:url" content="([^"]*)"', text
    )
    expected = os.environ.get("BOOK_URL", "").rstrip("/")
    assert all(expected and "".join(pair).startswith(expected) for pair in claimed)
    assert bool(claimed) == bool(expected)
    assert (html / "sitemap.xml").exists() == bool(expected)


def test_the_site_holds_only_what_it_needs(html):
    assert sum(file.stat().st_size for file in html.rglob("*") if file.is_file()) < 40e6
    assert sorted(p.name for p in (html / "_static" / "mathjax").iterdir()) == [
        "output",
        "tex-mml-chtml.js",
        "ui",
    ]


# --- each finding has been seen ----------------------------------------------------------------

FLAWS = {
    "errors": "<script>throw new Error('no')</script>",
    "foreign": "<img alt='x' src='http://localhost:9/x.png'>",
    "unrendered": "<p>$$ x = y $$</p>",
    "nameless_images": "<img src='data:image/gif;base64,R0lGODlhAQABAAAAACw='>",
    "sideways": "<main class='bd-main'><div style='width: 500px'>wide</div></main>",
}
PAGE = "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>x</title></head><body>"


@pytest.mark.parametrize("name", FLAWS)
def test_a_flaw_is_noticed(browser, tmp_path, name):
    (tmp_path / "good.html").write_text(f"{PAGE}<p>good</p>")
    (tmp_path / "bad.html").write_text(f"{PAGE}{FLAWS[name]}")
    (tmp_path / "favicon.ico").touch()
    for address in serve(tmp_path):
        assert getattr(look(browser, f"{address}/good.html", axe=False), name) == []
        assert getattr(look(browser, f"{address}/bad.html", axe=False), name) != []


def test_a_barrier_is_noticed(browser, tmp_path):
    grey = "<style>@media (prefers-color-scheme: dark) {p {color: #888; background: #777}}</style>"
    (tmp_path / "bad.html").write_text(f"{PAGE}{grey}<p>text</p>")
    (tmp_path / "favicon.ico").touch()
    for address in serve(tmp_path):
        violations = look(browser, f"{address}/bad.html").violations
        assert violations["light"] == []
        assert any("color-contrast" in v for v in violations["dark"])
