"""`comfyctl queue` and `e3`: jobs put in, looked at and changed from the command line; nobody runs them here."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from runcomfy.cli.e3 import e3
from runcomfy.cli.main import call, comfyctl

KNIGHT = "T2I_20250809123001_1_knight.yaml"
JOB_FILE = """\
job_type: T2I
workflow_id: wf_realistic_portrait
priority: 20
inputs:
  prompt: "Ultra-realistic portrait of a medieval knight in rain, cinematic lighting"
  seed: 123456
  steps: 30
outputs:
  file_path: "jobs/finished/image/{stem}.png"
metadata:
  creator: "cli"
  version: "1.0"
"""

Say = Callable[..., tuple[int, str, str]]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project's folder, which is the working directory."""
    folder = tmp_path / "E3"
    (folder / "jobs" / "processing" / "image").mkdir(parents=True)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str], project: Path) -> Say:
    """Run `comfyctl` or `e3` in the project; returns exit code, stdout, stderr."""

    def run(program: str, *arguments: str) -> tuple[int, str, str]:
        code = call(e3 if program == "e3" else comfyctl, list(arguments), name=program)
        shown = capsys.readouterr()
        assert "Traceback" not in shown.err
        return code, shown.out, shown.err

    return run


def write(project: Path, name: str = KNIGHT, text: str = JOB_FILE) -> str:
    path = project / "jobs" / "processing" / "image" / name
    path.write_text(text.format(stem=path.stem), encoding="utf-8")
    return f"jobs/processing/image/{name}"


def rows(project: Path, query: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(project / "database" / "comfyui_agent.db")) as database:
        return list(database.execute(query))


def listed(say: Say, *arguments: str) -> list[dict[str, Any]]:
    code, out, _ = say("e3", "queue", "ls", "--json", *arguments)
    assert code == 0
    found: list[dict[str, Any]] = json.loads(out)
    return found


# -- putting in ----------------------------------------------------------------------------------------------


def test_add_takes_a_job_file_up_once(say: Say, project: Path) -> None:
    path = write(project)
    code, out, err = say("e3", "add", path)
    assert code == 0, err
    assert out == f"{KNIGHT} is in the queue (number 1, priority 20, pending)\n"
    assert "nobody works on the queue" in err
    assert rows(project, "SELECT config_name, job_type, workflow_id, priority, status, run_count FROM jobs") == [
        (KNIGHT, "T2I", "wf_realistic_portrait", 20, "pending", 0)
    ]
    code, out, _ = say("comfyctl", "queue", "add", path)
    known = f"{KNIGHT} is known already, and its content has not changed (number 1, priority 20, pending)\n"
    assert (code, out) == (0, known)
    assert rows(project, "SELECT count(*) FROM jobs") == [(1,)]


def test_a_broken_file_is_named_with_line_and_field_and_the_others_are_taken(say: Say, project: Path) -> None:
    broken = write(project, "T2I_2_1_broken.yaml", JOB_FILE.replace("steps: 30", "stebs: 30"))
    code, out, err = say("e3", "add", broken, "no-such-file.yaml", write(project))
    assert code == 2
    assert "line 7" in err
    assert "inputs.stebs" in err
    assert "no-such-file.yaml" in err
    assert KNIGHT in out
    assert rows(project, "SELECT config_name FROM jobs") == [(KNIGHT,)]


def test_add_as_json_tells_what_became_of_each_file(say: Say, project: Path) -> None:
    code, out, err = say("comfyctl", "queue", "add", "--json", write(project), "missing.yaml")
    assert (code, err) == (2, "")
    taken, missing = json.loads(out)
    assert (taken["what"], taken["job"]["config_name"], taken["job"]["status"]) == ("new", KNIGHT, "pending")
    assert missing["error"]["code"] == "input-file-missing"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(("show", "nobody"), "job-not-found"), (("retry", "nobody"), "job-not-found"), (("ls", "-s", "odd"), "bad-input")],
)
def test_an_error_is_an_object_for_whoever_reads_json(say: Say, arguments: tuple[str, ...], code: str) -> None:
    exit_code, out, err = say("comfyctl", "queue", *arguments, "--json")
    assert (exit_code, json.loads(out)["error"]["code"]) == (2, code)
    assert err.startswith("error: ")


