"""
The half of `python -m benchmarks mutation` that runs inside pytest.

Everything is imported and collected once. Then this process forks: one child runs all tests and notes which functions
and lines each of them reaches; for every mutant one child switches that mutant on and runs the tests that reach its
statement, until one fails: first those that killed others of the function, and the quick before the slow. A fork costs
50 ms; importing and collecting anew for each mutant cost seconds.

The parent runs one test itself, so that what is made once for all tests (migrations, compiled code) is inherited.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import json
import math
import os
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType
from typing import Any, Final

import coverage
import hypothesis
import pytest
from _pytest.runner import runtestprotocol
from mutmut.mutation.trampoline import set_mutant_under_test
from mutmut.state import state

PLAN: Final = "MUTATION_PLAN"
"""Names the file that says what to do, and where to write what came of it."""
KILLED, SURVIVED, UNREACHED, HANGED, UNDECIDED = "killed", "survived", "unreached", "hanged", "undecided"
FAILED_ALREADY: Final = 3
_SURVIVED, _KILLED, _UNDECIDED = 0, 1, 2
HANGS_S: Final = 5
HANGS_TIMES: Final = 20
"""A test hangs that takes 5 s of processor time and 20 times what it takes without a mutant."""

# Examples are the same for each mutant, and one that fails is enough: it is not made smaller.
hypothesis.settings.register_profile(
    "mutation",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=60,
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
    suppress_health_check=list(hypothesis.HealthCheck),
)


@dataclass(frozen=True, slots=True)
class Reach:
    """What one test reaches, and the processor time it takes."""

    functions: frozenset[str]
    lines: dict[str, frozenset[int]]
    """By module."""
    seconds: float


@dataclass(slots=True)
class Chooser:
    """Knows which tests to run for a mutant, and in which order."""

    reaches: dict[str, Reach]
    executable: dict[str, frozenset[int]]
    """The lines of each module that something can be known of."""
    killers: dict[str, Counter[str]] = field(default_factory=dict)
    """Which tests killed mutants of a function or module, and how many."""

    def tests(self, name: str, lines: Sequence[int] | None) -> list[str]:
        """Return the tests that reach the statement of a mutant, the most likely per second first."""
        function, module = function_of(name), module_of(name)
        chosen = [test for test, reach in self.reaches.items() if function in reach.functions]
        statement = range(lines[0], lines[1] + 1) if lines else range(0)
        if not self.executable.get(module, frozenset()).isdisjoint(statement):
            nowhere: frozenset[int] = frozenset()
            chosen = [
                test for test in chosen if not self.reaches[test].lines.get(module, nowhere).isdisjoint(statement)
            ]
        own = f"test_{module.rpartition('.')[2]}.py"
        here, near = (self.killers.get(key, Counter[str]()) for key in (function, module))

        def promise(test: str) -> float:
            likely = 1 + 4 * (own in test) + 10 * min(3, here[test]) + min(5, near[test])
            return likely / (0.02 + self.reaches[test].seconds)

        return sorted(chosen, key=promise, reverse=True)

    def learn(self, name: str, test: str) -> None:
        """Note who killed a mutant."""
        for key in (function_of(name), module_of(name)):
            self.killers.setdefault(key, Counter())[test] += 1


def function_of(mutant: str) -> str:
    return mutant.partition("__mutmut_")[0]


def module_of(mutant: str) -> str:
    return mutant.rpartition(".")[0]


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool:
    plan = json.loads(Path(os.environ[PLAN]).read_text(encoding="utf-8"))
    items = {item.nodeid: item for item in session.items}
    quiet()
    set_mutant_under_test("")
    warm = next(item for item in session.items if item.nodeid.startswith(plan["warm_up"]))
    # The next test is one of another file: what belongs to the whole session is kept, the rest is torn down.
    other = next(item for item in session.items if item.path != warm.path)
    runtestprotocol(warm, nextitem=other, log=False)
    # What is there by now is never freed by the children, so that its pages stay shared.
    gc.collect()
    gc.freeze()
    reaches = reached(items, plan["files"], Path(plan["reaches"]))
    chooser = Chooser(reaches, {module: executable(Path(path)) for module, path in plan["files"].items()})
    outcomes = Path(plan["outcomes"])
    for line in outcomes.read_text(encoding="utf-8").splitlines() if outcomes.exists() else ():
        if (known := json.loads(line))["fate"] == KILLED:
            chooser.learn(known["mutant"], known["by"])
    with outcomes.open("a", encoding="utf-8") as written:
        for mutant in plan["mutants"]:
            name = mutant["name"]
            began = time.perf_counter()
            tests = chooser.tests(name, mutant["lines"])
            fate, by = tried(name, [(items[test], reaches[test].seconds) for test in tests], budget_s=plan["budget_s"])
            if fate == KILLED:
                chooser.learn(name, by)
            took = round(time.perf_counter() - began, 2)
            written.write(json.dumps({"mutant": name, "fate": fate, "by": by, "took_s": took}) + "\n")
            written.flush()
    return True


def quiet() -> None:
    """Have tests say nothing: thousands of failures are expected."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    sys.stdout.flush()
    os.dup2(nowhere, 1)


def executable(path: Path) -> frozenset[int]:
    """Return the lines of a module that code was made of."""
    codes = [compile(path.read_text(encoding="utf-8"), str(path), "exec")]
    lines: set[int] = set()
    while codes:
        code = codes.pop()
        lines.update(line for _, _, line in code.co_lines() if line)
        codes.extend(inner for inner in code.co_consts if isinstance(inner, CodeType))
    return frozenset(lines)


