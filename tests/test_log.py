"""The log: whole lines, no secrets, private files, and no failure that reaches the program."""

from __future__ import annotations

import errno
import json
import logging
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runcomfy.adapters.log import (
    JsonLines,
    LineHandler,
    LogFile,
    Redactor,
    configure_logging,
    redact,
    register_secret,
    unconfigure_logging,
)
from runcomfy.config import Settings, load_settings
from runcomfy.domain.secret import Secret, SecretUrl

posix = pytest.mark.skipif(sys.platform == "win32", reason="permission bits and links are POSIX's")
log = logging.getLogger("runcomfy.test")

TOKEN, USER = "9d2b7e51-canary-token", "canary-user-5c0f"


def settings(tmp_path: Path, **env: str) -> Settings:
    given = {"RUNCOMFY_STATE_DIR": str(tmp_path / "state"), "RUNCOMFY_CREDENTIALS_FILE": os.devnull}
    return load_settings(env={**given, "RUNCOMFY_API_TOKEN": TOKEN, "RUNCOMFY_USER_ID": USER, **env})


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    unconfigure_logging()


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """The log file, with logging set up."""
    configure_logging(settings(tmp_path))
    return tmp_path / "state" / "logs" / "comfyctl.log"


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_line_is_an_event_with_its_fields(written: Path) -> None:
    fields = {
        "machine": "m-1",
        "usd": Decimal("0.99"),
        "seconds": timedelta(seconds=1.5),
        "at_provider": datetime(2026, 11, 21, 12, tzinfo=UTC),
        "tries": 3,
        "ok": True,
        "none": None,
        "ids": ["a", "b"],
        "path": Path("x"),
    }
    log.info("machine_launched", extra={"fields": fields})
    (line,) = lines(written)
    assert datetime.fromisoformat(line.pop("at")).utcoffset() == timedelta(0)
    assert line == {
        "level": "INFO",
        "event": "machine_launched",
        "logger": "runcomfy.test",
        "pid": os.getpid(),
        "machine": "m-1",
        "usd": "0.99",
        "seconds": 1.5,
        "at_provider": "2026-11-21T12:00:00+00:00",
        "tries": 3,
        "ok": True,
        "none": None,
        "ids": ["a", "b"],
        "path": "x",
    }


def test_a_field_cannot_pass_for_the_lines_own(written: Path) -> None:
    log.warning("stop_sent", extra={"fields": {"event": "launched", "level": "DEBUG"}})
    (line,) = lines(written)
    assert (line["event"], line["event_"], line["level"], line["level_"]) == (
        "stop_sent",
        "launched",
        "WARNING",
        "DEBUG",
    )


def test_the_level_is_the_settings(tmp_path: Path) -> None:
    configure_logging(settings(tmp_path, RUNCOMFY_LOG_LEVEL="WARNING"))
    log.info("quiet")
    log.warning("loud")
    assert [line["event"] for line in lines(tmp_path / "state" / "logs" / "comfyctl.log")] == ["loud"]


def test_setting_it_up_again_writes_no_line_twice_and_leaves_others_handlers(tmp_path: Path, written: Path) -> None:
    theirs = logging.NullHandler()
    logging.getLogger("runcomfy").addHandler(theirs)
    try:
        configure_logging(settings(tmp_path))
        log.info("once")
        assert len(lines(written)) == 1
        assert theirs in logging.getLogger("runcomfy").handlers
    finally:
        logging.getLogger("runcomfy").removeHandler(theirs)


