"""Which commands there are, and what each one's line in `tally --help` says.

Nothing here imports a command: a list of commands is shown, and a word is completed, without loading
any. Tests hold each line to the command's own help.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_group

PLUGINS = "tally.commands"
"""Entry points by which other distributions add commands: a name, and a function or a typer.Typer."""
PLUGINS_HELP = "tally.help"
"""Entry points of dictionaries of help lines, by command, in modules that are quickly imported."""

COMMANDS = {
    "get": "Show the features of cards as of an instant.",
    "historical": "Compute features of many points, each exactly as of its instant, for training.",
    "export": "Export everything of a kind, as one snapshot sees it, into Parquet files.",
    "sync": "Write to Redis what Postgres says, beside everything else.",
    "catalog": "List the features that the server knows.",
    "synth": "Write card transactions in Kaggle format, with fraud that each feature family can catch.",
}
"""The client's own commands: each is the function of its name in the module of its name."""


class _Unloaded(TyperCommand):
    """A command in a list: its name and its help line."""


class LazyGroup(TyperGroup):
    """The `tally` command: imports a command when it is called."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The client's commands in the order of a first visit, then the operator's."""
        return [*COMMANDS, *sorted(_plugins().keys() - COMMANDS.keys())]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """A command to be listed; None where there is none."""
        if cmd_name in COMMANDS:
            return _Unloaded(cmd_name, help=COMMANDS[cmd_name])
        if cmd_name not in _plugins():
            return None
        line = _plugins_help().get(cmd_name)
        return load(cmd_name) if line is None else _Unloaded(cmd_name, help=line)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that is called, imported."""
        name, command, rest = super().resolve_command(ctx, args)
        if name is not None and isinstance(command, _Unloaded):
            command = load(name)
        return name, command, rest


def load(name: str) -> Any:
    """Imports a command and makes it one of the framework's.

    Raises:
        KeyError: there is none of this name.
    """
    if name in COMMANDS:
        command: object = getattr(import_module(f"tally.cli.{name}"), name)
    else:
        command = _plugins()[name].load()
    holder = typer.Typer(rich_markup_mode=None, add_completion=False)
    if isinstance(command, typer.Typer):
        holder.add_typer(command, name=name)
    else:
        assert callable(command)
        holder.command(name=name)(command)
    holder.callback()(lambda: None)  # a group, even of one
    return get_group(holder).commands[name]


def _plugins() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=PLUGINS)}


def _plugins_help() -> dict[str, str]:
    lines: dict[str, str] = {}
    for point in entry_points(group=PLUGINS_HELP):
        lines |= point.load()
    return lines
