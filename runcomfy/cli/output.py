"""What every command prints the same way: errors, warnings, sentences for the user, tables, money."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import click

from runcomfy.domain.exceptions import RunComfyError, foreign_text

if TYPE_CHECKING:
    from runcomfy.domain.job import BillLine
    from runcomfy.domain.settings import Settings


def show_error(error: RunComfyError) -> None:
    """Write an error as two lines on stderr: what happened, and what to do."""
    click.echo(f"error: {foreign_text(error.message, 600)} [{error.code}]", err=True)
    click.echo(f"  -> {foreign_text(error.hint or 'the log in the state directory says more', 600)}", err=True)


def tell(sentence: str) -> None:
    """Write a sentence for the user on stderr; stdout is for results."""
    click.echo(foreign_text(sentence, 600), err=True)


def show_warnings(settings: Settings) -> None:
    """Write what is worth knowing about the settings."""
    for warning in settings.warnings:
        tell(f"warning: {warning}")


def show_json(value: Any) -> None:
    """Write one JSON value on stdout."""
    click.echo(json.dumps(value, ensure_ascii=False, indent=2 if sys.stdout.isatty() else None, default=str))


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a plain table, columns as wide as needed."""
    lines = [list(headers), *[[foreign_text(cell, 200) for cell in row] for row in rows]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headers))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def bill_table(lines: Sequence[BillLine]) -> str:
    """Return a bill line by line, with its sum."""
    from decimal import Decimal

    from runcomfy.domain.money import show_usd

    rows = [
        (line.what, f"{line.seconds.quantize(Decimal('0.1'))} s", f"${line.usd_per_hour}/h", show_usd(line.amount_usd))
        for line in lines
    ]
    amount = sum((line.amount_usd for line in lines), Decimal(0))
    rows.append(("total", "", "", show_usd(amount)))
    return table(("what", "time", "rate", "amount"), rows)
