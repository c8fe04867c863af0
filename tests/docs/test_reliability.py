"""
docs/reliability.md says what the tests' own marks say: every promise, fault and threat with what shows it.

The words are in catalogue.toml beside this file, the figures in benchmarks/results/.
"""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from benchmarks import coverage_report
from benchmarks.results import Figure, Result, kept

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
CATALOGUE = tomllib.loads(Path(__file__).with_name("catalogue.toml").read_text(encoding="utf-8"))
FAULTS = 74
NOT_BUILT = {"S7", "S9"}
"""Threats to parts that are not there yet; the page says so under what is not covered."""
CAMPAIGNS = {
    "simulate": "the whole controller, days of random load and faults in virtual time, one for each seed",
    "killpoints": "SIGKILL before and after every durable write and every remote call, then a restart",
    "soak": "real processes and sockets, a fault proxy between all of them, kills and stops at random",
    "fuzz": "everything that reads bytes from outside, grown from recordings under coverage guidance",
    "model": "every order of steps of a small model of launch, stop, submit and lease",
    "mutation": "the program changed in small ways: how many of the changes some test notices",
    "coverage": "branches of the program that the tests reach",
    "killing": "executors killed at random",
    "leaks": "everything of ours killed at every durable write and remote call: what is billed after that",
}
INTRODUCTION = """\
# What is promised, and what shows it

Machines that cost money are started and stopped here, so this page says what holds whatever fails, which test makes
each thing fail, how much of that was run, and what is not covered. It is generated from the marks that the tests carry
and from the files in `benchmarks/results/`; a test compares it with both. Tests are in `tests/`; to run one of them:
`pytest tests/FILE::NAME`."""


MARK_OR_TEST = re.compile(
    r"^ *(?:@pytest\.mark\.(fault|threat|invariant)\(([^)]*)\)|(?:async )?def (\w+))", re.MULTILINE
)


@cache
def marks(kind: str) -> Mapping[Any, list[str]]:
    """What is named in `@pytest.mark.<kind>(name)` -> the tests that carry it.

    Read as text: to read them as Python takes seconds.
    """
    found: dict[Any, set[str]] = {}
    for path in sorted(TESTS.rglob("test_*.py")):
        text = path.read_text(encoding="utf-8")
        marked: list[Any] = []
        for mark, name, function in MARK_OR_TEST.findall(text) if f"mark.{kind}(" in text else ():
            if mark == kind:
                marked.append(ast.literal_eval(name))
            elif function:
                assert function.startswith("test_") or not marked, f"{path}: a mark on {function}, which is no test"
                for key in marked:
                    found.setdefault(key, set()).add(f"{path.relative_to(TESTS).as_posix()}::{function}")
                marked = []
    return {key: sorted(found[key]) for key in sorted(found)}


def named(names: Iterable[str]) -> str:
    """Write tests of one file together: `file::one`, `::another`."""
    files = []
    for file, group in groupby(sorted(names), key=lambda name: name.partition("::")[0]):
        first, *more = [name.partition("::")[2] for name in group]
        files.append(", ".join([f"`{file}::{first}`", *(f"`::{name}`" for name in more)]))
    return "<br>".join(files)


def table(head: str, rows: Iterable[Iterable[str]]) -> str:
    columns = head.count("|") + 1
    return "\n".join([f"| {head} |", "|" + "---|" * columns, *(f"| {' | '.join(row)} |" for row in rows)])


# -- the page ------------------------------------------------------------------------------------------------


def promises() -> str:
    def tried_by(promise: str) -> str:
        numbers = [number for number, (_, holds) in CATALOGUE["faults"].items() if promise in holds.split()]
        faults = f"faults {', '.join(numbers)}" if numbers else ""
        return "<br>".join(filter(None, [faults, named(marks("invariant").get(promise, []))]))

    rows = [(promise, words, tried_by(promise)) for promise, words in CATALOGUE["promises"].items()]
    return table("| promise | tried by", rows)


def faults() -> str:
    rows = [
        (number, words, holds.replace(" ", ", "), named(marks("fault").get(int(number), [])))
        for number, (words, holds) in CATALOGUE["faults"].items()
    ]
    return table("| what goes wrong | what must hold | tests", rows)


def threats() -> str:
    rows = [
        (threat, words, defence, named(marks("threat").get(threat, [])) or "see what is not covered")
        for threat, (words, defence) in CATALOGUE["threats"].items()
    ]
    return table("| what attacks | defence | tests", rows)


def volumes(results: Mapping[str, list[Result]]) -> str:
    parts = []
    for name, words in CAMPAIGNS.items():
        lines = [f"### {name}", f"{words[0].upper()}{words[1:]}."]
        for result in results.get(name, []):
            lines += [figures(result)]
        parts.append("\n\n".join([*lines, *([] if name in results else ["Not recorded."])]))
    return "\n\n".join(parts)