def test_a_second_file_of_that_name_elsewhere_is_not_taken_up_and_the_command_fails(say: Say, project: Path) -> None:
    first = write(project)
    (project / "jobs" / "processing" / "mesh").mkdir()
    second = f"jobs/processing/mesh/{KNIGHT}"
    (project / second).write_text((project / first).read_text(encoding="utf-8") + "# another\n", encoding="utf-8")
    assert say("comfyctl", "queue", "add", first)[0] == 0
    code, out, _ = say("comfyctl", "queue", "add", second)
    assert code == 2
    assert f"{KNIGHT} is not taken up: another file, elsewhere, has this name" in out
    [(source,)] = rows(project, "SELECT source_path FROM jobs")
    assert Path(source) == project / first


# -- looking -------------------------------------------------------------------------------------------------


def test_a_folder_without_a_queue_stays_without_one(say: Say, project: Path) -> None:
    code, out, _ = say("e3", "queue", "ls")
    assert code == 0
    assert "the queue is empty" in out
    assert listed(say) == []
    for command in (("show", "1"), ("cancel", "1"), ("pause",), ("resume",), ("events",), ("god-mode", "1")):
        code, _, err = say("comfyctl", "queue", *command)
        assert code == 2
        assert "there is no queue" in err
    assert not (project / "database").exists()


def test_a_queue_that_cannot_be_looked_for_is_not_said_to_be_empty(say: Say, project: Path) -> None:
    (project / "database").write_text("a file in the folder's place", encoding="utf-8")
    for command in (("ls",), ("show", "1"), ("events",)):
        code, out, err = say("comfyctl", "queue", *command)
        assert (code, out) == (9, "")
        assert "cannot be opened" in err


def test_the_list_is_in_the_order_of_running_and_says_that_nobody_works(say: Say, project: Path) -> None:
    for name, priority in (("T2I_1_1_a.yaml", 50), ("T2I_1_2_b.yaml", 10), ("T2I_1_3_c.yaml", 50)):
        say("e3", "add", write(project, name, JOB_FILE.replace("priority: 20", f"priority: {priority}")))
    say("e3", "queue", "cancel", "T2I_1_3_c.yaml")
    code, out, _ = say("e3", "queue", "ls")
    lines = out.splitlines()
    assert code == 0
    assert lines[0].split() == ["no", "name", "type", "priority", "status", "runs", "what"]
    assert [line.split()[1] for line in lines[1:4]] == ["T2I_1_2_b.yaml", "T2I_1_1_a.yaml", "T2I_1_3_c.yaml"]
    assert "cancelled" in lines[3]
    assert lines[4] == "2 pending, 0 processing, 0 done, 1 failed"
    assert (
        lines[5] == "nobody works on the queue; `comfyctl agent start` does, or `comfyctl serve` over rented machines"
    )
    assert [job["config_name"] for job in listed(say, "-s", "pending")] == ["T2I_1_2_b.yaml", "T2I_1_1_a.yaml"]
    assert [job["reason"] for job in listed(say, "-s", "failed")] == ["cancelled"]
    code, out, _ = say("e3", "queue", "ls", "--limit", "1")
    assert "not shown: 1 more pending (--limit shows more)" in out


def test_show_tells_everything_of_one_job(say: Say, project: Path) -> None:
    say("e3", "add", write(project))
    code, out, _ = say("comfyctl", "queue", "show", KNIGHT)
    assert code == 0
    facts = {line[:15].strip(): line[16:] for line in out.splitlines()}
    assert facts["type, workflow"] == "T2I, wf_realistic_portrait"
    assert facts["status"] == "pending: waits"
    assert facts["job file"] == str(project / "jobs" / "processing" / "image" / KNIGHT)
    _, out, _ = say("comfyctl", "queue", "show", KNIGHT, "--json")
    shown = json.loads(out)
    assert shown["metadata"] == {"creator": "cli", "version": "1.0"}
    assert shown["attempts"] == []


def test_a_job_is_known_by_name_path_number_and_uid(say: Say, project: Path) -> None:
    path = write(project)
    say("e3", "add", path)
    uid = listed(say)[0]["uid"]
    for name in (KNIGHT, path, "1", uid):
        code, out, _ = say("comfyctl", "queue", "show", name, "--json")
        assert (code, json.loads(out)["uid"]) == (0, uid)


