"""What all tests share: one thread a process, and a list of what was not tested."""

import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import notebooks
import pytest
from playwright.sync_api import Browser, sync_playwright

# Set before torch is imported, here and in the kernels of the notebooks: two test
# processes use two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

notebooks.use_socket_files()


@pytest.fixture(scope="session")
def root() -> Path:
    """Return the top folder of the repository."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Start the Chromium that the machine has; skip, visibly, where there is none.

    One for the whole process: a second ``sync_playwright`` beside a first is refused.
    """
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("no Chromium on this machine: the pages were not looked at")
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(
            executable_path=path,
            args=[
                "--no-sandbox",
                "--disable-gpu",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
            ],
        )
        yield running
        running.close()


@pytest.hookimpl(hookwrapper=True)
def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter,
) -> Iterator[None]:
    """List what was skipped and why, after all other sections."""
    yield
    reasons = Counter(
        # A skip's longrepr is (file, line, "Skipped: reason").
        (report.nodeid.partition("::")[0], report.longrepr[2].removeprefix("Skipped: "))
        for report in terminalreporter.stats.get("skipped", [])
        if isinstance(report.longrepr, tuple)
    )
    if reasons:
        terminalreporter.section("not tested, and why")
        for (file, reason), count in sorted(reasons.items()):
            terminalreporter.line(f"{file}: {count} skipped: {reason}")
