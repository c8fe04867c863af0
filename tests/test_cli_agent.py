"""`comfyctl agent`, the doors of `python -m comfyui_agent`, and `run --queue`: what they say and how they end."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOORS = ROOT / "comfyui_agent"

# -- the doors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(DOORS.glob("*.py")), ids=lambda path: path.stem)
def test_a_door_holds_nothing_but_a_docstring_imports_and_a_call(path: Path) -> None:
    body = ast.parse(path.read_text(encoding="utf-8")).body
    assert isinstance(body[0], ast.Expr), "a door begins with its docstring"
    for statement in body[1:]:
        is_call = isinstance(statement, ast.If) and ast.unparse(statement.test) == "__name__ == '__main__'"
        assert is_call or isinstance(statement, ast.ImportFrom), ast.unparse(statement)


def in_project(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run python in a project whose own `comfyui_agent/` has no `__init__.py`."""
    config = folder / "comfyui_agent" / "config"
    config.mkdir(parents=True, exist_ok=True)
    (config / "global_config.yaml").write_text("poll_interval_ms: 1000\n", encoding="utf-8")
    for name in ("workflows", "state", "runcomfy"):
        (folder / name).mkdir(exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=60
    )


@pytest.mark.parametrize(
    ("module", "usage"),
    [
        ("comfyui_agent", "Usage: e3 [OPTIONS] COMMAND"),
        ("comfyui_agent.run", "Usage: python -m comfyui_agent.run [OPTIONS]"),
        ("comfyui_agent.monitor", "Usage: python -m comfyui_agent.monitor [OPTIONS]"),
        ("comfyui_agent.execute", "Usage: python -m comfyui_agent.execute [OPTIONS]"),
    ],
)
def test_a_projects_own_folder_of_that_name_hides_nothing(module: str, usage: str, tmp_path: Path) -> None:
    told = in_project(tmp_path, "-m", module, "--help")
    assert told.returncode == 0, told.stderr
    assert usage in told.stdout


def test_the_package_is_found_from_a_projects_folder_as_a_package(tmp_path: Path) -> None:
    told = in_project(tmp_path, "-c", "import comfyui_agent; print(comfyui_agent.__file__)")
    assert told.stdout.strip().endswith("__init__.py")


def test_the_requirements_are_the_product_with_what_a_server_needs() -> None:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    wanted = [line for line in lines if line and not line.startswith("#")]
    (match,) = [re.fullmatch(r"\.\[(\w+)\]", line) for line in wanted]
    assert match is not None
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert match[1] in project["project"]["optional-dependencies"]
    assert project["project"]["scripts"]["e3"] == "runcomfy.cli.e3:main"
    assert "comfyui_agent" in project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]


def test_the_help_of_e3_loads_nothing_heavy() -> None:
    heavy = ("aiohttp", "sqlalchemy", "pydantic", "rich", "PIL", "asyncio", "yaml")
    code = (
        "import sys; from runcomfy.cli.e3 import e3; from runcomfy.cli.main import call; call(e3, ['--help']);"
        f" print([name for name in {heavy!r} if name in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip().endswith("[]")
