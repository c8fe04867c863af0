"""Every example runs, and every block of Python in the pages is one of them."""

from __future__ import annotations

import inspect
import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from runcomfy.testing.emulators.comfyui import ComfyUIEmulator
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator
from runcomfy.testing.in_thread import InThread, served

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TESTED_BELOW = {
    "quickstart_async.py",
    "quickstart_sync.py",
    "progress_and_cancel.py",
    "own_comfyui.py",
    "queue_a_job.py",
    "test_with_emulators.py",
    "make_render.py",
    "what_it_cost.py",
    "serve_a_queue.py",
    "http_api.py",
}
EMULATOR_TESTS = runpy.run_path(str(EXAMPLES / "test_with_emulators.py"))


@pytest.fixture
def account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[InThread[RunComfyEmulator]]:
    """The environment of a user with an account, in the root of a checkout; nothing may bill at the end."""
    with served(
        lambda: RunComfyEmulator(boot_time=0.2, delete_takes=0.2, comfyui_speed=20.0, rate_limit=False)
    ) as cloud:
        for name, value in cloud.emulator.environment().items():
            monkeypatch.setenv(name, value)
        for name, value in (("POLL_INTERVAL", "0.1"), ("REQUESTS_PER_SECOND", "1000"), ("BURST", "1000")):
            monkeypatch.setenv(f"RUNCOMFY_{name}", value)
        monkeypatch.setenv("RUNCOMFY_OUTPUT_DIR", str(tmp_path / "outputs"))
        monkeypatch.chdir(ROOT)
        yield cloud
        assert cloud.call(lambda c: list(c.billing)) == []


def run(name: str) -> None:
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_no_example_is_left_out() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == TESTED_BELOW


@pytest.mark.parametrize("name", ["quickstart_async.py", "quickstart_sync.py"])
def test_the_quickstarts_bring_a_picture_and_a_mesh(
    name: str, account: InThread[RunComfyEmulator], capsys: pytest.CaptureFixture[str]
) -> None:
    run(name)
    picture, mesh, cost = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"image .*flux\.png [0-9a-f]{64}", picture)
    assert re.fullmatch(r"mesh .*mesh\.glb [0-9a-f]{64}", mesh)
    assert re.fullmatch(r"cost \$0\.\d+", cost)
    for line in (picture, mesh):
        assert Path(line.split(" ", 1)[1].rsplit(" ", 1)[0]).is_file()
    assert len(account.call(lambda c: list(c.launched))) == 1


def test_the_sync_form_works_inside_a_running_event_loop(account: InThread[RunComfyEmulator]) -> None:
    # A loop of its own, on the real clock: this is what a notebook or a server does to the example.
    code = (
        "import asyncio, runpy\n"
        "async def main():\n"
        "    runpy.run_path('examples/quickstart_sync.py', run_name='__main__')\n"
        "asyncio.run(main())\n"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=100)
    assert said.returncode == 0, said.stderr
    assert said.stdout.count("\n") == 3


def test_a_job_is_watched_and_taken_back(
    account: InThread[RunComfyEmulator], capsys: pytest.CaptureFixture[str]
) -> None:
    run("progress_and_cancel.py")
    lines = capsys.readouterr().out.splitlines()
    percents = [float(line.split("%")[0]) for line in lines if "%" in line]
    running = [value for value in percents if value]
    assert running == sorted(running)
    assert 50 < max(running) < 100
    assert lines[-1].startswith("cancelled interrupted $0.")


def test_what_it_cost_is_told_after_a_job(
    account: InThread[RunComfyEmulator], capsys: pytest.CaptureFixture[str]
) -> None:
    run("quickstart_sync.py")
    capsys.readouterr()
    run("what_it_cost.py")
    lines = capsys.readouterr().out.splitlines()
    cost = float(account.call(lambda c: c.total_usd))
    told = re.fullmatch(r"generate_flux_mesh: \$(0\.\d{4}), \$(0\.\d{4}) of it computing; 1 jobs", lines[0])
    assert told is not None, lines
    assert float(told[1]) == pytest.approx(cost, abs=0.0002)
    assert 0 < float(told[2]) <= float(told[1])  # in so few seconds rounding may make them one
    assert re.fullmatch(r"today: \$0\.\d{4} so far, \$0\.\d{4} expected", lines[1])
    assert lines[2].startswith("set a hard budget")


def test_serving_a_queue_rents_works_and_ends(
    account: InThread[RunComfyEmulator],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RUNCOMFY_GUARD", "false")
    for name, value in (("DATABASE", "queue.db"), ("JOBS_PROCESSING", "in"), ("JOBS_FINISHED", "out")):
        monkeypatch.setenv(f"COMFYUI_AGENT_{name}", str(tmp_path / value))
    run("serve_a_queue.py")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.startswith("done")] == ["done"] * 3
    assert any(line.startswith("launching a ") for line in lines)
    assert account.call(lambda c: list(c.alive)) == []


@contextmanager
def executor(url: str) -> Iterator[None]:
    """Somebody who works on the queue, as in another terminal."""
    command = [sys.executable, "-m", "runcomfy.cli.main", "agent", "execute", "--server", url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=ROOT) as process:
        try:
            yield
        finally:
            process.terminate()
            said, _ = process.communicate(timeout=120)
    assert process.returncode in (0, 1), said.decode()  # 1: Windows ends it without asking


