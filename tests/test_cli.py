"""The commands as people and scripts meet them: what they print, where, and their exit codes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from runcomfy.testing.emulators.comfyui import ComfyUIEmulator
from runcomfy.testing.emulators.comfyui.faults import Fault
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator
from runcomfy.testing.in_thread import InThread, served

ROOT = Path(__file__).resolve().parents[1]
RENDER = ROOT / "examples" / "render.png"
QUICK = {
    "RUNCOMFY_POLL_INTERVAL": "0.1",
    "RUNCOMFY_REQUESTS_PER_SECOND": "1000",
    "RUNCOMFY_BURST": "1000",
    "RUNCOMFY_VISIBILITY_WINDOW": "1",
}
Cloud = InThread[RunComfyEmulator]
FAIL = {
    "class_type": "EmulatorFail",
    "inputs": {"image": ["1", 0], "message": "on purpose", "kind": "error", "steps": 4, "at_step": 2},
}
DELAY: dict[str, Any] = {
    "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 255}},
    "2": {
        "class_type": "EmulatorDelay",
        "inputs": {"image": ["1", 0], "seconds": 8000.0, "steps": 10000, "previews": False, "seed": 1},
    },
    "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "slow"}},
}


@pytest.fixture(scope="module")
def comfyui() -> Iterator[InThread[ComfyUIEmulator]]:
    with served(lambda: ComfyUIEmulator(speed=20)) as server:
        yield server


@pytest.fixture
def cloud(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    """An account at an emulated cloud; nothing may bill at the end of the test."""
    with served(
        lambda: RunComfyEmulator(boot_time=0.3, delete_takes=0.2, comfyui_speed=20, rate_limit=False)
    ) as running:
        for name, value in {**running.emulator.environment(), **QUICK}.items():
            monkeypatch.setenv(name, value)
        yield running
        assert running.call(lambda c: list(c.billing)) == []


@pytest.fixture
def picture(picture: Path) -> str:
    return str(picture)


# -- run -----------------------------------------------------------------------------------------------------


def test_a_cold_run_prints_files_seeds_and_the_bill_and_leaves_nothing(comfy: Any, cloud: Cloud) -> None:
    code, out, err = comfy("run", "generate_flux_mesh", "--image", str(RENDER), "--prompt", "a brass bell")
    assert code == 0, err
    assert "flux.png" in out
    assert "mesh.glb" in out
    assert "3.noise_seed = " in out
    assert "32.seed = " in out
    bill = [line for line in out.splitlines() if line.startswith("medium (ready until the stop was accepted)")]
    assert len(bill) == 1
    assert "$0.99/h" in bill[0]
    assert out.splitlines()[-1].startswith("total")
    for step in ("launching", "booting", "checking", "uploading", "running", "fetching", "stopping", "finished"):
        assert f"] {step}" in err
    assert "\x1b" not in out + err, "piped output has no escape codes"


def test_json_is_one_object_with_everything_promised(comfy: Any, cloud: Cloud, tmp_path: Path) -> None:
    code, out, err = comfy(
        "run", "generate_flux_mesh", "--image", str(RENDER), "--prompt", "x", "--seed", "7", "--json"
    )
    job = json.loads(out)
    assert (code, err) == (0, "")
    assert set(job) == {"job_id", "status", "prompt_id", "outputs", "seeds", "cost_usd", "timings"}
    assert job["status"] == "done"
    assert job["seeds"] == {"3.noise_seed": 7, "32.seed": 7}
    # Our books against the cloud's own: the stop's answer travels, so they may differ by less than a second.
    assert abs(Decimal(job["cost_usd"]) - cloud.call(lambda c: c.total_usd)) < Decimal("0.99") / 3600
    assert {output["kind"] for output in job["outputs"]} == {"image", "mesh"}
    for output in job["outputs"]:
        assert set(output) == {"node", "kind", "path", "size_bytes", "sha256"}
        content = Path(output["path"]).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (output["size_bytes"], output["sha256"])
    assert job["timings"]["total"] >= job["timings"]["execute"] > 0
    manifest = json.loads((tmp_path / "outputs" / job["job_id"] / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["seeds"] == job["seeds"]


def test_a_given_server_needs_no_account_and_bills_nothing(
    comfy: Any, comfyui: InThread[ComfyUIEmulator], picture: str, tmp_path: Path
) -> None:
    code, out, err = comfy(
        "run", "image_invert", "--image", picture, "--server", comfyui.emulator.url, "--out", "here", "--convert", "jpg"
    )
    assert code == 0, err
    assert "nothing was billed" in out
    (path,) = (tmp_path / "here").rglob("inverted.jpg")
    with Image.open(path) as inverted:
        assert inverted.format == "JPEG"
        assert inverted.size == (64, 48)


def test_values_and_files_are_set_by_id_title_or_class(
    comfy: Any, comfyui: InThread[ComfyUIEmulator], picture: str, tmp_path: Path
) -> None:
    graph = {
        "1": {"class_type": "LoadImage", "inputs": {"image": "x.png"}, "_meta": {"title": "the input"}},
        "2": {"class_type": "ImageScale", "inputs": {
            "image": ["1", 0], "upscale_method": "nearest-exact", "width": 8, "height": 8, "crop": "disabled"}},
        "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "set"}},
    }  # fmt: skip
    (tmp_path / "mine.json").write_text(json.dumps(graph), encoding="utf-8")
    code, out, err = comfy(
        "run", "mine.json", "--server", comfyui.emulator.url, "--json",
        "--set", f"the input.image=@{picture}", "--set", "ImageScale.width=40", "--set", "2.height=30",
    )  # fmt: skip
    assert code == 0, err
    with Image.open(json.loads(out)["outputs"][0]["path"]) as scaled:
        assert scaled.size == (40, 30)


def test_a_dry_run_shows_graph_place_and_cost_and_sends_nothing(comfy: Any, cloud: Cloud, tmp_path: Path) -> None:
    words = ("run", "generate_flux_mesh", "--image", str(RENDER), "--prompt", "x", "--timeout", "10m", "--dry-run")
    code, out, _ = comfy(*words)
    assert code == 0
    assert '"class_type": "XlabsSampler"' in out
    assert "a machine of its own, stopped at the end (medium)" in out
    assert "at most $0.17 if the job takes its whole timeout of 10m" in out
    code, out, _ = comfy(*words, "--json")
    facts = json.loads(out)
    assert facts["graph"]["34"]["inputs"]["clip_l"] == "x"
    assert facts["usd_per_hour"] == "0.99"
    assert cloud.call(lambda c: list(c.calls)) == []
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    ("graph", "fault", "code", "status", "word"),
    [
        ({"2": FAIL}, None, 5, "failed", "node-failed"),
        (DELAY, None, 6, "timeout", "job-timeout"),
        ({}, Fault.page(), 7, "failed", ""),
    ],
    ids=["a node raises", "too slow", "a page in place of the picture"],
)
def test_exit_codes_tell_failures_apart(
    graph: dict[str, Any], fault: Fault | None, code: int, status: str, word: str, comfy: Any, tmp_path: Path
) -> None:
    whole = {
        "1": DELAY["1"],
        "3": {"class_type": "SaveImage", "inputs": {"images": ["2" if graph else "1", 0], "filename_prefix": "x"}},
        **graph,
    }
    (tmp_path / "w.json").write_text(json.dumps(whole), encoding="utf-8")
    with served(ComfyUIEmulator) as server:
        if fault is not None:
            server.call(lambda s: s.faults.add("GET", "/view", fault, times=1000))
        got, out, _ = comfy(
            "run", "w.json", "--server", server.emulator.url, "--timeout", "2s" if code == 6 else "1m", "--json"
        )
    job = json.loads(out)
    assert (got, job["status"]) == (code, status), job
    assert word in job["error"]["code"]
    assert job["error"]["hint"]
    assert job["outputs"] == []


# -- machines ------------------------------------------------------------------------------------------------


def test_machines_are_listed_adopted_told_and_stopped(comfy: Any, cloud: Cloud) -> None:
    theirs = cloud.call(lambda c: c.foreign("large").server_id)
    code, out, _ = comfy("machines", "ls")
    assert code == 0
    assert theirs in out
    assert "not ours" in out
    assert "never touched" in out

    code, out, _ = comfy("machines", "reap")
    assert (code, f"{theirs}: not ours, left alone" in out) == (0, True)

    code, out, _ = comfy("machines", "adopt", theirs)
    assert (code, f"{theirs} is ours now" in out) == (0, True)
    code, out, _ = comfy("machines", "ls", "--json")
    (row,) = json.loads(out)
    assert (row["ours"], row["purpose"], row["server_id"]) == (True, "taken", theirs)

    code, out, _ = comfy("machines", "stop", theirs)
    assert (code, "stopped; it cost $" in out) == (0, True)
    code, out, _ = comfy("machines", "show", theirs)
    assert code == 0
    for word in ("adopted by the user", "stop-asked", "gone"):
        assert word in out
    code, out, _ = comfy("machines", "ls")
    assert out == "the account runs no machine, and our books have none open\n"
    assert comfy("machines", "stop", "no-such-machine")[0] == 4


def test_a_killed_runs_machine_is_seen_and_reaped(comfy: Any, cloud: Cloud) -> None:
    process = start_run(cloud)
    wait_for(process, "running")
    process.kill()
    process.communicate()
    code, out, _ = comfy("machines", "ls")
    assert "the process that rented it is gone; `comfyctl machines reap` would end it" in out
    code, out, err = comfy("machines", "reap", "--json")
    assert (code, len(json.loads(out)["ended"])) == (0, 1), err
    assert comfy("machines", "reap")[1] == "nothing to end\n"


# -- the dev server ------------------------------------------------------------------------------------------


def test_the_dev_server_is_started_used_described_prolonged_and_stopped(
    comfy: Any, cloud: Cloud, picture: str, tmp_path: Path
) -> None:
    code, out, err = comfy("dev", "start", "--duration", "2h", "--warm-up", "--no-interactive")
    assert code == 0, err
    assert "dev server ready: medium machine" in out
    assert "$0.99 per hour" in out
    assert "(planned)" in out
    assert "warm-up  done in" in out
    state = tmp_path / "state" / "dev_server_state.json"
    assert json.loads(state.read_text(encoding="utf-8"))["status"] == "running"

    code, out, _ = comfy("dev", "start")
    assert "dev server reused" in out
    code, out, _ = comfy("run", "image_invert", "--image", picture)
    assert (code, "this job's time on the dev server" in out) == (0, True)
    code, out, _ = comfy("dev", "extend", "30m")
    assert (code, "now stops at" in out) == (0, True)
    code, out, _ = comfy("dev", "status", "--json")
    facts = json.loads(out)
    assert (facts["Usable"], facts["Status"], facts["Jobs Running"]) == (True, "Ready", 0)
    assert facts["Idle For"]
    code, out, _ = comfy("dev", "status")
    assert "healthy" in out.splitlines()

    code, out, err = comfy("dev", "shutdown")
    assert (code, "stopped; it cost $" in out) == (0, True)
    assert "looking until it is gone" in err
    assert not state.exists()
    assert comfy("dev", "shutdown") == (0, "there is no active development server\n", "")
    assert comfy("dev", "status")[:2] == (0, "there is no active development server\n")
    assert len(cloud.call(lambda c: list(c.launched))) == 1


def test_a_restart_keeps_type_and_duration(comfy: Any, cloud: Cloud) -> None:
    assert comfy("dev", "start", "--server-type", "large", "--duration", "5000")[0] == 0
    assert comfy("dev", "restart")[0] == 0
    machines = cloud.call(lambda c: list(c.machines.values()))
    assert [(m.server_type, m.estimated_duration) for m in machines] == [("large", 5000), ("large", 5000)]
    assert comfy("dev", "stop")[0] == 0


# -- doctor --------------------------------------------------------------------------------------------------


def layers(out: str) -> dict[str, str]:
    return {line[4:].split(":")[0].strip(): line[:4].strip() for line in out.splitlines()}


def test_the_doctor_finds_nothing_where_nothing_is_wrong(comfy: Any, cloud: Cloud) -> None:
    code, out, _ = comfy("doctor")
    assert code == 0
    names = ("credentials", "host and path", "token", "user id", "workflow version", "machine list")
    assert layers(out) == {**dict.fromkeys(names, "ok"), "leases": "--"}  # what a canary has not tried yet


@pytest.mark.parametrize(
    ("name", "value", "bad", "code", "word"),
    [
        ("RUNCOMFY_API_BASE_URL", "http://127.0.0.1:1", "host and path", 4, "provider-busy"),
        ("RUNCOMFY_API_TOKEN", "not-the-token", "token", 4, "provider-auth-rejected"),
        ("RUNCOMFY_USER_ID", "somebody-else", "user id", 4, "provider-access-denied"),
        ("RUNCOMFY_WORKFLOW_VERSION_ID", "no-such-version", "workflow version", 3, "setting-invalid"),
        (
            "RUNCOMFY_WORKFLOW_VERSION_ID",
            "7f0c1f3e-0c5b-4a39-8f43-52c6f1b0a001",
            "workflow version",
            3,
            "holds a workflow's id, not a version id",
        ),
    ],
)
def test_the_doctor_names_the_layer_that_is_wrong(
    name: str, value: str, bad: str, code: int, word: str, comfy: Any, cloud: Cloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    monkeypatch.setenv("RUNCOMFY_MAX_RETRIES", "0")
    got, out, err = comfy("doctor")
    assert got == code, err
    assert [layer for layer, state in layers(out).items() if state == "BAD"] == [bad]
    assert word in err


def test_the_doctor_looks_at_a_comfyui(comfy: Any, comfyui: InThread[ComfyUIEmulator]) -> None:
    code, out, _ = comfy("doctor", "--server", comfyui.emulator.url, "--json")
    assert code == 0
    assert [(f["layer"], f["ok"]) for f in json.loads(out)] == [
        ("ComfyUI answers", True),
        ("node list readable", True),
        ("queue readable", True),
    ]


# -- Ctrl+C --------------------------------------------------------------------------------------------------


def start_run(cloud: Cloud) -> subprocess.Popen[str]:
    """Start a cold run that does not end by itself, as a process of its own."""
    folder = Path(os.environ["RUNCOMFY_STATE_DIR"]).parent
    (folder / "slow.json").write_text(json.dumps(DELAY), encoding="utf-8")
    return subprocess.Popen(
        [sys.executable, "-m", "runcomfy.cli.main", "run", "slow.json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def wait_for(process: subprocess.Popen[str], step: str) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        if f"] {step}" in line:
            return
    pytest.fail(f"the run never came to {step}")


@pytest.mark.processes
@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)])
@pytest.mark.parametrize("step", ["booting", "running"])
def test_a_signal_ends_the_prompt_and_the_machine_and_says_so(number: signal.Signals, step: str, cloud: Cloud) -> None:
    process = start_run(cloud)
    wait_for(process, step)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "ending in good order" in err
    assert "[interrupted]" in err
    assert "cancelled; nothing that this command rented still runs" in err
    assert cloud.call(lambda c: list(c.alive)) == []


@pytest.mark.processes
@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_a_second_ctrl_c_leaves_at_once_and_says_what_bills_and_how_to_stop_it(comfy: Any, cloud: Cloud) -> None:
    cloud.call(lambda c: c.next_call("DELETE servers/*", status=503, times=None))
    process = start_run(cloud)
    wait_for(process, "running")
    process.send_signal(signal.SIGINT)
    wait_for(process, "stopping")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    (machine,) = cloud.call(lambda c: list(c.billing))
    assert "This may still run and bill:" in err
    assert f"$0.99/h: stop it with `comfyctl machines stop {machine}`" in err
    cloud.call(RunComfyEmulator.behave)
    assert comfy("machines", "stop", machine)[0] == 0


@pytest.mark.processes
@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_an_interrupted_start_of_a_dev_server_leaves_none(cloud: Cloud) -> None:
    cloud.call(lambda c: c.next_machine(boot_time=600))
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "runcomfy" / "dev_server_startup.py")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/",
    )  # fmt: skip
    wait_for(process, "booting")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "cancelled; nothing that this command rented still runs" in err
    assert cloud.call(lambda c: list(c.alive)) == []


@pytest.mark.processes
@pytest.mark.skipif(sys.platform == "win32", reason="pseudo terminals of POSIX")
@pytest.mark.parametrize(
    ("answer", "said"), [("s", "stopped; it cost $"), ("l", "left running, and billing")], ids=["stop", "leave"]
)
def test_ctrl_c_in_the_monitor_asks_whether_to_stop_or_leave(answer: str, said: str, comfy: Any, cloud: Cloud) -> None:
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "runcomfy.cli.main", "dev", "start", "--monitor"],
        stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    os.close(theirs)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("idle; $"):
            break
    assert re.fullmatch(r"idle; \$\d+\.\d+ so far, stops \d{4}-\d\d-\d\d \d\d:\d\d:\d\d\n", line)
    process.send_signal(signal.SIGINT)
    os.write(ours, f"{answer}\n".encode())
    rest, _ = process.communicate(timeout=120)
    os.close(ours)
    assert process.returncode == 0
    assert "[s]top the machine, or [l]eave it running?" in rest
    assert said in rest
    assert bool(cloud.call(lambda c: list(c.billing))) == (answer == "l")
    assert comfy("dev", "shutdown")[0] == 0


@pytest.mark.processes
@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_without_a_terminal_the_monitor_leaves_the_machine_running(comfy: Any, cloud: Cloud) -> None:
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "runcomfy" / "dev_server_startup.py"), "--monitor", "--no-interactive"],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("idle; $"):
            break
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=120)
    assert (process.returncode, rest) == (0, "left running, and billing; `comfyctl dev shutdown` stops it\n")
    assert comfy("dev", "shutdown")[0] == 0


# -- in a terminal -------------------------------------------------------------------------------------------


@pytest.mark.processes
@pytest.mark.skipif(sys.platform == "win32", reason="pseudo terminals of POSIX")
def test_in_a_terminal_there_is_one_live_line(comfyui: InThread[ComfyUIEmulator], picture: str, tmp_path: Path) -> None:
    import pty

    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "runcomfy.cli.main", "run", "image_invert", "--image", picture, "--server",
         comfyui.emulator.url],
        stdout=subprocess.PIPE, stderr=theirs, text=True, cwd=tmp_path,
        env={**{k: v for k, v in os.environ.items() if k != "NO_COLOR"}, "PYTHONPATH": str(ROOT), "TERM": "xterm"},
    )  # fmt: skip
    os.close(theirs)
    seen = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        seen += piece
    os.close(ours)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "inverted.png" in out
    text = seen.decode(errors="replace")
    assert "\x1b[?25l" in text  # the cursor is hidden while the line lives
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # and shown again
    assert "%" in text
    assert "\n[" not in text, "no plain lines in a terminal"


# -- the rest ------------------------------------------------------------------------------------------------


def test_nothing_of_a_defect_but_two_lines_reaches_the_user(
    comfy: Any, monkeypatch: pytest.MonkeyPatch, picture: str
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("somewhere deep")

    monkeypatch.setattr("runcomfy.adapters.config.load_settings", broken)
    code, out, err = comfy("run", "image_invert", "--image", picture)
    assert (code, out) == (1, "")
    assert err.splitlines()[0] == "error: unexpected ZeroDivisionError: somewhere deep [internal-error]"
    assert len(err.splitlines()) == 2


@pytest.mark.parametrize(
    "arguments", [["nonsense"], ["run"], ["run", "--nonsense"], ["dev", "extend"], ["emulator", "--port", "x"]]
)
def test_what_cannot_be_understood_is_two_lines_and_exit_code_2(arguments: list[str], comfy: Any) -> None:
    code, out, err = comfy(*arguments)
    assert (code, out) == (2, "")
    what, hint = err.splitlines()
    assert what.startswith("error: ")
    assert "--help" in hint


@pytest.mark.parametrize("arguments", [["--help"], ["run", "-h"], ["dev", "start", "--help"], ["--version"]])
def test_help_and_version(arguments: list[str], comfy: Any) -> None:
    code, out, err = comfy(*arguments)
    assert (code, err) == (0, "")
    assert "comfyctl" in out


@pytest.mark.processes
@pytest.mark.parametrize(
    "how", [["-m", "runcomfy.dev_server_startup"], [str(ROOT / "runcomfy" / "dev_server_startup.py")]]
)
def test_the_script_runs_from_any_directory(how: list[str], cloud: Cloud, tmp_path: Path) -> None:
    environment = dict(os.environ)
    if how[0] == "-m":
        environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, *how, "--status", "--no-interactive"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "there is no active development server\n", "")
