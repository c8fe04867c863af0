"""Real processes that answer HTTP, as people start and stop them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@contextmanager
def running(folder: Path, *command: str, **env: str) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """Run a program of ours; gives what it prints, as it comes."""
    with subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        lines: list[str] = []

        def read() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                lines.append(line)  # noqa: PERF402 - they are looked at while they come

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        try:
            yield process, lines
        finally:
            process.kill()
            reader.join(10)


def found(process: subprocess.Popen[str], lines: list[str], pattern: str) -> str:
    """Return what a line says, once it was printed."""
    for _ in range(600):
        for line in list(lines):
            if (match := re.search(pattern, line)) is not None:
                return match[1]
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.1)
            break
    for line in lines:
        if (match := re.search(pattern, line)) is not None:
            return match[1]
    pytest.fail(f"it never said {pattern}: {''.join(lines)}")


def get(address: str, **headers: str) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=30) as answer:  # noqa: S310
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


SERVES = ["-m", "runcomfy.cli.main", "serve"]


@pytest.mark.processes
@pytest.mark.skipif(sys.platform == "win32", reason="Windows ends processes without asking")
@pytest.mark.parametrize(
    ("command", "env"),
    [
        ([*SERVES, "--no-pool", "--port", "0"], {}),
        ([str(ROOT / "launcher" / "main.py"), "--no-queue", "--port", "0"], {}),
        ([str(ROOT / "launcher" / "api_server.py"), "--port", "0"], {}),
        ([str(ROOT / "launcher" / "api_server.py"), "--port", "0"], {"RUNCOMFY_SERVE": "queue"}),
    ],
    ids=["serve", "main.py", "api_server.py", "api_server.py with a queue"],
)
def test_a_real_process_listens_and_ends_in_good_order(command: list[str], env: dict[str, str], tmp_path: Path) -> None:
    state = tmp_path / "state"
    with running(tmp_path, *command, RUNCOMFY_STATE_DIR=str(state), **env) as (process, lines):
        address = found(process, lines, r"answering HTTP at (http://127\.0\.0\.1:\d+)")
        page = found(process, lines, r"(http://127\.0\.0\.1:\d+/\?code=\S+)")
        assert json.loads(get(f"{address}/health")[1])["status"] == "healthy"
        assert get(f"{address}/jobs")[0] == 401
        token = (state / "http_token").read_text().strip()
        assert get(f"{address}/jobs", Authorization=f"Bearer {token}")[0] == 200
        assert get(page)[0] in (200, 404, 401), "the code was taken"
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 0, lines
    assert any("stopped" in line for line in lines), lines
    log = "".join(path.read_text() for path in (state / "logs").glob("*")) if (state / "logs").is_dir() else ""
    code = page.partition("code=")[2]
    assert code not in log
    assert token not in log + "".join(lines)


@pytest.mark.processes
@pytest.mark.skipif(sys.platform == "win32", reason="Windows ends processes without asking")
def test_under_another_server_an_open_page_does_not_keep_it_from_ending(tmp_path: Path) -> None:
    """Servers wait for their connections before they say that it ends; impatient people then kill it."""
    state = tmp_path / "state"
    command = ["-m", "uvicorn", "launcher.api_server:app", "--port", "0"]
    with running(tmp_path, *command, RUNCOMFY_STATE_DIR=str(state), RUNCOMFY_SERVE="queue") as (process, lines):
        address = found(process, lines, r"running on (http://127\.0\.0\.1:\d+)")
        token = {"Authorization": f"Bearer {(state / 'http_token').read_text().strip()}"}
        with urllib.request.urlopen(urllib.request.Request(f"{address}/events", headers=token), timeout=30) as page:  # noqa: S310
            assert page.readline().startswith(b"retry")
            process.send_signal(signal.SIGTERM)
            assert page.read().endswith(b"\n\n"), "the stream ended, whole"
            process.wait(120)
    assert any("Application shutdown complete" in line for line in lines), lines


@pytest.mark.processes
@pytest.mark.skipif(sys.platform == "win32", reason="Windows ends processes without asking")
def test_a_second_one_at_the_same_port_is_told_so(tmp_path: Path) -> None:
    env = {"RUNCOMFY_STATE_DIR": str(tmp_path / "state")}
    with running(tmp_path, *SERVES, "--no-pool", "--port", "0", **env) as (process, lines):
        port = found(process, lines, r"answering HTTP at http://127\.0\.0\.1:(\d+)")
        second = subprocess.run(
            [sys.executable, *SERVES, "--no-pool", "--port", port],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), **env},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert second.returncode == 9
        assert f"port {port}" in second.stderr
        assert "[address-in-use]" in second.stderr
        assert get(f"http://127.0.0.1:{port}/health")[0] == 200, "the first one goes on"


@pytest.mark.processes
@pytest.mark.skipif(sys.platform == "win32", reason="Windows ends processes without asking")
def test_the_demos_page_is_served_until_it_is_stopped(tmp_path: Path) -> None:
    real = {
        "RUNCOMFY_DATABASE_URL": "postgresql://nobody:secret@127.0.0.1:1/books",
        "COMFYUI_AGENT_DATABASE": str(tmp_path / "real_queue.sqlite3"),
        "RUNCOMFY_STATE_DIR": str(tmp_path / "real_state"),
        "RUNCOMFY_BUDGET_DAY": "0.000001",
    }
    with running(tmp_path, "-m", "runcomfy.cli.main", "demo", "--serve", **real) as (process, lines):
        address = found(process, lines, r"until Ctrl\+C: (http://127\.0\.0\.1:\d+)/\?code=")
        assert get(f"{address}/health")[0] == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 0, lines
    assert lines[-1].strip() == "nothing bills any more"
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"], "the user's books and queue are not touched"