def test_a_job_is_put_into_the_queue_and_followed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COMFYUI_AGENT_DATABASE", str(tmp_path / "queue.db"))
    monkeypatch.setenv("COMFYUI_AGENT_JOBS_FINISHED", str(tmp_path / "finished"))
    with served(lambda: ComfyUIEmulator(speed=20)) as server, executor(server.emulator.url):
        run("queue_a_job.py")
        first = capsys.readouterr().out.splitlines()
        run("queue_a_job.py")  # the same key: the same job, as it is now
        second = capsys.readouterr().out.splitlines()
        assert len(server.call(lambda emulator: list(emulator.run_log))) == 1
    assert [line.split()[1] for line in first[:-1]] == ["enqueued", "claimed", "submitting", "submitted", "done"]
    assert second == first
    word, runs, path = first[-1].split(" ", 2)
    assert (word, runs) == ("done", "1")
    assert Path(path).is_file()


@contextmanager
def service(url: str, state: Path) -> Iterator[str]:
    """The API over somebody's ComfyUI, as in another terminal; gives its address."""
    command = [sys.executable, "-m", "runcomfy.cli.main", "serve", "--server", url, "--port", "0", "--json"]
    env = {**os.environ, "RUNCOMFY_STATE_DIR": str(state)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=ROOT, env=env) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if (address := json.loads(line).get("address")) is not None:
                    yield address
                    break
            else:
                pytest.fail("it never listened")
        finally:
            process.terminate()
            process.communicate(timeout=120)
    assert process.returncode in (0, 1, 130)  # 1: Windows ends it without asking


def test_a_job_is_sent_followed_and_fetched_over_http(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COMFYUI_AGENT_DATABASE", str(tmp_path / "queue.db"))
    monkeypatch.setenv("COMFYUI_AGENT_JOBS_FINISHED", str(tmp_path / "finished"))
    monkeypatch.setenv("RUNCOMFY_STATE_DIR", str(tmp_path / "state"))
    with served(lambda: ComfyUIEmulator(speed=20)) as server, service(server.emulator.url, tmp_path / "state") as api:
        monkeypatch.setenv("COMFYCTL_SERVE", api)
        run("http_api.py")
        first = capsys.readouterr().out.splitlines()
        run("http_api.py")  # the same key: the same job
        second = capsys.readouterr().out.splitlines()
        assert len(server.call(lambda emulator: list(emulator.run_log))) == 1
    story = ["enqueued", "claimed", "submitting", "submitted", "done"]
    assert [line for line in first[1:-1] if not line.endswith("%")] == story
    assert second[1:-1] == story
    assert (first[0].split()[:2], second[0].split()[:2]) == (["job", "1"], ["job", "1"])
    assert second[-1] == first[-1]
    assert re.fullmatch(r"done inverted\.png True [0-9a-f]{64}", first[-1])


def test_own_comfyui_needs_no_account(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("RUNCOMFY_OUTPUT_DIR", str(tmp_path))
    with served(ComfyUIEmulator) as server:
        monkeypatch.setenv("COMFYUI_URL", server.emulator.url)
        run("own_comfyui.py")
    assert "inverted.png" in capsys.readouterr().out.splitlines()[-1]
    monkeypatch.setenv("COMFYUI_URL", server.emulator.url)  # nothing listens there any more
    run("own_comfyui.py")
    what, hint = capsys.readouterr().out.splitlines()
    assert what.startswith("comfyui-unreachable: ")
    assert hint.startswith("  -> ")


@pytest.mark.parametrize("name", [name for name in EMULATOR_TESTS if name.startswith("test_")])
async def test_the_example_tests_pass(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    test = EMULATOR_TESTS[name]
    assert inspect.iscoroutinefunction(test)
    await test(tmp_path)


def test_the_shipped_picture_can_be_drawn_again(tmp_path: Path) -> None:
    from PIL import Image

    script = tmp_path / "make_render.py"
    script.write_text((EXAMPLES / "make_render.py").read_text(encoding="utf-8"), encoding="utf-8")
    subprocess.run([sys.executable, str(script), "32"], check=True, timeout=100)
    assert (EXAMPLES / "render.png").read_bytes() == (ROOT / "runcomfy" / "data" / "render.png").read_bytes()
    with Image.open(tmp_path / "render.png") as small, Image.open(EXAMPLES / "render.png") as shipped:
        assert small.size == (32, 32)
        expected = shipped.convert("RGBA").resize((32, 32), Image.Resampling.BOX).getchannel("A")
        drawn = small.convert("RGBA").getchannel("A")
    different = sum(abs(a - b) > 128 for a, b in zip(drawn.tobytes(), expected.tobytes(), strict=True))
    assert different < 32, "the small drawing has another outline than the picture that ships"


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def test_the_readme_shows_the_async_quickstart() -> None:
    assert blocks(ROOT / "README.md") == [(EXAMPLES / "quickstart_async.py").read_text(encoding="utf-8")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_in_the_pages_is_an_example(page: Path) -> None:
    examples = [path.read_text(encoding="utf-8") for path in EXAMPLES.glob("*.py")]
    for block in blocks(page):
        assert any(block in example for example in examples), f"in {page.name}, but in no example:\n{block}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.name} -> {target}"


def test_json_in_the_pages_is_json() -> None:
    for page in PAGES:
        for block in re.findall(r"```json\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            json.loads(block)
