"""`comfyctl config`: every setting with its value and where it came from, secrets hidden."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from runcomfy.adapters.agent_config import default_queue_values, describe_queue_settings, load_queue_settings
from runcomfy.adapters.agent_variables import CONFIG_VARIABLE, DATABASE_URL_VARIABLE, ENVIRONMENT_VARIABLE
from runcomfy.adapters.agent_variables import VARIABLES as QUEUE_VARIABLES
from runcomfy.adapters.config import SettingRow, default_settings, describe_settings, load_settings
from runcomfy.adapters.credentials import FILE_KEYS
from runcomfy.adapters.variables import BY_NAME
from runcomfy.domain.exceptions import foreign_text


@click.group()
def config() -> None:
    """Settings, and where each came from."""


@config.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def show(as_json: bool) -> None:
    """Print every setting with its value, unit and source. Secrets are stars."""
    settings = load_settings()
    queue = load_queue_settings(settings=settings)
    rows = [*describe_settings(settings), *describe_queue_settings(queue)]
    warnings = [*settings.warnings, *queue.warnings]
    if as_json:
        shown = [{"name": r.name, "value": r.value_shown, **_without(asdict(r), "name", "value_shown")} for r in rows]
        document = {
            "settings": shown,
            "credentials_file": settings.credentials_file,
            "rates_as_of": settings.rates.as_of.isoformat(),
            "queue_config_file": queue.config_file,
            "warnings": warnings,
        }
        click.echo(json.dumps(document, indent=2))
        return
    for line in _table(rows):
        click.echo(line)
    for warning in warnings:
        click.echo(f"warning: {warning}", err=True)


@config.command(hidden=True)
def reference() -> None:
    """Print docs/reference/settings.md."""
    click.echo(reference_page(), nl=False)


def _without(document: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in document.items() if name not in names}


def _table(rows: list[SettingRow]) -> list[str]:
    cells = [(r.name, foreign_text(r.value_shown, 60) or "(not set)", r.unit, r.source) for r in rows]
    widths = [max(len(cell[column]) for cell in cells) for column in range(3)]
    lines = []
    for name, value, unit, source in cells:
        lines.append(f"{name:{widths[0]}}  {value:{widths[1]}}  {unit:{widths[2]}}  {source}".rstrip())
    return lines


def reference_page() -> str:
    """Return the page that documents every setting; `comfyctl config reference` writes it."""
    rows = describe_settings(default_settings(state_dir="a checkout's state/, else the user's data folder"))
    return _INTRODUCTION + "".join(_section(row) for row in rows) + _queue_part()


def _queue_part() -> str:
    defaults = default_queue_values()
    lines = [_QUEUE_INTRODUCTION]
    for variable in QUEUE_VARIABLES:
        keys = " or ".join(f"`{key}`" for key in variable.keys)
        default = f"`{defaults[variable.name]}`" if defaults[variable.name] else "none, or it depends on the folder"
        lines.append(f"\n### {variable.name}\n")
        lines.append(f"{variable.help}\n")
        lines.append(f"- Value: {variable.sort.unit} ({variable.sort.hint})")
        lines.append(f"- Default: {default}")
        lines.append(f"- In the configuration file: {keys}")
    return "\n".join(lines) + "\n"


_INTRODUCTION = """# Settings

<!-- Written by `comfyctl config reference > docs/reference/settings.md`; a test keeps it current. -->

Every setting is an environment variable. The environment wins over the credentials file, the file over the default;
`comfyctl config show` prints what holds and where it came from. A variable that is empty counts as not set.

The credentials file is the first of these that exists: what `RUNCOMFY_CREDENTIALS_FILE` names; `./credentials.txt`;
`runcomfy/credentials.txt`, below the working directory, then beside the package in a checkout; `credentials.txt` in the
user's configuration folder. It holds one `key:value` per line (`credentials.example.txt` is one to fill in). Beside the
keys named below it may hold any other variable, except paths: those come from the environment only. An address of the
API that stands in a file below the working directory is used only with tokens from that same file.

A duration is a number of seconds (`90`, `1.5`) or numbers with units (`90s`, `10m`, `1h30m`, `2d`).
"""

_QUEUE_INTRODUCTION = f"""
## The queue

The environment wins over the project's configuration file, that over the default. The project's folder is the working
directory if it has `comfyui_agent/config/global_config.yaml`, `config/global_config.yaml` or `jobs/processing`; what
`{CONFIG_VARIABLE}` or `--config` names wins over both, and `{ENVIRONMENT_VARIABLE}` (`alpha`, `prod`) chooses
`global_alpha.yaml` or `global_prod.yaml` in their place. Elsewhere the database is `runcomfy.sqlite3` in the state
folder. Relative paths in the file begin at the project's folder; `${{NAME}}` and `${{NAME:-otherwise}}` in it stand
for variables. `{DATABASE_URL_VARIABLE}` (`postgresql://…`) puts the queue, unless it has a database of its own, and the
books of rented machines on a PostgreSQL.
"""


def _section(row: SettingRow) -> str:
    lines = [f"\n## {row.name}\n", f"{row.help}\n"]
    lines.append(f"- Value: {row.unit} ({BY_NAME[row.name].kind.hint})")
    lines.append(f"- Default: {f'`{row.value_shown}`' if row.value_shown else 'none'}")
    if row.name in FILE_KEYS:
        lines.append(f"- In the credentials file: `{FILE_KEYS[row.name]}`")
    return "\n".join(lines) + "\n"
