"""
`python -m benchmarks mutation [--group domain] [--sample 40] [--seed 1] [--record]`: do the tests notice a change?

mutmut writes the mutants: each is one function with one small change (an operator, a number, an argument, a constant).
A mutant is killed if a test that reaches its function fails, or never ends. How they are run is this repository's own
(`benchmarks/mutation_plugin.py`), because mutmut collects the tests anew for each mutant.

What people read is not mutated (sentences, log lines, hints), nor what mutmut leaves alone (properties and
other decorated functions, the values of constants). Survivors that change nothing that could be asked for are
explained in `benchmarks/mutation_explained.toml` and counted apart.

`--sample N` draws N mutants of each module, by `--seed`; without it all are tried. A seed whose survivors tests were
then written for says nothing any more about the rest: take another one for a figure. `--again` goes on where the last
run of the same group ended and keeps what it knows. `--show` prints the survivors as changes.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import hashlib
import json
import math
import os
import random
import shutil
import subprocess
import sys
import textwrap
import time
import tomllib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.results import Figure, Result, keep, told_to_keep

ROOT: Final = Path(__file__).parent.parent
WORK: Final = ROOT / "build" / "mutation"
TREE: Final = WORK / "tree"
EXPLAINED: Final = Path(__file__).with_name("mutation_explained.toml")
COPIED: Final = (
    "benchmarks",
    "comfyui_agent",
    "docs",
    "examples",
    "launcher",
    "runcomfy",
    "state",
    "tests",
    "workflows",
)
BAR: Final = 80.0
WORDS: Final = "4"
"""Goes up when `without_words` or `Mutant` changes, so that mutants are written anew."""

APPLICATION: Final = (
    "machine_pool", "pool_health", "pool_members", "pool_renewal", "pool_seat", "pool_station", "pool_watch",
    "pool_works", "pooled", "fleet", "fleet_demand", "fleet_failing", "fleet_offers", "planner", "job_queue",
    "executor", "job_run", "store_journal", "claims", "work_book", "working_off", "reconciler", "reaper", "ending",
    "launching", "machines", "books", "ledger", "purse", "spending",
)  # fmt: skip
STORES: Final = (
    "jobs", "jobs_claim", "jobs_finish", "jobs_intake", "jobs_look", "jobs_reap", "jobs_rows", "jobs_steps", "sql",
    "sql_money", "sql_parts", "sql_signals", "roles", "bucket",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Group:
    """What is mutated together, and which tests are run: those that take no processes and little time."""

    modules: tuple[str, ...]
    tests: tuple[str, ...]
    warm_up: str
    budget_s: float
    """Processor time that a mutant may spend; if tests of its lines are left then, it is undecided. Rules are tested
    in milliseconds, stories of machines in tenths of a second."""


GROUPS: Final = {
    "domain": Group(
        ("runcomfy/domain/*.py",),
        (
            "tests/domain", "tests/test_balance.py", "tests/test_canary.py",
            "tests/serverless/test_serverless_answers.py", "tests/test_rate_limits.py",
            "tests/test_dev_server_state.py", "tests/test_work_book.py", "tests/test_costs.py",
            "tests/test_time_left.py", "tests/test_log.py", "tests/media/test_media_inputs.py",
            "tests/test_credentials.py", "tests/test_result_names.py", "tests/security", "tests/docs/test_errors.py",
            "tests/test_workflow_registry.py", "tests/test_config.py", "tests/test_job_files.py",
            "tests/serverless/test_serverless.py", "tests/serverless/test_serverless_endings.py",
            "tests/test_job_queue.py", "tests/test_cli_costs.py",
        ),
        "tests/test_work_book.py",
        2.0,
    ),
    "application": Group(
        (*(f"runcomfy/application/{name}.py" for name in APPLICATION),),
        (
            "tests/test_machine_pool.py", "tests/test_machine_pool_life.py", "tests/test_machines.py",
            "tests/test_lost_launches.py", "tests/test_machines_ending.py", "tests/test_machines_full_disk.py",
            "tests/test_books.py", "tests/test_reaper.py", "tests/test_reaper_any_faults.py",
            "tests/test_reconciler.py", "tests/test_fleet.py", "tests/test_fleet_launches.py",
            "tests/test_fleet_signals.py", "tests/test_pool_health.py", "tests/test_pool_members.py",
            "tests/test_pool_station.py", "tests/test_pool_experience.py", "tests/test_job_queue.py",
            "tests/test_work_book.py", "tests/test_executor.py", "tests/test_job_run.py", "tests/test_journal.py",
            "tests/test_budgets_enforced.py", "tests/test_presence.py", "tests/test_costs.py", "tests/test_serve.py",
            "tests/stories/test_other_type.py", "tests/stories/test_pool_faults.py",
            "tests/stories/test_pool_account.py", "tests/test_executor_crashes.py", "tests/test_executor_database.py",
            "tests/test_planner_and_journal.py", "tests/test_api_machines_and_money.py", "tests/test_cli_costs.py",
            "tests/test_placing.py", "tests/stories/test_queue_trouble.py",
        ),
        "tests/test_work_book.py",
        10.0,
    ),
    "stores": Group(
        (*(f"runcomfy/adapters/stores/{name}.py" for name in STORES),),
        (
            "tests/contracts/test_jobs_contract.py", "tests/contracts/test_store_contract.py",
            "tests/test_jobs_store.py", "tests/test_jobs_store_histories.py", "tests/test_jobs_store_limits.py",
            "tests/test_jobs_beside.py", "tests/test_store.py", "tests/test_store_pools.py", "tests/test_bucket.py",
            "tests/test_signals.py",
        ),
        "tests/test_bucket.py",
        5.0,
    ),
}  # fmt: skip


# -- mutants -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Mutant:
    """One change of one function."""

    name: str
    """`runcomfy.domain.money.x_show_usd__mutmut_3`"""
    was: str
    now: str
    """The lines that differ, stripped and joined."""
    lines: tuple[int, int] | None
    """The first and the last line of the statement that is changed, where it stands unchanged in the copied tree; None
    for what is no statement, such as the default of a parameter."""

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def function(self) -> str:
        mangled = self.name.rpartition(".")[2].partition("__mutmut_")[0]
        return mangled.removeprefix("x_").removeprefix("xǁ").replace("ǁ", ".")


def without_words() -> None:
    """Have mutmut leave alone what people read: sentences, log lines, hints, names of tasks, what is said at work."""
    import libcst as cst
    import libcst.matchers as m
    from mutmut.mutation import file_mutation, mutators

    spoken = {"tell", "debug", "info", "warning", "error", "exception", "_complain", "_tell", "_once", "note", "say"}

    def called(node: cst.Call) -> str:
        return node.func.attr.value if isinstance(node.func, cst.Attribute) else getattr(node.func, "value", "")

    def is_sentence(node: cst.CSTNode) -> bool:
        if isinstance(node, cst.SimpleString):
            return " " in node.value
        if isinstance(node, cst.FormattedString):
            return any(isinstance(part, cst.FormattedStringText) and " " in part.value for part in node.parts)
        return isinstance(node, cst.ConcatenatedString)

    def is_spoken(node: cst.CSTNode) -> bool:
        if is_sentence(node):
            return True
        if isinstance(node, cst.Call):
            return isinstance(node.func, cst.Attribute | cst.Name) and called(node) in spoken
        return isinstance(node, cst.Arg) and node.keyword is not None and node.keyword.value in ("hint", "note")

    def names_task(call: cst.Call, argument: cst.Arg) -> bool:
        return called(call) == "create_task" and argument.keyword is not None and argument.keyword.value == "name"

    def logged(function: cst.FunctionDef) -> Iterable[cst.Assign | cst.AnnAssign]:
        """Assignments of what is used in log lines only."""
        said = [name for call in m.findall(function, m.Call()) if is_spoken(call) for name in m.findall(call, m.Name())]
        used = list(m.findall(function, m.Name()))
        for one in m.findall(function, m.Assign(targets=[m.AssignTarget(m.Name())]) | m.AnnAssign(target=m.Name())):
            target = one.targets[0].target if isinstance(one, cst.Assign) else one.target
            others = [name for name in used if name.value == target.value and name is not target]
            if others and all(any(name is word for word in said) for name in others):
                yield one

    class Silent(file_mutation.MutationVisitor):  # type: ignore[misc]
        def _skip_node_and_children(self, node: cst.CSTNode) -> bool:
            if isinstance(node, cst.Call):
                names.extend(one for one in node.args if names_task(node, one))
            if isinstance(node, cst.FunctionDef):
                names.extend(logged(node))
            return is_spoken(node) or any(node is one for one in names) or super()._skip_node_and_children(node)

    names: list[cst.CSTNode] = []

    def arguments(node: cst.Call) -> Iterable[cst.Call]:
        unspoken = [is_spoken(one) or is_sentence(one.value) or names_task(node, one) for one in node.args]
        for number, silent in enumerate(unspoken):
            if silent:
                continue
            argument = node.args[number]
            if argument.star == "" and not (isinstance(argument.value, cst.Name) and argument.value.value == "None"):
                none = argument.with_changes(value=cst.Name("None"))
                yield node.with_changes(args=[*node.args[:number], none, *node.args[number + 1 :]])
            if len(node.args) > 1:
                yield node.with_changes(args=[*node.args[:number], *node.args[number + 1 :]])

    file_mutation.MutationVisitor = Silent
    file_mutation.mutation_operators = [
        (kind, arguments if operator is mutators.operator_arg_removal else operator)
        for kind, operator in mutators.mutation_operators
    ]


def mutated(path: str) -> list[Mutant]:
    """Write the mutants of one module into the copied tree, and return them. Kept until the module changes."""
    source = (ROOT / path).read_text(encoding="utf-8")
    mark = hashlib.sha256(f"{WORDS} {source}".encode()).hexdigest()[:16]
    kept = WORK / "mutants" / f"{path.replace('/', '.')}.{mark}.json"
    if kept.exists():
        told = json.loads(kept.read_text(encoding="utf-8"))
    else:
        told = written(path, source)
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(told), encoding="utf-8")
    (TREE / path).write_text(told["code"], encoding="utf-8")
    return [Mutant(**{**one, "lines": tuple(one["lines"]) if one["lines"] else None}) for one in told["mutants"]]


def written(path: str, source: str) -> dict[str, Any]:
    """Have mutmut write the mutants of one module."""
    from mutmut.mutation.file_mutation import mutate_file_contents

    file = mutate_file_contents(path, source)
    module = path.removesuffix(".py").replace("/", ".")
    lines = file.code.splitlines()
    spans = file.line_span_by_function_name

    def of(name: str) -> list[str]:
        span = spans[name]
        return [line.replace(name, "_") for line in lines[span.start - 1 : span.end]]

    def stripped(text: Iterable[str]) -> list[str]:
        return [line.strip() for line in text if line.strip()]

    mutants = []
    for name in file.mutant_names:
        original = f"{name.rpartition('__mutmut_')[0]}__mutmut_orig"
        before, after = of(original), of(name)
        changed = list(difflib.ndiff(stripped(before), stripped(after)))
        was = " ".join(line[2:] for line in changed if line.startswith("- "))
        now = " ".join(line[2:] for line in changed if line.startswith("+ "))
        differs = next(
            (number for number, pair in enumerate(zip(before, after, strict=False)) if len(set(pair)) > 1), 0
        )
        statement = statement_at(before, differs + 1)
        start = spans[original].start - 1
        found = [start + line for line in statement] if statement else None
        mutants.append({"name": f"{module}.{name}", "was": was, "now": now, "lines": found})
    return {"code": file.code, "mutants": mutants}


def statement_at(function: Sequence[str], line: int) -> tuple[int, int] | None:
    """Return the first and the last line of the innermost statement at a line of a function; of a statement that
    contains others, those before the first of them. None for the head of the function."""
    root = ast.parse(textwrap.dedent("\n".join(function))).body[0]
    best: tuple[int, int] | None = None
    for node in ast.walk(root):
        if node is root or not isinstance(node, ast.stmt | ast.match_case | ast.ExceptHandler):
            continue
        first = node.pattern.lineno if isinstance(node, ast.match_case) else node.lineno
        last = max(getattr(part, "end_lineno", None) or first for part in ast.walk(node))
        inner = [part.lineno for part in ast.walk(node) if part is not node and isinstance(part, ast.stmt)]
        if inner:
            last = max(first, min(inner) - 1)
        if first <= line <= last and (best is None or last - first <= best[1] - best[0]):
            best = (first, last)
    return best


def copied() -> None:
    """Copy the project to where it is mutated."""
    shutil.rmtree(TREE, ignore_errors=True)
    leave = shutil.ignore_patterns("__pycache__", "node_modules", "*.pyc", "results")
    for name in COPIED:
        shutil.copytree(ROOT / name, TREE / name, ignore=leave)
    for path in ROOT.iterdir():
        if path.is_file() and path.suffix in (".toml", ".md", ".txt", ""):
            shutil.copy(path, TREE / path.name)


# -- trying them -------------------------------------------------------------------------------------------------


def outcomes_of(
    group: str, mutants: Sequence[Mutant], *, budget_s: float, again: bool, retry: bool
) -> dict[str, dict[str, Any]]:
    """Try mutants, and return what became of each by its name."""
    outcomes, plan = (WORK / f"{group}.{name}" for name in ("outcomes.jsonl", "plan.json"))
    # What a test reaches is found out anew when it changes, or anything that is no test.
    reaches = WORK / f"{group}.reaches.{digest()}"
    if not again:
        outcomes.unlink(missing_ok=True)
    known = read(outcomes)
    if retry:
        known = {name: one for name, one in known.items() if one["fate"] in ("killed", "hanged")}
    wanted = [{"name": one.name, "lines": one.lines} for one in mutants if one.name not in known]
    if wanted:
        chosen = GROUPS[group]
        told = {
            "mutants": wanted,
            "files": {path.replace("/", ".").removesuffix(".py"): str(TREE / path) for path in paths_of(group)},
            "outcomes": str(outcomes),
            "reaches": str(reaches),
            "warm_up": chosen.warm_up,
            "budget_s": budget_s,
        }
        plan.write_text(json.dumps(told), encoding="utf-8")
        environment = {
            **os.environ,
            "MUTATION_PLAN": str(plan),
            "HYPOTHESIS_PROFILE": "mutation",
            "PYTHONPATH": str(TREE),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        plugins = ["no:randomly", "no:cacheprovider", "no:xdist", "no:cov", "benchmarks.mutation_plugin"]
        pytest = [sys.executable, "-m", "pytest", "-q", "--tb=no", "-m", "not campaign and not processes"]
        subprocess.run(
            [*pytest, *(word for name in plugins for word in ("-p", name)), *chosen.tests],
            cwd=TREE,
            env=environment,
            check=True,
        )
    return read(outcomes)


def paths_of(group: str) -> list[str]:
    """Return the modules of a group, as paths inside the project."""
    found = (path for pattern in GROUPS[group].modules for path in ROOT.glob(pattern))
    return sorted(path.relative_to(ROOT).as_posix() for path in found if path.name != "__init__.py")


def digest() -> str:
    """Return a mark of everything that is mutated and run, tests aside."""
    mark = hashlib.sha256(WORDS.encode())
    for path in sorted(path for name in COPIED for path in (ROOT / name).rglob("*.py")):
        if not path.name.startswith(("test_", "mutation")):
            mark.update(path.read_bytes())
    return mark.hexdigest()[:16]


def read(outcomes: Path) -> dict[str, dict[str, Any]]:
    if not outcomes.exists():
        return {}
    lines = outcomes.read_text(encoding="utf-8").splitlines()
    return {one["mutant"]: one for one in map(json.loads, lines)}


def drawn(mutants: Sequence[Mutant], sample: float | None, seed: int) -> list[Mutant]:
    """Draw so many mutants of one module, or such a share of them (below 1); all of them without `sample`."""
    if sample is None:
        return list(mutants)
    number = math.ceil(len(mutants) * sample) if sample < 1 else int(sample)
    if number >= len(mutants):
        return list(mutants)
    return random.Random(f"{seed} {mutants[0].module}").sample(mutants, number)


# -- what came of it ---------------------------------------------------------------------------------------------


def explained() -> dict[tuple[str, str, str], str]:
    """Return the reason for each survivor that is explained: by module, function and what it says now."""
    if not EXPLAINED.exists():
        return {}
    groups = tomllib.loads(EXPLAINED.read_text(encoding="utf-8"))["explained"]
    return {(module, function, now): group["reason"] for group in groups for module, function, now in group["mutants"]}


@dataclass(slots=True)
class Score:
    """How many of a module's mutants were killed."""

    generated: int
    tried: int = 0
    killed: int = 0
    explained: int = 0
    unreached: int = 0
    undecided: int = 0
    """Not noticed before the processor time was used up; counted as survived."""

    @property
    def of(self) -> int:
        return self.tried - self.explained

    @property
    def percent(self) -> float:
        return 100 * self.killed / self.of if self.of else 100.0

    @property
    def margin(self) -> float:
        """Half of the 95 % interval that a sample leaves, in percent; with the correction for a finite number."""
        if self.of < 2 or self.tried >= self.generated:
            return 0.0
        share = self.percent / 100
        finite = math.sqrt((self.generated - self.tried) / (self.generated - 1))
        return 196 * math.sqrt(share * (1 - share) / self.of) * finite


