"""Puts the command together and reports errors without tracebacks."""

from __future__ import annotations

import os
import sys
from importlib.metadata import version
from typing import Annotated

import typer

from tally.cli.commands import LazyGroup
from tally.cli.exit_codes import EPILOG, FAILED
from tally.cli.terminal import show_what_can_be_shown

DISTRIBUTION = "tally"

app = typer.Typer(
    name="tally",
    cls=LazyGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog=EPILOG,
)


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


def _messages(error: BaseException) -> list[str]:
    from tally.errors import TallyError

    lines = [str(error) or type(error).__name__]
    if isinstance(error, TallyError):
        lines += [f"  {v.field}: {v.description}" for v in error.violations[1:]]
    return lines


def main() -> None:
    """Runs the command, and exits as tally.cli.exit_codes says."""
    show_what_can_be_shown()
    try:
        app()  # usage errors, exits and Ctrl-C are the framework's
    except Exception as error:
        if os.environ.get("TALLY_DEBUG"):
            raise
        from rich.console import Console

        console = Console(stderr=True, highlight=False)
        for line in _messages(error):
            console.print(f"tally: {line}", markup=False, soft_wrap=True)
        sys.exit(FAILED)
