"""The table of a machine's states, and the list of commands, are written by the code they describe."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import click

from runcomfy.cli.dev_server import script
from runcomfy.cli.e3 import e3
from runcomfy.cli.main import comfyctl
from runcomfy.domain.machine import NEXT, OPEN, MachineEvent, MachineState

EVENTS = {
    MachineEvent.LISTED: "the provider answered, or lists it",
    MachineEvent.ANSWERED: "the provider says Ready",
    MachineEvent.SILENT: "nothing can be learnt of it",
    MachineEvent.STOP_ASKED: "somebody wants it stopped",
    MachineEvent.GONE: "status and two full lists agree that it is gone",
    MachineEvent.REFUSED: "the provider refused the launch",
    MachineEvent.ABSENT: "nothing appeared within the visibility window",
}
PLATFORM_DEFAULTS = {"form"}
"""Options whose default depends on the computer: it does not belong in a page."""

KeepCurrent = Callable[..., None]


def states_table() -> str:
    lines = ["| state | event | then | may exist at the provider |", "|---|---|---|---|"]
    for state in MachineState:
        exists = "yes" if state in OPEN else "no"
        for event in MachineEvent:
            if (after := NEXT.get((state, event))) is not None:
                stays = " (stays)" if after is state else ""
                lines.append(f"| {state} | {event} | {after}{stays} | {exists} |")
    lines += ["", "| event | means |", "|---|---|"]
    lines += [f"| {event} | {words} |" for event, words in EVENTS.items()]
    return "\n".join(lines)


def test_every_event_is_explained() -> None:
    assert set(EVENTS) == set(MachineEvent)


def test_the_table_of_states_is_current(keep_current: KeepCurrent) -> None:
    keep_current("design/machines-and-money.md", states_table(), part="states")


# -- commands ------------------------------------------------------------------------------------------------


def commands(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[str, click.Command]]:
    """Every command below `group`, with its words; a command with two names comes under the first only."""
    context = click.Context(group)
    seen: set[int] = set()
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if command.hidden or id(command) in seen:
            continue
        seen.add(id(command))
        yield " ".join((*path, name)), command
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))


def aliases(group: click.Group) -> Iterator[tuple[str, str]]:
    context = click.Context(group)
    first: dict[int, str] = {}
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if (other := first.setdefault(id(command), name)) != name:
            yield other, name


def written(option: click.Option) -> str:
    names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    if option.is_flag:
        return names
    shown = option.metavar
    if shown is None and isinstance(option.type, click.Choice):
        shown = "\\|".join(option.type.choices)
    return f"{names} {shown or option.type.name.upper().removesuffix(' RANGE')}"


def section(path: str, command: click.Command, *, depth: str = "##") -> list[str]:
    arguments = [p.human_readable_name.upper() for p in command.params if isinstance(p, click.Argument)]
    usage = " ".join([path, *(f"`{argument}`" for argument in arguments)]).replace("`", "")
    lines = [f"{depth} `{usage}`", "", *paragraphs(command.help or "")]
    options = [p for p in command.params if isinstance(p, click.Option) and not p.hidden]
    if options:
        lines += ["| option | means |", "|---|---|"]
        for option in options:
            default = ""
            if option.show_default and option.name not in PLATFORM_DEFAULTS:
                default = f" Default: {option.default}."
            many = " May be given several times." if option.multiple else ""
            means = (option.help or "").replace("|", "\\|")
            lines.append(f"| {written(option)} | {means}{default}{many} |")
        lines.append("")
    return lines


def paragraphs(text: str) -> list[str]:
    lines: list[str] = []
    for paragraph in text.strip().split("\n\n"):
        lines += [" ".join(paragraph.split()), ""]
    return lines


def commands_page() -> str:
    lines = [
        "# Commands",
        "",
        "Generated from the help texts in `runcomfy/cli/`; `comfyctl COMMAND --help` prints the same.",
        "",
        "## `comfyctl`",
        "",
        *paragraphs(comfyctl.help or ""),
    ]
    for path, command in commands(comfyctl):
        if isinstance(command, click.Group):
            lines += [f"## `comfyctl {path}`", "", *paragraphs(command.help or "")]
            for name, other in aliases(command):
                lines += [f"`comfyctl {path} {other}` is another name of `comfyctl {path} {name}`.", ""]
        else:
            lines += section(f"comfyctl {path}", command, depth="###" if " " in path else "##")
    lines += section("python runcomfy/dev_server_startup.py", script)
    lines += ["## `e3`", "", *paragraphs(e3.help or ""), "| command | is |", "|---|---|"]
    lines += [f"| {' or '.join(f'`{name}`' for name in names)} | `{other}` |" for other, *names in others()]
    lines.append("")
    return "\n".join(lines)


def others() -> Iterator[tuple[str, ...]]:
    """Every command of `comfyctl` that `e3` and `python -m` have, too, with their names for it."""
    homes = {id(command): f"comfyctl {path}" for path, command in commands(comfyctl)}
    doors = {"start": "run", "monitor": "monitor", "run": "execute"}
    yield "e3", "python -m comfyui_agent"
    context = click.Context(e3)
    for name in e3.list_commands(context):
        command = e3.get_command(context, name)
        module = [f"python -m comfyui_agent.{doors[name]}"] if name in doors else []
        yield homes[id(command)], f"e3 {name}", *module


def test_every_command_and_option_says_what_it_does() -> None:
    for path, command in [*commands(comfyctl), ("dev_server_startup.py", script)]:
        assert command.help, path
        for parameter in command.params:
            if isinstance(parameter, click.Option) and not parameter.hidden:
                assert parameter.help, f"{path} {parameter.opts}"


def test_the_list_of_commands_is_current(keep_current: KeepCurrent) -> None:
    keep_current("reference/commands.md", commands_page())
