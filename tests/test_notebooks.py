"""The committed notebooks: form, parameters, and that the checks on them can fail."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import notebooks
import papermill
import pytest
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[1]
BOOK = ROOT / "book"
TOOL = BOOK / "_tools" / "notebooks.py"
NOTEBOOKS = sorted(BOOK.glob("*.ipynb"))

MAX_FIGURE_BYTES = 100_000
MAX_TEXT_BYTES = 250_000
MAX_LINES = 25
# A chapter is to take 30 s at profile smoke on a core of its own.
SMOKE_SECONDS = 90

every_notebook = pytest.mark.parametrize(
    "path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS]
)


def code_cells(path: Path) -> list[NotebookNode]:
    """Return the code cells of a notebook."""
    cells = nbformat.read(path, as_version=4).cells
    return [cell for cell in cells if cell.cell_type == "code"]


def parameter_names(path: Path) -> list[str]:
    """Return the names that the first code cell of a notebook declares."""
    body = ast.parse(code_cells(path)[0].source).body
    return [
        ast.unparse(each.target) for each in body if isinstance(each, ast.AnnAssign)
    ]


def speaks(source: str) -> bool:
    """Say whether a cell surely shows something when it runs.

    That is a call of print, display or plt.show outside of functions and branches, or
    a plain expression at the end.
    """

    def called(body: list[ast.stmt]) -> Iterator[str]:
        for each in body:
            if isinstance(each, ast.For | ast.With):
                yield from called(each.body)
            elif isinstance(each, ast.Expr) and isinstance(each.value, ast.Call):
                yield ast.unparse(each.value.func)

    body = ast.parse(source).body
    last = body[-1] if body else None
    if isinstance(last, ast.Expr) and not isinstance(last.value, ast.Call):
        return True
    return not {"print", "display", "plt.show"}.isdisjoint(called(body))


def run_tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the notebook tool as a reader would, with no way out to the network."""
    nowhere = "http://127.0.0.1:9"
    offline = {"HTTP_PROXY": nowhere, "HTTPS_PROXY": nowhere, "NO_PROXY": "127.0.0.1"}
    return subprocess.run(
        [sys.executable, str(TOOL), *arguments],
        env=os.environ | offline | {key.lower(): v for key, v in offline.items()},
        capture_output=True,
        text=True,
        timeout=SMOKE_SECONDS,
    )


# Form


@every_notebook
def test_first_code_cell_declares_the_parameters(path: Path) -> None:
    """It is tagged, and every line is typed and has a comment; profile comes first."""
    cell = code_cells(path)[0]
    assert "parameters" in cell.metadata.get("tags", [])
    for line in cell.source.splitlines():
        # papermill does not see a parameter whose type has a "|" in it.
        assert re.fullmatch(r"\w+: [\w\[\], ]+ = .+  # .+", line), line
    assert parameter_names(path)[0] == "profile"
    assert '"record"' in cell.source.splitlines()[0]


@every_notebook
def test_every_cell_was_executed_and_shows_its_output(path: Path) -> None:
    """Nbval passes a cell without stored output, whatever it prints: not here."""
    for place, cell in enumerate(code_cells(path)):
        assert cell.execution_count == place + 1
        for output in cell.outputs:
            assert output.output_type != "error", output
            assert output.get("name") != "stderr", output
        if speaks(cell.source):
            assert cell.outputs, f"no stored output:\n{cell.source}"


@every_notebook
def test_figures_say_what_they_show(path: Path) -> None:
    """A drawing has a caption and a text for readers who do not see it."""
    for cell in code_cells(path):
        if any("image/svg+xml" in o.get("data", {}) for o in cell.outputs):
            options = cell.metadata.get("mystnb", {})
            assert options.get("figure", {}).get("caption"), cell.source
            assert options.get("image", {}).get("alt"), cell.source
            shown = [o for o in cell.outputs if o.output_type != "stream"]
            assert len(shown) == 1, f"the caption would stand twice:\n{cell.source}"


