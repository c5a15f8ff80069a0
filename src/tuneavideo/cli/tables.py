"""Tables on the terminal. No torch here."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

WIDE = 4
"""So many edits have a column each; of more, the table shows the best and the worst, and which they are."""

UNLIMITED = 1000
WIDE_TABLE = 120

ARROWS = {"higher": "↑", "lower": "↓"}


def console() -> Console:
    """Standard output; tables are as wide as they need when it is a file or a pipe, which have no edge."""
    return Console(emoji=False, width=None if sys.stdout.isatty() else UNLIMITED)


def show_models(known: Sequence[Mapping[str, Any]]) -> None:
    """Print the table of bases; a narrow terminal shows all but where they are opened from."""
    out, table = console(), Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    wide = out.width >= WIDE_TABLE
    for name in ("name", "pixels", "frames", "memory", "here"):
        table.add_column(name, no_wrap=True)
    for name in ("model", "opened from") if wide else ("model",):
        table.add_column(name, overflow="fold")
    for row in known:
        memory = f"{row['memory_gb']} GB" if row["memory_gb"] else "-"
        size = (str(row["resolution"]), str(row["num_frames"]), memory, "yes" if row["here"] else "no")
        source = "(bundled)" if Path(row["source"]).is_absolute() else row["source"]
        table.add_row(row["name"], *size, row["note"], *([source] if wide else []))
    out.print(table)
    if not wide:
        print("A wider terminal, or --json, shows where each is opened from.")


def show_scores(file: str, scores: Mapping[str, Any]) -> None:
    """Print scores in the form of `scores.json`: a row for every metric, the edits, the models, and what is missing."""
    out, edits = console(), scores["edits"]
    out.print(f"{file}: {_count(len(edits), 'edit')}", markup=False, highlight=False, soft_wrap=True)
    single = len(edits) <= WIDE
    table = _columns("metric", "unit", "")
    for name in [*map(_number, edits)] if single else ["best", "edit", "worst", "edit"]:
        table.add_column(name, justify="left" if name == "edit" else "right", no_wrap=True)
    published = any(metric["baseline"] is not None for metric in scores["metrics"].values())
    for name in ("mean", "published") if published else ("mean",):
        table.add_column(name, justify="right", no_wrap=True)
    for name, metric in scores["metrics"].items():
        values = {_number(edit): edit["scores"][name]["value"] for edit in edits if name in edit["scores"]}
        comparable = len(_models(edits, name)) == 1
        if single:
            shown = [number(values.get(_number(edit)), 3) for edit in edits]
        else:
            ends = (max, min) if metric["better"] == "higher" else (min, max)
            shown = [cell for end in ends for cell in (_extreme(values, end) if comparable else ("-", ""))]
        shown.append(number(mean(values.values()) if comparable else None))
        shown += [number(metric["baseline"])] if published else []
        table.add_row(name, metric["unit"], ARROWS[metric["better"]], *shown)
    if scores["metrics"]:
        out.print(table)
    few = [*scores["metrics"]] if not single and len(scores["metrics"]) <= WIDE else []
    out.print(_edits(edits, few))
    for line in [*_measured_with(scores), *_not_measured(scores)]:
        out.print(line, markup=False, highlight=False, soft_wrap=True)


def _edits(edits: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> Table:
    """A row for every edit, with its scores of a few metrics."""
    table = _columns("edit", "seed")
    for name in metrics:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("prompt")
    for edit in edits:
        values = [number(edit["scores"][name]["value"] if name in edit["scores"] else None, 3) for name in metrics]
        table.add_row(_number(edit), str(edit["seed"]), *values, Text(" ".join(edit["prompt"].split())))
    return table


def _columns(*names: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in names:
        table.add_column(name, no_wrap=True)
    return table


def _extreme(values: Mapping[str, float], end: Any) -> tuple[str, str]:
    """The best or worst value, and which edit or how many edits have it."""
    value = end(values.values())
    found = [edit for edit, each in values.items() if each == value]
    return number(value, 3), found[0] if len(found) == 1 else f"{len(found)} tie"


def _measured_with(scores: Mapping[str, Any]) -> list[str]:
    """The models and masks that scores were measured with, and the edits where it is not the same for all."""
    found: dict[str, list[str]] = {}
    for name in scores["metrics"]:
        models = _models(scores["edits"], name)
        for model, folders in models.items():
            where = f" ({' '.join(folders)})" if len(models) > 1 else ""
            found.setdefault(model, []).append(name + where)
    return [f"measured with {model}: {', '.join(names)}" for model, names in found.items() if model != "pixels"]


def _models(edits: Sequence[Mapping[str, Any]], metric: str) -> dict[str, list[str]]:
    """The models that a metric was measured with, with the start of the revision where one name has several."""
    found: dict[tuple[str, str], list[str]] = {}
    for edit in edits:
        if score := edit["scores"].get(metric):
            found.setdefault((score["model"], score["revision"] or ""), []).append(_number(edit))
    names = [model for model, _ in found]
    return {
        f"{model} {revision[:8]}" if names.count(model) > 1 else model: folders
        for (model, revision), folders in found.items()
    }


def _not_measured(scores: Mapping[str, Any]) -> list[str]:
    """What has no value, by reason, and the edits it is true of if it is not all."""
    found: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for each in scores["missing"]:
        found.setdefault((each["why"], (*each.get("edits", ()),)), []).append(each["metric"])
    lines = []
    for (why, folders), names in found.items():
        where = f" ({' '.join(map(_first, folders))})" if folders else ""
        lines.append(f"not measured: {', '.join(names)}{where}: {why}")
    return lines


def _number(edit: Mapping[str, Any]) -> str:
    return _first(edit["folder"])


def _first(folder: str) -> str:
    """The number that the name of an edit's folder begins with."""
    return folder.split("-")[0]


def _count(number: int, name: str) -> str:
    return f"{number} {name}{'' if number == 1 else 's'}"


def show_variants(results: Mapping[str, Any]) -> None:
    """Print the miniature benchmark's results: scores with their spread, and differences from the first variant."""
    out, (first, *others) = console(), results["variants"]
    out.print(f"{results['part']} clips: {results['clips']}, seeds: {results['seeds']}; 95 % limits over clips")
    out.print(_by_variant(results["variants"], [first, *others], "scores"))
    if others:
        out.print(f"differences from {first}:", highlight=False)
        out.print(_by_variant(results["variants"], others, "differences"))


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
