"""Summary of the miniature benchmark: scores of every variant and differences from the first."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tuneavideo.evaluation.compare import difference, estimate
from tuneavideo.evaluation.miniature import CONTROL, Variant, benchmark, count, edits_of
from tuneavideo.progress import Events, Progress
from tuneavideo.storage import atomic

SCORES = (
    "good", "clean", "success", "preserved", "track", "flicker_ratio", "subject_ratio", "consistency", "background_db",
    "true_psnr",
)  # fmt: skip


def run_benchmark(
    names: Sequence[str], out: Path, *, seeds: int = 1, part: str = "development", quick: bool = False, processes: int
) -> Events:
    """Run the miniature benchmark and write `rows.jsonl` and `results.json`.

    Args:
        names: Presets, or `untuned`; differences are from the first.
        out: Folder to write.
        seeds: Number of seeds.
        part: `development`, `report`, `harder` or `harder-report` clips.
        quick: Only 4 clips.
        processes: Number of clips computed at a time.

    Raises:
        DiskError: The folder has a file of another program, or cannot be written.
        MemoryShort: A worker process was killed.
    """
    variants = [variant_of(name) for name in names]
    atomic.refuse_foreign(out / "results.json", '"format": 1')
    atomic.refuse_foreign(out / "rows.jsonl", '"key": ')
    out.mkdir(parents=True, exist_ok=True)
    rows, clips = list[dict[str, Any]](), 4 if quick else None
    total = count(variants, range(seeds), part, clips)
    yield Progress("benchmark", 0, total, about=f"{processes} at a time")
    for row in benchmark(variants, out / "rows.jsonl", seeds=range(seeds), part=part, clips=clips, processes=processes):
        if row:
            rows.append(row)
            yield Progress("benchmark", len(rows), total, about=f"{row['variant']} {row['clip']} {row['seed']}")
        else:
            yield Progress("")
    about = {"format": 1, "part": part, "seeds": seeds, "clips": len({row["clip"] for row in rows})}
    atomic.write(out / "results.json", json.dumps(about | {"variants": summary(rows, names)}, indent=1))
    yield Progress("results", path=out / "results.json")


def variant_of(name: str) -> Variant:
    """Return the variant of a preset, or the untuned control."""
    if name == CONTROL.name:
        return CONTROL
    return Variant(name, {} if name == "default" else {"preset": name})


def summary(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """Return each variant's `scores` and `differences` from the first: `mean`, `low`, `high` (95 % interval)."""
    edits = {name: edits_of([row for row in rows if row["variant"] == name]) for name in names}
    return {
        name: {
            "edits": len(edits[name]),
            "scores": {score: asdict(estimate(edits[name], score)) for score in SCORES if _has(edits[name], score)},
            "differences": {
                score: asdict(difference(edits[name], edits[names[0]], score))
                for score in SCORES
                if name != names[0] and _has(edits[name], score) and _has(edits[names[0]], score)
            },
        }
        for name in names
    }


def _has(edits: Sequence[dict[str, Any]], score: str) -> bool:
    return any(edit.get(score) is not None for edit in edits)
