"""The error tree is one tree, its codes are unique, and the reference page lists every one of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages

import pytest

import runcomfy
from runcomfy import exceptions as door
from runcomfy.domain import exceptions as tree
from runcomfy.domain.exceptions import RunComfyError, foreign_text

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "errors.md"
EXIT_CODES = {
    0: "done",
    1: "internal error",
    2: "bad input",
    3: "configuration",
    4: "provider",
    5: "the workflow failed",
    6: "timeout",
    7: "results failed verification",
    8: "refused by a budget",
    9: "local disk or database",
    130: "interrupted",
}


def every_module() -> None:
    for module in walk_packages(runcomfy.__path__, "runcomfy."):
        if not module.name.endswith("__main__") and ".migrations." not in module.name:
            import_module(module.name)


def family(root: type[RunComfyError] = RunComfyError) -> Iterator[type[RunComfyError]]:
    yield root
    for child in root.__subclasses__():
        if "code" in vars(child):  # else it is its parent's error, that is a built-in one, too
            yield from family(child)


def page() -> str:
    lines = [
        "# Errors and exit codes",
        "",
        "Every error is two lines: what happened, and what to do. Its code is stable and also stands in `--json`",
        "output and in the log. This page is generated from `runcomfy/domain/exceptions.py`.",
        "",
        "| exit code | means |",
        "|---|---|",
        *[f"| {code} | {words} |" for code, words in EXIT_CODES.items()],
        "",
    ]
    for error in family():
        if error.__module__ != tree.__name__:
            continue
        words = " ".join((error.__doc__ or "").split())
        again = " Trying again later may help." if error.retryable else ""
        lines += [f"## `{error.code}`", "", f"Exit code {error.exit_code}. {words}{again}", ""]
    return "\n".join(lines).rstrip() + "\n"


def test_no_code_is_used_twice() -> None:
    every_module()
    codes = [error.code for error in family()]
    assert sorted(codes) == sorted(set(codes))


def test_every_error_has_an_exit_code_of_the_table() -> None:
    every_module()
    assert {error.exit_code for error in family()} <= set(EXIT_CODES)


def test_the_door_shows_the_whole_tree() -> None:
    named = {name for name in vars(tree) if isinstance(vars(tree)[name], type)}
    named = {name for name in named if issubclass(vars(tree)[name], RunComfyError)}
    assert named == set(door.__all__)


def test_the_reference_page_is_current() -> None:
    if os.environ.get("UPDATE_DOCS"):
        PAGE.write_text(page(), encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == page(), "run the tests once with UPDATE_DOCS=1"


def test_the_message_defaults_to_what_the_class_says() -> None:
    assert str(tree.DiskFull()) == "A file could not be written whole."


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("two\nlines\tand tabs", "two lines and tabs"),
        ("\x1b[31mred\x1b[0m", "[31mred[0m"),
        ("bell\x07 nul\x00", "bell nul"),
        ("x" * 300, "x" * 255 + "…"),
        ("right\u202eto left", "rightto left"),
    ],
)
def test_texts_from_outside_are_made_safe(text: str, shown: str) -> None:
    assert foreign_text(text) == shown
