"""Collects figures, prints them as a table and writes them to build/bench.json."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

OUTPUT = Path("build/bench.json")


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured figure."""

    name: str
    value: float
    unit: str
    goal: str
    """What it should be, such as ">= 0.7"; empty for a figure that is only told."""

    @property
    def holds(self) -> bool | None:
        """Whether the goal is met; None without one."""
        if not self.goal:
            return None
        relation, bound = self.goal.split()
        number = float(bound.replace(",", ""))
        return self.value >= number if relation == ">=" else self.value <= number


class Report:
    """Figures in the order they were measured."""

    def __init__(self) -> None:
        self.figures: list[Figure] = []
        self._console = Console(stderr=True)

    def add(self, name: str, value: float, unit: str, goal: str = "") -> None:
        """Adds a figure, and says it at once."""
        figure = Figure(name, value, unit, goal)
        self.figures.append(figure)
        self._console.print(f"  {name}: {value:,.3g} {unit}", highlight=False)

    def section(self, title: str) -> None:
        """Says what is measured next."""
        self._console.print(f"[bold]{title}[/bold]")

    def finish(self) -> None:
        """Prints the table and writes the file."""
        table = Table("figure", "value", "unit", "goal", "holds", title="Bench")
        marks = {True: "yes", False: "NO", None: ""}
        for figure in self.figures:
            value = f"{figure.value:,.3g}" if figure.value < 1000 else f"{figure.value:,.0f}"
            table.add_row(figure.name, value, figure.unit, figure.goal, marks[figure.holds])
        Console(width=120).print(table)
        OUTPUT.parent.mkdir(exist_ok=True)
        content = [asdict(figure) | {"holds": figure.holds} for figure in self.figures]
        OUTPUT.write_text(json.dumps(content, indent=1) + "\n")