def test_a_name_like_no_other_is_answered_with_where_names_are_listed(say: Say, project: Path) -> None:
    say("e3", "add", write(project))
    _, _, err = say("e3", "queue", "show", "zzz")
    assert "`comfyctl queue ls` lists the jobs" in err
    assert "did you mean" not in err


@pytest.mark.parametrize("typed", ["T2I_20250809123001_1_kniht.yaml", "knight", "T2I_20250809123001_1_knight"])
def test_a_name_that_comes_near_is_suggested_and_nothing_is_changed(say: Say, project: Path, typed: str) -> None:
    say("e3", "add", write(project))
    code, _, err = say("e3", "queue", "cancel", typed)
    assert code == 2
    assert "[job-not-found]" in err
    assert f"did you mean {KNIGHT}?" in err
    assert listed(say)[0]["status"] == "pending"


def test_events_tell_the_story(say: Say, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("getpass.getuser", lambda: "ada")
    say("e3", "add", write(project))
    say("e3", "queue", "god-mode", KNIGHT)
    say("e3", "queue", "pause", "--reason", "moving house")
    _, out, _ = say("comfyctl", "queue", "events")
    assert [line.split(" ", 2)[2] for line in out.splitlines()] == [
        f"{KNIGHT}: put into the queue (file={project / 'jobs' / 'processing' / 'image' / KNIGHT})",
        f"{KNIGHT}: priority changed (priority=1, by=ada)",
        "paused (message=moving house, reason=asked, scope=queue, by=ada)",
    ]
    _, out, _ = say("comfyctl", "queue", "events", KNIGHT, "--json")
    assert [json.loads(line)["kind"] for line in out.splitlines()] == ["enqueued", "priority"]
    _, out, _ = say("comfyctl", "queue", "events", "--limit", "1", "--json")
    assert [json.loads(line)["kind"] for line in out.splitlines()] == ["paused"]


@contextmanager
def watching(*words: str) -> Iterator[tuple[Callable[[], str], subprocess.Popen[str]]]:
    """A command that stays; gives what reads its next line."""
    command = [sys.executable, "-m", "runcomfy.cli.e3", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline, process
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=120)
        finally:
            process.kill()  # else a failing assertion waits for a command that never ends
    assert (process.returncode, err) == (0, ""), "Ctrl+C is how looking ends"


@pytest.mark.processes
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT to send")
def test_a_watched_list_without_a_terminal_prints_each_change(say: Say, project: Path) -> None:
    say("e3", "add", write(project))
    with watching("queue", "ls", "--watch") as (line, _):
        assert line().split() == ["1", KNIGHT, "T2I", "20", "pending", "0", "waits"]
        assert (
            line()
            == "nobody works on the queue; `comfyctl agent start` does, or `comfyctl serve` over rented machines\n"
        )
        say("e3", "queue", "god-mode", KNIGHT)
        assert line().split()[:4] == ["1", KNIGHT, "T2I", "1"]
        say("e3", "queue", "pause", "--reason", "moving house")
        assert "moving house" in line()


@pytest.mark.processes
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT to send")
def test_followed_events_come_as_they_happen(say: Say, project: Path) -> None:
    say("e3", "add", write(project))
    with watching("queue", "events", KNIGHT, "--follow", "--json") as (line, _):
        assert json.loads(line())["kind"] == "enqueued"
        say("e3", "queue", "pause")
        say("e3", "queue", "cancel", KNIGHT)
        assert json.loads(line())["kind"] == "cancelled"


@pytest.mark.processes
def test_a_watched_job_is_shown_when_it_has_ended(say: Say, project: Path) -> None:
    say("e3", "add", write(project))
    command = [sys.executable, "-m", "runcomfy.cli.e3", "queue", "show", KNIGHT, "--watch"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            assert process.stderr.readline() == "pending: waits\n"
            say("e3", "queue", "cancel", KNIGHT)
            out, err = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 0
    assert "status          cancelled" in out
    assert err.startswith("failed: ")


# -- changing ------------------------------------------------------------------------------------------------


def test_priorities_are_set_and_cut_to_what_there_is(say: Say, project: Path) -> None:
    say("e3", "add", write(project))
    assert say("e3", "queue", "set-priority", KNIGHT, "5")[1] == f"{KNIGHT} has priority 5\n"
    code, out, err = say("e3", "queue", "set-priority", KNIGHT, "5000")
    assert (code, out) == (0, f"{KNIGHT} has priority 999\n")
    assert "5000" in err
    assert say("e3", "queue", "god-mode", KNIGHT)[1] == f"{KNIGHT} has priority 1\n"
    assert rows(project, "SELECT priority FROM jobs") == [(1,)]


def test_a_cancelled_job_comes_back_by_retry_only(say: Say, project: Path) -> None:
    path = write(project)
    say("e3", "add", path)
    assert say("e3", "queue", "cancel", KNIGHT)[1] == f"{KNIGHT} is cancelled\n"
    assert "was cancelled" in say("e3", "add", write(project, text=JOB_FILE + "# changed\n"))[1]
    assert listed(say)[0]["status"] == "failed"
    assert say("e3", "retry", KNIGHT)[1] == f"{KNIGHT} waits to be run\n"
    assert listed(say)[0]["status"] == "pending"


def test_orders_are_answered_with_objects_for_whoever_reads_json(say: Say, project: Path) -> None:
    say("e3", "add", write(project))
    job = json.loads(say("comfyctl", "queue", "cancel", KNIGHT, "--json")[1])
    assert (job["config_name"], job["status"]) == (KNIGHT, "failed")
    pause = json.loads(say("comfyctl", "queue", "pause", "--reason", "moving house", "--json")[1])
    assert (pause["message"], pause["until"]) == ("moving house", None)


def test_a_pause_is_told_wherever_the_queue_is_looked_at(say: Say, project: Path) -> None:
    say("e3", "add", write(project))
    assert say("comfyctl", "queue", "resume")[1] == "nothing was paused\n"
    assert "nothing begins" in say("comfyctl", "queue", "pause", "--reason", "moving house")[1]
    paused = "paused: the queue, until `comfyctl queue resume`: moving house"
    assert paused in say("e3", "queue", "ls")[1]
    assert paused in say("comfyctl", "agent", "status")[1]
    _, out, _ = say("comfyctl", "agent", "status", "--json")
    status = json.loads(out)
    assert [pause["message"] for pause in status["pauses"]] == ["moving house"]
    assert (status["workers"], status["counts"]["pending"]) == ([], 1)
    _, out, _ = say("comfyctl", "queue", "resume", "--json")
    assert [pause["reason"] for pause in json.loads(out)] == ["asked"]
    assert "paused" not in say("e3", "queue", "ls")[1]


def test_sql_by_hand_is_what_the_commands_show(say: Say, project: Path) -> None:
    say("e3", "add", write(project))
    with closing(sqlite3.connect(project / "database" / "comfyui_agent.db")) as database, database:
        database.execute("UPDATE jobs SET priority=1 WHERE config_name=?", (KNIGHT,))
    assert listed(say)[0]["priority"] == 1


def test_another_database_can_be_named(say: Say, project: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.db"
    assert say("e3", "add", write(project), "--database", str(other))[0] == 0
    assert other.is_file()
    assert listed(say) == []
    assert [job["id"] for job in listed(say, "--database", str(other))] == [1]


# -- the command line itself -----------------------------------------------------------------------------------


def test_e3_names_its_commands_without_loading_them(say: Say) -> None:
    code, out, _ = say("e3", "--help")
    assert code == 0
    commands = ("init", "add", "queue", "retry", "start", "monitor", "run", "status")
    assert all(f"  {name} " in out for name in commands)


@pytest.mark.parametrize(
    "arguments",
    [("queue", "ls", "-s", "lost"), ("queue", "set-priority", "x", "high"), ("queue", "nothing"), ("add",)],
)
def test_words_that_mean_nothing_end_with_2_and_two_lines(say: Say, arguments: tuple[str, ...]) -> None:
    code, out, err = say("e3", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert "--help" in err


def test_options_of_the_queue_need_the_queue(say: Say) -> None:
    for option in (("--priority", "5"), ("--key", "k")):
        code, _, err = say("comfyctl", "run", "image_invert", *option)
        assert code == 2
        assert "--queue" in err
