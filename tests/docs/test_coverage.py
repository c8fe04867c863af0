"""docs/coverage.md names tests and commands that exist, and its table of faults is what the tests' marks say."""

from __future__ import annotations

import ast
import os
import re
import tomllib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import click
import pytest

from runcomfy.cli.main import comfyctl

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
PAGE = ROOT / "docs" / "coverage.md"

FAULTS = {
    1: "killed after the intent, before the launch leaves",
    2: "killed after the launch left, before its answer",
    3: "killed after the answer, before it is written down",
    4: "a launch that is not answered in time and worked",
    5: "a launch answered with 500 or 502 that worked",
    6: "a launch answered 200 with nothing, half of it, or a page",
    7: "two launches answered with the same id",
    8: "a launch answered with an id that is never listed",
    9: "a new machine missing from the list for a while",
    10: "a list in pages of which one fails or repeats",
    11: "a list that is empty by mistake",
    12: "machines of other people on the account",
    13: "unknown states, null fields, wrong types",
    14: "starting for ever",
    15: "Ready, and ComfyUI does not answer",
    16: "Ready and Starting in turns",
    17: "ready after it was asked to stop",
    18: "a stop answered with 500 that worked",
    19: "a stop answered with yes that did nothing",
    20: "a stop answered with 404 while the machine is listed",
    21: "stops that fail for hours",
    22: "a machine that goes away under a job",
    23: "a program that is gone for ever",
    24: "a prolongation that fails or cannot be read back",
    25: "429 with any Retry-After",
    26: "a token rotated or revoked meanwhile",
    27: "no credit, no quota, no stock",
    28: "a price that rose meanwhile",
    29: "the cloud's API down for hours",
    30: "names that do not resolve, certificates that do not fit",
    31: "connections reset before or within an answer",
    32: "answers in drops, answers without an end",
    33: "redirects in a loop, or to another host",
    34: "a submission that is not answered and was queued",
    35: "a prompt queued twice",
    36: "a prompt refused with errors of its nodes",
    37: "a prompt that vanishes from queue and history",
    38: "ComfyUI restarts under a job",
    39: "a prompt that stands still",
    40: "an interrupt that is ignored",
    41: "the GPU out of memory, or its driver lost",
    42: "success without outputs",
    43: "a cached run that says nothing of its nodes",
    44: "a socket that never opens",
    45: "a half-open socket: no frames, no close",
    46: "a socket that is cut without a word",
    47: "frames out of order, repeated, foreign, too many, too large",
    48: "JSON that is malformed, too deep, or no UTF-8",
    49: "a download cut short, or of another length than said",
    50: "a page in place of a result",
    51: "results that are corrupt",
    52: "a result that changes between two reads",
    53: "an upload cut short; another content under the same name",
    54: "a full disk",
    55: "a database locked by somebody else",
    56: "a database that is damaged, or of a newer version",
    57: "power lost: the last writes gone",
    58: "a rename or a flush that fails",
    59: "no more files, memory or threads",
    60: "a clock that jumps",
    61: "SIGTERM, Ctrl+C twice, a closed terminal",
    62: "an event loop that stands still",
    63: "several processes on one state folder",
    64: "a program that wakes up after somebody took over",
    65: "a database of another version than the program",
    66: "very many jobs at once, very large results",
    67: "a receiver of news that is down or slow",
    68: "a machine deleted by hand on the provider's page",
    69: "a prompt started by hand on our machine",
    70: "a provider whose clock differs",
    71: "a machine that comes back with another address",
    72: "a machine out of reach that returns with the job done",
    73: "a GPU that slows down",
    74: "a portal that says 200 to everything",
}
"""Fault of the catalogue -> what goes wrong."""
REQUIRED = {*range(1, 67), 68, 69, 70, 72, 73, 74}
PAGES = {
    "docs/quickstart.md", "docs/glossary.md", "docs/coverage.md", "docs/reference/commands.md",
    "docs/reference/settings.md", "docs/reference/errors.md", "docs/reference/http.md", "docs/design/http.md",
    "CONTRIBUTING.md", "CHANGELOG.md", "README.md",
}  # fmt: skip
HOW_TOS = {
    "run-a-workflow", "dev-server", "own-comfyui", "credentials", "stop-bills", "write-a-sidecar", "from-python",
    "test-with-the-emulators", "windows", "queue", "agent", "job-files", "costs", "serve", "replay",
    "conjure", "serverless", "page", "api", "http-safety", "measure",
}  # fmt: skip


@cache
def functions(path: Path) -> dict[str, ast.FunctionDef | ast.AsyncFunctionDef]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {
        node.name: node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
    }


def rows() -> Iterator[tuple[str, str]]:
    """Every row of the first tables: promise, and what shows it."""
    for line in PAGE.read_text(encoding="utf-8").split("\n## Faults")[0].splitlines():
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


# -- faults --------------------------------------------------------------------------------------------------


def marks() -> dict[int, list[str]]:
    """Fault -> the tests that carry its mark."""
    found: dict[int, list[str]] = {}
    for path in sorted(TESTS.rglob("test_*.py")):
        for name, function in functions(path).items():
            for decorator in function.decorator_list:
                if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.fault":
                    number = ast.literal_eval(decorator.args[0])
                    found.setdefault(number, []).append(f"{path.relative_to(TESTS).as_posix()}::{name}")
    return {number: sorted(found[number]) for number in sorted(found)}


def faults_table() -> str:
    lines = ["| fault | what goes wrong | tests |", "|---|---|---|"]
    for number, tests in marks().items():
        lines.append(f"| {number} | {FAULTS[number]} | {', '.join(f'`{test}`' for test in tests)} |")
    return "\n".join(lines)


def test_every_required_fault_has_a_test() -> None:
    assert set(marks()) >= REQUIRED


def test_every_marked_fault_has_words() -> None:
    assert set(marks()) <= set(FAULTS)


def test_the_table_of_faults_is_current(keep_current: Callable[..., None]) -> None:
    keep_current("coverage.md", faults_table(), part="faults")


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
    installed = [line for line in every if line != "--group bench"]  # that is only for measuring
    for page in (ROOT / "README.md", ROOT / "docs" / "howto" / "windows.md"):
        shown = re.findall(r"pip install (?!-r |--group bench)(.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert shown == installed, page.name