class Messages(logging.Handler):
    """Remembers the messages of the program around this library."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.heard.append(record.getMessage())


def test_nothing_reaches_the_root_logger_until_it_is_undone(written: Path) -> None:
    root = Messages()
    logging.getLogger().addHandler(root)
    try:
        log.error("ours")
        assert root.heard == []
        unconfigure_logging()
        log.error("theirs")
    finally:
        logging.getLogger().removeHandler(root)
    assert root.heard == ["theirs"]
    assert [line["event"] for line in lines(written)] == ["ours"]


def test_the_console_gets_a_line_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(settings(tmp_path), console=True)
    log.warning("machine_lost", extra={"fields": {"machine": "m-1", "token": TOKEN}})
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.endswith(" warning machine_lost machine=m-1 token=***\n")


def test_a_program_without_a_standard_error_loses_nothing_by_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logging(settings(tmp_path), console=True)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", None)  # as in a program with windows and without a console
        log.warning("machine_lost")
    log.warning("machine_found")
    assert [line["event"] for line in lines(tmp_path / "state" / "logs" / "comfyctl.log")] == [
        "machine_lost",
        "machine_found",
    ]
    assert capsys.readouterr().err.count("\n") == 1


# --- secrets ------------------------------------------------------------------------------------------------


@pytest.mark.threat("S3")
def test_no_secret_gets_into_the_file_by_any_way(written: Path) -> None:
    host = "0f6b-canary-host-comfyui.runcomfy.com"
    register_secret(SecretUrl("https://odd-canary-name.example.org/"))
    register_secret(Secret("another/canary+token"))
    log.info("plain %s and %s", TOKEN, USER)
    log.info(f"joined{TOKEN}text", extra={"fields": {"list": [TOKEN, {"deep": (USER, f"https://{host}/view")}]}})
    log.info(
        "headers", extra={"fields": {"headers": {"Authorization": "Bearer unknown-canary", "x-api-key": "canary"}}}
    )
    log.info("text", extra={"fields": {"why": "Authorization: Bearer unknown-canary.x and Basic Y2FuYXJ5OmNhbmFyeQ=="}})
    log.info("urls wss://%s/ws http://me:canary@example.org/?token=canary&x=1 ODD-CANARY-NAME.example.org", host)
    log.info(
        "quoted %s",
        "another%2Fcanary%2Btoken",
        extra={"fields": {TOKEN: 1, "secret": Secret("canary"), "cookie": "canary"}},
    )
    log.info(
        "object",
        extra={"fields": {"url": SecretUrl(f"https://{host}"), "error": ValueError(TOKEN), "password": "canary"}},
    )
    try:
        raise ValueError(f"could not reach https://{host}/queue with {TOKEN}")
    except ValueError:
        log.exception("failed", stack_info=True)
    text = written.read_text(encoding="utf-8")
    for needle in (
        TOKEN,
        USER,
        host,
        "0f6b",
        "unknown-canary",
        "another",
        "odd-canary",
        "ODD-",
        "Y2Fu",
        "me:",
        "token=canary",
    ):
        assert needle not in text.replace("test_no_secret", ""), needle
    assert '"canary"' not in text
    assert "https://***-comfyui.runcomfy.com/queue" in text
    assert len(lines(written)) == 8
    assert "ValueError" in lines(written)[-1]["traceback"]


def test_short_secrets_do_not_eat_words() -> None:
    redactor = Redactor()
    redactor.add("demo")
    redactor.add("abc")
    assert redactor.clean("demo demonstrates abc, users/demo/servers") == "*** demonstrates abc, users/***/servers"


def test_this_computers_own_address_is_no_secret() -> None:
    register_secret(SecretUrl("http://127.0.0.1:8188"))
    assert redact("http://127.0.0.1:8188/queue") == "http://127.0.0.1:8188/queue"


@given(before=st.text(max_size=30), after=st.text(max_size=30), size=st.sampled_from([0, 4_090, 70_000]))
@pytest.mark.threat("S3")
def test_a_secret_is_cut_out_wherever_it_stands(before: str, after: str, size: int) -> None:
    register_secret(TOKEN)
    record = logging.makeLogRecord({"msg": "x" * size + before + TOKEN + after, "fields": {before: after + TOKEN}})
    line = JsonLines().format(record)
    assert TOKEN not in line
    assert "\n" not in line
    assert set(json.loads(line)) >= {"at", "level", "event", "logger", "pid"}


@given(st.text())
@pytest.mark.threat("S15")
def test_control_characters_do_not_pass(text: str) -> None:
    assert redact(text).isprintable()


@pytest.mark.threat("S15")
def test_escape_codes_and_forged_lines_are_flattened(written: Path) -> None:
    log.info('node said \x1b[31m"red"\x1b[0m\n{"event": "forged"}\u202e')
    (line,) = lines(written)
    assert line["event"] == 'node said [31m"red"[0m {"event": "forged"}'


# --- what callers get wrong ---------------------------------------------------------------------------------


class Unprintable:
    def __str__(self) -> str:
        raise RuntimeError("no")


def test_arguments_that_do_not_fit_cost_only_themselves() -> None:
    record = logging.makeLogRecord({"msg": "percent %d", "args": ("text",)})
    assert json.loads(JsonLines().format(record))["event"] == "percent %d"


def test_half_a_character_is_left_out_of_an_event() -> None:
    # Formatted by hand: pytest would hand the captured text on to other processes, which cannot carry it.
    record = logging.LogRecord("runcomfy.x", logging.INFO, __file__, 1, "surrogate \ud800", None, None)
    assert json.loads(JsonLines().format(record))["event"] == "surrogate "


def test_what_cannot_be_shown_is_named_and_not_raised(written: Path) -> None:
    loop: list[object] = []
    loop.append(loop)
    log.info(
        "fields", extra={"fields": {"bad": Unprintable(), "loop": loop, "nan": float("nan"), "raw": b"\xff", 5: 6}}
    )
    log.info("none", extra={"fields": "not a mapping"})
    log.info("long", extra={"fields": {"half": "a\ud800b", "long": "x" * 100_000, "many": list(range(1000))}})
    second, third, fourth = lines(written)
    assert second["bad"] == "<Unprintable: RuntimeError>"
    assert (second["nan"], second["5"]) == ("nan", 6)
    assert third["event"] == "none"
    assert fourth["half"] == "ab"
    assert len(fourth["long"]) <= 4_096
    assert len(fourth["many"]) == 100


# --- the disk -----------------------------------------------------------------------------------------------


class FullDisk:
    """A sink that takes no line while it is full."""

    def __init__(self) -> None:
        self.full = True
        self.lines: list[bytes] = []

    def append(self, line: bytes) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.lines.append(line)


@pytest.mark.fault(54)
def test_a_full_disk_costs_lines_and_nothing_else(capfd: pytest.CaptureFixture[str]) -> None:
    disk = FullDisk()
    handler = LineHandler(disk)
    logger = logging.getLogger("runcomfy")
    logger.addHandler(handler)
    try:
        log.error("lost 1")
        log.error("lost 2")
        disk.full = False
        log.error("kept")
    finally:
        logger.removeHandler(handler)
    confession, kept = (json.loads(line) for line in disk.lines)
    assert (confession["event"], confession["lines"]) == ("log_lines_lost", 2)
    assert kept["event"] == "kept"
    assert handler.lost == 0
    assert capfd.readouterr() == ("", "")


@posix
@pytest.mark.fault(54)
def test_a_real_full_device_is_survived_in_silence(capfd: pytest.CaptureFixture[str]) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    handler = LineHandler(LogFile(Path("/dev/full")))
    handler.handle(logging.makeLogRecord({"msg": "x"}))
    assert handler.lost == 1
    assert capfd.readouterr() == ("", "")


@posix
@pytest.mark.fault(54)
def test_a_line_that_was_cut_by_a_full_disk_does_not_swallow_the_next(tmp_path: Path) -> None:
    """The limit on file sizes stands for the full disk: the kernel writes what fits, then refuses."""
    import resource

    file = LogFile(tmp_path / "x.log")
    handler = LineHandler(file)
    handler.handle(logging.makeLogRecord({"msg": "first"}))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.path.stat().st_size + 20, hard))
    try:
        handler.handle(logging.makeLogRecord({"msg": "cut"}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert handler.lost == 1
    handler.handle(logging.makeLogRecord({"msg": "last"}))
    first, _, *rest = file.path.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["event"] for line in (first, *rest)] == ["first", "log_lines_lost", "last"]


def test_a_folder_that_cannot_be_made_is_tried_again_at_every_line(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("in the way", encoding="utf-8")
    configure_logging(settings(tmp_path))
    log.info("lost")
    (tmp_path / "state").unlink()
    log.info("kept")
    events = [line["event"] for line in lines(tmp_path / "state" / "logs" / "comfyctl.log")]
    assert events == ["log_lines_lost", "kept"]


def test_a_folder_that_was_deleted_is_made_again(written: Path) -> None:
    log.info("gone")
    written.unlink()
    written.parent.rmdir()
    log.info("kept")
    assert [line["event"] for line in lines(written)] == ["kept"]


@pytest.fixture
def _open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@posix
@pytest.mark.usefixtures("_open_umask")
@pytest.mark.threat("S4")
def test_log_files_are_private_whatever_the_umask(tmp_path: Path) -> None:
    file = LogFile(tmp_path / "state" / "logs" / "comfyctl.log", max_bytes=300)
    configure_logging(settings(tmp_path))
    for number in range(12):
        file.append(b"%d " % number + b"x" * 100 + b"\n")
    made = list((tmp_path / "state").rglob("*"))
    assert {mode(path) for path in made if path.is_file()} == {0o600}
    assert {mode(path) for path in made if path.is_dir()} | {mode(tmp_path / "state")} == {0o700}
    assert len(made) > 3


@posix
@pytest.mark.threat("S4")
def test_files_that_were_open_to_others_are_closed(tmp_path: Path) -> None:
    folder = tmp_path / "state" / "logs"
    folder.mkdir(parents=True, mode=0o755)
    old = folder / "comfyctl.log.1"
    old.write_text("x", encoding="utf-8")
    old.chmod(0o644)
    configure_logging(settings(tmp_path))
    assert (mode(folder), mode(old)) == (0o700, 0o600)


@posix
@pytest.mark.threat("S16")
def test_a_link_planted_in_its_place_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("untouched", encoding="utf-8")
    folder = tmp_path / "state" / "logs"
    folder.mkdir(parents=True)
    (folder / "comfyctl.log").symlink_to(victim)
    configure_logging(settings(tmp_path))
    log.error("x")
    assert victim.read_text(encoding="utf-8") == "untouched"


# --- rotation -----------------------------------------------------------------------------------------------


def test_long_logs_are_renamed_and_bounded(tmp_path: Path) -> None:
    file = LogFile(tmp_path / "x.log", max_bytes=1000, backups=2)
    for number in range(100):
        file.append(f"{number:03d} {'x' * 95}\n".encode())
    found = sorted(path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock"))
    assert found == ["x.log", "x.log.1", "x.log.2"]
    assert all(path.stat().st_size <= 1000 for path in tmp_path.iterdir())
    kept = "".join((tmp_path / name).read_text() for name in ("x.log.2", "x.log.1", "x.log"))
    assert [int(line[:3]) for line in kept.splitlines()] == list(range(70, 100))


def test_a_line_longer_than_the_limit_is_still_written(tmp_path: Path) -> None:
    file = LogFile(tmp_path / "x.log", max_bytes=10)
    file.append(b"x" * 50 + b"\n")
    file.append(b"y" * 50 + b"\n")
    assert (tmp_path / "x.log").read_bytes() == b"y" * 50 + b"\n"
    assert (tmp_path / "x.log.1").read_bytes() == b"x" * 50 + b"\n"


_WRITER = """
import sys
from pathlib import Path
from runcomfy.adapters.log import LogFile
file = LogFile(Path(sys.argv[1]), max_bytes=2_000, backups=60)
for number in range(300):
    file.append(f"{sys.argv[2]} {number} {'x' * 50}\\n".encode())
"""


@pytest.mark.processes
def test_processes_that_write_at_once_lose_no_line_while_files_are_renamed(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    writers = [subprocess.Popen([sys.executable, "-c", _WRITER, str(path), str(n)]) for n in range(3)]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    files = [file for file in tmp_path.iterdir() if not file.name.endswith(".lock")]
    found = sorted(tuple(map(int, line.split()[:2])) for file in files for line in file.read_text().splitlines())
    assert found == [(writer, number) for writer in range(3) for number in range(300)]
    assert len(files) >= 2  # how often depends on who is put to sleep in the middle of a renaming
