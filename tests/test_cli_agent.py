"""`comfyctl agent`, the doors of `python -m comfyui_agent`, and `run --queue`: what they say and how they end."""

from __future__ import annotations

import ast
import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from PIL import Image

from runcomfy.cli.main import call, comfyctl
from runcomfy.testing.emulators.comfyui import ComfyUIEmulator
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator
from runcomfy.testing.in_thread import InThread, served
from runcomfy.testing.sources import parsed

ROOT = Path(__file__).resolve().parents[1]
DOORS = ROOT / "comfyui_agent"
JOB_FILE = """\
job_type: T2I
workflow_id: image_invert
inputs: {image: picture.png}
outputs: {file_path: jobs/finished/image/inverted.png}
"""

Say = Callable[..., tuple[int, str, str]]

# -- the doors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(DOORS.glob("*.py")), ids=lambda path: path.stem)
def test_a_door_holds_nothing_but_a_docstring_imports_and_a_call(path: Path) -> None:
    body = parsed(path.read_text(encoding="utf-8")).body
    assert isinstance(body[0], ast.Expr), "a door begins with its docstring"
    for statement in body[1:]:
        is_call = isinstance(statement, ast.If) and ast.unparse(statement.test) == "__name__ == '__main__'"
        assert is_call or isinstance(statement, ast.ImportFrom), ast.unparse(statement)


