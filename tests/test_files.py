"""Files are written whole or not at all, whatever the disk does; foreign text becomes one plain name."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import textwrap
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from runcomfy.adapters.files import (
    Disk,
    fsync_directory,
    local_error,
    make_private_dir,
    open_new,
    open_regular,
    safe_name,
    write_atomically,
)
from runcomfy.domain.exceptions import DiskFull, LocalError

posix = pytest.mark.skipif(os.name == "nt", reason="permissions and links as on POSIX")


@pytest.fixture
def open_umask() -> Iterator[None]:
    """A careless user: nothing is taken from the permissions a program asks for."""
    before = os.umask(0)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


class FailingDisk(Disk):
    """A disk on which one operation fails."""

    def __init__(self, operation: str, code: int = errno.EIO) -> None:
        self.operation = operation
        self.code = code

    def _maybe(self, operation: str) -> None:
        if operation == self.operation:
            raise OSError(self.code, os.strerror(self.code))

    def fsync(self, fd: int) -> None:
        self._maybe("fsync")
        super().fsync(fd)

    def replace(self, source: str, target: str) -> None:
        self._maybe("replace")
        super().replace(source, target)

    def fsync_directory(self, path: str) -> None:
        self._maybe("fsync_directory")
        super().fsync_directory(path)


# --- write_atomically ---


def test_the_new_content_takes_the_place_of_the_old(tmp_path: Path) -> None:
    target = tmp_path / "state.json"
    write_atomically(target, "old")
    write_atomically(target, b"new", durable=False)
    assert target.read_bytes() == b"new"
    assert names(tmp_path) == ["state.json"]


@posix
@pytest.mark.threat("S4")
def test_files_are_private_whatever_the_umask(tmp_path: Path, open_umask: None) -> None:
    write_atomically(tmp_path / "private", "x")
    write_atomically(tmp_path / "shared", "x", mode=0o644)
    assert mode(tmp_path / "private") == 0o600
    assert mode(tmp_path / "shared") == 0o644


@posix
@pytest.mark.threat("S16")
def test_a_link_planted_in_the_target_s_place_is_replaced_and_not_followed(tmp_path: Path) -> None:
    """Threat S16."""
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    (tmp_path / "state.json").symlink_to(victim)
    write_atomically(tmp_path / "state.json", "ours")
    assert victim.read_text() == "untouched"
    assert not (tmp_path / "state.json").is_symlink()


@pytest.mark.fault(58)
@pytest.mark.parametrize("operation", ["fsync", "replace"])
def test_when_the_disk_fails_the_old_content_stays_and_nothing_is_left_behind(tmp_path: Path, operation: str) -> None:
    target = tmp_path / "state.json"
    target.write_text("old")
    with pytest.raises(LocalError) as caught:
        write_atomically(target, "new", disk=FailingDisk(operation))
    assert target.read_text() == "old"
    assert names(tmp_path) == ["state.json"]
    assert str(target) in caught.value.message
    assert caught.value.hint
    assert caught.value.details["errno"] == "EIO"


@pytest.mark.fault(58)
def test_a_directory_that_cannot_be_flushed_is_an_error_and_not_a_success(tmp_path: Path) -> None:
    with pytest.raises(LocalError):
        write_atomically(tmp_path / "state.json", "new", disk=FailingDisk("fsync_directory"))


@pytest.mark.fault(58)
def test_a_rename_that_the_operating_system_refuses(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(LocalError):
        write_atomically(tmp_path / "taken", "new")
    assert names(tmp_path) == ["taken"]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(LocalError) as caught:
        write_atomically(tmp_path / "nowhere" / "state.json", "x")
    assert "nowhere" in caught.value.message
    assert not isinstance(caught.value, DiskFull)


@posix
@pytest.mark.fault(54)
@pytest.mark.processes
def test_when_the_disk_is_full_the_old_content_stays(tmp_path: Path) -> None:
    """The limit on a process's file size fails in the middle of a write, as a full disk does, even for root."""
    target = tmp_path / "state.json"
    target.write_text("old")
    script = textwrap.dedent(
        """
        import resource, sys
        from runcomfy.adapters.files import write_atomically
        from runcomfy.domain.exceptions import DiskFull

        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            write_atomically(sys.argv[1], b"n" * 5000)
        except DiskFull as error:
            print(error.code, "|", error.hint)
        """
    )
    done = subprocess.run([sys.executable, "-c", script, str(target)], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("disk-full | free some space")
    assert target.read_text() == "old"
    assert names(tmp_path) == ["state.json"]


@posix
@pytest.mark.fault(54)
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
def test_what_a_full_device_says_means_disk_full() -> None:
    with Path("/dev/full").open("wb", buffering=0) as full, pytest.raises(OSError) as caught:
        full.write(b"x")
    assert isinstance(local_error(caught.value, "/dev/full", "write"), DiskFull)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_no_room_has_one_error(code: int) -> None:
    assert isinstance(local_error(OSError(code, os.strerror(code)), "/x", "write"), DiskFull)


@pytest.mark.threat("S15")
def test_an_error_does_not_carry_escape_codes_of_a_path() -> None:
    error = local_error(PermissionError(errno.EACCES, "no"), "/srv/\x1b[31mred", "write")
    assert "\x1b" not in error.message
    assert "permissions" in error.hint


# --- folders ---


@posix
@pytest.mark.threat("S4")
def test_folders_are_private_whatever_the_umask(tmp_path: Path, open_umask: None) -> None:
    made = make_private_dir(tmp_path / "a" / "b")
    assert mode(made) == 0o700
    assert mode(tmp_path / "a") == 0o700


@posix
def test_a_folder_that_is_there_is_left_as_it_is(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o755)
    make_private_dir(shared)
    assert mode(shared) == 0o755


def test_a_file_in_a_folder_s_place_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(LocalError):
        make_private_dir(tmp_path / "file")
    with pytest.raises(LocalError):
        make_private_dir(tmp_path / "file" / "below")


def test_flushing_a_folder_that_is_gone_is_an_error(tmp_path: Path) -> None:
    fsync_directory(tmp_path)
    if os.name != "nt":
        with pytest.raises(LocalError):
            fsync_directory(tmp_path / "gone")


@posix
def test_a_file_system_that_cannot_flush_folders_does_as_well_as_it_can_and_a_broken_disk_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = errno.EINVAL
    flushed: list[int] = []

    def fsync(fd: int) -> None:
        flushed.append(fd)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fsync)
    fsync_directory(tmp_path)
    code = errno.EIO
    with pytest.raises(LocalError):
        fsync_directory(tmp_path)
    assert len(flushed) == 2


