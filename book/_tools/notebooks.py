"""Write the committed notebooks, check their form, and rerun a chapter.

    notebooks.py build [NAME ...]           execute and normalise notebooks of the book
    notebooks.py build --check [NAME ...]   only say which are not in normal form
    notebooks.py chapter NAME --profile P --params "seeds=3 dataset=digits"

This is the one writer of committed notebooks, so that running it twice gives the same
file and a difference in git is a difference in content.
"""

import argparse
import ast
import atexit
import hashlib
import os
import re
import shlex
import shutil
import sys
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[2]
BOOK = ROOT / "book"
SCRATCH = ROOT / "_build" / "chapters"
LONGEST = 200  # characters of a result's name: file systems allow 255


class NotebookError(Exception):
    """Something about a notebook that its author must mend; one sentence."""


def use_socket_files() -> None:
    """Let the kernels that this process starts talk to it over files of their own.

    Jupyter's way is a free TCP port, which another program may have taken by the time
    the kernel binds it: of some hundred starts side by side, one fails.
    """
    from jupyter_client import KernelManager

    folder = tempfile.mkdtemp(prefix="l2o-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    start = KernelManager.__init__

    def start_on_files(self: KernelManager, *args: Any, **kwargs: Any) -> None:
        place = f"{folder}/{uuid.uuid4().hex}"
        start(self, *args, **{"transport": "ipc", "ip": place, **kwargs})

    KernelManager.__init__ = start_on_files  # type: ignore[method-assign]


def find(names: Sequence[str] = ()) -> list[Path]:
    """Return the notebooks of the book called `names`, or all of them.

    A name is the file's name, with or without folder and ending. Raises NotebookError
    for an unknown one.
    """
    known = {path.stem: path for path in sorted(BOOK.glob("*.ipynb"))}
    stems = [Path(name).name.removesuffix(".ipynb") for name in names]
    for stem in stems:
        if stem not in known:
            choices = ", ".join(known) or "none yet"
            raise NotebookError(f"no chapter {stem}: the book has {choices}.")
    return [known[stem] for stem in stems] if names else list(known.values())


def normalise(notebook: NotebookNode) -> NotebookNode:
    """Return a copy without anything that differs between machines or runs.

    Cell ids count the cells, streams of one kind are joined, and metadata that tools
    leave behind goes; what an author sets (tags, `mystnb`) stays.
    """
    clean = nbformat.from_dict(notebook)
    clean.nbformat, clean.nbformat_minor = 4, 5
    clean.metadata = nbformat.from_dict(
        {
            "kernelspec": {
                "display_name": "Python 3",
                "language": "python",
                "name": "python3",
            },
            "language_info": {"name": "python"},
        }
    )
    executed = 0
    for place, cell in enumerate(clean.cells):
        cell.id = f"cell-{place:02d}"
        cell.source = cell.source.strip("\n")
        for key in (
            "collapsed",
            "execution",
            "jp-MarkdownHeadingCollapsed",
            "papermill",
        ):
            cell.metadata.pop(key, None)
        if not cell.metadata.get("tags", True):
            del cell.metadata["tags"]
        if cell.cell_type != "code":
            continue
        executed += 1
        if cell.execution_count is not None:
            cell.execution_count = executed
        cell.outputs = _join_streams(cell.outputs)
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = executed
    return clean


def _join_streams(outputs: Sequence[NotebookNode]) -> list[NotebookNode]:
    """Join neighbouring stream outputs: where they break is a matter of timing."""
    joined: list[NotebookNode] = []
    for output in outputs:
        last = joined[-1] if joined else None
        if (
            last is not None
            and output.output_type == last.output_type == "stream"
            and output.name == last.name
        ):
            last.text += output.text
        else:
            joined.append(output)
    return joined


def as_text(notebook: NotebookNode) -> str:
    """Return the one text form in which a notebook is committed."""
    return nbformat.writes(normalise(notebook), version=4, indent=1) + "\n"


def is_normal(path: Path) -> bool:
    """Say whether the file is exactly what `build` would write for its content."""
    text = path.read_text(encoding="utf-8")
    return text == as_text(nbformat.reads(text, as_version=4))


def build(path: Path) -> None:
    """Execute a notebook in its folder and write it back in normal form.

    Raises NotebookError, and leaves the file alone, if a cell fails or writes to
    stderr.
    """
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(path.parent)}},
        timeout=None,
    )
    try:
        client.execute()
    except CellExecutionError as error:
        raise NotebookError(f"{path.name} is unchanged: {error}") from None
    for place, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            if output.get("name") == "stderr":
                raise NotebookError(
                    f"{path.name} is unchanged: cell {place} wrote to stderr: "
                    + output.text.strip()
                )
    path.write_text(as_text(notebook), encoding="utf-8")


