"""Where a workflow's text comes from: the shipped ones by name, any other by its path, with its sidecar beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path

from runcomfy.adapters.files import is_exhausted, local_error
from runcomfy.domain.exceptions import WorkflowNotFound, foreign_text

MAX_BYTES = 64 * 1024 * 1024
MAX_SIDECAR_BYTES = 4 * 1024 * 1024


class WorkflowFiles:
    """Loads workflows. What is shipped is passed in, so that this room need not know the package that holds it."""

    def __init__(self, names: Callable[[], Sequence[str]], shipped: Callable[[str], tuple[str, str | None]]) -> None:
        self._names = names
        self._shipped = shipped

    def __call__(self, wanted: str) -> tuple[str | bytes, str | None, str]:
        """Return the graph's JSON, its sidecar's TOML (or None), and a name. Raises WorkflowNotFound."""
        looks_like_path = wanted.endswith(".json") or "/" in wanted or "\\" in wanted
        if not looks_like_path and wanted in self._names():
            text, toml = self._shipped(wanted)
            return text, toml, wanted
        try:
            path = Path(wanted).expanduser()
            if path.is_file():
                return self._read(path)
        except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: the home of a user who does not exist
            if isinstance(error, OSError) and is_exhausted(error):
                raise local_error(error, wanted, "read the workflow file") from error
            why = foreign_text(getattr(error, "strerror", None) or error)
            raise WorkflowNotFound(f"the workflow file {foreign_text(wanted)} cannot be read: {why}") from error
        near = get_close_matches(wanted, self._names(), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"shipped are: {', '.join(self._names())}"
        raise WorkflowNotFound(
            f"there is no workflow {foreign_text(wanted)!r}, neither shipped nor as a file",
            hint=f"{hint}; any other is named by the path of its API-format .json file",
        )

    def _read(self, path: Path) -> tuple[bytes, str | None, str]:
        if path.stat().st_size > MAX_BYTES:
            raise WorkflowNotFound(
                f"{path} is larger than {MAX_BYTES // 1024**2} MB; that is no workflow",
                hint="give the .json file that ComfyUI exported in API format",
            )
        sidecar = path.with_suffix(".toml")
        toml = _text(sidecar) if sidecar.is_file() else None
        return path.read_bytes(), toml, path.stem


def _text(sidecar: Path) -> str:
    with sidecar.open("rb") as file:
        data = file.read(MAX_SIDECAR_BYTES + 1)
    if len(data) > MAX_SIDECAR_BYTES:
        raise WorkflowNotFound(
            f"{sidecar} is larger than {MAX_SIDECAR_BYTES // 1024**2} MB; that is no sidecar",
            hint="a sidecar is the small TOML file that tells what a workflow's inputs are called",
        )
    return data.decode("utf-8")
