"""What nobody in particular answers for: the package has the page, words name what there is, refusals are announced."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings

from runcomfy.testing import samples
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.emulators.comfyui import ComfyUIEmulator
from runcomfy.testing.sources import parsed
from runcomfy.testing.web import serving_web

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("launcher", "runcomfy", "comfyui_agent", "workflows")
ON_PAGES = {
    "CONJURE_GENERATION_MODE",
    "CONJURE_LOCAL_BACKEND",
    "COMFYUI_AGENT_CONFIG",
    "RUNCOMFY_DATABASE_URL",
    "HUGGINGFACE_HUB_ACCESS_TOKEN",
    "RUNCOMFY_SERVE",
}
"""Variables that are no settings: they are read before there are any, or are CONJURE's."""
VARIABLE = re.compile(r"\b(?:RUNCOMFY|COMFYUI_AGENT|CONJURE)_[A-Z_]*[A-Z]\b(?!_)")


# -- what is packed ------------------------------------------------------------------------------------------


def test_the_built_page_is_packed() -> None:
    """Users need no Node: the wheel has what is in the repository below the packages that it names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "launcher" in project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    files = [path for path in (ROOT / "launcher" / "dashboard").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} >= {".html", ".js", ".css"}
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("this is no checkout")
    names = [path.relative_to(ROOT).as_posix() for path in files]
    tracked = subprocess.run(["git", "ls-files", "--", *names], cwd=ROOT, capture_output=True, text=True, check=True)
    assert sorted(tracked.stdout.split()) == sorted(names), "what is ignored is not packed"


def test_every_package_says_that_it_has_types() -> None:
    for package in (*PACKAGES, "state"):
        assert (ROOT / package / "py.typed").is_file(), package


# -- what is named -------------------------------------------------------------------------------------------


def words(tree: ast.AST) -> Iterator[str]:
    """Every text that people may read: all but docstrings."""
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield node.value


def test_hints_name_variables_that_there_are() -> None:
    reference = (ROOT / "docs" / "reference" / "settings.md").read_text(encoding="utf-8")  # which a test keeps current
    known = {*VARIABLE.findall(reference), *ON_PAGES}
    wrong = []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            for text in words(parsed(path.read_text(encoding="utf-8"))):
                wrong += [f"{path.name}: {name}" for name in VARIABLE.findall(text) if name not in known]
    assert wrong == []


def test_variables_that_are_no_settings_are_on_a_page() -> None:
    pages = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs").rglob("*.md"))
    assert [name for name in sorted(ON_PAGES) if name not in pages] == []


# -- what is announced ---------------------------------------------------------------------------------------

REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("nobody", {"token": False, "headers": {"X-Forwarded-For": "8.8.8.8"}}),
    ("a wrong token", {"token": False, "headers": {"Authorization": "Bearer wrong"}}),
    ("another host", {"headers": {"Host": "evil.example"}}),
    ("another page", {"headers": {"Origin": "https://evil.example"}}),
    ("a form", {"headers": {"Content-Type": "application/x-www-form-urlencoded"}, "data": b"a=1"}),
    ("too much", {"headers": {"Content-Type": "application/json"}, "data": b" " * 20_000}),
    ("half a body", {"headers": {"Content-Type": "application/json"}, "data": b'{"a": '}),
]


async def test_every_refusal_is_in_the_document(
    tmp_path: Path, clock: LoopClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every route: what the guard answers is announced beside what the route answers."""
    monkeypatch.chdir(tmp_path)  # CONJURE's files lie where the server was started
    async with serving_web(tmp_path, clock, max_body_bytes=1_000, max_upload_bytes=1_000) as api:
        paths = (await api.get("/openapi.json")).json["paths"]
        wrong = []
        for path, methods in paths.items():
            filled = re.sub(r"\{[a-z_]+\}", "0", path)
            for method, operation in methods.items():
                for name, options in REFUSED:
                    if "data" in options and method == "get":
                        continue
                    if path == "/shutdown" and name == "half a body":
                        continue  # it takes none, and would end the rest of this
                    answer = await api.ask(method.upper(), filled, **options)
                    if str(answer.status) not in operation["responses"]:
                        wrong.append(f"{method} {path} to {name}: {answer.status}")
        assert wrong == []


# -- CONJURE's endpoints that work ---------------------------------------------------------------------------

WORKING = ("/flux/", "/partpacker/", "/serverless/", "/local_comfyui/", "/blender/", "/process_", "/execute_")


def cases_of(operation: Any, most: int = 12) -> list[dict[str, Any]]:
    """Bodies that the document allows, and some that it does not quite."""
    found: list[dict[str, Any]] = []

    @given(case=operation.as_strategy())
    @settings(
        max_examples=most,
        database=None,
        derandomize=True,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def collect(case: Any) -> None:
        body = case.body if isinstance(case.body, (dict, list, str, int, float, bool)) or case.body is None else {}
        found.append({"json": body} if body is not None else {})

    collect()
    return found


async def test_whatever_is_asked_of_conjures_endpoints_the_answer_is_announced(
    tmp_path: Path, clock: LoopClock, comfyui_server: ComfyUIEmulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They wait for pictures, which are made here in no time: what virtual time is good for."""
    monkeypatch.chdir(tmp_path)
    for name, content in {
        "data/input/state.json": b'{"generation_mode": "local_comfyui"}',
        "data/generated_text/userPrompt.txt": b"a small house",
        "data/generated_images/gestureCamera/render.png": samples.png(),
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    async with serving_web(tmp_path, clock, comfyui=comfyui_server.url, max_per_minute=1_000) as api:
        document = (await api.get("/openapi.json")).json
        schema: Any = schemathesis.openapi.from_dict(document)
        seen = []
        for found in schema.get_all_operations():
            operation = found.ok()
            if not operation.path.startswith(WORKING):
                continue
            announced = document["paths"][operation.path][operation.method]["responses"]
            for case in cases_of(operation):
                answer = await api.ask(operation.method.upper(), operation.path, **case)
                assert str(answer.status) in announced, (operation.label, case, answer)
                assert answer.status != 500, (operation.label, case, answer)
                assert {"detail", "success"} & set(answer.json), answer
                seen.append((operation.path, answer.status))
        assert len({path for path, _ in seen}) == 9
        assert ("/local_comfyui/flux_mesh_unified", 200) in seen
        assert ("/flux/generate", 200) in seen