def parse_parameters(text: str) -> dict[str, Any]:
    """Read ``name=value`` words; values are Python literals, otherwise strings.

    Raises NotebookError for a word that is not of this form.
    """
    parameters: dict[str, Any] = {}
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise NotebookError(
            f"{text!r} cannot be read ({error}): write name=value, quotes in pairs."
        ) from None
    for word in words:
        name, equals, value = word.partition("=")
        if not (name.isidentifier() and equals):
            raise NotebookError(f"{word!r} is not a parameter: write name=value.")
        if name in parameters:
            raise NotebookError(f"{name} is given twice: leave one of them out.")
        try:
            parameters[name] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            parameters[name] = value
    return parameters


def run_chapter(name: str, profile: str, parameters: dict[str, Any]) -> Path:
    """Rerun one chapter with papermill and return where the result is.

    Papermill lets unknown names pass with a warning, so they are refused here. Raises
    NotebookError for these, for a chapter that fails and a result that cannot be
    written.
    """
    import papermill

    [path] = find([name])
    if "profile" in parameters:  # it may mean hours, so it has one place
        raise NotebookError(
            "profile is not for PARAMS or --params: write "
            f"PROFILE={parameters['profile']} or --profile {parameters['profile']}."
        )
    known = papermill.inspect_notebook(path)
    parameters = {"profile": profile, **parameters}
    for each in parameters:
        if each not in known:
            raise NotebookError(
                f"{path.stem} has no parameter {each}: it has {', '.join(known)}."
            )
    given = [f"{k}={v}" for k, v in parameters.items() if k != "profile"]
    named = "-".join([path.stem, str(parameters["profile"]), *given])
    stem = re.sub(r"[^-=.,a-zA-Z0-9]+", "_", named)
    if len(stem) > LONGEST:  # what is cut off still tells two runs apart
        stem = f"{stem[:LONGEST]}-{hashlib.sha256(named.encode()).hexdigest()[:8]}"
    output = SCRATCH / f"{stem}.ipynb"
    partly = output.with_suffix(".part.ipynb")  # a failure leaves an earlier result
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        papermill.execute_notebook(
            path,
            partly,
            parameters,
            cwd=path.parent,
            kernel_name="python3",
            progress_bar=sys.stderr.isatty(),
        )
        return partly.replace(output)
    except papermill.PapermillExecutionError as error:
        raise NotebookError(
            f"{path.stem} failed: {error.ename}: {error.evalue} (what ran is in "
            f"{os.path.relpath(partly)})"
        ) from None
    except OSError as error:
        raise NotebookError(
            f"{os.path.relpath(output)} cannot be written: {error.strerror or error}; "
            "make its folder writable or make room there."
        ) from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    builder = commands.add_parser("build", help="execute and normalise notebooks")
    builder.add_argument("names", nargs="*", help="chapters; all if none is given")
    builder.add_argument("--check", action="store_true", help="only check their form")
    runner = commands.add_parser("chapter", help="rerun one chapter with papermill")
    runner.add_argument("name", help="the chapter, for example 02-loss-guard")
    runner.add_argument("--profile", default="smoke", help="smoke, laptop or paper")
    runner.add_argument("--params", default="", help='"name=value ..."')
    given = parser.parse_args(arguments)
    try:
        if given.command == "chapter":
            parameters = parse_parameters(given.params)
            print(run_chapter(given.name, given.profile, parameters))
            return 0
        bad = []
        for path in find(given.names):
            if not given.check:
                build(path)
                print(path.relative_to(ROOT))
            elif not is_normal(path):
                bad.append(path)
                print(f"{path.relative_to(ROOT)} is not in normal form: rebuild it.")
        return 1 if bad else 0
    except NotebookError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; earlier results are kept", file=sys.stderr)
        return 130


if __name__ == "__main__":
    use_socket_files()
    sys.exit(main())
