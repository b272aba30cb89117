"""The built book has no broken link, and works from disk without network."""

import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from playwright.sync_api import Browser, BrowserContext, Page
from problems import complaints_of

from l2olib import claims, proofs

ROOT = Path(__file__).resolve().parents[1]


def listed(entry: Any) -> list[str]:
    """Return the pages that a part of _toc.yml names, in order."""
    if isinstance(entry, list):
        return [page for each in entry for page in listed(each)]
    if isinstance(entry, dict):
        own = [entry[key] for key in ("root", "file") if key in entry]
        return own + [
            page
            for key in ("parts", "chapters", "sections")
            for page in listed(entry.get(key, []))
        ]
    return []


PAGES = listed(yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8")))

each_page = pytest.mark.parametrize("name", PAGES)


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the book from nothing, with warnings as errors; return its folder.

    A build from nothing also shows the warnings that Sphinx gives only once.
    """
    output = tmp_path_factory.mktemp("site")
    program = str(Path(sys.executable).with_name("jupyter-book"))
    options = ["-W", "--keep-going", "--path-output", str(output)]
    done = subprocess.run(
        [program, "build", *options, str(ROOT)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return output / "_build" / "html"


class Addresses(HTMLParser):
    """What one page refers to, and what can be referred to in it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect ids and the addresses that are loaded or linked."""
        for key, value in attrs:
            if key in ("id", "name") and value:
                self.anchors.add(value)
            elif key in ("href", "src") and value:
                self.links.add(value)


# Pages


@each_page
def test_page_was_built(site: Path, name: str) -> None:
    """Every page of the table of contents is there, with a title in its article."""
    text = (site / f"{name}.html").read_text(encoding="utf-8")
    assert re.search(r"<article\b.*?<h1\b", text, flags=re.DOTALL)


def test_every_notebook_is_a_page() -> None:
    """A notebook that is not in the table of contents would be seen by nobody."""
    notebooks = {path.stem for path in (ROOT / "book").glob("*.ipynb")}
    assert notebooks <= {Path(name).stem for name in PAGES}


def test_internal_links_resolve(site: Path) -> None:
    """Each address on a page of this site names a file, and an anchor in it."""
    files = [path for path in site.rglob("*.html") if "_static" not in path.parts]
    pages = {path.resolve(): Addresses(path) for path in files}
    broken = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve()
            target = path if not parts.path else target
            anchor = unquote(parts.fragment)
            missing = anchor and target in pages and anchor not in pages[target].anchors
            if not target.exists() or missing:
                broken.append(f"{path.relative_to(site)}: {link}")
    assert not broken, "\n".join(broken)


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    """No page or style sheet of ours loads anything by a network address."""
    found = []
    for path in site.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        found += re.findall(r"<(?:script|img|iframe)\b[^>]*src=\"(?:https?:)?//", text)
        found += re.findall(r"<link\b[^>]*href=\"(?:https?:)?//[^>]*>", text)
        found += re.findall(r"unpkg|jsdelivr|cdnjs", text)
    for path in site.rglob("*.css"):
        text = path.read_text(encoding="utf-8")
        found += re.findall(r"url\([\"']?(?:https?:)?//[^)]*\)", text)
    assert not found


# In a browser, from disk, with the network off


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    """Open a fresh profile without network."""
    fresh = browser.new_context(viewport={"width": 1280, "height": 900})
    fresh.set_offline(True)
    yield fresh
    fresh.close()


@pytest.fixture
def page(context: BrowserContext) -> Iterator[Page]:
    """Open a page that fails the test on any request, error or complaint."""
    fresh = context.new_page()
    complaints = complaints_of(fresh)
    yield fresh
    assert not complaints, "\n".join(complaints)


def show(page: Page, path: Path) -> None:
    """Load a built page and wait until its mathematics, if any, is typeset."""
    page.goto(path.as_uri())
    page.evaluate("async () => window.MathJax?.startup?.promise")


@each_page
def test_page_works_without_network(site: Path, page: Page, name: str) -> None:
    """Formulas are typeset; the fixture sees requests and errors."""
    show(page, site / f"{name}.html")
    formulas = page.locator("article .math").count()
    assert page.locator("article mjx-container").count() >= formulas
    # An error is typeset as such, an unknown macro as its own name in red.
    assert page.locator("article mjx-merror").count() == 0
    unknown = page.locator("article mjx-assistive-mml mtext[mathcolor=red]")
    assert unknown.all_text_contents() == []
    # Code may hold dollars; what else still shows them was not understood.
    page.evaluate("document.querySelectorAll('pre, code').forEach(e => e.remove())")
    assert "$$" not in page.locator("article").inner_text()


@each_page
def test_page_fits_a_telephone(site: Path, page: Page, name: str) -> None:
    """At 375 px nothing moves the page sideways, figures fit or scroll in their own
    line, lists have marks."""
    page.set_viewport_size({"width": 375, "height": 800})
    show(page, site / f"{name}.html")
    wide = page.evaluate(
        """() => [...document.querySelectorAll('body *')]
            .filter(e => e.getBoundingClientRect().right > innerWidth + 1
                && getComputedStyle(e).position !== 'fixed')
            .slice(0, 5).map(e => e.outerHTML.slice(0, 120))"""
    )
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= 375, f"{width} px wide; candidates: {wide}"
    scrolls = "e => getComputedStyle(e).overflowX === 'auto'"
    for image in page.locator("article img").all():
        box, frame = image.bounding_box(), image.locator("xpath=ancestor::figure")
        if frame.count() and frame.evaluate(scrolls):
            box = frame.bounding_box()
        assert box and box["x"] + box["width"] <= 375
    # Marks stand outside of their item, which must not cut them off.
    cut = "li => getComputedStyle(li).overflowX !== 'visible'"
    assert not page.evaluate(
        f"() => [...document.querySelectorAll('article li')].some({cut})"
    )


def test_search_works_from_disk(site: Path, page: Page) -> None:
    """A word of the title is found."""
    page.goto((site / "search.html").as_uri() + "?q=optimizers")
    page.locator("#search-results li a").first.wait_for(timeout=10_000)
    assert page.locator("#search-results li a").count() > 0


def test_figures_have_text_for_those_who_do_not_see_them(site: Path) -> None:
    """Every picture of a page has a non-empty alternative text."""
    for path in (site / "book").rglob("*.html"):
        for tag in re.findall(r"<img\b[^>]*>", path.read_text(encoding="utf-8")):
            assert re.search(r'alt="[^"]+"', tag), f"{path.name}: {tag}"


def test_appendices_show_every_row_and_every_theorem(site: Path) -> None:
    """Nothing is lost between the library's lists and the two pages made of them."""
    ledger = (site / "book" / "a3-ledger.html").read_text(encoding="utf-8")
    for claim in claims.LEDGER:
        assert f'#row-{claim.id}">{claim.id}</a>' in ledger, claim.id
    errata = (site / "book" / "a1-errata.html").read_text(encoding="utf-8")
    for notebook in sorted((ROOT / "book").glob("[0-9]*.ipynb")):
        if proofs.proof_code(notebook).strip():
            for theorem in proofs.load(notebook):
                assert f'href="{notebook.stem}.html#{theorem.label}"' in errata
