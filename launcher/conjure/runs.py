"""
Where the results of generations lie that no queue keeps.

CONJURE takes its files from fixed places, and asks for new ones twice a minute: a folder of results for each in its
own project would fill the disk. So they lie in the state folder, and only the newest are kept. Whoever sets
`RUNCOMFY_OUTPUT_DIR` keeps them all, there.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from runcomfy.bootstrap import App

OUTPUT_DIR: Final = "RUNCOMFY_OUTPUT_DIR"
BY_DEFAULT: Final = "default"
KEPT_RUNS: Final = 64
"""As many as there are kept meshes."""
LEFT_ALONE_SECONDS: Final = 3_600.0
"""Younger folders may be those of runs that are still at work, in this process or another."""


def own_app(overrides: Mapping[str, Any]) -> App:
    """Return an app whose results lie where they are swept, unless a place for them is set.

    Raises ConfigurationError.
    """
    app = App(overrides=overrides)
    if app.settings.sources.get(OUTPUT_DIR, BY_DEFAULT) != BY_DEFAULT:
        return app
    return App(overrides={**overrides, OUTPUT_DIR: str(runs_folder(Path(app.settings.files.state_dir) / "conjure"))})


def runs_folder(folder: Path) -> Path:
    """Return where they lie, below the folder of what the services know."""
    return folder / "runs"


def sweep_runs(folder: Path, *, now: float | None = None) -> None:
    """Remove all but the newest. Never raises."""
    limit = (time.time() if now is None else now) - LEFT_ALONE_SECONDS
    found: list[tuple[float, Path]] = []
    with suppress(OSError):
        for path in folder.iterdir():
            with suppress(OSError):
                found.append((path.lstat().st_mtime, path))
    for modified, path in sorted(found, reverse=True)[KEPT_RUNS:]:
        if modified < limit and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)


__all__ = ["KEPT_RUNS", "own_app", "runs_folder", "sweep_runs"]
