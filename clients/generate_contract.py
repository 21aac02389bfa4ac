"""Build hook: makes the contract's Python code where `make gen` has not made it yet."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class GenerateContract(BuildHookInterface):  # type: ignore[type-arg]
    """Runs protos/generate.py when the package lacks its generated code."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before it collects files."""
        here = Path(self.root)
        if not (here / "src" / "tally" / "v1" / "__init__.py").exists():
            runpy.run_path(str(here.parent / "protos" / "generate.py"), run_name="__main__")
