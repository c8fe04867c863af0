"""
Where this program keeps what it must remember: the database, the dev server file, the logs.

This package holds no data of its own when it is installed; `path()` says where the data is. The formats are described
in the README beside this file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

__all__ = ["path"]


def path(env: Mapping[str, str] | None = None) -> Path:
    """Return the state folder, absolute: RUNCOMFY_STATE_DIR, else a checkout's `state/`, else the user's data folder.

    Nothing is created. `env` replaces the process's environment.
    """
    chosen = (os.environ if env is None else env).get("RUNCOMFY_STATE_DIR", "").strip()
    if chosen:
        return Path(os.path.abspath(Path(chosen).expanduser()))  # noqa: PTH100 - resolve() would follow links
    here = Path(__file__).resolve().parent
    # Installed, this file lies in site-packages, where no pyproject.toml stands beside it.
    if (here.parent / "pyproject.toml").is_file():
        return here
    from platformdirs import user_data_path

    return user_data_path("runcomfy-orchestrator", appauthor=False)
