"""Puts the command together and reports errors without tracebacks."""

from __future__ import annotations

import os
import sys
from importlib.metadata import entry_points, version
from typing import Annotated

import typer
from rich.console import Console

from tally.cli.catalog import catalog
from tally.cli.exit_codes import EPILOG, FAILED
from tally.cli.export import export
from tally.cli.get import get
from tally.cli.historical import historical
from tally.cli.sync import sync
from tally.cli.synth import synth
from tally.cli.terminal import show_what_can_be_shown
from tally.errors import TallyError

DISTRIBUTION = "tally"
PLUGINS = "tally.commands"
"""Entry point group by which other distributions add commands."""

app = typer.Typer(
    name="tally",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog=EPILOG,
)
for _command in (get, historical, export, sync, catalog, synth):
    app.command()(_command)


def _say_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"tally {version(DISTRIBUTION)}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_say_version, is_eager=True, help="Print the version and leave."
        ),
    ] = False,
) -> None:
    """The feature store for card fraud: what did this card's recent history look like at t?"""


def _add_plugins(arguments: list[str]) -> None:
    """Adds the commands of other distributions; only the one that is called, if one is, since
    importing them all takes longer than most of them run."""
    called = arguments[0] if arguments else ""
    points = entry_points(group=PLUGINS)
    chosen = [point for point in points if point.name == called]
    if not chosen and any(command.name == called for command in app.registered_commands):
        return
    for point in chosen or sorted(points, key=lambda p: p.name):
        command = point.load()
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=point.name)
        else:
            app.command(name=point.name)(command)


def _messages(error: BaseException) -> list[str]:
    lines = [str(error) or type(error).__name__]
    if isinstance(error, TallyError):
        lines += [f"  {v.field}: {v.description}" for v in error.violations[1:]]
    return lines


def main() -> None:
    """Runs the command, and exits as tally.cli.exit_codes says."""
    show_what_can_be_shown()
    _add_plugins(sys.argv[1:])
    try:
        app()  # usage errors, exits and Ctrl-C are the framework's
    except Exception as error:
        if os.environ.get("TALLY_DEBUG"):
            raise
        console = Console(stderr=True, highlight=False)
        for line in _messages(error):
            console.print(f"tally: {line}", markup=False, soft_wrap=True)
        sys.exit(FAILED)
