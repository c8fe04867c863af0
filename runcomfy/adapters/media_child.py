"""
Decoding in a process of its own, with limited memory and time: for pictures that are large or may be bombs.

The parent calls `decode`; the child is this module run with `python -m`. The child is granted memory and time by the
bytes that really came, not by what the header promises: a small file that unpacks to gigabytes is refused, a large one
is not. It gets no environment of ours (no tokens) and no terminal. Where the operating system has no such limits
(Windows), the time limit alone holds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from runcomfy.adapters import media_picture
from runcomfy.adapters.files import open_regular
from runcomfy.adapters.media_picture import Header
from runcomfy.adapters.media_source import Corrupt
from runcomfy.domain.exceptions import LocalError

MEMORY_BASE_BYTES: Final = 320 << 20
"""On top of what Python itself takes: enough for a still of about 80 megapixels."""
MEMORY_PER_BYTE: Final = 24
"""A photograph has about one byte in the file for one to ten bytes in memory, and decoders keep two copies."""
MEMORY_MOST_BYTES: Final = 6 << 30
CPU_BASE_SECONDS: Final = 8
CPU_BYTES_PER_SECOND: Final = 2 << 20
START_SECONDS: Final = 30
"""Wall time granted on top of four times the processor time: a loaded computer is slow, not hostile."""

_KEPT_VARIABLES: Final = ("PATH", "SYSTEMROOT", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TEMP", "TMP", "TMPDIR")


def cpu_seconds(size_bytes: int) -> int:
    """Return the processor time granted for decoding a file of that size."""
    return CPU_BASE_SECONDS + size_bytes // CPU_BYTES_PER_SECOND


def memory_bytes(size_bytes: int) -> int:
    """Return the memory granted for decoding a file of that size, beyond what Python itself takes."""
    return min(MEMORY_MOST_BYTES, MEMORY_BASE_BYTES + MEMORY_PER_BYTE * size_bytes)


def decode(path: str | os.PathLike[str], header: Header, *, size_bytes: int) -> dict[str, Any]:
    """Decode a picture in a child process; return what `media_picture.decode` returns.

    Raises Corrupt (it cannot be decoded, or takes more than it was granted) and LocalError (no process could be
    started).
    """
    return _ask({"path": os.fspath(path), "header": asdict(header)}, size_bytes)


def convert(path: str, header: Header, target: str, to: str, *, size_bytes: int) -> None:
    """Do what `media_picture.convert` does, in a child process. Raises Corrupt, OSError (disk), LocalError."""
    _ask({"path": path, "header": asdict(header), "target": target, "to": to}, size_bytes)


def _ask(request: dict[str, Any], size_bytes: int) -> dict[str, Any]:
    said = _exchange(request | {"size_bytes": size_bytes}, seconds=START_SECONDS + 4 * cpu_seconds(size_bytes))
    if "errno" in said:
        raise OSError(int(said["errno"]), os.strerror(int(said["errno"])))
    if "error" in said:
        raise Corrupt(str(said["error"]))
    return said


def _exchange(request: dict[str, Any], *, seconds: float) -> dict[str, Any]:
    try:
        done = subprocess.run(  # noqa: S603 - our own interpreter and module
            [sys.executable, "-P", "-m", __name__],
            input=json.dumps(request).encode(),
            capture_output=True,
            timeout=seconds,
            check=False,
            env=child_environment(),
            # Ctrl+C in the terminal is for the parent, which decides what becomes of this one.
            start_new_session=os.name != "nt",
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )
    except subprocess.TimeoutExpired as error:
        raise Corrupt(f"it was not decoded within {seconds:.0f} s") from error
    except OSError as error:
        raise LocalError(
            f"no process could be started to check a large picture: {error.strerror}",
            hint="check the number of processes and the memory this user may have",
        ) from error
    try:
        said = json.loads(done.stdout)
    except ValueError:
        said = None
    if not isinstance(said, dict):
        # Killed by a limit, or by its own decoder: a healthy picture does neither.
        raise Corrupt(f"its decoder ended without an answer (exit code {done.returncode})")
    return said


def child_environment() -> dict[str, str]:
    """Return the variables a decoder gets: what Python needs to start, and where this package is."""
    kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    root = str(Path(__file__).resolve().parents[2])
    return kept | {"PYTHONPATH": os.pathsep.join([root, *(entry for entry in sys.path if entry)])}


def _limit(size_bytes: int) -> None:
    """Take from this process what it does not need."""
    try:
        import resource
    except ImportError:  # Windows
        return
    seconds = cpu_seconds(size_bytes)
    # macOS has the memory limit but does not take every value; the time limit holds there.
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 2))
    with suppress(ValueError, OSError):
        most = _virtual_bytes() + memory_bytes(size_bytes)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _virtual_bytes() -> int:
    """Return the address space this process has already taken."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    except (OSError, ValueError):
        return 512 << 20
    return pages * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    """Answer one request from stdin on stdout."""
    request = json.loads(sys.stdin.buffer.read())
    from PIL import Image

    Image.preinit()
    # Asked and answered by the caller, from the header; Pillow's own limit would only warn.
    Image.MAX_IMAGE_PIXELS = None
    _limit(request["size_bytes"])
    sys.stdout.write(json.dumps(answer(request)))


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Do what is asked for, in this process; return what goes back to the parent."""
    header = Header(**request["header"])
    try:
        with open_regular(request["path"]) as file:
            if "to" not in request:
                return media_picture.decode(file, header)
            media_picture.convert(file, header, request["target"], request["to"])
            return {}
    except OSError as error:
        return {"errno": error.errno} if error.errno is not None else {"error": str(error)}
    except Corrupt as error:
        return {"error": str(error)}
    except MemoryError:
        return {"error": "it takes more memory to decode than is allowed"}


if __name__ == "__main__":
    main()
