"""
The file `credentials.txt`: where it is looked for, how it is read, and what a credential may look like.

The form is the one CONJURE's users already have: `key:value` lines, loosely quoted, often without a last newline, saved
by whatever editor. Nothing here decides whether credentials are needed, nor which source wins: `config` does.
No error, warning or repr of this module holds a value out of the file.
"""

from __future__ import annotations

import os
import re
import stat
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from runcomfy.domain.exceptions import CredentialsMalformed, CredentialsMissing, foreign_text

FILE_VARIABLE: Final = "RUNCOMFY_CREDENTIALS_FILE"

KEYS: Final[Mapping[str, str]] = {
    "userid": "RUNCOMFY_USER_ID",
    "version_id": "RUNCOMFY_WORKFLOW_VERSION_ID",
}
"""CONJURE's own keys, in lower case, beside the names of the variables."""

FILE_KEYS: Final[Mapping[str, str]] = {
    "RUNCOMFY_USER_ID": "userID",
    "RUNCOMFY_API_TOKEN": "RUNCOMFY_API_TOKEN",
    "RUNCOMFY_API_TOKEN_2": "RUNCOMFY_API_TOKEN_2",
    "RUNCOMFY_WORKFLOW_VERSION_ID": "version_id",
}
"""The variable -> the key that the example file uses for it."""

_MAX_BYTES: Final = 64 * 1024
"""A credentials file is a few lines; what is larger is another file."""

_PLACEHOLDER: Final = re.compile(r"your[-_ ].*|<.*>|x{3,}[-x]*|\.{3,}|change[-_ ]?me|todo", re.IGNORECASE)
"""The example file's values and what people write in their place before they have the real ones."""

_LINE_END: Final = re.compile(r"\r\n|\r|\n")


@dataclass(frozen=True, slots=True)
class Entry:
    """One value of the file and the line it stands in, counted from 1."""

    value: str = field(repr=False)
    line: int


@dataclass(frozen=True, slots=True)
class CredentialsFile:
    """What was found."""

    path: Path | None
    """The file that was read; None if there is none."""
    searched: tuple[Path, ...] = ()
    """Every place looked at, in order, up to and including the one that was found."""
    entries: Mapping[str, Entry] = field(default_factory=dict)
    """Variable name -> entry. Keys that are no variables keep their own spelling."""
    without_colon: Mapping[str, int] = field(default_factory=dict)
    """Variable name -> line that begins with it and has no colon, and was therefore skipped."""
    warnings: tuple[str, ...] = ()
    by_chance: bool = False
    """Found below the working directory, where somebody else may have put it, and not by the user's own choice."""


def is_placeholder(value: str) -> bool:
    """Return whether a value is empty or only stands where the real one belongs."""
    return not value.strip() or _PLACEHOLDER.fullmatch(value.strip()) is not None


def flaw(value: str, *, in_path: bool = False) -> str | None:
    """Return what is wrong with a credential in words that do not hold it, or None.

    `in_path`: it becomes a part of the request's path, so characters that would change the path are refused too.
    """
    if value.lower().startswith("bearer "):
        return "begins with the word Bearer; give the token alone"
    if any(c.isspace() for c in value):
        return "has a blank inside"
    if any(c in "\"'`" for c in value):
        return "has a quote inside"
    if not value.isprintable():
        return "has control characters inside"
    if not value.isascii():
        return "has characters inside that no RunComfy credential has"
    if len(value) > 4096:
        return "is longer than any RunComfy credential"
    if in_path and any(c in "/\\?#%;:@&=+" for c in value):
        return "has characters inside that no id has; an id is not an address"
    return None


def user_config_dir(env: Mapping[str, str]) -> Path:
    """Return the user's configuration folder for this program; it need not exist."""
    base = env.get("XDG_CONFIG_HOME", "").strip()
    if base and Path(base).is_absolute() and sys.platform != "win32":
        return Path(base) / "runcomfy-orchestrator"
    from platformdirs import user_config_path

    return user_config_path("runcomfy-orchestrator", appauthor=False)


def search_places(env: Mapping[str, str], cwd: Path) -> tuple[Path, ...]:
    """Return where a credentials file is looked for when none is named, in order."""
    places = [cwd / "credentials.txt", cwd / "runcomfy" / "credentials.txt"]
    package = Path(__file__).resolve().parents[1]
    if (package.parent / "pyproject.toml").is_file():
        places.append(package / "credentials.txt")
    places.append(user_config_dir(env) / "credentials.txt")
    return tuple(dict.fromkeys(places))


