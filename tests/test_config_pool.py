"""Settings of pools and budgets: what is accepted, what is refused and in which words, and how they are shown."""

from __future__ import annotations

import json
import os
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from runcomfy.adapters.pool_variables import POOL_VARIABLES
from runcomfy.bootstrap import App
from runcomfy.cli.config import config
from runcomfy.config import Settings, describe_settings, load_settings
from runcomfy.domain.budget import Budget, Period
from runcomfy.domain.exceptions import ConfigurationError, SettingInvalid
from runcomfy.domain.settings import PoolSettings


def load(env: dict[str, str] | None = None, **options: Any) -> Settings:
    """Load settings from these variables alone."""
    return load_settings(env={"RUNCOMFY_CREDENTIALS_FILE": os.devnull, **(env or {})}, **options)


def refused(env: dict[str, str], **options: Any) -> ConfigurationError:
    with pytest.raises(SettingInvalid) as caught:
        load(env, **options)
    return caught.value


# --- pools --------------------------------------------------------------------------------------------------


def test_what_nobody_sets_has_the_default_of_the_dataclass() -> None:
    settings = load()
    assert settings.pool == PoolSettings()
    assert settings.budgets == ()
    assert {settings.sources[variable.name] for variable in POOL_VARIABLES} == {"default"}


@pytest.mark.parametrize(
    ("name", "text", "field", "value"),
    [
        ("POOL_MAX_MACHINES", "4", "max_machines", 4),
        ("POOL_SERVER_TYPES", "large, medium,large", "server_types", ("large", "medium")),
        ("POOL_DEPTH", "3", "depth", 3),
        ("WAIT_PRICE", "batch", "wait_price", "batch"),
        ("WAIT_PRICE", "Person-Waiting", "wait_price", "person waiting"),
        ("WAIT_PRICE", "person  waiting", "wait_price", "person waiting"),
        ("WAIT_PRICE", "$8.75", "wait_price", "8.75"),
        ("WAIT_PRICE", "1e1", "wait_price", "10"),
        ("LATENCY_TARGET", "90s", "latency_target", timedelta(seconds=90)),
        ("KEEP_ALIVE", "5m", "keep_alive", timedelta(minutes=5)),
        ("KEEP_ALIVE", "0", "keep_alive", timedelta(0)),
        ("POOL_AFFINITY_WAIT", "0s", "affinity_wait", timedelta(0)),
        ("PLAN_EVERY", "2", "plan_every", timedelta(seconds=2)),
        ("RECONCILE_EVERY", "1m", "reconcile_every", timedelta(minutes=1)),
        ("STATUS_EVERY", "3s", "status_every", timedelta(seconds=3)),
        ("FLIP_LIMIT", "5", "flip_limit", 5),
        ("FLIP_WINDOW", "10m", "flip_window", timedelta(minutes=10)),
        ("SLOW_FACTOR", "2.5", "slow_factor", 2.5),
        ("BREAKER_FAILURES", "2", "breaker_failures", 2),
        ("BREAKER_REST", "1h", "breaker_rest", timedelta(hours=1)),
        ("GUARD", "off", "guard", False),
        ("GUARD_PERIOD", "15", "guard_period", timedelta(seconds=15)),
        ("IDLE_WARNING", "1m", "idle_warning", timedelta(minutes=1)),
        ("SILENCE", "20m", "silence", timedelta(minutes=20)),
        ("PRESENCE_LEAD", "2m", "presence_lead", timedelta(minutes=2)),
    ],
)
def test_a_variable_sets_its_field(name: str, text: str, field: str, value: object) -> None:
    settings = load({f"RUNCOMFY_{name}": text})
    assert getattr(settings.pool, field) == value
    assert settings.sources[f"RUNCOMFY_{name}"] == "environment"
    assert getattr(load(overrides={f"pool.{field}": value}).pool, field) == value


