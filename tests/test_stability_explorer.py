"""The stability explorer in a browser computes what l2olib.stability computes."""

import json
import re
import shutil
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
from playwright.sync_api import Browser, Page
from problems import complaints_of

from l2olib.stability import NoisyQuadratic, spectral_radius

ROOT = Path(__file__).resolve().parents[1]
SLIDERS = ("nominal", "decay", "preconditioning")
POSITIONS = [
    (0.0, 0.0, 0.0),
    (0.6, 0.0, 0.0),
    (0.6, 0.5, 0.0),
    (0.6, 0.5, 0.5),
    (1.37, 0.25, 1.0),
    (2.0, 1.0, 0.33),
]


def fragment() -> str:
    """Return the piece of HTML by which the chapter asks for the explorer."""
    chapter = nbformat.read(ROOT / "book" / "08-stability-theory.ipynb", as_version=4)
    for cell in chapter.cells:
        found = re.search(r"```\{raw\} html\n(.*?)```", cell.source, flags=re.DOTALL)
        if found and "stability-explorer" in found[1]:
            return found[1]
    raise AssertionError("the chapter does not load the explorer")


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Lay out one page as the book does: its script, plotly, the chapter's HTML."""
    site = tmp_path_factory.mktemp("explorer")
    static = site / "_static"
    shutil.copytree(ROOT / "book" / "_static", static)
    (static / "plotly").mkdir()
    script = distribution("plotly").locate_file("plotly/package_data/plotly.min.js")
    shutil.copy(str(script), static / "plotly")
    path = site / "book" / "page.html"
    path.parent.mkdir()
    path.write_text(
        '<!DOCTYPE html><html lang="en"><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width"><body>{fragment()}',
        encoding="utf-8",
    )
    return path.as_uri()


@pytest.fixture(scope="module")
def page(browser: Browser, address: str) -> Iterator[Page]:
    """Open the page on a telephone without network; fail on any complaint."""
    context = browser.new_context(viewport={"width": 375, "height": 800})
    context.set_offline(True)
    opened = context.new_page()
    complaints = complaints_of(opened)
    opened.goto(address, timeout=120_000)
    opened.wait_for_selector(".stability-explorer .plot svg", timeout=60_000)
    yield opened
    context.close()
    assert not complaints, complaints


def state(page: Page) -> dict[str, Any]:
    """Return what the explorer has computed last."""
    return json.loads(
        page.locator("div.stability-explorer").get_attribute("data-state")
    )


def move(page: Page, position: tuple[float, ...]) -> None:
    """Set the sliders as a user's browser does: a value and an input event."""
    for name, value in zip(SLIDERS, position, strict=True):
        page.locator(f"#stability-{name}").fill(str(value))


def names_of_cases(page: Page) -> list[str]:
    return page.locator("#stability-case option").all_inner_texts()


@pytest.mark.parametrize("position", POSITIONS)
def test_page_and_library_agree(page: Page, position: tuple[float, ...]) -> None:
    """Eigenvalues, radius, descent margin and run, for every blackbox term."""
    nominal, decay, power = position
    for case in names_of_cases(page):
        page.locator("#stability-case").select_option(label=case)
        move(page, position)
        shown = state(page)
        assert tuple(shown[name] for name in SLIDERS) == position
        hessian, blackbox = (
            torch.tensor(shown[k], dtype=torch.float64) for k in ("hessian", "blackbox")
        )
        problem = NoisyQuadratic(hessian, torch.eye(2))
        dynamics = problem.dynamics(
            blackbox, nominal, decay=decay, preconditioning=power
        )
        # the trace and the determinant fix the spectrum, whatever its order
        (re1, im1), (re2, im2) = shown["eigenvalues"]
        found = (complex(re1, im1), complex(re2, im2))
        assert sum(found) == pytest.approx(torch.trace(dynamics).item(), abs=1e-12)
        determinant = torch.linalg.det(dynamics).item()
        assert found[0] * found[1] == pytest.approx(determinant, abs=1e-12)
        radius = spectral_radius(dynamics).item()
        assert shown["radius"] == pytest.approx(radius, abs=1e-7)
        gain = problem.power(-power) @ problem.gain((1 - decay) * blackbox, nominal)
        margin = problem.descent_margin(gain).item()
        assert shown["descentMargin"] == pytest.approx(margin, abs=1e-12)
        path = torch.tensor(shown["path"], dtype=torch.float64)
        steps = torch.zeros(len(path) - 1, 2, dtype=torch.float64)
        expected = problem.simulate(dynamics, path[0], steps)
        torch.testing.assert_close(path, expected)


def test_words_follow_the_numbers(page: Page) -> None:
    """The sentence under the plots says stable exactly when the radius is below 1."""
    page.locator("#stability-case").select_option(index=0)
    verdicts = set()
    for position in POSITIONS:
        move(page, position)
        text = page.locator(".stability-explorer .summary").inner_text()
        stable = state(page)["radius"] < 1
        assert (": stable." in text) == stable
        assert (": not stable." in text) != stable
        assert f"{state(page)['radius']:.3f}" in text
        verdicts.add(stable)
    assert verdicts == {True, False}


def test_crosses_mark_eigenvalues_outside_the_circle(page: Page) -> None:
    """Colour and symbol both tell."""
    symbols = "Plotly => document.querySelector('.plot').data[1].marker.symbol"
    move(page, (0.0, 0.0, 0.0))
    assert page.evaluate(symbols) == ["x", "x"]
    move(page, (0.6, 0.5, 0.5))
    assert page.evaluate(symbols) == ["circle", "circle"]


def test_keyboard_and_buttons_work(page: Page) -> None:
    """Arrow keys move a focused slider by one step; a button sets all three."""
    move(page, (0.5, 0.0, 0.0))
    slider = page.locator("#stability-nominal")
    slider.focus()
    page.keyboard.press("ArrowRight")
    assert state(page)["nominal"] == pytest.approx(0.51)
    page.keyboard.press("Tab")
    page.keyboard.press("End")
    assert state(page)["decay"] == 1.0
    page.get_by_role("button", name="+ preconditioning").press("Enter")
    assert tuple(state(page)[name] for name in SLIDERS) == (0.6, 0.5, 0.5)


def test_controls_have_names_and_fit_a_telephone(page: Page) -> None:
    """Every control is labelled; nothing is wider than 375 px."""
    for name in ("Blackbox term", "Nominal term", "Weight decay", "Preconditioning"):
        assert page.get_by_label(name).count() == 1
    assert page.locator(".plot[role=img][aria-label]").count() == 2
    assert page.evaluate("document.documentElement.scrollWidth") <= 375


def test_without_scripts_the_page_points_to_the_figure(
    page: Page, address: str
) -> None:
    """A reader without JavaScript is told where the static figure is."""
    browser = page.context.browser
    assert browser is not None
    plain = browser.new_context(java_script_enabled=False).new_page()
    plain.goto(address)
    assert "figure above" in plain.locator("div.stability-explorer").inner_text()