def scored(
    mutants: dict[str, list[Mutant]], outcomes: dict[str, dict[str, Any]]
) -> tuple[dict[str, Score], list[tuple[Mutant, str]]]:
    """Return the score of each module, and the survivors that are not explained."""
    reasons = explained()
    scores: dict[str, Score] = {}
    survivors: list[tuple[Mutant, str]] = []
    for module, found in mutants.items():
        score = scores[module] = Score(len(found))
        for mutant in found:
            if (outcome := outcomes.get(mutant.name)) is None:
                continue
            score.tried += 1
            if outcome["fate"] in ("killed", "hanged"):
                score.killed += 1
            elif (mutant.module.rpartition(".")[2], mutant.function, mutant.now) in reasons:
                score.explained += 1
            else:
                score.unreached += outcome["fate"] == "unreached"
                score.undecided += outcome["fate"] == "undecided"
                survivors.append((mutant, outcome["fate"]))
    return scores, survivors


def total(scores: Iterable[Score]) -> Score:
    counts: Counter[str] = Counter()
    for score in scores:
        for name in ("generated", "tried", "killed", "explained", "unreached", "undecided"):
            counts[name] += getattr(score, name)
    return Score(**counts)


def weighted(scores: Iterable[Score]) -> float:
    """Return the percentage of the whole, each module counting with all of its mutants and not with those drawn."""
    every = [score for score in scores if score.tried]
    whole = sum(score.generated for score in every)
    return sum(score.percent * score.generated for score in every) / whole if whole else 100.0