@every_notebook
def test_notebook_is_small_and_in_normal_form(path: Path) -> None:
    """Thin cells, light figures, the one writer's form, no path of one machine."""
    text = path.read_text(encoding="utf-8")
    size = len(text.encode())
    for cell in code_cells(path):
        assert len(cell.source.splitlines()) <= MAX_LINES, cell.source
        for output in cell.outputs:
            figure = len(output.get("data", {}).get("image/svg+xml", "").encode())
            assert figure < MAX_FIGURE_BYTES, f"thin what is drawn in\n{cell.source}"
            size -= figure
    assert size < MAX_TEXT_BYTES
    assert notebooks.is_normal(path), "write it with make notebooks"
    cells = nbformat.reads(text, as_version=4).cells
    words = json.dumps([{**cell, "outputs": text_of(cell)} for cell in cells])
    assert not re.search(
        r"""(?<![\w:/.<])/(home|root|tmp|work|usr|var|Users)/""", words
    )
    assert not re.search(r"\b0x[0-9a-f]{8,}\b", words), "an address in memory"


def text_of(cell: NotebookNode) -> list[str]:
    """Return what a cell printed."""
    return [
        output.get("text", "") or output.get("data", {}).get("text/plain", "")
        for output in cell.get("outputs", [])
    ]


# Parameters


@every_notebook
def test_help_explains_every_parameter(path: Path) -> None:
    """Papermill finds a type and a comment for each."""
    for name, found in papermill.inspect_notebook(path).items():
        assert found["inferred_type_name"] != "None", name
        assert found["help"].strip(), name


@every_notebook
def test_wrong_profile_stops_papermill_at_once(path: Path, tmp_path: Path) -> None:
    """The first cell after the parameters fails, with one sentence."""
    with pytest.raises(papermill.PapermillExecutionError) as caught:
        papermill.execute_notebook(
            path,
            tmp_path / "out.ipynb",
            {"profile": "huge"},
            cwd=BOOK,
            kernel_name="python3",
            progress_bar=False,
        )
    # Papermill injects its own cell after the first.
    assert (caught.value.exec_count, caught.value.ename) == (3, "ValueError")
    assert caught.value.evalue == (
        "profile = 'huge' is not allowed: use one of record, smoke, laptop, paper."
    )


PARAMETERS = [(path, n) for path in NOTEBOOKS for n in parameter_names(path)[1:]]


@pytest.mark.parametrize(
    ("path", "name"), PARAMETERS, ids=[f"{p.stem}-{n}" for p, n in PARAMETERS]
)
@pytest.mark.parametrize("wrong", ["no such value", -7, []], ids=repr)
def test_wrong_value_fails_in_the_first_cell(path: Path, name: str, wrong: Any) -> None:
    """Whatever the parameter, a senseless value is refused by name."""
    given, start = code_cells(path)[:2]
    scope: dict[str, Any] = {}
    exec(given.source, scope)
    scope[name] = wrong
    with pytest.raises(ValueError, match=rf"^{name} = .* is not allowed: use .*\.$"):
        exec(start.source, scope)


@every_notebook
def test_unknown_parameter_is_refused(path: Path) -> None:
    """Papermill itself only warns; the runner names the parameters there are."""
    done = run_tool("chapter", path.stem, "--params", "sedes=3")
    assert done.returncode == 1
    assert done.stderr.startswith(f"{path.stem} has no parameter sedes: it has profile")
    assert len(done.stderr.splitlines()) == 1


@every_notebook
def test_chapter_runs_at_toy_size(path: Path) -> None:
    """Profile smoke recomputes the chapter offline, and nothing lands on stderr."""
    done = run_tool("chapter", path.stem, "--profile", "smoke")
    assert done.returncode == 0, done.stderr
    for cell in code_cells(Path(done.stdout.strip())):
        assert not any(o.get("name") == "stderr" for o in cell.outputs), cell.outputs


# The tool


def demo(source: str = 'print("loss 0.123")') -> NotebookNode:
    """Return a small notebook with one computing cell."""
    cells = [
        nbformat.v4.new_code_cell(
            'profile: str = "record"  # record or smoke\nseeds: int = 3  # at least 1',
            metadata={"tags": ["parameters"]},
        ),
        nbformat.v4.new_code_cell(source),
    ]
    return notebooks.normalise(nbformat.v4.new_notebook(cells=cells))


