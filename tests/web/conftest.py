"""A real Chromium, and the page served by a real process."""

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from threading import Timer
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    # A software WebGL: the mesh is drawn without a graphics card.
    "--use-gl=angle",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
]
STARTS_WITHIN = 120.0
SEEN_WITHIN = 45_000
"""Milliseconds after which what should be seen by now is missing; a computer with much to do is slow."""


class Served:
    """A server of the page, in a process of its own."""

    def __init__(self, folder: Path, port: int = 0) -> None:
        self.log = folder / "server.log"
        command = [sys.executable, str(Path(__file__).with_name("serve_page.py")), str(folder), str(port)]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        assert self._process.stdout is not None
        late = Timer(STARTS_WITHIN, self._process.kill)
        late.start()
        try:
            self.login = self._process.stdout.readline().strip()
        finally:
            late.cancel()
        assert self.login.startswith("http://127.0.0.1:"), self.log.read_text()
        self.address = self.login.partition("/?")[0]

    def end(self) -> None:
        """Tell it to stop, and wait until it has. Harmless when repeated."""
        self._process.terminate()
        try:
            self._process.wait(120)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    """Start a server: `serve()`, or `serve(port)` where one was before. All end with the test."""
    with ExitStack() as stack:

        def start(port: int = 0) -> Served:
            served = Served(tmp_path, port)
            stack.callback(served.end)
            return served

        yield start


@pytest.fixture
def browser() -> "Iterator[Browser]":
    """Debian's, or whatever Chromium this computer has; without one the test is skipped."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip("there is no Chromium on this computer: the page is not looked at")
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=SEEN_WITHIN)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=FLAGS)
        yield browser
        browser.close()
