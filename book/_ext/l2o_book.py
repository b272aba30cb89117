"""Sphinx extension: the built book works from disk, with no network, in any browser.

It also labels the bibliography as the text cites, and keeps numbers in tables whole.
"""

# docutils and pybtex come without types.
# mypy: disable-error-code="import-untyped"

import re
from collections.abc import Iterable, Iterator
from importlib.metadata import distribution
from pathlib import Path
from shutil import copyfile
from types import SimpleNamespace
from typing import Any

from docutils import nodes
from pybtex.plugin import register_plugin
from pybtex.style.formatting.unsrt import Style
from pybtex.style.labels import BaseLabelStyle
from pybtex.style.sorting import BaseSortingStyle
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinxcontrib.bibtex.style.referencing import PersonStyle

SCRIPT = "tex-mml-chtml.js"
FONTS = "output/chtml/fonts/woff-v2"
INDEX = "book/index"
PERSONS = PersonStyle()

# What no line of a table may break: a number with its sign, exponent and unit, two of
# them with what joins them, the widths of a network.
VALUE = r"[-−+±]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]?\d+|·10[⁻⁰¹²³⁴-⁹]+)?%?"
JOINED = rf"{VALUE}(?:(?: ± | of | to | × |–){VALUE})*(?: (?:nat|min|h|years|seeds))?"
WHOLE = re.compile(rf"(?<![\w.,–-])(\d+(?:-\d+)+|(?:p [=<] )?{JOINED})(?!\w)")
SHORT, LONG, TEXT = 14, 24, 60  # characters of a cell


def cited_as(entry: Any) -> str:
    """Return how the text cites an entry: Chamberlain et al., 1982."""
    names = PERSONS.author_or_editor_or_title(full=False)
    who = names.format_data({"entry": entry, "style": SimpleNamespace(person=PERSONS)})
    return f"{who}, {entry.fields['year']}"


class AuthorYearLabels(BaseLabelStyle):
    """Labels of the bibliography that read as the citations do."""

    def format_labels(self, sorted_entries: Iterable[Any]) -> Iterator[str]:
        """Return the labels of the entries; pybtex calls this."""
        return map(cited_as, sorted_entries)


class AuthorYearSorting(BaseSortingStyle):
    """The order of these labels."""

    def sorting_key(self, entry: Any) -> str:
        """Return what an entry is sorted by; pybtex calls this."""
        return cited_as(entry).casefold()


class AuthorYearStyle(Style):
    """The style ``author_year``, for ``bibtex_default_style``."""

    default_sorting_style = AuthorYearSorting
    default_label_style = AuthorYearLabels


def drop_thebe(app: Sphinx, config: Config) -> None:
    """Take the live-code scripts out of every page.

    Jupyter Book loads them in any case and emits their configuration twice, which is a
    JavaScript error on each page, and they name a remote address.
    """
    unwanted = {"init_thebe_core", "update_thebe_context"}
    for listeners in app.events.listeners.values():
        listeners[:] = [
            each
            for each in listeners
            if getattr(each.handler, "__name__", "") not in unwanted
        ]


def add_style(app: Sphinx, config: Config) -> None:
    """Add the book's own style sheet; Jupyter Book looks for one only at the root."""
    config.html_static_path.append(str(Path(__file__).parents[1] / "_static"))
    app.add_css_file("l2o_book.css")


def load_mathematics_everywhere(app: Sphinx) -> None:
    """Have the one-page book load MathJax.

    Sphinx decides by the root page alone, which has no equation.
    """
    if app.builder.name == "singlehtml":
        app.set_html_assets_policy("always")


def mend_bibliography_roles(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: object
) -> None:
    """Replace a deprecated ARIA role that docutils writes for bibliography entries."""
    if "body" in context:
        context["body"] = context["body"].replace(
            'role="doc-biblioentry"', 'role="listitem"'
        )


def copy_mathematics(app: Sphinx, failure: Exception | None) -> None:
    """Copy the part of MathJax that the pages use: 2 MB instead of 24."""
    if failure is not None or app.builder.format != "html":
        return
    target = Path(app.outdir, "_static", "mathjax")
    for file in distribution("sphinx-mathjax-offline").files or []:
        _, _, name = file.as_posix().partition("static/mathjax/")
        if name == SCRIPT or name.startswith(FONTS):
            path = target / name
            path.parent.mkdir(parents=True, exist_ok=True)
            copyfile(str(file.locate()), path)


def copy_plotting(app: Sphinx, failure: Exception | None) -> None:
    """Copy plotly's script, which the stability explorer loads, from its package."""
    if failure is not None or app.builder.format != "html":
        return
    target = Path(app.outdir, "_static", "plotly")
    target.mkdir(parents=True, exist_ok=True)
    script = "plotly/package_data/plotly.min.js"
    copyfile(str(distribution("plotly").locate_file(script)), target / "plotly.min.js")


def list_experiments(app: Sphinx, page: str, source: list[str]) -> None:
    """Write the table of experiments, from the records as they are now."""
    if page == INDEX:
        from l2olib.experiments import table

        source[0] = source[0].replace("<!-- experiments -->", table())


def mark_cells(app: Sphinx, doctree: nodes.document, page: str) -> None:
    """Mark what the style sheet cannot see in tables: whole numbers, and long cells."""
    for cell in doctree.findall(nodes.entry):
        shown = [
            text for text in cell.findall(nodes.Text) if text.parent.tagname != "raw"
        ]
        words = "".join(shown)
        if len(words) > LONG:
            cell["classes"].append("text" if len(words) > TEXT else "long")
        elif len(words) <= SHORT and (" " not in words or WHOLE.match(words)):
            cell["classes"].append("whole")
        for text in shown:
            if text.parent.tagname not in ("literal", "math"):
                parts = [
                    nodes.inline("", part, classes=["whole"])
                    if WHOLE.fullmatch(part) and re.search("[ –-]", part)
                    else nodes.Text(part)
                    for part in WHOLE.split(text)
                ]
                text.parent.replace(text, parts)


def reread_index(app: Sphinx, env: object, *changed: set[str]) -> list[str]:
    """Have the front page read in every build: records may have come."""
    return [INDEX]


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the above; called by Sphinx."""
    register_plugin("pybtex.style.formatting", "author_year", AuthorYearStyle)
    app.config.mathjax_path = f"mathjax/{SCRIPT}"
    app.connect("config-inited", drop_thebe)
    app.connect("config-inited", add_style)
    app.connect("builder-inited", load_mathematics_everywhere)
    app.connect("source-read", list_experiments)
    app.connect("env-get-outdated", reread_index)
    app.connect("doctree-resolved", mark_cells)
    app.connect("html-page-context", mend_bibliography_roles)
    app.connect("build-finished", copy_mathematics)
    app.connect("build-finished", copy_plotting)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
