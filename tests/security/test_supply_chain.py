"""Threats S8, S12, S17 and S18 as this repository's own files and gates refuse them."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from runcomfy.testing.sources import parsed

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PRODUCT = ("runcomfy", "launcher", "comfyui_agent", "workflows", "state")


def nodes(*words: str) -> Iterator[tuple[Path, ast.AST]]:
    """Every piece of our own code in the files in which one of the words stands at all."""
    for room in PRODUCT:
        for path in (ROOT / room).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            if any(word in text for word in words):
                yield from ((path, node) for node in ast.walk(parsed(text)))


# -- S12: what is installed ----------------------------------------------------------------------------------


def wanted() -> list[Requirement]:
    """Everything that pyproject.toml asks for, but what only `make bench` measures against."""
    extras = PROJECT["project"]["optional-dependencies"].values()
    lists = [PROJECT["project"]["dependencies"], PROJECT["dependency-groups"]["dev"], *extras]
    return [Requirement(text) for listed in lists for text in listed]


def locked() -> dict[str, list[tuple[str, Marker | None, list[str]]]]:
    """Name -> (version, for which computers, hashes) of requirements.lock; one line may be cut into several."""
    found: dict[str, list[tuple[str, Marker | None, list[str]]]] = {}
    text = re.sub(r"\s*\\\n\s*", " ", (ROOT / "requirements.lock").read_text(encoding="utf-8"))
    for line in text.splitlines():
        if line and not line.lstrip().startswith("#"):
            said, *hashes = line.split(" --hash=")
            requirement = Requirement(said)
            (version,) = requirement.specifier
            assert version.operator == "==", line
            assert requirement.url is None, line
            found.setdefault(canonicalize_name(requirement.name), []).append(
                (version.version, requirement.marker, hashes)
            )
    return found


@pytest.mark.threat("S12")
def test_every_locked_package_has_one_version_and_its_hashes() -> None:
    lock = locked()
    assert len(lock) > 60
    for name, versions in lock.items():
        for version, marker, hashes in versions:
            assert hashes, f"{name} {version} has no hash"
            assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", digest) for digest in hashes), name
            assert len(versions) == 1 or marker is not None, f"{name} is locked to several versions"


@pytest.mark.threat("S12")
def test_the_lock_has_everything_that_is_asked_for_in_a_version_that_is_allowed() -> None:
    lock = locked()
    for requirement in wanted():
        assert requirement.url is None, f"{requirement} comes from a place of its own, not from the index"
        versions = lock.get(canonicalize_name(requirement.name), [])
        assert versions, f"requirements.lock lacks {requirement}: run `make lock`"
        for version, _, _ in versions:
            assert requirement.specifier.contains(version), f"{requirement} is locked to {version}: run `make lock`"


@pytest.mark.threat("S12")
def test_what_is_built_and_run_in_the_gates_comes_from_the_index_and_from_here() -> None:
    assert PROJECT["build-system"]["build-backend"] == "hatchling.build"
    assert [Requirement(text).url for text in PROJECT["build-system"]["requires"]] == [None]
    for script in (ROOT / "Makefile", ROOT / ".ci" / "run"):
        text = script.read_text(encoding="utf-8")
        assert not re.search(r"\b(curl|wget|git clone)\b|https?://|--index-url|--trusted-host", text), script.name
    assert "npm ci " in (ROOT / "Makefile").read_text(encoding="utf-8")  # obeys package-lock.json, with its digests


# -- S17: data that is code ----------------------------------------------------------------------------------

LOADERS = """
import pickle
import marshal

import yaml

pickle.loads(b"")
marshal.loads(b"")
yaml.load("", Loader=yaml.Loader)
yaml.load("", Loader=yaml.UnsafeLoader)
eval("1")
exec("1")
query = f"SELECT * FROM jobs WHERE user = '{query}'"
"""


@pytest.mark.threat("S8")
@pytest.mark.threat("S17")
@pytest.mark.parametrize("room", PRODUCT)
def test_the_linter_refuses_data_that_is_code_and_sql_that_is_put_together(room: str) -> None:
    """With the settings of the gate, in every room, whatever is ignored there."""
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format=concise", "--stdin-filename"]
    done = subprocess.run(
        [*command, str(ROOT / room / "planted.py"), "-"],
        input=LOADERS, capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    found = re.findall(r":(\d+):\d+: (S\d+)", done.stdout)
    assert found == [
        ("7", "S301"),
        ("8", "S302"),
        ("9", "S506"),
        ("10", "S506"),
        ("11", "S307"),
        ("12", "S102"),
        ("13", "S608"),
    ]


@pytest.mark.threat("S17")
def test_nothing_of_ours_can_unpickle_and_no_linter_is_told_to_look_away() -> None:
    unsafe = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "torch", "jsonpickle"}
    for path, node in nodes(*unsafe):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not unsafe & {name.partition(".")[0] for name in names}, path
    silenced = re.compile(r"noqa:[^#\n]*\b(S30[1267]|S506)\b")
    for room in PRODUCT:
        for path in (ROOT / room).rglob("*.py"):
            assert not silenced.search(path.read_text(encoding="utf-8")), path


# -- S18: encryption -----------------------------------------------------------------------------------------


@pytest.mark.threat("S18")
def test_no_connection_of_ours_does_without_the_check_of_a_certificate_or_takes_a_proxy_by_chance() -> None:
    never = {"CERT_NONE", "_create_unverified_context", "check_hostname"}
    safe = {"ssl": ("True", "None"), "verify_ssl": ("True",), "trust_env": ("False",)}
    for path, node in nodes(*never, "ssl=", "trust_env"):
        if "testing" in path.parts:
            continue
        if isinstance(node, ast.keyword) and isinstance(node.value, ast.Constant) and node.arg in safe:
            assert str(node.value.value) in safe[node.arg], f"{path}:{node.lineno}"
        assert not (isinstance(node, ast.Attribute) and node.attr in never), path