# --- opening ---


@posix
@pytest.mark.threat("S16")
def test_a_new_file_is_private_and_never_an_old_one(tmp_path: Path, open_umask: None) -> None:
    """Threat S16."""
    with open_new(tmp_path / "new") as file:
        file.write(b"x")
    assert mode(tmp_path / "new") == 0o600
    (tmp_path / "link").symlink_to(tmp_path / "planted")
    for taken in ("new", "link"):
        with pytest.raises(FileExistsError):
            open_new(tmp_path / taken)
    assert not (tmp_path / "planted").exists()


@posix
def test_links_folders_and_pipes_are_not_read_and_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "pipe"):
        with pytest.raises(OSError, match=r"is a link|is not an ordinary file"):
            open_regular(tmp_path / name)
    with pytest.raises(OSError, match=r"ordinary|directory"):
        open_regular(tmp_path)
    with open_regular(tmp_path / "link", follow=True) as file:
        assert file.read() == b"x"


# --- names ---

DEVICES = {
    "con",
    "prn",
    "aux",
    "nul",
    "conin$",
    "conout$",
    *(f"com{n}" for n in range(10)),
    *(f"lpt{n}" for n in range(10)),
}


@given(st.text(st.characters(exclude_categories=())), st.integers(20, 120))
@example("../../etc/passwd", 80)
@example("C:\\x", 80)
@example("con.txt", 80)
@example("\ud800\udfff", 80)
@example("a/b", 80)
@example("．．／．．／x", 80)
@example("COM¹", 80)
@example("x" * 4096 + ".png", 80)
@example("\u202egnp.exe", 80)
@example(" . . ", 80)
@example(".partial-1", 80)
def test_any_text_becomes_one_plain_name(text: str, limit: int) -> None:
    name = safe_name(text, limit=limit)
    assert name
    assert not set(name) & set('/\\:*?"<>|\0')
    assert not any(unicodedata.category(c)[0] == "C" for c in name)
    assert name[0] not in ". -"
    assert name[-1] not in ". "
    assert name.split(".")[0].strip().lower() not in DEVICES
    assert len(name.encode()) <= limit + 1
    assert Path(name).name == name


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("flux.png", "flux.png"),
        ("ComfyUI_00001_.png", "ComfyUI_00001_.png"),
        ("Ergebnis für Ölbild.webp", "Ergebnis für Ölbild.webp"),
        ("../../x", "_.._x"),
        ("NUL.png", "_NUL.png"),
        ("", "file"),
        ("...", "file"),
        ("a" * 300 + ".glb", "a" * 76 + ".glb"),
    ],
)
def test_plain_names_stay_and_others_are_tamed(text: str, name: str) -> None:
    assert safe_name(text) == name