def find_credentials(env: Mapping[str, str], cwd: Path) -> CredentialsFile:
    """Read the file that RUNCOMFY_CREDENTIALS_FILE names, else the first that exists; files are never mixed.

    Raises:
        CredentialsMissing: the file that was named does not exist.
        CredentialsMalformed: it cannot be read, or is not a text of reasonable size.
    """
    named = env.get(FILE_VARIABLE, "").strip()
    if named:
        path = _named_path(named, cwd)
        return _read(path, searched=(path,), by_chance=False)
    searched: list[Path] = []
    for place in search_places(env, cwd):
        searched.append(place)
        # A folder that is closed to us raises here on some versions of Python and is "not there" on others.
        with suppress(PermissionError):
            if place.is_file():
                return _read(place, searched=tuple(searched), by_chance=place.is_relative_to(cwd))
    return CredentialsFile(path=None, searched=tuple(searched))


def _named_path(named: str, cwd: Path) -> Path:
    if named == os.devnull:  # no file at all; on Windows it would not be one below the working directory
        return Path(named)
    try:
        return cwd / Path(named).expanduser()
    except RuntimeError as error:  # "~somebody" who does not exist
        raise CredentialsMissing(
            f"{FILE_VARIABLE} names {foreign_text(named)}, which does not exist",
            hint=f"correct or unset {FILE_VARIABLE}",
        ) from error


def _read(path: Path, *, searched: tuple[Path, ...], by_chance: bool) -> CredentialsFile:
    shown = foreign_text(path, 500)
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
            mode = os.fstat(file.fileno()).st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:  # ValueError: a NUL character in the name
        raise CredentialsMissing(
            f"{FILE_VARIABLE} names {shown}, which does not exist",
            hint=f"correct or unset {FILE_VARIABLE}, or copy credentials.example.txt there",
        ) from error
    except OSError as error:
        raise CredentialsMalformed(
            f"the credentials file {shown} cannot be read: {error.strerror or type(error).__name__}",
            hint=f"make it readable for you, or name another file in {FILE_VARIABLE}",
        ) from error
    if len(data) > _MAX_BYTES:
        raise CredentialsMalformed(
            f"{shown} is not a credentials file: it is larger than {_MAX_BYTES // 1024} KiB",
            hint=f"compare it with credentials.example.txt, or name another file in {FILE_VARIABLE}",
        )
    entries, without_colon = parse_credentials(data)
    warnings = []
    if sys.platform != "win32" and stat.S_ISREG(mode) and mode & 0o077:
        warnings.append(f"others can read your credentials in {shown}; run: chmod 600 {shown}")
    return CredentialsFile(path, searched, entries, without_colon, tuple(warnings), by_chance)


def parse_credentials(data: bytes) -> tuple[dict[str, Entry], dict[str, int]]:
    """Return the entries of a credentials file, and the lines of known keys that lack their colon. Never fails.

    Rules of the format: one key:value per line, split at the first colon; blanks, then double quotes are taken off both
    sides; lines without a colon and lines that start with # are skipped; the last of several wins.
    """
    entries: dict[str, Entry] = {}
    without_colon: dict[str, int] = {}
    for number, line in enumerate(_LINE_END.split(_decode(data)), start=1):
        if line.lstrip().startswith("#"):
            continue
        key, colon, value = line.partition(":")
        if colon:
            entries[_variable(key.strip().strip('"'))] = Entry(value.strip().strip('"'), number)
        elif word := re.match(r"\W*(\w+)", line):
            name = _variable(word[1])
            if name in FILE_KEYS:
                without_colon[name] = number
    return entries, without_colon


def _decode(data: bytes) -> str:
    # Notepad's "Unicode" is UTF-16 with a byte order mark. What is no UTF-8 either is read as Latin-1, which takes
    # every byte: a comment in an old encoding must not hide the keys around it.
    for mark, encoding in ((b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"), (b"", "utf-8-sig")):
        if data.startswith(mark):
            try:
                return data.decode(encoding)
            except UnicodeDecodeError:
                continue
    return data.decode("latin-1")


def _variable(key: str) -> str:
    return KEYS.get(key.lower(), key.upper() if key.upper().startswith(("RUNCOMFY_", "COMFYUI_", "CONJURE_")) else key)