def test_machines_that_are_kept_are_not_more_than_may_be_rented() -> None:
    assert load({"RUNCOMFY_POOL_MAX_MACHINES": "3", "RUNCOMFY_POOL_MIN_MACHINES": "3"}).pool.min_machines == 3
    error = refused({"RUNCOMFY_POOL_MIN_MACHINES": "3"})
    assert "RUNCOMFY_POOL_MIN_MACHINES" in error.message
    assert "RUNCOMFY_POOL_MAX_MACHINES (1)" in error.message


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("POOL_MAX_MACHINES", "0"),
        ("POOL_MAX_MACHINES", "many"),
        ("POOL_SERVER_TYPES", " , "),
        ("POOL_SERVER_TYPES", "large;medium"),
        ("POOL_DEPTH", "0"),
        ("WAIT_PRICE", "cheap"),
        ("WAIT_PRICE", "0"),
        ("WAIT_PRICE", "-5"),
        ("WAIT_PRICE", "nan"),
        ("WAIT_PRICE", "inf"),
        ("LATENCY_TARGET", "0"),
        ("KEEP_ALIVE", "-1s"),
        ("KEEP_ALIVE", "soon"),
        ("KEEP_ALIVE", "8785h"),
        ("PLAN_EVERY", "0"),
        ("FLIP_LIMIT", "2.5"),
        ("SLOW_FACTOR", "1"),
        ("SLOW_FACTOR", "nan"),
        ("GUARD", "perhaps"),
        ("BUDGET_DAY", "0"),
        ("BUDGET_DAY", "-1"),
        ("BUDGET_DAY", "1e3"),
        ("BUDGET_DAY", "twenty"),
        ("BUDGET_DAY", "20 EUR"),
        ("BUDGET_DAY", "1000000.01"),
        ("BUDGET_MONTH_SOFT", "nan"),
    ],
)
def test_nonsense_is_refused_and_named(name: str, text: str) -> None:
    error = refused({f"RUNCOMFY_{name}": text})
    assert f"RUNCOMFY_{name} (environment)" in error.message
    assert f"RUNCOMFY_{name}" in error.hint


def test_a_price_of_waiting_that_a_target_replaces_is_mentioned() -> None:
    both = {"RUNCOMFY_WAIT_PRICE": "batch", "RUNCOMFY_LATENCY_TARGET": "60"}
    assert any("RUNCOMFY_WAIT_PRICE does not count" in word for word in load(both).warnings)
    assert not any("WAIT_PRICE" in word for word in load({"RUNCOMFY_LATENCY_TARGET": "60"}).warnings)


def test_a_type_of_the_pool_without_a_price_is_mentioned() -> None:
    warnings = load({"RUNCOMFY_POOL_SERVER_TYPES": "medium,h100-times-8"}).warnings
    assert [word for word in warnings if "h100-times-8 has no payg price" in word]
    assert not [word for word in warnings if "medium has no" in word]


# --- budgets ------------------------------------------------------------------------------------------------


def test_budgets_of_every_period_fold_into_one_list() -> None:
    env = {
        "RUNCOMFY_BUDGET_RUN": "2",
        "RUNCOMFY_BUDGET_HOUR": "$1.50",
        "RUNCOMFY_BUDGET_DAY": "20",
        "RUNCOMFY_BUDGET_DAY_SOFT": "12",
        "RUNCOMFY_BUDGET_MONTH_SOFT": "300",
        "RUNCOMFY_BUDGET_PROJECTS": "conjure=20/day, *=100/month",
        "RUNCOMFY_BUDGET_USERS": "ann=16..20/day,ann=5/hour, a=b=7../run",
    }
    assert load(env).budgets == (
        Budget(Period.RUN, Decimal(2)),
        Budget(Period.HOUR, Decimal("1.50")),
        Budget(Period.DAY, Decimal(20), Decimal(12)),
        Budget(Period.MONTH, None, Decimal(300)),
        Budget(Period.DAY, Decimal(20), project="conjure"),
        Budget(Period.MONTH, Decimal(100), project="*"),
        Budget(Period.DAY, Decimal(20), Decimal(16), user="ann"),
        Budget(Period.HOUR, Decimal(5), user="ann"),
        Budget(Period.RUN, None, Decimal(7), user="a=b"),
    )


def test_an_alert_above_its_cap_is_one_error_that_names_both() -> None:
    error = refused({"RUNCOMFY_BUDGET_DAY": "20", "RUNCOMFY_BUDGET_DAY_SOFT": "21"})
    assert "RUNCOMFY_BUDGET_DAY_SOFT" in error.message
    assert "21 is more than RUNCOMFY_BUDGET_DAY (20)" in error.message
    assert len(error.details["problems"]) == 1
    assert load({"RUNCOMFY_BUDGET_DAY": "20", "RUNCOMFY_BUDGET_DAY_SOFT": "20"}).budgets[0].alerts_at == 20


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("20/day", "does not say whose"),
        ("=20/day", "does not say whose"),
        ("ann=20", "does not end with a period"),
        ("ann=20/week", "does not end with a period"),
        ("ann=20/", "does not end with a period"),
        ("ann=/day", "is not an amount"),
        ("ann=../day", "has no amount"),
        ("ann=lots/day", "is not an amount"),
        ("ann=0/day", "is not more than 0"),
        ("ann=20..16/day", "would alert at more than what it refuses at"),
        ("ann=20/day, bob=3/day, ann=21/day", "'ann' has two budgets per day"),
        (f"{'a' * 201}=20/day", "cannot be the name"),
        ("an\x1b[31mn=20/day", "cannot be the name"),
        (",", "names no budget"),
    ],
)
def test_a_list_of_budgets_that_cannot_be_read_says_where(text: str, words: str) -> None:
    for variable in ("RUNCOMFY_BUDGET_USERS", "RUNCOMFY_BUDGET_PROJECTS"):
        error = refused({variable: text})
        assert f"{variable} (environment)" in error.message
        assert words in error.message
        assert "\x1b" not in error.message
        assert len(error.details["problems"]) == 1


