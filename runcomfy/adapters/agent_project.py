"""
A new project: the folders for job files and results, its configuration, a first workflow.

What is there already is left as it is; with `force` the configuration is written anew and the old file kept beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from runcomfy.adapters.agent_config import CONFIG_FOLDERS, JOBS_FINISHED, JOBS_PROCESSING, PROJECT_CONFIGS
from runcomfy.adapters.files import local_error, write_atomically
from runcomfy.adapters.job_files import FOLDERS

FIRST_WORKFLOW: Final = "wf_realistic_portrait"
_READABLE: Final = 0o644

GLOBAL_CONFIG: Final = """\
# The queue of this project. Every setting can also be given as an environment variable (COMFYUI_AGENT_...);
# `comfyctl config show` prints what holds and where it came from.

default_priority: 50        # 1 to 999, lower runs first
retry_limit: 2              # 2 means at most three runs; a job file may say otherwise
poll_interval_ms: 1000

paths:
  jobs_processing: "jobs/processing"
  jobs_finished: "jobs/finished"
  database: "database/comfyui_agent.db"     # or postgresql://user:password@host/name, for many hosts

comfyui:
  api_base_url: "http://127.0.0.1:8188"
  timeout_seconds: 300      # how long a job may run

# agent:
#   where: server           # cloud: on the dev server if it lives, else on a machine rented for the job
#   slots: 1                # jobs an executor works on at once
#   limits: {machine: 1}    # also workflow: {ID: 2}, job_type: {T2V: 1}, user: 5
"""

WORKFLOWS: Final = """\
# Which graph a job file's workflow_id stands for. Workflows that ship (`comfyctl workflows ls`) need no entry.
# template_path: from the project's folder; a graph in ComfyUI's API format.
# inputs: names for job files, each with where its value goes, for example prompt: 6.text

wf_realistic_portrait:
  template_path: "workflows/wf_realistic_portrait.json"
  required_inputs: ["prompt", "seed", "steps"]
  description: "Portraits that look like photographs"
"""


@dataclass(frozen=True, slots=True)
class ProjectMade:
    """What `init_project` did; paths from the project's folder."""

    made: tuple[str, ...]
    left: tuple[str, ...]
    """What was there already."""
    backups: tuple[str, ...]
    """Where the old content of files that were written anew is kept."""


def init_project(root: Path, *, load: Callable[[str], tuple[str, str | None]], force: bool = False) -> ProjectMade:
    """Make a project of a folder. Blocks.

    `load` gives (graph, sidecar) of a workflow that ships. `force` writes the configuration anew.

    Raises LocalError, DiskFull: what was made until then stays.
    """
    made: list[str] = []
    left: list[str] = []
    backups: list[str] = []
    folders = [f"{base}/{name}" for base in (JOBS_PROCESSING, JOBS_FINISHED) for name in FOLDERS]
    for folder in (*folders, "database"):
        path = root / folder
        (left if path.is_dir() else made).append(f"{folder}/")
        _make(path)
    graph, sidecar = load(FIRST_WORKFLOW)
    config = _config_folder(root)
    texts = {
        f"{config}/global_config.yaml": GLOBAL_CONFIG,
        f"{config}/workflows.yaml": WORKFLOWS,
        f"workflows/{FIRST_WORKFLOW}.json": graph,
        f"workflows/{FIRST_WORKFLOW}.toml": sidecar or "",
    }
    for name, text in texts.items():
        path = root / name
        _make(path.parent)
        if path.exists() or path.is_symlink():
            if not force or _holds(path, text):
                left.append(name)
                continue
            backups.append(_set_aside(path).relative_to(root).as_posix())
        write_atomically(path, text, mode=_READABLE)
        made.append(name)
    return ProjectMade(tuple(made), tuple(left), tuple(backups))


def _config_folder(root: Path) -> str:
    """Return where the project keeps its configuration: where it is, else where the guide has it."""
    return next(
        (folder for folder, name in zip(CONFIG_FOLDERS, PROJECT_CONFIGS, strict=True) if (root / name).is_file()),
        CONFIG_FOLDERS[0],
    )


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise local_error(error, folder, "make the folder") from error


def _holds(path: Path, text: str) -> bool:
    try:
        return path.read_bytes() == text.encode()
    except OSError:
        return False


def _set_aside(path: Path) -> Path:
    """Give a file another name, one that is free."""
    number = 1
    while True:
        backup = path.with_name(f"{path.name}.bak{'' if number == 1 else number}")
        if not backup.exists() and not backup.is_symlink():
            break
        number += 1
    try:
        path.rename(backup)
    except OSError as error:
        raise local_error(error, path, "rename") from error
    return backup
