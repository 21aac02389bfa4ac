"""The `tally` command. Client commands are here; the store's distribution adds the operator's."""

from tally.cli.app import main

__all__ = ["main"]