@pytest.fixture
def book(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty book folder that the tool works on."""
    monkeypatch.setattr(notebooks, "ROOT", tmp_path)
    monkeypatch.setattr(notebooks, "BOOK", tmp_path / "book")
    monkeypatch.setattr(notebooks, "SCRATCH", tmp_path / "scratch")
    (tmp_path / "book").mkdir()
    return tmp_path / "book"


def test_build_writes_the_same_file_twice(book: Path) -> None:
    """Building is repeatable and leaves normal form; an edit is noticed."""
    path = book / "demo.ipynb"
    notebook = demo()
    notebook.metadata.kernelspec.name = "venv-of-mine"
    nbformat.write(notebook, path)
    assert notebooks.main(["build", "--check"]) == 1
    assert notebooks.main(["build", "demo"]) == 0
    first = path.read_bytes()
    assert b"loss 0.123" in first
    assert notebooks.main(["build", "book/demo.ipynb"]) == 0
    assert path.read_bytes() == first
    assert notebooks.main(["build", "--check"]) == 0
    path.write_bytes(first.replace(b"cell-01", b"cell-99"))
    assert notebooks.main(["build", "--check"]) == 1


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("1 / 0", "ZeroDivisionError"),
        ("import sys\nprint('beware', file=sys.stderr)", "cell 1 wrote to stderr"),
    ],
)
def test_build_leaves_a_failing_notebook_alone(
    book: Path, capsys: pytest.CaptureFixture[str], source: str, message: str
) -> None:
    """An error or a word on stderr is reported, and the file stays as it was."""
    path = book / "demo.ipynb"
    nbformat.write(demo(source), path)
    before = path.read_bytes()
    assert notebooks.main(["build"]) == 1
    assert message in capsys.readouterr().err
    assert path.read_bytes() == before


def test_kernels_take_no_port(book: Path) -> None:
    """A port that was free may not be when a kernel binds it; a file of its own is."""
    source = (
        "from ipykernel.kernelapp import IPKernelApp\n"
        "app = IPKernelApp.instance()\n"
        "print(app.transport, app.ip)"
    )
    path = book / "demo.ipynb"
    seen = []
    for _ in range(2):
        nbformat.write(demo(source), path)
        assert notebooks.main(["build"]) == 0
        [said] = text_of(nbformat.read(path, as_version=4).cells[-1])
        seen.append(said.split())
    (transport, first), (_, second) = seen
    assert transport == "ipc"
    assert Path(first).is_absolute() and first != second


def test_chapter_passes_typed_parameters(book: Path) -> None:
    """Numbers arrive as numbers, words as strings; the original is not touched."""
    path = book / "demo.ipynb"
    nbformat.write(demo("print(profile, repr(seeds))"), path)
    before = path.read_bytes()
    output = notebooks.run_chapter(
        "demo", "smoke", notebooks.parse_parameters("seeds=5")
    )
    assert text_of(nbformat.read(output, as_version=4).cells[-1]) == ["smoke 5\n"]
    assert path.read_bytes() == before


def test_a_long_value_has_a_short_file(book: Path) -> None:
    """Results of two long values stand side by side all the same."""
    nbformat.write(demo("print(len(seeds))"), book / "demo.ipynb")
    for end in "ab":
        output = notebooks.run_chapter("demo", "smoke", {"seeds": "x" * 299 + end})
        assert text_of(nbformat.read(output, as_version=4).cells[-1]) == ["300\n"]
    assert len(list(output.parent.iterdir())) == 2


def test_a_result_that_cannot_be_written_is_named(
    book: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nbformat.write(demo(), book / "demo.ipynb")
    notebooks.SCRATCH.write_text("a file in the place of the folder")
    assert notebooks.main(["chapter", "demo"]) == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert "scratch/demo-smoke.ipynb cannot be written: File exists; make its" in said


def test_parameters_are_read_as_python_values() -> None:
    """Literals keep their type; anything else is a string."""
    read = notebooks.parse_parameters(
        "a=3 b=1e-3 c=digits d=True 'e=[1, 2]' f='two words'"
    )
    assert read == {
        "a": 3,
        "b": 1e-3,
        "c": "digits",
        "d": True,
        "e": [1, 2],
        "f": "two words",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build", "nowhere"], "no chapter nowhere: the book has demo."),
        (["chapter", "nowhere"], "no chapter nowhere: the book has demo."),
        (
            ["chapter", "demo", "--params", "sedes=3"],
            "demo has no parameter sedes: it has profile, seeds.",
        ),
        (
            ["chapter", "demo", "--params", "seeds"],
            "'seeds' is not a parameter: write name=value.",
        ),
        (
            ["chapter", "demo", "--params", "seeds='3"],
            """"seeds='3" cannot be read (No closing quotation): write name=value, """
            "quotes in pairs.",
        ),
        (
            ["chapter", "demo", "--params", "seeds=3 seeds=4"],
            "seeds is given twice: leave one of them out.",
        ),
        (
            ["chapter", "demo", "--params", "profile=laptop"],
            "profile is not for PARAMS or --params: write PROFILE=laptop or --profile "
            "laptop.",
        ),
        (["chapter", "demo"], "demo failed: KeyError: 'no'"),
    ],
)
def test_tool_refuses_with_one_sentence(
    book: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    """Wrong names, wrong words and a failing chapter give exit status 1."""
    nbformat.write(demo('{}["no"]'), book / "demo.ipynb")
    assert notebooks.main(arguments) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    there = r" \(what ran is in .*demo-smoke\.part\.ipynb\)"
    assert re.fullmatch(re.escape(message) + f"({there})?", said)
    assert ("what ran" in said) == ("failed" in message)


# The check of stored outputs can fail


def nbval(path: Path) -> str:
    """Run nbval on one notebook as `make test` does; return its report."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rA"]
    options = ["--nbval", "--nbval-current-env", "--nbval-sanitize-with"]
    done = subprocess.run(
        [*command, *options, str(ROOT / "tests" / "nbval.cfg"), str(path)],
        cwd=path.parent,
        capture_output=True,
        text=True,
    )
    return done.stdout


