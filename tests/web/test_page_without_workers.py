"""A page over a queue that nobody works on says so: jobs are taken all the same, and wait."""

import json
import os
import re
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

GRAPH = {"1": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "x"}}}


@pytest.mark.processes
@pytest.mark.skipif(sys.platform == "win32", reason="Windows ends processes without asking")
def test_it_is_said_that_nothing_works_on_the_queue(browser: "Browser", tmp_path: Path) -> None:
    from playwright.sync_api import expect

    command = [sys.executable, "-m", "runcomfy.cli.main", "serve", "--no-queue", "--port", "0"]
    state = tmp_path / "state"
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        env={**os.environ, "RUNCOMFY_STATE_DIR": str(state)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            login = next(found[0] for line in process.stdout if (found := re.search(r"http://\S+\?code=\S+", line)))
            page = browser.new_page()
            page.goto(login)
            glance = page.get_by_role("region", name="At a glance")
            expect(glance).to_contain_text("Waiting")
            expect(glance).not_to_contain_text("Nothing works on the queue")
            token = (state / "http_token").read_text().strip()
            request = urllib.request.Request(  # noqa: S310 - our own address
                f"{login.partition('/?')[0]}/jobs",
                json.dumps({"workflow": GRAPH | {"2": {"class_type": "EmptyImage", "inputs": {}}}}).encode(),
                {"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
                assert answer.status == 201
            expect(glance).to_contain_text("Nothing works on the queue")
            page.close()
        finally:
            process.terminate()
