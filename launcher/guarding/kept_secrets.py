"""
Secrets that this program makes for itself and keeps in the state folder: the token of the HTTP API, the key that
webhooks are signed with.

A file is private from the moment it exists and appears whole. One that others can read is refused and not mended: what
they may have read by now must not go on being used.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

from runcomfy.adapters.files import local_error, make_private_dir, open_regular, remove_quietly
from runcomfy.adapters.log import register_secret
from runcomfy.domain.exceptions import CredentialsMalformed, foreign_text
from runcomfy.domain.secret import Secret

TOKEN_FILE: Final = "http_token"  # noqa: S105 - a file's name
_LONGEST: Final = 4096
_TEXT: Final = re.compile(r"[A-Za-z0-9_\-+/=.~]{32,512}")


def new_token() -> str:
    """Return 256 random bits as text."""
    return secrets.token_urlsafe(32)


def kept_secret(path: Path, make: Callable[[], str], *, what: str) -> Secret:
    """Return the secret in a file, made now if there is none; the log cuts it out from then on.

    Several processes may ask at once: all get what the first one made. Blocks. Raises CredentialsMalformed (others can
    read it, it belongs to another user, it is a link or no secret), LocalError, DiskFull.
    """
    make_private_dir(path.parent)
    text = _read(path, what)
    if text is None:
        _create(path, make())
        text = _read(path, what)
    if text is None:
        raise CredentialsMalformed(f"{path} vanished while it was read", hint="start again")
    secret = Secret(text)
    register_secret(secret)
    return secret


def _create(path: Path, text: str) -> None:
    """Put a new file there, whole and private, unless another process was faster."""
    temporary = ""
    try:
        # mkstemp makes the file 0600 whatever the umask is; the link makes it appear with its content, and fails if
        # there is one already.
        fd, temporary = tempfile.mkstemp(prefix=".tmp-", dir=path.parent)
        with os.fdopen(fd, "wb") as file:
            file.write(text.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        if sys.platform == "win32":
            Path(temporary).rename(path)  # refuses to replace there
        else:
            os.link(temporary, path)
    except FileExistsError:
        return
    except OSError as error:
        raise local_error(error, path, "write") from error
    finally:
        if temporary:
            remove_quietly(temporary)


def _read(path: Path, what: str) -> str | None:
    """Return what the file holds; None if there is none."""
    remove = f"remove {foreign_text(path, 1024)}; a new one is made at the next start"
    try:
        with open_regular(path) as file:
            status = os.fstat(file.fileno())
            raw = file.read(_LONGEST)
    except FileNotFoundError:
        return None
    except OSError as error:
        if path.is_symlink() or not path.is_file():
            raise CredentialsMalformed(f"{what} is not an ordinary file: {path}", hint=remove) from error
        raise local_error(error, path, "read") from error
    if sys.platform != "win32":
        if stat.S_IMODE(status.st_mode) & 0o077:
            raise CredentialsMalformed(
                f"others can read {what}: {path}",
                hint=f"{remove} (chmod 600 is enough only if you know that nobody has read it)",
            )
        if status.st_uid != os.geteuid():
            raise CredentialsMalformed(f"{what} belongs to another user: {path}", hint=remove)
    text = raw.decode("ascii", "replace").strip()
    if not _TEXT.fullmatch(text):
        raise CredentialsMalformed(f"{what} is unreadable: {path}", hint=remove)
    return text
