"""Tables of bases, scores and benchmark results for the terminal. Imports no torch."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tuneavideo.evaluation.metrics import format_score

MAX_COLUMNS = 4
"""Number of edits up to which each has a column; of more, the table shows the best and the worst."""

UNLIMITED = 1000  # columns of a file or a pipe
WIDE = 120  # columns from which the table of bases shows their sources

ARROWS = {"higher": "↑", "lower": "↓"}


def console() -> Console:
    """Return a console on standard output; a file or a pipe does not limit the width of tables."""
    return Console(emoji=False, width=None if sys.stdout.isatty() else UNLIMITED)


def show_models(bases: Sequence[Mapping[str, Any]]) -> None:
    """Print the table of bases; a narrow terminal omits their sources."""
    out, table = console(), Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    wide = out.width >= WIDE
    for name in ("name", "pixels", "frames", "memory", "here"):
        table.add_column(name, no_wrap=True)
    for name in ("model", "source") if wide else ("model",):
        table.add_column(name, overflow="fold")
    for row in bases:
        memory = f"{row['memory_gb']} GB" if row["memory_gb"] else "-"
        size = (str(row["resolution"]), str(row["num_frames"]), memory, "yes" if row["here"] else "no")
        source = "(bundled)" if Path(row["source"]).is_absolute() else row["source"]
        table.add_row(row["name"], *size, row["note"], *([source] if wide else []))
    out.print(table)
    if not wide:
        print("A wider terminal, or --json, shows the source of each.")


def show_scores(file: str, scores: Mapping[str, Any]) -> None:
    """Print scores in the form of `scores.json`: metrics, edits, models, and metrics without a value.

    Args:
        file: Path to print above them.
        scores: Contents of the file.
    """
    out, edits = console(), scores["edits"]
    out.print(f"{file}: {len(edits)} edit{'s' * (len(edits) != 1)}", markup=False, highlight=False, soft_wrap=True)
    single = len(edits) <= MAX_COLUMNS
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
            shown = [format_score(values.get(_number(edit)), 3) for edit in edits]
        else:
            ends = (max, min) if metric["better"] == "higher" else (min, max)
            shown = [cell for end in ends for cell in (_extreme(values, end) if comparable else ("-", ""))]
        shown.append(format_score(mean(values.values()) if comparable else None))
        shown += [format_score(metric["baseline"])] if published else []
        table.add_row(name, metric["unit"], ARROWS[metric["better"]], *shown)
    if scores["metrics"]:
        out.print(table)
    few = [*scores["metrics"]] if not single and len(scores["metrics"]) <= MAX_COLUMNS else []
    out.print(_edits(edits, few))
    for line in [*_measured_with(scores), *_not_measured(scores)]:
        out.print(line, markup=False, highlight=False, soft_wrap=True)


def _edits(edits: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> Table:
    """Build a table of edits, with their scores of a few metrics."""
    table = _columns("edit", "seed")
    for name in metrics:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("prompt")
    for edit in edits:
        values = [
            format_score(edit["scores"][name]["value"] if name in edit["scores"] else None, 3) for name in metrics
        ]
        table.add_row(_number(edit), str(edit["seed"]), *values, Text(" ".join(edit["prompt"].split())))
    return table


def _columns(*names: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in names:
        table.add_column(name, no_wrap=True)
    return table


def _extreme(values: Mapping[str, float], end: Any) -> tuple[str, str]:
    """Return the best or worst value, and its edit or the number of tied edits."""
    value = end(values.values())
    ties = [edit for edit, each in values.items() if each == value]
    return format_score(value, 3), ties[0] if len(ties) == 1 else f"{len(ties)} tie"


def _measured_with(scores: Mapping[str, Any]) -> list[str]:
    """Return lines that name models and masks, with their edits if these differ."""
    found: dict[str, list[str]] = {}
    for name in scores["metrics"]:
        models = _models(scores["edits"], name)
        for model, folders in models.items():
            where = f" ({' '.join(folders)})" if len(models) > 1 else ""
            found.setdefault(model, []).append(name + where)
    return [f"measured with {model}: {', '.join(names)}" for model, names in found.items() if model != "pixels"]


def _models(edits: Sequence[Mapping[str, Any]], metric: str) -> dict[str, list[str]]:
    """Return the edits of each model of a metric; models of one name are labelled with their revisions."""
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
    """Return a line for every reason why metrics have no value, with its edits unless it holds for all."""
    found: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for each in scores["missing"]:
        found.setdefault((each["why"], (*each.get("edits", ()),)), []).append(each["metric"])
    lines = []
    for (why, folders), names in found.items():
        where = f" ({' '.join(map(_number_of, folders))})" if folders else ""
        lines.append(f"not measured: {', '.join(names)}{where}: {why}")
    return lines


def _number(edit: Mapping[str, Any]) -> str:
    return _number_of(edit["folder"])


def _number_of(folder: str) -> str:
    return folder.split("-")[0]


def show_variants(results: Mapping[str, Any]) -> None:
    """Print results of the miniature benchmark: scores with intervals, and differences from the first variant."""
    out, (first, *others) = console(), results["variants"]
    out.print(
        f"{results['part']} clips: {results['clips']}, seeds: {results['seeds']}; 95 % confidence intervals over clips"
    )
    out.print(_by_variant(results["variants"], [first, *others], "scores"))
    if others:
        out.print(f"differences from {first}:", highlight=False)
        out.print(_by_variant(results["variants"], others, "differences"))


_SCORES = {"good": "good", "clean": "clean", "success": "success", "preserved": "preserved", "track": "track, px",
           "flicker_ratio": "flicker / clip's", "subject_ratio": "subject / true", "consistency": "consistency",
           "background_db": "background, dB", "true_psnr": "to true edit, dB"}  # fmt: skip


def _by_variant(variants: Mapping[str, Any], names: list[str], part: str) -> Table:
    table = Table("", *names, box=None)
    for score, title in _SCORES.items():
        table.add_row(title, *(_interval(variants[name][part].get(score)) for name in names))
    return table


def _interval(estimate: Mapping[str, float] | None) -> str:
    return "-" if estimate is None else f"{estimate['mean']:.2f} ({estimate['low']:.2f}…{estimate['high']:.2f})"
