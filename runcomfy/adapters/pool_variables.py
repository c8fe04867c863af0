"""
The variables of pools and budgets, and how budgets are written.

A budget for everything is one amount in a variable of its own; budgets of projects and users are lists:
`conjure=20/day, *=16..100/month`, where `16..100` alerts from 16 on and refuses above 100, and `*` means everybody who
is not named, each by themselves.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from decimal import Decimal, InvalidOperation
from typing import Annotated, Any, Final

from pydantic import BeforeValidator

from runcomfy.adapters.setting_kinds import (
    DURATION,
    SWITCH,
    YEAR,
    Kind,
    Variable,
    duration_of,
    number,
    number_of,
    refuse,
    server_type,
    several,
    shown,
    text_of,
)
from runcomfy.domain.budget import Budget, Period
from runcomfy.domain.durations import HINT as DURATION_HINT
from runcomfy.domain.exceptions import ValueInvalid, foreign_text
from runcomfy.domain.settings import KNOWN_SERVER_TYPES, WAIT_PRICES

_LARGEST_BUDGET: Final = 1_000_000
_LONGEST_NAME: Final = 200
_AMOUNT: Final = re.compile(r"\$?\s*([0-9]{1,9}(?:\.[0-9]{1,6})?)")

Flawed = tuple[str, str]
"""A variable, and what is wrong with it beside others."""


# --- kinds of values --------------------------------------------------------------------------------------


def _duration_or_none(value: object) -> timedelta:
    duration = duration_of(value)
    if not timedelta(0) <= duration <= YEAR:
        raise refuse(f"{shown(value)} is not from nothing to a year")
    return duration


def _factor(value: object) -> float:
    factor = number_of(value)
    if not 1 < factor <= 1000:
        raise refuse(f"{shown(value)} is not more than 1 and at most 1000")
    return factor


def _server_types(value: object) -> tuple[str, ...]:
    return several(value, server_type, "machine type")


def _wait_price(value: object) -> str:
    word = " ".join(str(value).lower().replace("-", " ").replace("_", " ").split())
    word = {"person": "person waiting"}.get(word, word)
    if word in WAIT_PRICES:
        return word
    try:
        price = Decimal(str(value).strip().removeprefix("$").strip())
    except InvalidOperation:
        raise refuse(f"{shown(value)} is none of {', '.join(WAIT_PRICES)}, and no price") from None
    if not price.is_finite() or not 0 < price <= 10_000:
        raise refuse(f"{shown(value)} is not more than 0 and at most 10000 USD per hour")
    return format(price, "f")


def _amount(text: str) -> Decimal:
    """Return a cap in USD. Zero is refused: one would read it as "no limit", another as "nothing at all"."""
    match = _AMOUNT.fullmatch(text.strip())
    if match is None:
        raise refuse(f"{shown(text)} is not an amount in USD")
    amount = Decimal(match[1])
    if not 0 < amount <= _LARGEST_BUDGET:
        raise refuse(f"{shown(text)} is not more than 0 and at most {_LARGEST_BUDGET}")
    return amount


def _cap(value: object) -> Decimal:
    return _amount(format(value, "f") if isinstance(value, Decimal) else str(value))


def _budgets_of(whose: str) -> Callable[[object], tuple[Budget, ...]]:
    """Return what reads a list of budgets, each of one `project` or `user`."""

    def check(value: object) -> tuple[Budget, ...]:
        if isinstance(value, Mapping):
            value = ", ".join(f"{name}={caps}" for name, caps in value.items())
        found: dict[tuple[str, Period], Budget] = {}
        for part in filter(None, (part.strip() for part in str(value).split(","))):
            name, equals, caps = (piece.strip() for piece in part.rpartition("="))
            if not equals or not name:
                raise refuse(f"{shown(part)} does not say whose budget it is: write {whose}=USD/period")
            if len(name) > _LONGEST_NAME or not name.isprintable():
                raise refuse(f"{shown(name)} cannot be the name of a {whose}")
            budget = _named(whose, name, caps)
            if (name, budget.period) in found:
                raise refuse(f"{shown(name)} has two budgets per {budget.period}")
            found[name, budget.period] = budget
        if not found:
            raise refuse(f"{shown(value)} names no budget")
        return tuple(found.values())

    return check


def _named(whose: str, name: str, caps: str) -> Budget:
    amounts, slash, word = caps.rpartition("/")
    if not slash or word.strip().lower() not in list(Period):
        raise refuse(f"{shown(caps)} does not end with a period: /{', /'.join(Period)}")
    low, dots, high = amounts.partition("..")
    soft = _amount(low) if dots and low.strip() else None
    hard = _amount(high if dots else amounts) if high.strip() or not dots else None
    if soft is None and hard is None:
        raise refuse(f"{shown(caps)} has no amount")
    if soft is not None and hard is not None and soft > hard:
        raise refuse(f"{shown(caps)} would alert at more than what it refuses at")
    period = Period(word.strip().lower())
    return Budget(
        period, hard, soft, project=name if whose == "project" else None, user=name if whose == "user" else None
    )


DURATION_OR_NONE: Final = Kind(
    Annotated[timedelta, BeforeValidator(_duration_or_none)], "duration", f"{DURATION_HINT}; 0 for none"
)
FACTOR: Final = Kind(Annotated[float, BeforeValidator(_factor)], "factor", "write a number, for example 5 or 2.5")
SERVER_TYPES: Final = Kind(
    Annotated[tuple[str, ...], BeforeValidator(_server_types)],
    "machine types",
    f"write one or more of {', '.join(KNOWN_SERVER_TYPES)}, with commas between them",
)
WAIT_PRICE: Final = text_of(
    "price of waiting", f"write {', '.join(WAIT_PRICES)}, or USD per hour, for example 8.75", _wait_price
)
CAP: Final = Kind(Annotated[Decimal, BeforeValidator(_cap)], "USD", "write an amount, for example 20 or 2.50")


def _caps_of(whose: str) -> Kind:
    hint = f"write {whose}=USD/period, for example ann=20/day, *=80..100/month; periods are {', '.join(Period)}"
    return Kind(Annotated[tuple[Budget, ...], BeforeValidator(_budgets_of(whose))], "budgets", hint)


# --- the variables ----------------------------------------------------------------------------------------


def _pool(name: str, kind: Kind, field: str, words: str) -> Variable:
    return Variable(name, kind, f"pool.{field}", words)


_POOL: Final = (
    _pool(
        "RUNCOMFY_POOL_MAX_MACHINES",
        number(1, 10_000, "machines"),
        "max_machines",
        "How many machines `comfyctl serve` may rent at once, those that start or stop counted.",
    ),
    _pool(
        "RUNCOMFY_POOL_MIN_MACHINES",
        number(0, 10_000, "machines"),
        "min_machines",
        "How many are kept even with nothing to do; budgets and leases still win.",
    ),
    _pool(
        "RUNCOMFY_POOL_SERVER_TYPES",
        SERVER_TYPES,
        "server_types",
        "Machine types the plan may choose from; without it RUNCOMFY_DEFAULT_SERVER_TYPE.",
    ),
    _pool(
        "RUNCOMFY_POOL_DEPTH",
        number(1, 100, "jobs"),
        "depth",
        "Jobs at one machine at once: one computes, the others' prompts wait in its queue.",
    ),
    _pool(
        "RUNCOMFY_WAIT_PRICE",
        WAIT_PRICE,
        "wait_price",
        "What an hour of one job's waiting is worth: batch, normal and person waiting are 1, 5 and 20 times the "
        "machine's price.",
    ),
    _pool(
        "RUNCOMFY_LATENCY_TARGET",
        DURATION,
        "latency_target",
        "In place of a price: the wait that 95 of 100 jobs should stay below.",
    ),
    _pool(
        "RUNCOMFY_KEEP_ALIVE",
        DURATION_OR_NONE,
        "keep_alive",
        "How long an idle machine is kept; without it that is learned from the gaps between jobs.",
    ),
    _pool(
        "RUNCOMFY_POOL_AFFINITY_WAIT",
        DURATION_OR_NONE,
        "affinity_wait",
        "How long a job may be passed over by others that fit a warm machine better.",
    ),
    _pool(
        "RUNCOMFY_PRESENCE_LEAD",
        DURATION_OR_NONE,
        "presence_lead",
        "How long before work somebody is usually there, until history tells.",
    ),
    _pool("RUNCOMFY_PLAN_EVERY", DURATION, "plan_every", "At the latest so long after the last plan there is another."),
    _pool(
        "RUNCOMFY_RECONCILE_EVERY",
        DURATION,
        "reconcile_every",
        "How often what RunComfy lists is compared with what we know.",
    ),
    _pool(
        "RUNCOMFY_STATUS_EVERY", DURATION, "status_every", "How often the machines' status is read, all in one call."
    ),
    _pool(
        "RUNCOMFY_FLIP_LIMIT",
        number(1, 1000, "changes"),
        "flip_limit",
        "So many changes from ready to not ready within RUNCOMFY_FLIP_WINDOW have a machine replaced.",
    ),
    _pool("RUNCOMFY_FLIP_WINDOW", DURATION, "flip_window", "The time in which those changes are counted."),
    _pool(
        "RUNCOMFY_SLOW_FACTOR",
        FACTOR,
        "slow_factor",
        "A machine this much slower than a workflow's median on its type, twice in a row, is replaced.",
    ),
    _pool(
        "RUNCOMFY_BREAKER_FAILURES",
        number(1, 1000, "failures"),
        "breaker_failures",
        "So many failed starts or ill machines of one type in a row, and it is not launched for a while.",
    ),
    _pool("RUNCOMFY_BREAKER_REST", DURATION, "breaker_rest", "How long such a type is not launched."),
    _pool(
        "RUNCOMFY_GUARD",
        SWITCH,
        "guard",
        "Whether a guard process is started that ends what outlives its lease when everything else is dead.",
    ),
    _pool("RUNCOMFY_GUARD_PERIOD", DURATION, "guard_period", "How often the guard looks."),
    _pool(
        "RUNCOMFY_IDLE_WARNING",
        DURATION_OR_NONE,
        "idle_warning",
        "How long before it ends an idle dev server the guard warns.",
    ),
    _pool(
        "RUNCOMFY_SILENCE",
        DURATION,
        "silence",
        "A gap without jobs after which a machine's idle time is not shared out over the jobs before it.",
    ),
)

_SPANS: Final[Mapping[Period, str]] = {
    Period.RUN: "by one command",
    Period.HOUR: "in a clock hour (UTC)",
    Period.DAY: "in a day (UTC)",
    Period.MONTH: "in a calendar month (UTC)",
}


def hard_variable(period: Period) -> str:
    """Return the variable of the cap that refuses."""
    return f"RUNCOMFY_BUDGET_{period.upper()}"


def soft_variable(period: Period) -> str:
    """Return the variable of the amount from which on the user is told."""
    return f"{hard_variable(period)}_SOFT"


_CAPS: Final = tuple(
    variable
    for period, span in _SPANS.items()
    for variable in (
        Variable(
            hard_variable(period),
            CAP,
            f"budgets.{period}",
            f"What may be spent {span} at most; nothing is launched or extended that could go above it.",
        ),
        Variable(
            soft_variable(period),
            CAP,
            f"budgets.{period}_soft",
            f"From what spending {span} on there is a word about it; without it 80 % of {hard_variable(period)}.",
        ),
    )
)
PROJECTS: Final = Variable(
    "RUNCOMFY_BUDGET_PROJECTS",
    _caps_of("project"),
    "budgets.projects",
    "Budgets of projects; `*` is each one not named.",
)
USERS: Final = Variable(
    "RUNCOMFY_BUDGET_USERS", _caps_of("user"), "budgets.users", "Budgets of users; `*` is each one not named."
)

POOL_VARIABLES: Final = (*_POOL, *_CAPS, PROJECTS, USERS)


# --- budgets ----------------------------------------------------------------------------------------------


def budgets_from(values: Mapping[str, Any]) -> tuple[tuple[Budget, ...], list[Flawed]]:
    """Return all budgets that checked values make, by variable, and what contradicts itself."""
    budgets: list[Budget] = []
    flaws: list[Flawed] = []
    for period in Period:
        hard, soft = values.get(hard_variable(period)), values.get(soft_variable(period))
        if hard is not None and soft is not None and soft > hard:
            flaws.append((soft_variable(period), f"{soft:f} is more than {hard_variable(period)} ({hard:f})"))
        if hard is not None or soft is not None:
            budgets.append(Budget(period, hard, soft))
    for variable in (PROJECTS, USERS):
        budgets += values.get(variable.name, ())
    return tuple(budgets), flaws


def budget_shown(name: str, budgets: Iterable[Budget]) -> str:
    """Return what a budget's variable would have to hold to make these budgets; empty if nothing."""
    if name in (PROJECTS.name, USERS.name):
        whose = "project" if name == PROJECTS.name else "user"
        return ", ".join(_written(b, getattr(b, whose)) for b in budgets if getattr(b, whose) is not None)
    for budget in budgets:
        if (
            budget.project is None
            and budget.user is None
            and name.removesuffix("_SOFT") == hard_variable(budget.period)
        ):
            amount = budget.soft if name.endswith("_SOFT") else budget.hard
            return "" if amount is None else format(amount, "f")
    return ""