def alter_a_number(path: Path) -> int:
    """Change the last digit printed by a notebook; return which cell printed it."""
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for place in reversed(range(len(code))):
        for output in code[place].outputs:
            match = re.search(r"\d(?=\D*$)", output.get("text", ""))
            if match:
                digit = str((int(match[0]) + 1) % 10)
                text = output.text
                output.text = text[: match.start()] + digit + text[match.end() :]
                nbformat.write(notebook, path)
                return place
    pytest.skip(f"{path.stem} prints no number")


def test_nbval_notices_a_changed_number_but_not_a_redrawn_figure(
    book: Path,
) -> None:
    """A printed digit fails its cell; other digits inside an SVG do not."""
    source = (
        "import matplotlib.pyplot as plt\nfrom l2olib import figures\n"
        'figures.use_style()\nfigures.figure()\nprint("loss 0.123")\nplt.show()'
    )
    path = book / "demo.ipynb"
    nbformat.write(demo(source), path)
    assert notebooks.main(["build"]) == 0
    written = path.read_text()
    redrawn = nbformat.reads(written, as_version=4)
    for output in redrawn.cells[-1].outputs:
        if "data" in output:
            output.data["image/svg+xml"] = output.data["image/svg+xml"].replace(
                "1", "2"
            )
    nbformat.write(redrawn, path)
    assert path.read_text() != written
    assert "2 passed" in nbval(path)
    path.write_text(written)
    assert alter_a_number(path) == 1
    assert "1 failed, 1 passed" in nbval(path)


def test_nbval_notices_a_changed_number_in_the_book(tmp_path: Path) -> None:
    """In the smallest chapter that prints a number, exactly the altered cell fails."""
    (tmp_path / "book").mkdir()
    for name in ("_toc.yml", "data", "src"):
        (tmp_path / name).symlink_to(ROOT / name)
    for original in sorted(NOTEBOOKS, key=lambda path: path.stat().st_size):
        if any(re.search(r"\d", "".join(text_of(c))) for c in code_cells(original)):
            break
    path = tmp_path / "book" / original.name
    shutil.copy(original, path)
    place = alter_a_number(path)
    report = nbval(path)
    failed = re.findall(r"^FAILED .*::Cell (\d+)", report, flags=re.MULTILINE)
    assert failed == [str(place)], report
