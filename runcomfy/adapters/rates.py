"""
The rate table: what ships in `runcomfy/data/rates.toml`, with the user's own file laid over it.

Which prices are right is the user's to say; this module only makes sure that a table is a table. A machine type without
a price is not in it, and nothing launches a machine whose price is not known.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from datetime import date
from decimal import Decimal
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from runcomfy.domain.exceptions import SettingInvalid, foreign_text
from runcomfy.domain.money import Rate, RateTable
from runcomfy.domain.settings import KNOWN_SERVER_TYPES

PLANS: Final[Mapping[str, str]] = {"payg": "Pay as You Go", "pro": "Pro"}
SERVER_TYPE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DEAREST: Final = Decimal(10_000)
"""USD per hour; a higher price is a misplaced point."""
_MAX_BYTES: Final = 1024 * 1024


def load_rates(*, plan: str, extra: Path | None = None) -> RateTable:
    """Return the prices of a plan (`payg` or `pro`): the shipped ones, with the file `extra` laid over them.

    `extra` has the form of the shipped file. Its types are added to the shipped ones or take their place; with
    `replace = true` it stands alone. A type RunComfy does not document is `tested=False`.

    Raises:
        SettingInvalid: `extra` cannot be read or is not such a file.
    """
    shipped = _parse(files("runcomfy").joinpath("data/rates.toml").read_text(encoding="utf-8"), plan, "rates.toml")
    if extra is None:
        return shipped
    try:
        with extra.open("rb") as file:
            text = file.read(_MAX_BYTES + 1).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise _broken(str(extra), f"cannot be read: {reason}") from error
    if len(text) > _MAX_BYTES:
        raise _broken(str(extra), "is too large for a rate table")
    own = _parse(text, plan, str(extra))
    if _document(text, str(extra)).get("replace") is True:
        return own
    return RateTable(as_of=max(shipped.as_of, own.as_of), plan=plan, rates={**shipped.rates, **own.rates})


def _parse(text: str, plan: str, where: str) -> RateTable:
    document = _document(text, where)
    if document.get("format", 1) != 1:
        raise _broken(where, "is of a newer format than this version reads")
    as_of = document.get("as_of")
    if type(as_of) is not date:
        raise _broken(where, "needs the date of its prices, for example: as_of = 2026-11-21")
    types = document.get("types")
    if not isinstance(types, dict):
        raise _broken(where, "has no table [types.NAME]")
    source = foreign_text(document.get("source") or where, 120)
    label = f"{source}, {PLANS[plan]}, as of {as_of.isoformat()}"
    rates = {}
    for name, row in types.items():
        rate = _rate(name, row, plan, label, where)
        if rate is not None:
            rates[name] = rate
    return RateTable(as_of=as_of, plan=plan, rates=rates)


def _document(text: str, where: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text, parse_float=Decimal)
    except (tomllib.TOMLDecodeError, RecursionError, ValueError, ArithmeticError) as error:
        raise _broken(where, f"is not TOML: {foreign_text(error, 120)}") from error


def _rate(name: str, row: Any, plan: str, label: str, where: str) -> Rate | None:
    """Return the rate of one type, or None if it has no price under the plan."""
    if not SERVER_TYPE.fullmatch(name):
        raise _broken(where, f"has a type name that cannot be one: {foreign_text(name, 64)!r}")
    if not isinstance(row, dict):
        raise _broken(where, f"has no table for the type {name}")
    for key in PLANS:
        if key in row:
            _check_price(row[key], name, key, where)
    if plan not in row:
        return None
    vram = row.get("vram_gb", 0)
    return Rate(
        server_type=name,
        usd_per_hour=Decimal(row[plan]),
        plan=plan,
        source=label,
        tested=name in KNOWN_SERVER_TYPES,
        gpu=foreign_text(row.get("gpu", ""), 64),
        vram_gb=vram if type(vram) is int and 0 <= vram <= 100_000 else 0,
    )


def _check_price(price: object, name: str, plan: str, where: str) -> None:
    if type(price) not in (int, Decimal) or not Decimal(str(price)).is_finite():
        raise _broken(where, f"has no price for {name} under {plan}: write a number, for example {plan} = 0.99")
    if not 0 < Decimal(str(price)) <= _DEAREST:
        raise _broken(where, f"has an impossible price for {name} under {plan}: it is in USD per hour")


def _broken(where: str, what: str) -> SettingInvalid:
    return SettingInvalid(
        f"the rate table {where} {what}",
        hint="correct the file that RUNCOMFY_RATES_FILE names (its form: runcomfy/data/rates.toml), or unset it",
    )