def _written(budget: Budget, name: str) -> str:
    low = "" if budget.soft is None else f"{budget.soft:f}.."
    high = "" if budget.hard is None else f"{budget.hard:f}"
    return f"{foreign_text(name, _LONGEST_NAME)}={low}{high}/{budget.period}"


# --- as options -------------------------------------------------------------------------------------------

SERVE_SETTINGS: Final[Mapping[str, str]] = {
    "max_machines": "RUNCOMFY_POOL_MAX_MACHINES",
    "min_machines": "RUNCOMFY_POOL_MIN_MACHINES",
    "budget_run": "RUNCOMFY_BUDGET_RUN",
    "budget_hour": "RUNCOMFY_BUDGET_HOUR",
    "budget_day": "RUNCOMFY_BUDGET_DAY",
    "budget_month": "RUNCOMFY_BUDGET_MONTH",
    "wait_price": "RUNCOMFY_WAIT_PRICE",
    "latency_target": "RUNCOMFY_LATENCY_TARGET",
    "server_types": "RUNCOMFY_POOL_SERVER_TYPES",
    "keep_alive": "RUNCOMFY_KEEP_ALIVE",
}
"""What command lines and programs call the settings of a pool -> the variable."""


def pool_overrides(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return options of a pool, by the names of `SERVE_SETTINGS`, as variables; None counts as not given.

    Raises ValueInvalid for an empty one: a shell variable that is not set must not mean that there is no limit.
    """
    for name, value in given.items():
        texts = value if isinstance(value, tuple) else (value,)
        if any(isinstance(text, str) and not text.strip() for text in texts):
            option = "--server-type" if name == "server_types" else f"--{name.replace('_', '-')}"
            raise ValueInvalid(f"{option} is empty", hint="give a value, or leave the option out")
    found = {SERVE_SETTINGS[name]: value for name, value in given.items() if value is not None}
    types = found.get("RUNCOMFY_POOL_SERVER_TYPES")
    if isinstance(types, (list, tuple)):
        found["RUNCOMFY_POOL_SERVER_TYPES"] = ",".join(types)
    return {
        name: str(value) if isinstance(value, (int, float)) else value for name, value in found.items() if value != ""
    }
