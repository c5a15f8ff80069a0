"""Contents of a run's `scores.json`: merging new scores with earlier ones, and selecting some of them."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any, NamedTuple

from tuneavideo.evaluation.metrics.table import METRICS
from tuneavideo.storage.run_folder import RunFolder

FORMAT = 1


class Missing(NamedTuple):
    """A metric without a value: the reason, and the folder name of the edit."""

    metric: str
    why: str
    folder: str


def merge(
    run: RunFolder, names: Container[str], scored: Sequence[dict[str, Any]], missing: Sequence[Missing]
) -> dict[str, Any]:
    """Merge new scores with those in the run's file, without edits that were removed or changed since.

    Args:
        run: The run folder.
        names: Metrics that were computed.
        scored: New `edits` of the file; a score that is None removes an earlier one.
        missing: Metrics without a value, and why.

    Returns:
        The contents of `scores.json`; docs/evaluation.md has the format.
    """
    earlier = _earlier(run)
    edits = {edit["folder"]: edit for edit in earlier["edits"]}
    folders = {edit["folder"] for edit in scored}
    kept = [each for each in _missing(earlier) if each.metric not in names or each.folder not in folders]
    for edit in scored:
        old = edits.get(edit["folder"], {"scores": {}})["scores"]
        new = {name: score for name, score in {**old, **edit["scores"]}.items() if score}
        edits[edit["folder"]] = edit | {"scores": new}
    ordered = [edits[edit.name] for edit in run.whole_edits() if edit.name in edits]
    return _contents(ordered, [e for e in [*kept, *missing] if e.metric not in edits[e.folder]["scores"]])


def select(scores: dict[str, Any], names: Container[str], folders: Container[str]) -> dict[str, Any]:
    """Return the part of `scores.json` for some metrics and edits, in the same form."""
    edits = [edit for edit in scores["edits"] if edit["folder"] in folders]
    edits = [edit | {"scores": {k: v for k, v in edit["scores"].items() if k in names}} for edit in edits]
    return _contents(edits, [each for each in _missing(scores) if each.metric in names and each.folder in folders])


def _contents(edits: list[dict[str, Any]], missing: Sequence[Missing]) -> dict[str, Any]:
    """Assemble the file; a reason lists its edits unless it holds for all."""
    every, reasons = [edit["folder"] for edit in edits], dict[tuple[str, str], set[str]]()
    for name, why, folder in missing:
        reasons.setdefault((name, why), set()).add(folder)
    return {
        "format": FORMAT,
        "metrics": {name: _description(name) for name in METRICS if any(name in edit["scores"] for edit in edits)},
        "edits": edits,
        "missing": [
            {"metric": name, "why": why}
            | ({} if found == {*every} else {"edits": [folder for folder in every if folder in found]})
            for (name, why), found in reasons.items()
        ],
    }


def _missing(scores: dict[str, Any]) -> list[Missing]:
    """Return the file's `missing`, one entry per edit."""
    every = [edit["folder"] for edit in scores["edits"]]
    return [
        Missing(each["metric"], each["why"], folder)
        for each in scores["missing"]
        for folder in each.get("edits", every)
        if folder in every
    ]


def _earlier(run: RunFolder) -> dict[str, Any]:
    """Read the file, without edits that are gone or were made since."""
    earlier = run.read_scores() or {"edits": [], "missing": []}
    current = {edit.name for edit in run.whole_edits() if earlier["edits"] and not run.is_newer(edit)}
    return earlier | {"edits": [edit for edit in earlier["edits"] if edit["folder"] in current]}


def _description(name: str) -> dict[str, Any]:
    metric = METRICS[name]
    baseline, source = metric.baseline or (None, None)
    return {
        "unit": metric.unit, "better": metric.better, "about": metric.about,
        "baseline": baseline, "baseline_source": source,
    }  # fmt: skip
