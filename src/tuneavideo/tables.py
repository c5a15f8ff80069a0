"""Scores on the terminal. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Table

WIDE = 4
"""So many edits have a column each; of more only mean, least and most are shown."""

ARROWS = {"higher": "↑", "lower": "↓"}


def show_scores(file: str, scores: Mapping[str, Any]) -> None:
    """Print what `scores.json` holds: a row for every metric, and below it what could not be measured."""
    console, edits = Console(), scores["edits"]
    console.print(f"{file}: {len(edits)} edits", markup=False, highlight=False, soft_wrap=True)
    single = len(edits) <= WIDE
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in ("metric", "unit", ""):
        table.add_column(name, no_wrap=True)
    for name in [edit["folder"][:3] for edit in edits] if single else ["least", "most"]:
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("mean", "published"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, metric in scores["metrics"].items():
        values = [edit["scores"][name]["value"] if name in edit["scores"] else None for edit in edits]
        known = [value for value in values if value is not None]
        shown = values if single else [min(known), max(known)]
        numbers = [*(number(value, 3) for value in shown), number(mean(known)), number(metric["baseline"])]
        table.add_row(name, metric["unit"], ARROWS[metric["better"]], *numbers)
    console.print(table)
    for why, names in _reasons(scores["missing"]).items():
        console.print(f"not measured: {', '.join(names)}: {why}", markup=False, highlight=False, soft_wrap=True)


def show_variants(results: Mapping[str, Any]) -> None:
    """Print the miniature benchmark's results: scores with their spread, and differences from the first variant."""
    console, (first, *others) = Console(), results["variants"]
    console.print(f"{results['part']} clips: {results['clips']}, seeds: {results['seeds']}; 95 % limits over clips")
    console.print(_by_variant(results["variants"], [first, *others], "scores"))
    if others:
        console.print(f"less {first}:", highlight=False)
        console.print(_by_variant(results["variants"], others, "differences"))


_SCORES = {"clean": "clean", "success": "success", "preserved": "preserved", "track": "track, px",
           "consistency": "consistency", "background_db": "background, dB"}  # fmt: skip


def _by_variant(told: Mapping[str, Any], names: list[str], part: str) -> Table:
    table = Table("", *names, box=None)
    for score, title in _SCORES.items():
        table.add_row(title, *(_spread(told[name][part].get(score)) for name in names))
    return table


def _spread(told: Mapping[str, float] | None) -> str:
    return "-" if told is None else f"{told['mean']:.2f} ({told['low']:.2f}…{told['high']:.2f})"


def number(value: float | None, digits: int = 4) -> str:
    """So many digits that count, and a dash for what is not there."""
    return "-" if value is None else f"{value:#.{digits}g}"


def _reasons(missing: list[dict[str, str]]) -> dict[str, list[str]]:
    """Metrics that are missing, by reason."""
    found: dict[str, list[str]] = {}
    for each in missing:
        found.setdefault(each["why"], []).append(each["metric"])
    return found