def marks_of(path: Path) -> dict[str, str]:
    """Return a mark of the source of every test of a file, by its name without parameters."""
    text = path.read_text(encoding="utf-8")
    tests: dict[str, str] = {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min(one.lineno for one in (node, *node.decorator_list))
            source = "\n".join(text.splitlines()[first - 1 : node.end_lineno])
            tests[node.name] = hashlib.sha256(source.encode()).hexdigest()[:16]
    return tests


def reached(items: dict[str, pytest.Item], files: Mapping[str, str], kept: Path) -> dict[str, Reach]:
    """Return what each test reaches; found out in a child, which runs all of those that are new or have changed."""
    kept.mkdir(parents=True, exist_ok=True)
    of_file: dict[Path, list[pytest.Item]] = {}
    for item in items.values():
        of_file.setdefault(item.path, []).append(item)
    unknown: dict[Path, list[tuple[pytest.Item, str]]] = {}
    for path, found in of_file.items():
        marks, known = marks_of(path), notes_of(kept / f"{path.stem}.json")
        for item in found:
            mark = marks.get(item.name.partition("[")[0], "")
            if known.get(item.nodeid, {}).get("mark") != mark:
                unknown.setdefault(kept / f"{path.stem}.json", []).append((item, mark))
    if unknown:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                observe(unknown, files)
                status = 0
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)
        if status != 0:
            pytest.exit("the tests could not be run without any mutant", returncode=FAILED_ALREADY)
    reaches: dict[str, Reach] = {}
    for path in of_file:
        for name, one in notes_of(kept / f"{path.stem}.json").items():
            if name in items and one["passed"]:
                lines = {module: frozenset(found) for module, found in one["lines"].items()}
                reaches[name] = Reach(frozenset(one["functions"]), lines, one["seconds"])
    return reaches


def notes_of(kept: Path) -> dict[str, dict[str, Any]]:
    """Return what is known of the tests of a file."""
    return json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}


def observe(unknown: Mapping[Path, Sequence[tuple[pytest.Item, str]]], files: Mapping[str, str]) -> None:
    """Run tests, and write what they reach. One that fails by itself shows nothing about mutants."""
    set_mutant_under_test("stats")
    watching = coverage.Coverage(data_file=None, config_file=False, include=list(files.values()))
    watching.set_option("run:core", "ctrace")  # the other one tells of each line once, and not once for each test
    watching.start()
    everything = [item for items in unknown.values() for item, _ in items]
    following = dict(zip(everything, [*everything[1:], None], strict=True))
    for path, items in unknown.items():
        notes: dict[str, dict[str, Any]] = {}
        for item, mark in items:
            state()._stats.clear()
            watching.switch_context(item.nodeid)
            began = time.process_time()
            reports = runtestprotocol(item, nextitem=following[item], log=False)
            seconds = round(time.process_time() - began, 4)
            note = {"mark": mark, "functions": sorted(state()._stats), "lines": {}, "seconds": seconds}
            notes[item.nodeid] = {**note, "passed": all(report.passed for report in reports)}
            if any(report.failed for report in reports):
                print(f"fails without any mutant: {item.nodeid}", file=sys.stderr, flush=True)
        data = watching.get_data()
        for module, source in files.items():
            for line, tests in data.contexts_by_lineno(source).items():
                for test in notes.keys() & set(tests):
                    notes[test]["lines"].setdefault(module, []).append(line)
        path.write_text(json.dumps({**notes_of(path), **notes}), encoding="utf-8")
    watching.stop()


def tried(mutant: str, tests: Sequence[tuple[pytest.Item, float]], *, budget_s: float) -> tuple[str, str]:
    """Return what became of a mutant, and the test that killed it."""
    if not tests:
        return UNREACHED, ""
    longest_s = HANGS_S + HANGS_TIMES * max(seconds for _, seconds in tests)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        status = _KILLED
        try:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            set_mutant_under_test(mutant)
            status = in_turn(tests, writer, budget_s=budget_s)
        finally:
            os._exit(status)
    os.close(writer)
    ended = ended_within(child, 60 + 5 * (budget_s + longest_s))
    with os.fdopen(reader, encoding="utf-8") as told:
        last = told.read().splitlines()[-1:] or [""]
    if ended is None or os.WIFSIGNALED(ended):
        return HANGED, last[0]
    fate = {_SURVIVED: SURVIVED, _UNDECIDED: UNDECIDED}.get(os.waitstatus_to_exitcode(ended), KILLED)
    return fate, last[0] if fate == KILLED else ""


def in_turn(tests: Sequence[tuple[pytest.Item, float]], writer: int, *, budget_s: float) -> int:
    """Run tests until one fails, all have passed, or so much processor time is used up."""
    began = time.process_time()
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    for number, (item, seconds) in enumerate(tests):
        if time.process_time() - began > budget_s:
            return _UNDECIDED
        os.write(writer, (item.nodeid + "\n").encode())
        # Ended by the system when it is reached: that is known as a mutant that hangs.
        limit_s = math.ceil(time.process_time() + HANGS_S + HANGS_TIMES * seconds)
        resource.setrlimit(resource.RLIMIT_CPU, (limit_s, most))
        following = tests[number + 1][0] if number + 1 < len(tests) else None
        if any(report.failed for report in runtestprotocol(item, nextitem=following, log=False)):
            return _KILLED
    return _SURVIVED


def ended_within(child: int, limit_s: float) -> int | None:
    """Wait for a child; end one that takes longer. Returns its status, or None if it was ended."""
    until = time.monotonic() + limit_s
    pause = 0.002
    while time.monotonic() < until:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return status
        time.sleep(pause)
        pause = min(0.05, pause * 1.5)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None
