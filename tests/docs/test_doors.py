"""A door holds a docstring, imports and `__all__`, and what it names exists; importing the package stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from runcomfy.testing.sources import parsed

ROOT = Path(__file__).resolve().parents[2]
HOUSES = {"__init__.py", "bootstrap.py", "connection.py"}
PROMISED = {
    "runcomfy": {
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
        "job_queue",
        "machine_pool",
        "cost_optimizer",
        "serverless_client",
        "serverless_service",
        "workflow_progress_tracker",
    },
    "launcher": {"generation_services", "local_comfyui_service", "main", "api_server"},
}
SCRIPTS = {"dev_server_startup", "main", "api_server"}
"""They are run by their path, too, and begin by putting our root on the path then."""
DOORS = sorted(
    {
        *(path for path in (ROOT / "runcomfy").glob("*.py") if path.name not in HOUSES),
        *(path for path in (ROOT / "launcher").glob("*.py") if path.stem in PROMISED["launcher"]),
    }
)


def name_of(path: Path) -> str:
    return f"{path.parent.name}.{path.stem}"


def test_every_promised_door_is_there() -> None:
    promised = {f"{package}.{name}" for package, names in PROMISED.items() for name in names}
    assert {name_of(path) for path in DOORS} == promised


def test_what_calls_itself_a_door_is_one() -> None:
    public = [*(ROOT / "runcomfy").glob("*.py"), *(ROOT / "launcher").glob("*.py")]
    said = {
        path for path in public if (ast.get_docstring(parsed(path.read_text("utf-8"))) or "").startswith("Public door")
    }
    assert said == set(DOORS)


@pytest.mark.parametrize("path", DOORS, ids=name_of)
def test_a_door_holds_nothing_but_a_docstring_imports_and_all(path: Path) -> None:
    body = parsed(path.read_text(encoding="utf-8")).body
    assert isinstance(body[0], ast.Expr), "a door begins with its docstring"
    for statement in body[1:]:
        is_all = isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "__all__"
        is_script = path.stem in SCRIPTS and isinstance(statement, ast.If) and is_run_directly(statement)
        assert is_all or is_script or isinstance(statement, (ast.Import, ast.ImportFrom)), ast.unparse(statement)


def is_run_directly(statement: ast.If) -> bool:
    return ast.unparse(statement.test).startswith("__name__ == '__main__'") and not statement.orelse


@pytest.mark.parametrize("path", DOORS, ids=name_of)
def test_a_door_leads_where_it_says(path: Path) -> None:
    module = import_module(name_of(path))
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
