"""The built book as a reader meets it: in a real browser, without a network, in light and dark, on a phone, on paper.

The book is built by book/build.py, which does nothing when it is up to date.
"""

from __future__ import annotations

import functools
import gzip
import http.server
import json
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlencode, urljoin, urlsplit

import bs4
import nbformat
import playground_states
import pytest
import yaml
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import sync_playwright

from moe_course.costs.playground import answer

ROOT = Path(__file__).resolve().parents[1]
HTML = ROOT / "_build" / "html"
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PHONE = {"width": 390, "height": 844}
DESKTOP = {"width": 1280, "height": 900}


def toc_pages() -> list[str]:
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    files = [
        toc["root"],
        *(chapter["file"] for part in toc["parts"] for chapter in part["chapters"]),
    ]
    return [file.removesuffix(".md").removesuffix(".ipynb") for file in files]


PAGES = toc_pages()
PLAYGROUND = "book/choosing/playground.html"
NOTEBOOKS = [page for page in PAGES if (ROOT / f"{page}.ipynb").exists()]


@pytest.fixture(scope="module")
def book() -> Path:
    built = subprocess.run(
        [sys.executable, "book/build.py"], cwd=ROOT, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return HTML


@pytest.fixture(scope="module")
def soups(book: Path) -> dict[str, Any]:
    """Every built page, parsed, by its path from the root of the site."""
    return {
        path.relative_to(book).as_posix(): bs4.BeautifulSoup(
            path.read_text(encoding="utf8"), "html.parser"
        )
        for path in sorted(book.rglob("*.html"))
        if "_static" not in path.parts
    }


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def site(book: Path) -> Iterator[str]:
    handler = functools.partial(QuietHandler, directory=str(book))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = [
        path
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (path := shutil.which(name))
    ]
    if not found:
        pytest.skip("no Chromium on this machine (Debian: apt install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found[0], args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A fresh profile: nothing kept from other tests."""
    context = browser.new_context(viewport=DESKTOP, color_scheme="light")
    context.set_default_timeout(10_000)
    yield context.new_page()
    context.close()


@dataclass
class Visit:
    """What one look at a page brought to light."""

    console: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    formulas: int = 0
    bad_formulas: list[str] = field(default_factory=list)
    broken_images: list[str] = field(default_factory=list)
    phone_width: int = 0
    too_wide: list[str] = field(default_factory=list)
    violations: dict[str, list[str]] = field(default_factory=dict)
    done_buttons: int = 0


LOOK = """async () => {
  while (document.querySelector("[aria-busy=true]")) await new Promise(done => setTimeout(done, 50));
  if (window.MathJax?.startup) await MathJax.startup.promise;
  const settled = image => image.complete || new Promise(done => { image.onload = image.onerror = done; });
  await Promise.all([...document.images].map(settled));
  for (const details of document.querySelectorAll("details")) details.open = true;
  const formulas = [...document.querySelectorAll("article .math")];
  const rendered = node => {
    const box = node.querySelector("mjx-container")?.getBoundingClientRect();
    return box && box.width > 0 && box.height > 0 && !node.querySelector("mjx-merror, [data-mjx-error]");
  };
  return {
    formulas: formulas.length,
    bad_formulas: formulas.filter(node => !rendered(node)).map(node => node.textContent.slice(0, 80)),
    broken_images: [...document.images].filter(i => i.getClientRects().length && !i.naturalWidth).map(i => i.src),
    done_buttons: document.querySelectorAll(".page-done button").length,
  };
}"""
WIDE = """() => {
  const clips = node => ["auto", "scroll", "hidden"].includes(getComputedStyle(node).overflowX);
  const scrolls = node => node && (clips(node) || scrolls(node.parentElement));
  return {
    phone_width: document.documentElement.scrollWidth,
    too_wide: [...document.querySelectorAll("body *")]
      .filter(node => node.getBoundingClientRect().right > innerWidth + 1 && !scrolls(node.parentElement))
      .map(node => node.outerHTML.slice(0, 100)),
  };
}"""

# One token of each colour stands for all when contrast is measured: pages of code hold thousands.
THIN = """() => {
  const seen = new Set();
  for (const token of document.querySelectorAll("pre span")) {
    const kind = token.className + token.closest("div.cell_input, div.cell_output, article")?.className;
    if (seen.has(kind)) token.replaceWith(...token.childNodes);
    else seen.add(kind);
  }
}"""


@pytest.fixture(scope="module")
def visits(browser: Any, site: str) -> dict[str, Visit]:
    """Open every page once and look at all that the tests below ask about."""
    context = browser.new_context(
        viewport=DESKTOP, color_scheme="light", reduced_motion="reduce"
    )
    seen = {name: visit(context, site, name) for name in [*PAGES, "search"]}
    context.close()
    return seen


def visit(context: Any, site: str, name: str) -> Visit:
    seen = Visit()
    page = context.new_page()

    def hear(said: Any) -> None:
        if said.type in ("error", "warning"):
            seen.console.append(f"{said.text} ({said.location['url']})")

    page.on("console", hear)
    page.on("pageerror", lambda error: seen.console.append(str(error)))
    page.on(
        "requestfailed",
        lambda request: seen.console.append(f"request failed: {request.url}"),
    )
    page.on("request", lambda request: seen.requests.append(request.url))
    page.goto(f"{site}{name}.html", wait_until="load")
    for key, value in page.evaluate(LOOK).items():
        setattr(seen, key, value)
    page.set_viewport_size(PHONE)
    for key, value in page.evaluate(WIDE).items():
        setattr(seen, key, value)
    page.set_viewport_size(DESKTOP)
    page.evaluate(THIN)
    seen.violations["light"] = serious_violations(page, {})
    page.evaluate("document.documentElement.dataset.theme = 'dark'")
    seen.violations["dark"] = serious_violations(page, {"runOnly": ["color-contrast"]})
    page.close()
    return seen


def serious_violations(page: Any, options: dict[str, Any]) -> list[str]:
    # preload would ask for style sheets at addresses that don't exist; what passes need not be reported in full.
    options = {"preload": False, "resultTypes": ["violations"], **options}
    return [
        f"{violation['id']} ({violation['impact']}): {node['target']} {node['failureSummary']}"
        for violation in Axe().run(page, options=options).response["violations"]
        if violation["impact"] in ("serious", "critical")
        for node in violation["nodes"][:3]
    ]


def collect(visits: dict[str, Visit], what: str) -> str:
    """One line for each finding, with its page: empty when all is well."""
    return "\n".join(
        f"{name}: {finding}"
        for name, seen in visits.items()
        for finding in getattr(seen, what)
    )


# ---- Every page ---------------------------------------------------------------------------------------------


def test_pages_open_without_an_error_or_warning_in_the_console(
    visits: dict[str, Visit],
) -> None:
    assert not collect(visits, "console")


def test_no_request_leaves_this_machine(
    visits: dict[str, Visit], soups: dict[str, Any], site: str
) -> None:
    asked = [(name, url) for name, seen in visits.items() for url in seen.requests]
    assert len(asked) > 10 * len(visits)
    assert not [
        item for item in asked if not item[1].startswith((site, "data:", "blob:"))
    ]
    loaded = [
        (name, url)
        for name, soup in soups.items()
        for tag in soup.find_all(["script", "link", "img", "iframe", "video", "source"])
        for url in [
            tag.get("src")
            or (tag.get("href") if tag.get("rel") != ["canonical"] else None)
        ]
        if url and urlsplit(url).netloc
    ]
    assert not loaded, "these pages would load something from elsewhere"


def test_formulas_are_rendered(visits: dict[str, Visit]) -> None:
    assert sum(seen.formulas for seen in visits.values()) > 0
    assert not collect(visits, "bad_formulas")


def test_images_load_and_have_alt_text(
    visits: dict[str, Visit], soups: dict[str, Any]
) -> None:
    assert not collect(visits, "broken_images")
    images = [
        (name, image)
        for name, soup in soups.items()
        for image in soup.select("article img")
    ]
    assert images
    assert not [
        (name, image.get("src"))
        for name, image in images
        if not (image.get("alt") or "").strip()
    ]
    generic = re.compile(
        r"(\.\./|_images/|.*\.(png|svg|jpe?g)$)"
    )  # Sphinx's stand-in for a missing text is the file name
    assert not [
        (name, image["alt"]) for name, image in images if generic.match(image["alt"])
    ]
    assert not [
        name
        for name, soup in soups.items()
        for image in soup.find_all("img")
        if image.get("alt") is None
    ]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_no_serious_accessibility_violation(
    visits: dict[str, Visit], theme: str
) -> None:
    found = [
        f"{name}: {violation}"
        for name, seen in visits.items()
        for violation in seen.violations[theme]
    ]
    assert not found, "\n".join(found)


def test_no_page_scrolls_sideways_on_a_phone(visits: dict[str, Visit]) -> None:
    wide = {
        name: seen.too_wide[:3]
        for name, seen in visits.items()
        if seen.phone_width > PHONE["width"]
    }
    assert not wide


def test_pages_are_light(book: Path, soups: dict[str, Any]) -> None:
    """What a browser fetches for a page, compressed, is below 1.5 MB; the playground brings a Python of its own."""
    for name, soup in soups.items():
        loaded = [
            tag.get("src") or tag.get("href")
            for tag in soup("script") + soup("img") + soup("link")
        ]
        files = {book / name} | {
            book / unquote(urlsplit(urljoin(name, address)).path)
            for address in loaded
            if address
            and not urlsplit(address).scheme
            and not address.endswith(".html")
        }
        sent = sum(
            min(file.stat().st_size, len(gzip.compress(file.read_bytes())))
            for file in files
            if file.is_file()
        )
        assert sent < 1.5e6 or "playground" in name, f"{name}: {sent / 1e6:.2f} MB"
        scripts = [tag.get("src", "") for tag in soup("script")]
        assert not any("fontawesome" in script for script in scripts), name


def test_links_and_anchors_resolve(book: Path, soups: dict[str, Any]) -> None:
    ids = {
        name: {tag["id"] for tag in soup.find_all(id=True)}
        for name, soup in soups.items()
    }
    checked, broken = 0, []
    for name, soup in soups.items():
        targets = [
            tag.get("href") or tag.get("src")
            for tag in soup.find_all(["a", "img", "script", "link"])
        ]
        targets += [
            tag["content"].partition("url=")[2]
            for tag in soup.find_all("meta", {"http-equiv": "Refresh"})
        ]
        for target in filter(None, targets):
            url = urlsplit(urljoin(name, target))
            if url.scheme or url.netloc or target == "#":
                continue
            checked += 1
            path, anchor = unquote(url.path) or name, unquote(url.fragment)
            if path == PLAYGROUND and "=" in anchor:
                continue  # a state, which tests/test_playground.py checks
            path = path if path in soups else path.removeprefix("./")
            if not (book / path).is_file() or (
                anchor and path in ids and anchor not in ids[path]
            ):
                broken.append(f"{name}: {target}")
    assert checked > 100
    assert not broken, "\n".join(sorted(set(broken)))


def test_every_reference_has_an_identifier() -> None:
    entries = (ROOT / "book/references.bib").read_text(encoding="utf-8").split("\n@")
    assert len(entries) > 50
    for entry in entries:
        assert re.search(r"\b(eprint|doi|url|isbn)\s*=", entry), entry[:60]


def test_figures_and_equations_are_numbered(soups: dict[str, Any]) -> None:
    figures, equations = [], []
    for page in PAGES:
        soup = soups[f"{page}.html"]
        for figure in soup.select("article figure"):
            number = figure.select_one("figcaption .caption-number")
            assert number, (
                f"{page}: a figure without caption and number: {figure.find('img')['alt']}"
            )
            figures.append(number.text.strip())
        for equation in soup.select("article div.math[id]"):
            number = equation.select_one(".eqno")
            assert number, f"{page}: {equation['id']} has no number"
            equations.append(re.sub(r"\D", "", number.text))
    assert figures == [f"Figure {n}" for n in range(1, len(figures) + 1)]
    assert equations == [str(n) for n in range(1, len(equations) + 1)]
    assert figures
    assert equations


def test_every_figure_of_a_notebook_is_on_its_page(soups: dict[str, Any]) -> None:
    # A figure that a cell draws but does not show leaves no trace and no error.
    wanted, shown = [], []
    for page in NOTEBOOKS:
        cells = nbformat.read(ROOT / f"{page}.ipynb", as_version=4).cells
        # A cell names the record without which it says "not measured yet" and draws nothing.
        figures = [
            cell.metadata.get("mystnb", {}).get("figure")
            for cell in cells
            if (ROOT / cell.metadata.get("record", "")).exists()
        ]
        wanted += [(page, figure["name"]) for figure in figures if figure]
        found = soups[f"{page}.html"].select("article figure[id]")
        shown += [(page, figure["id"]) for figure in found if figure.select_one("img")]
    assert sorted(shown) == sorted(wanted)
    assert wanted


def test_a_figure_opens_in_full_size(page: Any, site: str) -> None:
    page.set_viewport_size(PHONE)
    page.goto(f"{site}/book/concepts/two_bets.html")
    link = page.locator("article figure a.full-size").first
    natural = link.locator("img").evaluate("image => image.naturalWidth")
    link.click()
    page.wait_for_url("**/*.png")
    assert natural > PHONE["width"]


def test_pages_describe_themselves_for_sharing(soups: dict[str, Any]) -> None:
    for page in PAGES:
        tags = {
            tag["property"]: tag["content"]
            for tag in soups[f"{page}.html"].find_all("meta", property=True)
        }
        assert tags.get("og:title"), page
        assert tags.get("og:type") == "website", page
        assert tags.get("og:site_name") == "Dense and Sparse", page
        assert urlsplit(tags.get("og:url", "https://nowhere")).scheme == "https", page


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_page_offers_its_notebook(page: Any, site: str, name: str) -> None:
    page.goto(f"{site}{name}.html")
    href = page.locator("a.btn-download-source-button").first.get_attribute("href")
    downloaded = page.request.get(urljoin(page.url, href))
    assert downloaded.ok
    notebook = nbformat.reads(downloaded.text(), as_version=4)
    nbformat.validate(notebook)
    assert notebook == nbformat.read(ROOT / f"{name}.ipynb", as_version=4)


# ---- What a reader does -------------------------------------------------------------------------------------


def test_the_first_address_leads_to_the_landing_page(
    page: Any, site: str, book: Path
) -> None:
    for address in (f"{site}index.html", (book / "index.html").as_uri()):
        page.goto(address)
        page.wait_for_url(f"**/{PAGES[0]}.html")
        assert page.locator("article h1").is_visible()


def test_search_finds_a_term(page: Any, site: str) -> None:
    page.goto(f"{site}{PAGES[0]}.html")
    page.keyboard.press("Control+k")
    page.locator("#search-input").press_sequentially("router")
    page.keyboard.press("Enter")
    page.wait_for_url("**/search.html?q=router")
    results = page.locator("#search-results ul.search li a")
    results.first.wait_for()
    assert any(
        "/book/" in link
        for link in results.evaluate_all("links => links.map(link => link.href)")
    )
    page.goto(f"{site}search.html?q=zzqqxx")
    page.get_by_text("did not match any documents").wait_for()


def test_theme_toggle_changes_the_page_and_is_remembered(page: Any, site: str) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    page.goto(f"{site}{PAGES[0]}.html")
    assert page.evaluate(background) == "rgb(255, 255, 255)"
    for _ in range(3):  # auto, light, dark in an order that depends on the system
        if page.evaluate("document.documentElement.dataset.theme") == "dark":
            break
        page.locator("button.theme-switch-button:visible").click()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    dark = page.evaluate(background)
    assert dark != "rgb(255, 255, 255)"
    page.goto(f"{site}{PAGES[1]}.html")
    assert page.evaluate(background) == dark


def with_minutes(soups: dict[str, Any]) -> list[str]:
    pages = [
        page for page in PAGES if soups[f"{page}.html"].select("article [data-minutes]")
    ]
    assert len(pages) >= 3
    return pages


def test_progress_is_kept_and_can_be_cleared(
    page: Any, site: str, soups: dict[str, Any]
) -> None:
    counted = with_minutes(soups)
    first, second = counted[:2]
    page.goto(f"{site}{first}.html")
    page.get_by_role("button", name="Mark this page as done").click()
    page.reload()
    page.get_by_role("button", name="Mark as not done").wait_for()
    assert page.locator(".bd-sidebar-primary .done-mark").count() == 1

    page.goto(f"{site}{PAGES[0]}.html")
    box = page.locator("#course-progress")
    total = sum(
        int(soups[f"{name}.html"].select_one("[data-minutes]")["data-minutes"])
        for name in counted
    )
    done = int(soups[f"{first}.html"].select_one("[data-minutes]")["data-minutes"])
    left = total - done
    text = box.inner_text()
    assert f"1 of {len(counted)} pages done" in text
    assert (f"{left // 60} h" if left >= 60 else f"{left} min") in text
    assert "stays in this browser" in text
    assert box.locator("progress").evaluate("bar => [bar.value, bar.max]") == [
        done,
        total,
    ]
    link = box.get_by_role("link", name="Continue with")
    assert link.get_attribute("href").endswith(f"/{second}.html")

    page.on("dialog", lambda dialog: dialog.accept())
    box.get_by_role("button", name="Clear my progress").click()
    box.locator("p", has_text=f"0 of {len(counted)} pages done").wait_for()
    assert page.locator(".done-mark").count() == 0
    page.goto(f"{site}{first}.html")
    page.get_by_role("button", name="Mark this page as done").wait_for()


def test_the_map_shows_every_page_of_every_part_and_ticks_what_is_done(
    page: Any, site: str, soups: dict[str, Any]
) -> None:
    parts = yaml.safe_load((ROOT / "_toc.yml").read_text())["parts"][1:-1]
    shown = soups[f"{PAGES[0]}.html"].select(".course-map section")
    assert [card.h3.text for card in shown] == [part["caption"] for part in parts]
    for card, part in zip(shown, parts, strict=True):
        assert len(card.p.text) > 20
        pages = [chapter["file"] for chapter in part["chapters"]]
        links = [urljoin(f"{PAGES[0]}.html", a["href"]) for a in card.select("li a")]
        assert links == [f"{name}.html" for name in pages]
        for name, item in zip(pages, card.select("li"), strict=True):
            minutes = soups[f"{name}.html"].select_one("article [data-minutes]")
            stated = f"{minutes['data-minutes']} min" if minutes else ""
            assert item.text.endswith(stated or item.a.text)
    page.goto(f"{site}{pages[-1]}.html")
    page.get_by_role("button", name="Mark this page as done").click()
    page.goto(f"{site}{PAGES[0]}.html")
    ticked = page.locator(".course-map a", has=page.locator(".done-mark"))
    ticked.wait_for()
    assert ticked.count() == 1
    assert pages[-1] in str(ticked.get_attribute("href"))


def test_pages_with_minutes_can_be_marked_as_done_and_no_others(
    visits: dict[str, Visit], soups: dict[str, Any]
) -> None:
    counted = with_minutes(soups)
    assert {name: seen.done_buttons for name, seen in visits.items()} == {
        name: name in counted for name in visits
    }


def test_pages_read_the_same_without_storage_and_without_javascript(
    browser: Any, site: str, soups: dict[str, Any]
) -> None:
    name = with_minutes(soups)[0]
    blocked = browser.new_context()
    blocked.add_init_script(
        """const get = Storage.prototype.getItem;
        Storage.prototype.getItem = function (key) {
          if (key.startsWith("moe-course")) throw new DOMException("blocked", "SecurityError");
          return get.call(this, key);
        };"""
    )
    page = blocked.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(f"{site}{name}.html")
    assert page.locator("article h1").is_visible()
    assert page.locator(".page-done").count() == 0
    page.goto(f"{site}{PAGES[0]}.html")
    assert not page.locator("#course-progress").inner_text()
    assert not errors
    blocked.close()

    plain = browser.new_context(java_script_enabled=False)
    page = plain.new_page()
    page.goto(f"{site}{name}.html")
    assert page.locator("article h1").is_visible()
    assert page.locator(".page-card").is_visible()
    plain.close()


def test_the_slider_of_a_load_moves_its_bars(
    page: Any, browser: Any, site: str
) -> None:
    address = f"{site}book/balancing/collapse.html"
    heights = "bars => bars.map(bar => Number(bar.getAttribute('height')))"
    page.goto(address)
    bars = page.locator(".load-scrubber .bar")
    last = bars.evaluate_all(heights)
    slider = page.locator(".load-scrubber input")
    slider.focus()
    slider.press("Home")
    first = bars.evaluate_all(heights)
    assert first != last
    assert sum(first) == pytest.approx(sum(last), rel=0.01)  # shares of a whole
    assert page.locator(".load-scrubber output").inner_text() == "20"
    slider.press("End")
    assert bars.evaluate_all(heights) == last
    # Without JavaScript: the last state, and a slider that does not pretend.
    plain = browser.new_context(java_script_enabled=False)
    page = plain.new_page()
    page.goto(address)
    assert page.locator(".load-scrubber .bar").evaluate_all(heights) == last
    assert page.locator(".load-scrubber input").is_disabled()
    plain.close()


def test_a_glossary_word_shows_its_definition(
    page: Any, site: str, soups: dict[str, Any]
) -> None:
    glossary = "book/reference/glossary.html"
    name, href = next(
        (name, link["href"])
        for name, soup in soups.items()
        if name != glossary
        for link in soup.select("article a[href]")
        if "reference/glossary.html#g-" in link["href"]
        and not link.find_parent("details")
    )
    term = soups[glossary].find(id=href.partition("#")[2])
    assert term, f"the glossary has no {href}"
    page.goto(f"{site}{name}")
    link = page.locator(f'article a[href="{href}"]').first
    tip = page.locator("[role=tooltip]")
    for show in (link.hover, link.focus):
        show()
        tip.wait_for()
        assert len(tip.inner_text()) > 20
        first_words = " ".join(term.get_text(" ", strip=True).split()[:1])
        assert first_words in tip.inner_text()
        assert link.get_attribute("aria-describedby") == tip.get_attribute("id")
        page.keyboard.press("Escape")
        tip.wait_for(state="detached")
        page.mouse.move(0, 0)


def test_paper_shows_the_answers_and_no_sidebar(
    page: Any, site: str, soups: dict[str, Any]
) -> None:
    name = next(name for name, soup in soups.items() if soup.select("article details"))
    page.goto(f"{site}{name}")
    closed = "document.querySelectorAll('article details:not([open])').length"
    before = page.evaluate(closed)
    assert before > 0
    page.evaluate("document.documentElement.dataset.theme = 'dark'")
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate(closed) == 0
    assert page.evaluate("document.documentElement.dataset.theme") == "light"
    assert not page.locator(".bd-sidebar-primary").is_visible()
    assert not page.locator(".prev-next-footer").is_visible()
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.evaluate(closed) == before
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    # Code that only draws a figure stays off the paper; the figure does not.
    page.goto(f"{site}book/finetuning/drift.html")
    assert page.locator("details.hide").is_visible() is False
    assert page.locator("figure img").first.is_visible()


# ---- The playground: its answers are checked in test_playground.py, here that the page gives the same ------------


@pytest.fixture(scope="module")
def runtime(book: Path) -> None:
    if not (book / "_static/playground/pyodide/pyodide.mjs").exists():
        pytest.skip("the book was built without Pyodide (no network?)")


@pytest.fixture
def playground(page: Any, site: str, runtime: None) -> Any:
    """The page, with Python started."""
    return open_playground(page, site)


def open_playground(page: Any, site: str, state: str = "") -> Any:
    page.goto(f"{site}{PLAYGROUND}{state}")
    page.locator(".pg-form fieldset:enabled").first.wait_for(timeout=120_000)
    return page


SHOWN = """() => {
  const texts = (root, what) => [...root.querySelectorAll(what)].map(node => node.textContent);
  const table = node => ({
    caption: node.querySelector("caption").textContent,
    head: texts(node.querySelector("thead"), "th, td"),
    rows: [...node.querySelectorAll("tbody tr")].map(row => texts(row, "th, td")),
  });
  const errors = [...document.querySelectorAll(".pg-error")].filter(node => node.textContent);
  return {
    summary: texts(document, ".pg-summary p"),
    tables: [...document.querySelectorAll(".pg-tables table")].map(table),
    charts: [...document.querySelectorAll(".pg-numbers table")].map(table),
    alts: [...document.querySelectorAll(".pg-chart svg")].map(node => node.getAttribute("aria-label")),
    errors: Object.fromEntries(errors.map(node => [node.id.slice(3, -6), node.textContent])),
  };
}"""
SET = """state => new Promise(done => {
  addEventListener("popstate", () => done(true), { once: true });
  location.hash = state;
})"""


def expected(state: dict[str, str]) -> dict[str, Any]:
    """What the page must show for a state, by the same function in this Python."""
    found = answer(state)
    if found["errors"]:
        return {"errors": found["errors"]}
    lines = found["charts"]["lines"]
    charts = [
        {
            "caption": f"{chart['title']}, {chart['unit']}",
            "head": ["Batch", *chart["names"]],
            "rows": [
                [f"{points[0][0]:,}", *(cell(point) for point in points)]
                for points in zip(*chart["lines"], strict=True)
            ],
        }
        for chart in lines
    ]
    tables = [
        {key: table[key] for key in ("caption", "head", "rows")}
        for table in found["tables"]
    ]
    return {
        "summary": found["summary"],
        "tables": tables,
        "charts": charts,
        "errors": {},
    }


def cell(point: list[Any]) -> str:
    _, _, text, bound, fits = point
    waits = ", arithmetic" if bound == "compute" else ""
    return f"{text}{waits}{'' if fits else ', does not fit'}"


def test_the_playground_shows_what_the_package_answers(playground: Any) -> None:
    # 60 states by their links, answered by Pyodide and by this Python.
    for state in playground_states.states(seed=11, count=60):
        playground.evaluate(SET, urlencode(state))
        shown = playground.evaluate(SHOWN)
        alts = shown.pop("alts")
        assert shown == expected(state), state
        charts = answer(state)["charts"]["lines"]
        assert alts[: len(charts)] == [chart["alt"] for chart in charts]
        assert len(alts) == len(charts) + 1


def test_the_playground_runs_the_package_s_own_files(site: str, book: Path) -> None:
    with zipfile.ZipFile(book / "_static/playground/moe_course.zip") as packed:
        assert len(packed.namelist()) > 10
        for name in packed.namelist():
            assert packed.read(name) == (ROOT / name).read_bytes(), name


def test_a_link_to_the_playground_restores_everything(
    playground: Any, browser: Any, site: str
) -> None:
    config = json.dumps(playground_states.CONFIGS[2], indent=2)
    playground.get_by_label("Model", exact=True).select_option("config")
    playground.locator("#pg-config").fill(config)
    playground.get_by_label("Other model", exact=True).select_option("typed")
    playground.locator("#pg-other_experts").fill("0")
    playground.get_by_label("GPU", exact=True).select_option("L4")
    playground.get_by_text("Precision and use").click()
    playground.get_by_label("KV cache", exact=True).select_option("8")
    playground.locator("#pg-batch").fill("77")
    playground.locator("#pg-batch").press("Enter")
    state = {
        "model": "config", "config": config, "other": "typed", "other_experts": "0",
        "gpu": "L4", "cache": "8", "batch": "77",
    }  # fmt: skip
    assert dict(parse_qsl(urlsplit(playground.url).fragment)) == state
    before = playground.evaluate(SHOWN)
    assert {k: before[k] for k in ("summary", "tables")}.items() <= expected(
        state
    ).items()

    context = browser.new_context()
    other = open_playground(
        context.new_page(), site, f"#{urlsplit(playground.url).fragment}"
    )
    assert other.evaluate(SHOWN) == before
    assert other.locator("#pg-config").input_value() == config
    assert other.locator("#pg-batch").input_value() == "77"
    assert other.locator("#pg-other_experts").is_visible()
    assert not other.locator("#pg-layers").is_visible()
    context.close()


def test_back_and_forward_walk_through_finished_changes(playground: Any) -> None:
    batch = playground.locator("#pg-batch")
    slider = playground.get_by_label("Batch: sequences at once, in powers of two")
    batch.fill("100")
    batch.press("Tab")
    slider.focus()
    slider.press("End")
    slider.press("ArrowLeft")
    assert batch.input_value() == "2048"
    shown = playground.evaluate(SHOWN)
    assert "2,048 sequences" in shown["summary"][0]
    for step, wanted in (("back", "4096"), ("back", "100"), ("forward", "4096")):
        getattr(playground, f"go_{step}")()
        assert batch.input_value() == wanted
    playground.go_back()
    # A link to a place of the page leaves the state alone, and in the address.
    playground.evaluate("location.hash = 'summary'")
    playground.wait_for_function("location.hash === '#batch=100'")
    assert batch.input_value() == "100"
    playground.get_by_role("button", name="Start over").click()
    assert batch.input_value() == "32"
    assert not urlsplit(playground.url).fragment


def test_what_the_playground_cannot_use_is_said_beside_it_and_nothing_is_lost(
    playground: Any,
) -> None:
    before = playground.evaluate(SHOWN)
    playground.get_by_label("Model", exact=True).select_option("config")
    box = playground.locator("#pg-config")
    box.fill('{"model_type": "mixtral",')
    said = playground.locator("#pg-config-error")
    said.filter(has_text="This is not JSON").wait_for()
    assert said.evaluate("node => node.parentElement.contains(document.activeElement)")
    assert box.get_attribute("aria-invalid") == "true"
    assert box.get_attribute("aria-describedby") == "pg-config-error"
    assert box.input_value() == '{"model_type": "mixtral",'
    after = playground.evaluate(SHOWN)
    assert after["summary"] == before["summary"]  # the last that could be computed
    assert playground.get_by_text("Not up to date").is_visible()
    # For screen readers as well, once the reader pauses.
    playground.locator("[role=status]", has_text="This is not JSON").wait_for(
        state="attached"
    )
    box.fill(json.dumps(playground_states.CONFIGS[0]))
    playground.locator(".pg-summary", has_text="the pasted model").wait_for()
    assert box.get_attribute("aria-invalid") is None
    assert not playground.get_by_text("Not up to date").is_visible()
    playground.evaluate(SET, "gpu=Z80")
    assert "not in this list" in playground.locator("#pg-gpu-error").inner_text()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_playground_is_accessible_with_all_of_it_open(
    playground: Any, theme: str
) -> None:
    state = {
        "model": "typed", "layers": "x", "other": "typed", "gpu": "typed", "cache": "8",
    }  # fmt: skip
    playground.evaluate(SET, "context=8192&batch=300")
    playground.evaluate(SET, urlencode(state))
    playground.evaluate(
        "theme => document.documentElement.dataset.theme = theme", theme
    )
    playground.evaluate(
        "document.querySelectorAll('#course-playground details').forEach(d => d.open = true)"
    )
    assert playground.locator("#pg-layers-error").is_visible()
    assert not serious_violations(playground, {})
    playground.set_viewport_size(PHONE)
    playground.wait_for_timeout(100)
    wide = playground.evaluate(WIDE)
    assert wide["phone_width"] <= PHONE["width"], wide["too_wide"][:3]


def test_the_playground_as_a_file_and_without_its_runtime_says_what_to_do(
    page: Any, site: str, book: Path, browser: Any, runtime: None
) -> None:
    page.goto((book / PLAYGROUND).as_uri())
    assert "make serve" in page.locator(".pg-state").inner_text()
    assert page.locator("#pg-model").is_disabled()

    def without_runtime(route: Any) -> None:
        body = route.fetch().text()
        route.fulfill(
            body=body.replace('data-runtime="yes"', 'data-runtime="no"'),
            content_type="text/html",
        )

    page.route(f"**/{PLAYGROUND}", without_runtime)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"{site}{PLAYGROUND}")
    assert not [url for url in asked if "/pyodide/" in url]
    assert page.locator("#pg-model").is_disabled()
    page.unroute(f"**/{PLAYGROUND}")

    for lost in ("pyodide.mjs", "pyodide.asm.wasm", "moe_course.zip"):
        page.route(f"**/{lost}", lambda route: route.abort())
        page.goto(f"{site}{PLAYGROUND}")
        said = page.locator(".pg-state", has_text="Python could not be started")
        said.wait_for(timeout=60_000)
        page.unroute(f"**/{lost}")

    plain = browser.new_context(java_script_enabled=False)
    page = plain.new_page()
    page.goto(f"{site}{PLAYGROUND}")
    assert page.locator("#course-playground noscript p").is_visible()
    assert not page.locator(".pg-state").inner_text()
    assert page.locator("#pg-model").is_disabled()
    plain.close()
