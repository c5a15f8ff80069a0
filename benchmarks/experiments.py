"""Experiments on the miniature benchmark: variants, the ledger of their rows, and the page made from it.

    python -m benchmarks.experiments untuned default official --part report --seeds 3
    python -m benchmarks.experiments --page

The ledger, benchmarks/results/miniature.jsonl, has a line for every clip, variant and seed; what it has is not run
again, so this can be stopped at any time. The page is docs/quality.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.ideas import ANCHOR, BEFORE, COMBINATIONS, IDEAS, OFFICIAL, RANKS, REPORTED, STEADY, SWEEP
from tuneavideo import miniature
from tuneavideo.evaluation.compare import Estimate, difference, estimate
from tuneavideo.evaluation.miniature import CONTROL, PARTS, VERSION, Variant, benchmark, edits_of, read_rows
from tuneavideo.evaluation.steadiness import MAX_FLICKER, MAX_SUBJECT, MIN_SHOWN

LEDGER = Path(__file__).parent / "results" / "miniature.jsonl"
FIRST = LEDGER.with_name("miniature-first.jsonl")
"""Rows of the first bundled miniature, whose pictures are less sharp."""
PAGE = Path(__file__).parent.parent / "docs" / "quality.md"
TEMPLATE = Path(__file__).with_name("quality.md")
VARIANTS = {
    variant.name: variant
    for variant in (
        CONTROL,
        Variant("default"),
        Variant("official", OFFICIAL),
        Variant("official, not tuned", OFFICIAL, tuned=False),
        Variant("default, kept", {"keep": True}),
        Variant("default, masked", masked=True),
        Variant("untuned, not consistent", BEFORE, tuned=False),
        Variant("anchor", ANCHOR),
        *(Variant(name, settings) for name, settings in SWEEP.items()),
        *(Variant(name, ANCHOR | idea.change) for name, idea in IDEAS.items()),
        *(Variant(name, settings) for name, settings in (COMBINATIONS | RANKS | STEADY).items()),
    )
}
RANKS_OF_SD = {"rank 4": "1.3 MB", "rank 16": "4.8 MB", "rank 64": "19.2 MB"}
SCORES = (
    "good", "clean", "success", "shown", "preserved", "track", "flicker_ratio", "subject_ratio", "consistency",
    "background_db", "true_psnr", "true_motion_psnr", "true_features",
)  # fmt: skip
STEADINESS = (*REPORTED, "default, kept", "default, masked", *STEADY, "untuned, not consistent")
KINDS = ("subject", "background", "style", "two")
Rows = Sequence[Mapping[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", metavar="VARIANT", help="; ".join(VARIANTS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--part", default="development", choices=PARTS)
    parser.add_argument("--clips", type=int)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--page", action="store_true", help="write docs/quality.md from the ledger")
    chosen = parser.parse_args()
    if unknown := set(chosen.variants) - VARIANTS.keys():
        parser.error(f"no such variant: {', '.join(sorted(unknown))}; there are {'; '.join(VARIANTS)}")
    rows = []
    for row in benchmark(
        [VARIANTS[name] for name in chosen.variants], LEDGER, seeds=range(chosen.seeds), part=chosen.part,
        clips=chosen.clips, processes=chosen.processes,
    ):  # fmt: skip
        if row:
            rows.append(row)
            print(row["variant"], row["clip"], row["seed"], [edit["good"] for edit in row["edits"]], flush=True)
    for name in chosen.variants:
        _print(name, edits_of(_of(rows, name)))
    if chosen.page:
        PAGE.write_text(page(read_rows(LEDGER), read_rows(FIRST)), encoding="utf-8")


def page(rows: Rows, first: Rows) -> str:
    """Format the experiments as Markdown, with all numbers from the ledgers of the miniature and of the first one."""
    development, report = (_part(rows, part) for part in ("development", "report"))
    first_development, first_report = (_part(first, part) for part in ("development", "report"))
    ideas = {name: f"{idea.expected} | {idea.decision}" for name, idea in IDEAS.items()}
    return TEMPLATE.read_text(encoding="utf-8").format(
        sweep=_table(first_development, list(SWEEP)),
        ideas=_compared(first_development, ideas, "anchor"),
        combinations=_table(first_development, list(COMBINATIONS)),
        ranks=_compared(first_development, RANKS_OF_SD, "default, not consistent", "adapter of SD 1.5"),
        ranks_reported=_compared(first_report, RANKS_OF_SD, "default, not consistent", "adapter of SD 1.5"),
        first_reported=_steadiness(first_report, STEADINESS),
        steadiness=_steadiness(development, STEADINESS),
        steadiness_reported=_steadiness(report, STEADINESS),
        harder=_by_challenge(_part(rows, "harder"), STEADINESS),
        reported=_table(report, STEADINESS),
        by_kind=_by_kind(report, STEADINESS),
        differences="\n".join(_difference(report, name) for name in STEADINESS if name != "official"),
    )


def _part(rows: Rows, part: str) -> Rows:
    return [row for row in rows if row["set"] == part]


def _table(rows: Rows, names: Sequence[str]) -> str:
    columns = (
        "variant",
        "clean",
        "prompt shown",
        "preserved",
        "track error, px",
        "within 4 px",
        "TFLOP per clip",
        "clip-runs",
    )
    lines = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    for name in names:
        own = _of(rows, name)
        if own:
            edits = edits_of(own)
            near = np.mean([edit["track"] <= 4 for edit in edits])
            clean, shown, kept = (_percent(estimate(edits, score)) for score in ("clean", "success", "preserved"))
            off = estimate(edits, "track").mean
            lines.append(
                f"| {name} | {clean} | {shown} | {kept} | {off:.1f} | {near:.0%} | {_work(own):.2f} | {len(own)} |"
            )
    return "\n".join(lines)


def _steadiness(rows: Rows, names: Sequence[str]) -> str:
    """Format the scores of version 3, of the rows that have them."""
    limits = {"shown": (MIN_SHOWN, 1.0), "flicker_ratio": (0.0, MAX_FLICKER), "subject_ratio": (0.0, MAX_SUBJECT)}
    means = ("flicker", "flicker_ratio", "subject_change", "subject_ratio", "true_psnr", "true_motion_psnr")
    columns = ("variant", "good", "clean", "shown", "background rests", "subject keeps", "flicker", "relative",
               "change of subject", "relative", "dB to true edit", "of differences", "clip-runs")  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    for name in names:
        own = [row for row in _of(rows, name) if row.get("version") == VERSION]
        if own:
            edits = edits_of(own)
            good = _percent(estimate(edits, "good"))
            within = (
                f"{np.mean([low <= edit[score] <= high for edit in edits if edit[score] is not None]):.0%}"
                for score, (low, high) in {"clean": (1, 1), **limits}.items()
            )
            cells = (name, good, *within, *(f"{estimate(edits, score).mean:.1f}" for score in means), str(len(own)))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _by_challenge(rows: Rows, names: Sequence[str]) -> str:
    """Format fractions of good and of clean edits of the harder clips, by what makes them hard."""
    challenges: dict[str, list[str]] = {}
    for clip in miniature.clips(harder=True):
        challenges.setdefault(clip["challenge"], []).append(clip["name"])
    lines = [f"| good / clean edits | {' | '.join(challenges)} |", "| --- " * (len(challenges) + 1) + "|"]
    for name in names:
        edits = edits_of(_of(rows, name))
        own = [[edit for edit in edits if edit["clip"] in clips] for clips in challenges.values()]
        cells = [" / ".join(f"{np.mean([e[s] for e in each]):.0%}" for s in ("good", "clean") if each) for each in own]
        lines += [f"| {name} | {' | '.join(cells)} |"] if edits else []
    return "\n".join(lines) if len(lines) > 2 else "Not run yet."


def _compared(rows: Rows, about: Mapping[str, str], anchor: str, more: str = "hypothesis | decision") -> str:
    """Format the differences of variants from the anchor, on the clips and seeds that both have."""
    lines = [f"| change | clean edits, difference | track error, difference, px | work | {more} |"]
    lines.append("| --- " * lines[0].count(" |") + "|")
    base = _of(rows, anchor)
    for name, words in about.items():
        own = _of(rows, name)
        if own:
            had = {(row["clip"], row["seed"]) for row in own}
            theirs = [row for row in base if (row["clip"], row["seed"]) in had]
            clean, track = (difference(edits_of(own), edits_of(theirs), score) for score in ("clean", "track"))
            work = _work(own) / _work(theirs)
            lines.append(
                f"| {name} | {100 * clean.mean:+.0f} % ({100 * clean.low:+.0f} to {100 * clean.high:+.0f}) | "
                f"{track.mean:+.1f} ({track.low:+.1f} to {track.high:+.1f}) | x {work:.2f} | {words} |"
            )
    return "\n".join(lines)


def _by_kind(rows: Rows, names: Sequence[str]) -> str:
    lines = ["| clean edits | " + " | ".join(KINDS) + " |", "| --- " * 5 + "|"]
    for name in names:
        edits = edits_of(_of(rows, name))
        cells = [_percent(estimate([edit for edit in edits if edit["kind"] == kind], "clean")) for kind in KINDS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |" if edits else "")
    return "\n".join(line for line in lines if line)


def _difference(rows: Rows, name: str) -> str:
    ours, theirs = edits_of(_of(rows, name)), edits_of(_of(rows, "official"))
    if not (ours and theirs):
        return ""
    estimated, work = difference(ours, theirs, "clean"), _work(_of(rows, name)) / _work(_of(rows, "official"))
    return (
        f"- `{name}` minus `official`: {100 * estimated.mean:+.1f} % clean edits ({100 * estimated.low:+.1f} to "
        f"{100 * estimated.high:+.1f}), {work:.2f} of the work."
    )


def _of(rows: Rows, name: str) -> list[Mapping[str, Any]]:
    """Return the rows of a variant as it is defined now."""
    settings = dict(VARIANTS[name].settings)
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}
    return [row for row in rows if row["variant"] == name and row["settings"] in (settings, plain)]


def _work(rows: Rows) -> float:
    """Return the mean TFLOP of the UNet per clip: tuning, inversion and four edits."""
    return float(np.mean([sum(stage["tflop"] for stage in row["stages"].values()) for row in rows]))


def _percent(estimated: Estimate) -> str:
    return f"{estimated.mean:.0%} ({estimated.low:.0%} to {estimated.high:.0%})"


def _print(name: str, edits: Rows) -> None:
    print(f"\n{name} ({len(edits)} edits)")
    for kind in ("all", *KINDS):
        of_kind = [edit for edit in edits if kind in ("all", edit["kind"])]
        estimates = [
            (score, estimate(of_kind, score)) for score in SCORES if any(e.get(score) is not None for e in of_kind)
        ]
        print(f"  {kind:10} " + "  ".join(f"{score} {e.mean:.3f} [{e.low:.2f} {e.high:.2f}]" for score, e in estimates))


if __name__ == "__main__":
    main()