def test_what_a_program_gives_wins_over_the_environment() -> None:
    env = {"RUNCOMFY_BUDGET_DAY": "20", "RUNCOMFY_BUDGET_USERS": "ann=1/day"}
    for overrides in (
        {"RUNCOMFY_BUDGET_DAY": "30", "RUNCOMFY_BUDGET_USERS": "bob=2.5/day", "RUNCOMFY_POOL_MAX_MACHINES": 4},
        {"budgets.day": Decimal(30), "budgets.users": {"bob": "2.5/day"}, "pool.max_machines": "4"},
        {"budgets.day": 30, "budgets.users": "bob=2.5/day", "pool.max_machines": 4},
    ):
        settings = load(env, overrides=overrides)
        assert settings.pool.max_machines == 4
        assert settings.budgets == (Budget(Period.DAY, Decimal(30)), Budget(Period.DAY, Decimal("2.5"), user="bob"))
        assert settings.sources["RUNCOMFY_BUDGET_DAY"] == "override"


async def test_an_app_takes_budgets_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNCOMFY_BUDGET_DAY", "20")
    async with App(overrides={"RUNCOMFY_BUDGET_DAY": "5", "budgets.day_soft": None}) as app:
        assert app.settings.budgets == (Budget(Period.DAY, Decimal(5)),)


# --- showing ------------------------------------------------------------------------------------------------


def test_they_are_shown_like_every_other_setting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RUNCOMFY_STATE_DIR", str(tmp_path))
    monkeypatch.setenv("RUNCOMFY_BUDGET_DAY", "$20")
    monkeypatch.setenv("RUNCOMFY_BUDGET_USERS", "ann=16..20/day,*=9/month")
    monkeypatch.setenv("RUNCOMFY_POOL_SERVER_TYPES", "medium, large")
    answer = CliRunner().invoke(config, ["show", "--json"])
    assert answer.exit_code == 0, answer.output
    rows = {row["name"]: row for row in json.loads(answer.stdout)["settings"]}
    assert {variable.name for variable in POOL_VARIABLES} <= set(rows)
    assert (rows["RUNCOMFY_BUDGET_DAY"]["value"], rows["RUNCOMFY_BUDGET_DAY"]["source"]) == ("20", "environment")
    assert rows["RUNCOMFY_BUDGET_DAY_SOFT"]["value"] == ""
    assert rows["RUNCOMFY_BUDGET_USERS"]["value"] == "ann=16..20/day, *=9/month"
    assert rows["RUNCOMFY_POOL_SERVER_TYPES"]["value"] == "medium,large"
    assert rows["RUNCOMFY_POOL_MAX_MACHINES"]["value"] == "1"


CAPS = st.decimals(min_value="0.000001", max_value=1_000_000, places=6)
NAMES = st.text(st.characters(codec="utf-8", exclude_characters=","), min_size=1, max_size=40).filter(
    lambda name: name == name.strip() and name.isprintable()
)


@given(
    st.dictionaries(
        st.tuples(NAMES, st.sampled_from(Period)),
        st.one_of(
            CAPS.map(lambda hard: (hard, None)),
            CAPS.map(lambda soft: (None, soft)),
            st.tuples(CAPS, CAPS).map(lambda two: (max(two), min(two))),
        ),
        min_size=1,
        max_size=5,
    ),
    st.one_of(st.none(), CAPS),
)
def test_what_is_shown_reads_back_as_the_same_budgets(
    caps: dict[tuple[str, Period], tuple[Decimal | None, Decimal | None]], day: Decimal | None
) -> None:
    wanted = [Budget(Period.DAY, day)] if day is not None else []
    wanted += [Budget(period, hard, soft, user=name) for (name, period), (hard, soft) in caps.items()]
    first = load(overrides={"budgets.day": day, "RUNCOMFY_BUDGET_USERS": _text(wanted)})
    assert list(first.budgets) == wanted
    shown = {row.name: row.value_shown for row in describe_settings(first) if row.name.startswith("RUNCOMFY_BUDGET")}
    assert load({name: value for name, value in shown.items() if value}).budgets == first.budgets


def _text(budgets: list[Budget]) -> str:
    parts = []
    for budget in budgets:
        if budget.user is not None:
            low = "" if budget.soft is None else f"{budget.soft:f}.."
            parts.append(
                f"{budget.user}={low}{'' if budget.hard is None else format(budget.hard, 'f')}/{budget.period}"
            )
    return ",".join(parts)
