"""A door holds a docstring, imports and `__all__`, and what it names exists; importing the package stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HOUSES = {"__init__.py", "bootstrap.py", "connection.py"}
DOORS = sorted(p for p in (ROOT / "runcomfy").glob("*.py") if p.name not in HOUSES)
PROMISED = {
    "models",
    "exceptions",
    "config",
    "utils",
    "runcomfy_client",
    "comfyui_workflow_client",
    "runcomfy_orchestrator",
    "workflow_adapter",
    "workflow_io",
    "dev_server_state",
    "dev_server_startup",
}


def test_every_promised_door_is_there() -> None:
    assert {path.stem for path in DOORS} >= PROMISED


@pytest.mark.parametrize("path", DOORS, ids=lambda path: path.stem)
def test_a_door_holds_nothing_but_a_docstring_imports_and_all(path: Path) -> None:
    body = ast.parse(path.read_text(encoding="utf-8")).body
    assert isinstance(body[0], ast.Expr), "a door begins with its docstring"
    for statement in body[1:]:
        is_all = isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "__all__"
        is_script = path.stem == "dev_server_startup" and isinstance(statement, ast.If)
        assert is_all or is_script or isinstance(statement, (ast.Import, ast.ImportFrom)), ast.unparse(statement)


@pytest.mark.parametrize("path", DOORS, ids=lambda path: path.stem)
def test_a_door_leads_where_it_says(path: Path) -> None:
    module = import_module(f"runcomfy.{path.stem}")
    assert module.__all__
    for name in module.__all__:
        assert getattr(module, name)


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = ("aiohttp", "sqlalchemy", "pydantic", "rich", "PIL", "asyncio", "click", "fastapi")
    code = f"import sys, runcomfy; print([name for name in {heavy!r} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_help_loads_nothing_heavy() -> None:
    heavy = ("aiohttp", "sqlalchemy", "pydantic", "rich", "PIL", "asyncio", "fastapi")
    code = (
        "import sys; from runcomfy.cli.main import call, comfyctl; call(comfyctl, ['--help']);"
        f" print([name for name in {heavy!r} if name in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip().endswith("[]")