def shown(score: Score, percent: float | None = None) -> str:
    parts = f"{score.killed} of {score.of}"
    drawn_from = f"; drawn from {score.generated}" if score.tried < score.generated else ""
    apart = f"; {score.explained} explained" if score.explained else ""
    open_still = f"; {score.undecided} undecided" if score.undecided else ""
    sure = f" ± {score.margin:.1f}" if score.margin else ""
    return f"{score.percent if percent is None else percent:.1f}{sure} % ({parts}{drawn_from}{apart}{open_still})"


def figures(group: str, scores: dict[str, Score]) -> list[Figure]:
    whole, percent = total(scores.values()), weighted(scores.values())
    rows = [Figure(group, shown(whole, percent), f"at least {BAR:g} %", percent >= BAR)]
    for module, score in scores.items():
        if score.generated and score.tried:
            rows.append(Figure(f"{group}: {module.rpartition('.')[2]}", shown(score)))
    return rows


def main(arguments: Sequence[str] = ()) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks mutation", description=__doc__)
    parser.add_argument("--group", action="append", choices=list(GROUPS))
    parser.add_argument("--module", action="append", help="only modules whose name is this")
    parser.add_argument("--sample", type=float, help="so many mutants of each module, or such a share (below 1)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--budget", type=float, help="processor seconds for each mutant")
    parser.add_argument("--again", action="store_true", help="go on where the last run ended")
    parser.add_argument("--retry", action="store_true", help="with --again: try survivors once more")
    parser.add_argument("--only-shown", action="store_true", help="try nothing; show what is known")
    parser.add_argument("--show", action="store_true", help="print the survivors")
    parser.add_argument("--record", action="store_true", help="keep the figures")
    chosen = parser.parse_args(arguments)
    began = time.perf_counter()
    without_words()
    rows: list[Figure] = []
    tried_s = 0.0
    for group in chosen.group or GROUPS:
        copied()  # anew: what is mutated for another group only makes the tests of this one slow
        written_for = {Path(path).stem: mutated(path) for path in paths_of(group)}
        mutants = {stem: found for stem, found in written_for.items() if not chosen.module or stem in chosen.module}
        wanted = [one for found in mutants.values() for one in drawn(found, chosen.sample, chosen.seed)]
        # Mixed, so that what is known of an unfinished run says something about all modules.
        random.Random(chosen.seed).shuffle(wanted)
        print(f"{group}: {sum(map(len, mutants.values()))} mutants, {len(wanted)} to try", flush=True)
        outcomes = (
            read(WORK / f"{group}.outcomes.jsonl")
            if chosen.only_shown
            else outcomes_of(
                group, wanted, budget_s=chosen.budget or GROUPS[group].budget_s, again=chosen.again, retry=chosen.retry
            )
        )
        tried_s += sum(one["took_s"] for one in outcomes.values())
        scores, survivors = scored(mutants, outcomes)
        for mutant, fate in survivors if chosen.show else ():
            print(f"{fate} {mutant.name}\n  - {mutant.was}\n  + {mutant.now}")
        rows += figures(group, scores)
    for row in rows:
        print(f"{row.what}: {row.value}")
    took = round(max(time.perf_counter() - began, tried_s), 1)  # what earlier runs have found out took its time, too
    asked = " ".join(
        word for word in arguments if word not in ("--record", "--show", "--again", "--retry", "--only-shown")
    )
    notes = (
        "Killed of those tried, without those that are explained in `benchmarks/mutation_explained.toml`.",
        "Where mutants were drawn, ± is half of the 95 % interval; groups weigh each module by all of its mutants.",
        "Undecided is what no test had noticed when the processor time was used up; it counts as not noticed.",
        "What people read (sentences, log lines, hints) is not mutated; mutmut leaves out properties and constants.",
    )
    result = Result("mutation", f"python -m benchmarks mutation {asked}".strip(), tuple(rows), took, notes)
    if told_to_keep(*arguments):
        keep(result)
    return 0 if result.met else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
