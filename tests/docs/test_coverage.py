"""docs/coverage.md names tests and commands that exist."""

from __future__ import annotations

import ast
import os
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import click
import pytest

from runcomfy.cli.main import comfyctl
from runcomfy.testing.sources import parsed

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
PAGE = ROOT / "docs" / "coverage.md"

PAGES = {
    "docs/quickstart.md", "docs/glossary.md", "docs/coverage.md", "docs/reliability.md", "docs/performance.md",
    "docs/reference/commands.md",
    "docs/reference/settings.md", "docs/reference/errors.md", "docs/reference/http.md", "docs/design/http.md",
    "CONTRIBUTING.md", "CHANGELOG.md", "README.md",
}  # fmt: skip
HOW_TOS = {
    "run-a-workflow", "dev-server", "own-comfyui", "credentials", "stop-bills", "write-a-sidecar", "from-python",
    "test-with-the-emulators", "windows", "queue", "agent", "job-files", "costs", "serve", "replay",
    "conjure", "serverless", "page", "api", "http-safety", "measure", "soak",
}  # fmt: skip


@cache
def functions(path: Path) -> dict[str, ast.FunctionDef | ast.AsyncFunctionDef]:
    tree = parsed(path.read_text(encoding="utf-8"))
    return {
        node.name: node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
    }


def rows() -> Iterator[tuple[str, str]]:
    """Every row of the tables: promise, and what shows it."""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) == 2 and cells[0] != "promise" and not cells[0].startswith("---"):
            yield cells[0], cells[1]


def named(kind: str) -> list[str]:
    """What the last column names: `tests` or `commands`."""
    words = [word for _, shown in rows() for word in re.findall(r"`([^`]+)`", shown)]
    is_test = re.compile(r"[\w/]*test_\w+\.py(::\w+)?")
    return [word for word in words if (is_test.fullmatch(word) is not None) == (kind == "tests")]


def test_every_row_names_something_or_says_why_not() -> None:
    found = list(rows())
    assert len(found) > 120
    for promise, shown in found:
        assert "`" in shown or shown.startswith("not shown"), f"nothing shows: {promise}"


def follow_moved_tests() -> None:
    """Rewrite the page where a test that it names has moved to one other file."""
    homes: dict[str, list[str]] = {}
    for path in sorted(TESTS.rglob("test_*.py")):
        for function in functions(path):
            homes.setdefault(function, []).append(path.relative_to(TESTS).as_posix())

    def followed(match: re.Match[str]) -> str:
        file, function = match[1], match[2]
        found = homes.get(function, [])
        return f"`{found[0]}::{function}`" if file not in found and len(found) == 1 else match[0]

    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(re.sub(r"`([\w/]*test_\w+\.py)::(\w+)`", followed, text), encoding="utf-8")


def test_every_test_named_exists() -> None:
    if os.environ.get("UPDATE_DOCS"):
        follow_moved_tests()
    names = named("tests")
    assert len(names) > 150
    for name in names:
        file, _, function = name.partition("::")
        path = TESTS / file
        assert path.is_file(), name
        assert not function or function in functions(path), name


def test_every_command_named_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    from benchmarks.__main__ import ALL

    for command in named("commands"):
        match command.split():
            case ["make", target, *_]:
                assert target in targets, command
            case ["python", "-m", "benchmarks", *names]:
                assert set(names) <= set(ALL), command
            case ["comfyctl", *words]:
                assert has_command(words), command
            case _:
                pytest.fail(f"neither a test nor a command that can be checked: {command}")


def has_command(words: list[str]) -> bool:
    command: click.Command | None = comfyctl
    for word in words:
        if not isinstance(command, click.Group):
            break
        command = command.get_command(click.Context(command), word)
    return command is not None


def test_every_command_in_the_pages_exists() -> None:
    """`comfyctl machines stop ID` and its like, in text and in blocks, with their options."""
    for page in [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")]:
        for line in re.findall(r"\bcomfyctl ((?:[a-z]+ ?)+(?:[^`\n#]*))", page.read_text(encoding="utf-8")):
            command: click.Command = comfyctl
            words = line.split()
            while words and isinstance(command, click.Group):
                found = command.get_command(click.Context(command), words[0])
                if found is None:
                    break
                command, words = found, words[1:]
            assert command is not comfyctl, f"{page.name}: comfyctl {line}"
            known = {
                name for p in command.params if isinstance(p, click.Option) for name in (*p.opts, *p.secondary_opts)
            }
            for option in re.findall(r"(?<!\S)(--[a-z-]+)", " ".join(words)):
                assert option in known | {"--help"}, f"{page.name}: comfyctl {line}"


# -- pages and gates -----------------------------------------------------------------------------------------


def test_every_promised_page_is_there() -> None:
    for page in PAGES | {f"docs/howto/{name}.md" for name in HOW_TOS}:
        text = (ROOT / page).read_text(encoding="utf-8")
        assert text.startswith("# "), page
        assert len(text.splitlines()) > 5, page


def test_every_dependency_has_a_decision() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wanted = [*project["project"]["dependencies"], *project["dependency-groups"]["dev"]]
    decisions = " ".join(
        path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "decisions").glob("*.md")
    ).lower()
    for requirement in wanted:
        name = re.split(r"[<>=!~ \[;]", requirement)[0].lower()
        assert re.search(rf"\b{re.escape(name)}\b", decisions), f"no decision names {name}"


def test_the_gate_is_make_check() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8").split()
    assert script[-3:] == ["exec", "make", "check"]


def test_the_plain_pip_commands_are_those_of_the_makefile() -> None:
    """`pip install ...` in README and the Windows page is what `make install` does."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    every = re.findall(r"pip install (?:--\S*(?:quiet|check)\S* )*(.+)$", makefile, re.MULTILINE)
    # What is only for measuring is nobody's to install by hand.
    installed = [line for line in every if not re.fullmatch("--group (bench|fuzz|mutation)", line)]
    for page in (ROOT / "README.md", ROOT / "docs" / "howto" / "windows.md"):
        shown = re.findall(r"pip install (?!-r |--group bench)(.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert shown == installed, page.name