def figures(result: Result) -> str:
    def met(figure: Figure) -> str:
        return {None: "", True: "met", False: "**not met**"}[figure.met]

    shown = table("what | figure | bar | ", ((f.what, f.value, f.bar, met(f)) for f in result.figures))
    computer = f"{result.cores} cores, {result.system}, Python {result.python}"
    took = f", in {result.took_s:,.0f} s" if result.took_s else ""
    ran = f"`{result.command}` on {result.day}{took}: {computer}."
    return "\n\n".join([ran, shown, *result.notes])


def not_covered() -> str:
    return "\n\n".join(
        f"### {title[0].upper()}{title[1:]}\n\n" + "\n".join(f"- {line}" for line in lines)
        for title, lines in CATALOGUE["not_covered"].items()
    )


def by_campaign() -> dict[str, list[Result]]:
    """What was kept of each campaign; `soak-24h` belongs to `soak`."""
    found: dict[str, list[Result]] = {}
    for result in kept():
        campaign = re.split(r"[-_]", result.name)[0]
        if campaign in CAMPAIGNS:
            found.setdefault(campaign, []).append(result)
    return found


def page() -> str:
    parts = [
        INTRODUCTION,
        "## Promises\n\n" + promises(),
        "## Faults\n\n" + faults(),
        "## Threats\n\n" + threats(),
        "## Volumes and figures\n\n" + volumes(by_campaign()),
        "## What is not covered\n\n" + not_covered(),
    ]
    return "\n\n".join(parts)


def test_the_page_is_current(keep_current: Callable[..., None]) -> None:
    keep_current("reliability.md", page())


# -- what must be on it --------------------------------------------------------------------------------------


def test_every_fault_of_the_catalogue_has_words_and_a_test() -> None:
    assert list(CATALOGUE["faults"]) == [str(number) for number in range(1, FAULTS + 1)]
    assert set(marks("fault")) == set(range(1, FAULTS + 1))


def test_every_threat_has_words_a_defence_and_a_test_or_belongs_to_a_part_that_is_not_built() -> None:
    assert list(CATALOGUE["threats"]) == [f"S{number}" for number in range(1, 19)]
    assert set(marks("threat")) == set(CATALOGUE["threats"]) - NOT_BUILT
    untold = {threat for threat, (_, defence) in CATALOGUE["threats"].items() if not defence}
    assert untold == NOT_BUILT
    said = str(CATALOGUE["not_covered"])
    assert all(threat in said for threat in NOT_BUILT)


def test_every_promise_has_words_and_is_tried() -> None:
    tried = {promise for _, holds in CATALOGUE["faults"].values() for promise in holds.split()}
    assert tried | set(marks("invariant")) == set(CATALOGUE["promises"])
    assert list(CATALOGUE["promises"]) == [f"I{number}" for number in range(1, 26)]


def test_no_table_is_broken_by_what_stands_in_it() -> None:
    for line in page().splitlines():
        if line.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", line)) in (4, 5), line


def test_the_figure_of_coverage_is_the_one_of_the_bar() -> None:
    def file(share: float) -> dict[str, Any]:
        return {"summary": {"percent_covered": share}}

    totals = {
        "percent_covered": 94.96,
        "num_statements": 80,
        "covered_lines": 79,
        "num_branches": 20,
        "covered_branches": 18,
    }
    report = {
        "totals": totals,
        "files": {"runcomfy/a.py": file(94.9), "runcomfy/b.py": file(95), "runcomfy/c.py": file(1)},
    }
    assert coverage_report.below(report) == [("runcomfy/c.py", 1.0), ("runcomfy/a.py", 94.9)]
    whole, lines, branches, files = coverage_report.figures(report)
    assert (whole.value, whole.met) == ("94.96 %", False)
    assert (lines.value, branches.value, files.value) == ("98.8 % of 80", "90.0 % of 20", "3, 2 of them below 95 %")


@pytest.mark.parametrize("met", [True, False, None])
def test_figures_are_shown_with_their_bar_and_whether_they_meet_it(met: bool | None) -> None:
    result = Result(
        "soak", "make soak", [Figure("jobs", "2,400", "at least 2,000", met)], 1200.4, ["A note."], "2026-01-02"
    )
    shown = volumes({"soak": [result]})
    assert "`make soak` on 2026-01-02, in 1,200 s" in shown
    words = {True: "met", False: "**not met**", None: ""}[met]
    assert f"| jobs | 2,400 | at least 2,000 | {words} |" in shown
    assert "A note." in shown
    assert shown.count("Not recorded.") == len(CAMPAIGNS) - 1
