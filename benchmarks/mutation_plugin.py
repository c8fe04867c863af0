"""
The half of `python -m benchmarks mutation` that runs inside pytest.

Everything is imported and collected once. Then this process forks: one child runs all tests and notes which functions
each of them reaches; for every mutant one child switches that mutant on and runs the tests that reach its function, the
quickest first, until one fails. A fork costs 50 ms; importing and collecting anew for each mutant cost seconds.

The parent runs one test itself, so that what is made once for all tests (migrations, compiled code) is inherited.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import hypothesis
import pytest
from _pytest.runner import runtestprotocol
from mutmut.mutation.trampoline import set_mutant_under_test
from mutmut.state import state

PLAN: Final = "MUTATION_PLAN"
"""Names the file that says what to do, and where to write what came of it."""
KILLED, SURVIVED, UNREACHED, HANGED = "killed", "survived", "unreached", "hanged"
FAILED_ALREADY: Final = 3
_SURVIVED, _KILLED = 0, 1

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
    seconds: float


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
    reaches = reached(items, Path(plan["reaches"]))
    with Path(plan["outcomes"]).open("a", encoding="utf-8") as outcomes:
        for mutant in plan["mutants"]:
            began = time.perf_counter()
            fate, by = tried(mutant, items, reaches, budget_s=plan["budget_s"])
            took = round(time.perf_counter() - began, 2)
            outcomes.write(json.dumps({"mutant": mutant, "fate": fate, "by": by, "took_s": took}) + "\n")
            outcomes.flush()
    return True


def quiet() -> None:
    """Have tests say nothing: thousands of failures are expected."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    sys.stdout.flush()
    os.dup2(nowhere, 1)


def reached(items: dict[str, pytest.Item], kept: Path) -> dict[str, Reach]:
    """Return what each test reaches; found out in a child, which runs all of them."""
    if not kept.exists():
        child = os.fork()
        if child == 0:
            status = 1
            try:
                kept.write_text(json.dumps(observed(list(items.values()))), encoding="utf-8")
                status = 0
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)
        if status != 0:
            kept.unlink(missing_ok=True)
            pytest.exit("the tests could not be run without any mutant", returncode=FAILED_ALREADY)
    told = json.loads(kept.read_text(encoding="utf-8"))
    return {name: Reach(frozenset(one["functions"]), one["seconds"]) for name, one in told.items() if name in items}


def observed(items: Sequence[pytest.Item]) -> dict[str, dict[str, Any]]:
    """Run every test, and return what it reaches. One that fails by itself shows nothing about mutants: left out."""
    set_mutant_under_test("stats")
    notes: dict[str, dict[str, Any]] = {}
    for number, item in enumerate(items):
        state()._stats.clear()
        began = time.process_time()
        following = items[number + 1] if number + 1 < len(items) else None
        reports = runtestprotocol(item, nextitem=following, log=False)
        if all(report.passed for report in reports):
            notes[item.nodeid] = {
                "functions": sorted(state()._stats),
                "seconds": round(time.process_time() - began, 4),
            }
        elif any(report.failed for report in reports):
            print(f"fails without any mutant: {item.nodeid}", file=sys.stderr, flush=True)
    return notes


def tried(mutant: str, items: dict[str, pytest.Item], reaches: dict[str, Reach], *, budget_s: float) -> tuple[str, str]:
    """Return what became of a mutant, and the test that killed it."""
    function, module = mutant.partition("__mutmut_")[0], mutant.rpartition(".")[0].rpartition(".")[2]
    chosen = [name for name, reach in reaches.items() if function in reach.functions]
    if not chosen:
        return UNREACHED, ""
    # A module's own tests first, then the quick ones: who kills is found soon.
    chosen.sort(key=lambda name: (f"test_{module}.py" not in name, reaches[name].seconds))
    limit_s = 20 + 10 * budget_s
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        status = _KILLED
        try:
            resource.setrlimit(resource.RLIMIT_CPU, (int(limit_s), int(limit_s) + 1))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            set_mutant_under_test(mutant)
            status = in_turn([items[name] for name in chosen], writer, budget_s=budget_s)
        finally:
            os._exit(status)
    os.close(writer)
    ended = ended_within(child, 3 * limit_s)
    with os.fdopen(reader, encoding="utf-8") as told:
        last = told.read().splitlines()[-1:] or [""]
    if ended is None or os.WIFSIGNALED(ended):
        return HANGED, last[0]
    return (SURVIVED, "") if os.waitstatus_to_exitcode(ended) == _SURVIVED else (KILLED, last[0])


def in_turn(items: Sequence[pytest.Item], writer: int, *, budget_s: float) -> int:
    """Run tests until one fails, all have passed, or so much processor time is used up."""
    began = time.process_time()
    for number, item in enumerate(items):
        os.write(writer, (item.nodeid + "\n").encode())
        following = items[number + 1] if number + 1 < len(items) else None
        if any(report.failed for report in runtestprotocol(item, nextitem=following, log=False)):
            return _KILLED
        if time.process_time() - began > budget_s:
            break
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