def in_project(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run python in a project whose own `comfyui_agent/` has no `__init__.py`."""
    config = folder / "comfyui_agent" / "config"
    config.mkdir(parents=True, exist_ok=True)
    (config / "global_config.yaml").write_text("poll_interval_ms: 1000\n", encoding="utf-8")
    for name in ("workflows", "state", "runcomfy"):
        (folder / name).mkdir(exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=60
    )


@pytest.mark.parametrize(
    ("module", "usage"),
    [
        ("comfyui_agent", "Usage: e3 [OPTIONS] COMMAND"),
        ("comfyui_agent.run", "Usage: python -m comfyui_agent.run [OPTIONS]"),
        ("comfyui_agent.monitor", "Usage: python -m comfyui_agent.monitor [OPTIONS]"),
        ("comfyui_agent.execute", "Usage: python -m comfyui_agent.execute [OPTIONS]"),
    ],
)
def test_a_projects_own_folder_of_that_name_hides_nothing(module: str, usage: str, tmp_path: Path) -> None:
    told = in_project(tmp_path, "-m", module, "--help")
    assert told.returncode == 0, told.stderr
    assert usage in told.stdout


def test_the_package_is_found_from_a_projects_folder_as_a_package(tmp_path: Path) -> None:
    told = in_project(tmp_path, "-c", "import comfyui_agent; print(comfyui_agent.__file__)")
    assert told.stdout.strip().endswith("__init__.py")


def test_the_requirements_are_the_product_with_what_a_server_needs() -> None:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    wanted = [line for line in lines if line and not line.startswith("#")]
    (match,) = [re.fullmatch(r"\.\[(\w+)\]", line) for line in wanted]
    assert match is not None
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert match[1] in project["project"]["optional-dependencies"]
    assert project["project"]["scripts"]["e3"] == "runcomfy.cli.e3:main"
    assert "comfyui_agent" in project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]


def test_the_help_of_e3_loads_nothing_heavy() -> None:
    heavy = ("aiohttp", "sqlalchemy", "pydantic", "rich", "PIL", "asyncio", "yaml")
    code = (
        "import sys; from runcomfy.cli.e3 import e3; from runcomfy.cli.main import call; call(e3, ['--help']);"
        f" print([name for name in {heavy!r} if name in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip().endswith("[]")


# -- programs that work ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def comfyui() -> Iterator[InThread[ComfyUIEmulator]]:
    with served(lambda: ComfyUIEmulator(speed=20)) as server:
        yield server


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Say:
    """Run comfyctl in a project; returns exit code, stdout, stderr."""
    (tmp_path / "jobs" / "processing" / "image").mkdir(parents=True)
    Image.new("RGB", (64, 48), (200, 100, 50)).save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COMFYUI_AGENT_STABLE_MS", "20")

    def run(*arguments: str) -> tuple[int, str, str]:
        code = call(comfyctl, list(arguments))
        shown = capsys.readouterr()
        assert "Traceback" not in shown.err
        return code, shown.out, shown.err

    return run


def drop(folder: Path, name: str = "T2I_1_1_invert.yaml", text: str = JOB_FILE) -> None:
    (folder / "jobs" / "processing" / "image" / name).write_text(text, encoding="utf-8")


def test_once_takes_up_and_runs_what_is_there(say: Say, tmp_path: Path, comfyui: InThread[ComfyUIEmulator]) -> None:
    drop(tmp_path)
    code, out, err = say("agent", "start", "--once", "--server", comfyui.emulator.url)
    assert (code, err) == (0, "")
    lines = [line.split(" ", 1)[1] for line in out.splitlines()]
    assert all(re.match(r"\d\d:\d\d:\d\d ", line) for line in out.splitlines())
    assert lines[0].startswith("queue ")
    assert lines[3:5] == [
        "T2I_1_1_invert.yaml: in the queue",
        "T2I_1_1_invert.yaml: taken up (T2I, image_invert, priority 50)",
    ]
    assert re.fullmatch(r"T2I_1_1_invert\.yaml: done in \d+\.\d s: .*inverted\.png", lines[5])
    assert (tmp_path / "jobs" / "finished" / "image" / "inverted.png").is_file()


def test_json_lines_say_the_same_to_programs(say: Say, tmp_path: Path, comfyui: InThread[ComfyUIEmulator]) -> None:
    drop(tmp_path)
    code, out, err = say("agent", "start", "--once", "--server", comfyui.emulator.url, "--json")
    assert (code, err) == (0, "")
    told = [json.loads(line) for line in out.splitlines()]
    assert all({"at", "message"} <= set(line) for line in told)
    assert [line["job"] for line in told if "job" in line] == ["T2I_1_1_invert.yaml"]


def test_monitor_and_executor_apart(say: Say, tmp_path: Path, comfyui: InThread[ComfyUIEmulator]) -> None:
    drop(tmp_path)
    assert say("agent", "monitor", "--once")[0] == 0
    _, out, _ = say("queue", "ls", "--json")
    assert [job["status"] for job in json.loads(out)] == ["pending"]
    assert say("agent", "execute", "--once", "--server", comfyui.emulator.url)[0] == 0
    _, out, _ = say("queue", "ls", "--json")
    (job,) = json.loads(out)
    assert (job["status"], job["run_count"]) == ("done", 1)
    _, out, _ = say("queue", "ls")
    assert "inverted.png" in out
    _, out, _ = say("queue", "show", "1")
    assert re.search(r"^result +.*inverted\.png$", out, re.MULTILINE)
    assert re.search(r"^attempt +1: .* done after", out, re.MULTILINE)


def test_a_broken_file_is_told_and_keeps_nothing_from_running(
    say: Say, tmp_path: Path, comfyui: InThread[ComfyUIEmulator]
) -> None:
    drop(tmp_path)
    drop(tmp_path, "T2I_1_2_broken.yaml", "job_type: T2I\nworkflow_id: [\n")
    code, out, _ = say("agent", "start", "--once", "--server", comfyui.emulator.url)
    assert code == 0
    assert "job file refused: " in out
    assert "T2I_1_2_broken.yaml" in out
    assert "T2I_1_1_invert.yaml: done" in out


def test_two_places_at_once_are_refused(say: Say) -> None:
    code, out, err = say("agent", "execute", "--cloud", "--server", "http://127.0.0.1:1")
    assert (code, out) == (2, "")
    assert "--server and --cloud" in err


def test_a_setting_that_cannot_be_is_named_with_its_place(say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMFYUI_AGENT_SLOTS", "many")
    code, _, err = say("agent", "start", "--once")
    assert code == 3
    assert "COMFYUI_AGENT_SLOTS" in err


@pytest.mark.fault(56)
def test_a_damaged_database_is_said_and_left_alone(say: Say, tmp_path: Path) -> None:
    path = tmp_path / "broken.db"
    path.write_bytes(b"this is no database, whatever its name says" * 200)
    code, _, err = say("agent", "execute", "--once", "--database", str(path))
    assert code == 9
    assert "[store-corrupt]" in err
    assert path.read_bytes().startswith(b"this is no database")


# -- machines of its own ---------------------------------------------------------------------------------------


@pytest.fixture
def cloud(monkeypatch: pytest.MonkeyPatch) -> Iterator[InThread[RunComfyEmulator]]:
    """An account at an emulated cloud; nothing may bill at the end of the test."""
    with served(
        lambda: RunComfyEmulator(boot_time=0.3, delete_takes=0.2, comfyui_speed=20, rate_limit=False)
    ) as running:
        quick = {"POLL_INTERVAL": "0.1", "REQUESTS_PER_SECOND": "1000", "BURST": "1000", "VISIBILITY_WINDOW": "1"}
        named = {f"RUNCOMFY_{name}": value for name, value in quick.items()}
        for name, value in {**running.emulator.environment(), **named}.items():
            monkeypatch.setenv(name, value)
        yield running
        assert running.call(lambda c: list(c.billing)) == []


def test_in_the_cloud_several_jobs_share_a_machine_that_is_gone_at_the_end(
    say: Say, tmp_path: Path, cloud: InThread[RunComfyEmulator]
) -> None:
    for number in (1, 2):
        drop(tmp_path, f"T2I_1_{number}_invert.yaml", JOB_FILE.replace("inverted", f"inverted{number}"))
    code, out, err = say("agent", "start", "--once", "--cloud")
    assert (code, err) == (0, ""), out
    assert "jobs run on the dev server or rented machines" in out
    assert len(cloud.call(lambda c: list(c.launched))) == 1
    jobs = json.loads(say("queue", "ls", "--json")[1])
    assert [job["status"] for job in jobs] == ["done", "done"]
    assert all(Decimal(job["result"]["cost_usd"]) > 0 for job in jobs)


def test_one_postgresql_has_the_queue_and_the_books_of_machines(
    say: Say,
    tmp_path: Path,
    cloud: InThread[RunComfyEmulator],
    postgres_dsn: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import psycopg

    monkeypatch.setenv("RUNCOMFY_DATABASE_URL", postgres_dsn)
    drop(tmp_path)
    code, out, err = say("agent", "start", "--once", "--cloud")
    assert (code, err) == (0, ""), out
    with psycopg.connect(postgres_dsn) as server:
        assert server.execute("SELECT config_name, status FROM jobs").fetchall() == [("T2I_1_1_invert.yaml", "done")]
        (row,) = server.execute("SELECT server_id, state FROM machines").fetchall()
    assert row == (cloud.call(lambda c: c.launched[0]), "stopped")
    assert not list(tmp_path.rglob("*.sqlite3"))
    assert not list(tmp_path.rglob("*.db"))
    password = urlsplit(postgres_dsn).password
    assert password is not None
    logs = "".join(path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.log"))
    assert password not in out + err + logs


def test_the_books_of_machines_are_on_a_postgresql_or_in_a_file(
    say: Say, cloud: InThread[RunComfyEmulator], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUNCOMFY_DATABASE_URL", "books.sqlite3")
    code, _, err = say("machines", "ls")
    assert code == 3
    assert "RUNCOMFY_DATABASE_URL is not the address of a PostgreSQL" in err


# -- the doctor ------------------------------------------------------------------------------------------------


def layers(out: str) -> dict[str, str]:
    return {line[4:].split(":")[0].strip(): line[:4].strip() for line in out.splitlines()}


def test_the_doctor_looks_at_the_queue_and_needs_no_account_for_it(
    say: Say, tmp_path: Path, comfyui: InThread[ComfyUIEmulator], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMFYUI_AGENT_API_BASE_URL", comfyui.emulator.url)
    drop(tmp_path)
    say("agent", "monitor", "--once")
    say("queue", "pause", "--reason", "moving house")
    code, out, err = say("doctor")
    assert (code, err) == (0, "")
    names = ("queue database", "queue", "ComfyUI answers", "node list readable", "queue readable")
    assert layers(out) == {"credentials": "--", **dict.fromkeys(names, "ok")}
    assert "1 pending" in out
    assert "nobody works on the queue" in out
    assert "moving house" in out


def test_the_doctor_names_who_holds_a_transaction_open(
    say: Say,
    comfyui: InThread[ComfyUIEmulator],
    postgres_dsn: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import psycopg

    from runcomfy.cli import doctor_queue

    monkeypatch.setattr(doctor_queue, "OLD", timedelta(0))
    monkeypatch.setenv("COMFYUI_AGENT_API_BASE_URL", comfyui.emulator.url)
    monkeypatch.setenv("COMFYUI_AGENT_DATABASE", postgres_dsn)
    code, out, err = say("doctor")
    assert (code, layers(out)["open transactions"]) == (0, "ok"), err
    with psycopg.connect(postgres_dsn, application_name="somebody's shell") as shell:
        shell.execute("SELECT 1")
        code, out, err = say("doctor")
        assert (code, layers(out)["open transactions"]) == (9, "BAD")
        assert "somebody's shell" in err
        assert f"pg_terminate_backend({shell.info.backend_pid})" in err


# -- run --queue -----------------------------------------------------------------------------------------------


@pytest.fixture
def executor(comfyui: InThread[ComfyUIEmulator], say: Say, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Somebody who works on the project's queue, in a process of their own."""
    command = [sys.executable, "-m", "runcomfy.cli.main", "agent", "execute", "--server", comfyui.emulator.url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=tmp_path) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.terminate()
        process.communicate(timeout=120)


@pytest.mark.processes
def test_run_in_the_queue_shows_progress_and_prints_what_a_run_prints(
    say: Say, executor: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    code, out, err = say("run", "image_invert", "--image", "picture.png", "--queue", "--priority", "7", "--out", "here")
    assert code == 0, err
    assert re.search(r"^image  .*inverted\.png  \([\d,]+ bytes\)$", out, re.MULTILINE)
    assert "nothing was billed" in out
    assert "is in the queue (number 1, priority 7)" in err
    (path,) = (tmp_path / "here").rglob("inverted.png")
    assert path.is_file()


@pytest.mark.processes
def test_run_in_the_queue_as_json_is_the_object_of_a_run_and_a_key_runs_it_once(
    say: Say, executor: subprocess.Popen[bytes], comfyui: InThread[ComfyUIEmulator]
) -> None:
    before = comfyui.call(lambda emulator: len(emulator.run_log))
    command = ("run", "image_invert", "--image", "picture.png", "--queue", "--key", "order-17", "--json")
    code, out, err = say(*command)
    assert (code, err) == (0, "")
    first = json.loads(out)
    assert set(first) == {"job_id", "status", "prompt_id", "outputs", "seeds", "cost_usd", "timings"}
    assert first["status"] == "done"
    assert Path(first["outputs"][0]["path"]).is_file()
    assert json.loads(say(*command)[1]) == first
    assert comfyui.call(lambda emulator: len(emulator.run_log)) == before + 1
    code, out, _ = say("run", "wf_realistic_portrait", "--prompt", "x", "--queue", "--key", "order-17", "--json")
    assert code == 2
    assert json.loads(out)["error"]["code"] == "idempotency-conflict"


@pytest.mark.processes
def test_a_job_that_fails_in_the_queue_ends_run_with_its_own_exit_code(
    say: Say, executor: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    graph = {
        "1": {"class_type": "NoSuchNode", "inputs": {}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "x"}},
    }
    (tmp_path / "broken.json").write_text(json.dumps(graph), encoding="utf-8")
    code, _, err = say("run", "broken.json", "--queue")
    assert code == 2
    assert "[preflight-failed]" in err
    assert "NoSuchNode" in err


def test_what_can_never_run_is_refused_before_it_is_put_in(say: Say) -> None:
    code, _, err = say("run", "no-such-workflow", "--queue")
    assert code == 2
    assert "[workflow-not-found]" in err
    assert json.loads(say("queue", "ls", "--json")[1]) == []


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--server", "http://127.0.0.1:1"), "comfyctl agent execute --server"),
        (("--server-type", "large"), "COMFYUI_AGENT_SERVER_TYPE"),
    ],
)
def test_a_job_of_the_queue_does_not_choose_its_place(say: Say, options: tuple[str, ...], word: str) -> None:
    code, _, err = say("run", "image_invert", "--image", "picture.png", "--queue", *options)
    assert code == 2
    assert word in err
    assert json.loads(say("queue", "ls", "--json")[1]) == []


@pytest.mark.processes
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT to send")
def test_ctrl_c_leaves_the_job_in_the_queue_and_says_how_to_find_it(say: Say, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "runcomfy.cli.main", "run", "image_invert", "--image", "picture.png", "--queue"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path, text=True) as process:
        assert process.stderr is not None
        heard = ""
        while "nobody works on the queue" not in heard:
            line = process.stderr.readline()
            assert line, heard
            heard += line
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    (job,) = json.loads(say("queue", "ls", "--json")[1])
    assert job["status"] == "pending"
    assert f"`comfyctl queue show {job['config_name']}` finds it" in err
