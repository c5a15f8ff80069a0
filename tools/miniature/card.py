"""The model card, with the measured numbers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.experiments import LEDGER
from tools.miniature.artwork import PACKAGE, VERSION
from tools.miniature.world import COLOURED, COLOURS, HELD_OUT, MOTIONS, PLACES, STYLES, SUBJECTS

from tuneavideo.evaluation.compare import estimate
from tuneavideo.evaluation.miniature import MAX_TRACK_DISTANCE, edits_of, read_rows

TEMPLATE = Path(__file__).with_name("card.md")
AGAIN = LEDGER.with_name("miniature-again.json")
"""`measured.json` of a model that was made from nothing in one go, and where and how long that took."""


def write(product: Path) -> None:
    """Write `README.md` next to the model, from `measured.json` and the benchmark's ledger."""
    measured = json.loads((product / "measured.json").read_text())
    judge, vae = measured["judge"], measured["autoencoder"]
    kinds = measured["text to image"]
    text = TEMPLATE.read_text().format(
        n_subjects=len(SUBJECTS), n_places=len(PLACES), n_styles=len(STYLES), n_held_out=len(HELD_OUT), n_clips=24,
        subjects=", ".join(SUBJECTS), places=", ".join(PLACES.values()), styles=", ".join(STYLES),
        colours=", ".join(COLOURS), coloured=", ".join(COLOURED), motions=", ".join(MOTIONS),
        held_out=", ".join(f"{subject} {PLACES[place]}" for subject, place in sorted(HELD_OUT)),
        vae_millions=measured["millions"]["vae"], text_millions=measured["millions"]["text_encoder"],
        unet_millions=measured["millions"]["unet"], training=measured["training"], count=measured["count"],
        seeds=measured["seeds"], steps=measured["steps"], guidance=measured["guidance"],
        table="\n".join(_row(kind, scores) for kind, scores in kinds.items()),
        by_subject=", ".join(f"{name} {_percent(share)}" for name, share in kinds["seen"]["by subject"].items()),
        psnr=vae["psnr"], chroma=vae["chroma error"], judge=_sight(judge),
        one_shot=one_shot(("untuned", "default", "official")), head=HEAD, again=again(),
        package=PACKAGE, version=VERSION,
    )  # fmt: skip
    (product / "README.md").write_text(text)


def again() -> str:
    """Format the results of the whole recipe in one run."""
    made = json.loads(AGAIN.read_text())
    table = "\n".join(_row(kind, scores) for kind, scores in made["text to image"].items())
    return (
        f"The whole recipe in one go, from the artwork and seed 0: {made['training']}; {made['took']}. Measured alike, "
        f"by a judge of its own, with guidance {made['guidance']}:\n\n{HEAD}\n{table}\n\nIts autoencoder: "
        f"{made['autoencoder']['psnr']:.1f} dB. Its judge: {_sight(made['judge'])}."
    )


def _sight(judge: dict) -> str:
    shares = ", ".join(f"{word} {_percent(judge[word])}" for word in ("subject", "background", "style", "colour"))
    return (
        f"{shares}; subject on grey or recoloured drawings {_percent(judge['subject, recoloured'])}; the subject's "
        f"centre is off by {judge['pixels']:.2f} pixels on average"
    )


HEAD = "| requested | subject | background | style | colour |\n| --- | --- | --- | --- | --- |"


def one_shot(variants: Sequence[str]) -> str:
    """Format the results of tuning on one clip, from the rows of the benchmark's ledger."""
    rows = [row for row in read_rows(LEDGER) if row["set"] == "development" and row["variant"] in variants]
    variants = [name for name in variants if any(row["variant"] == name for row in rows)]
    if not rows:
        return "Not measured yet: `python -m benchmarks.experiments untuned default official --seeds 3`."
    lines = [
        "| tuning | subject | background | style | two at once | preserved | within 4 px | clean | mean distance |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in variants:
        edits = edits_of([row for row in rows if row["variant"] == name])
        near = [edit | {"near": edit["track"] <= MAX_TRACK_DISTANCE} for edit in edits]
        kinds = ("subject", "background", "style", "two")
        shares = [estimate([e for e in edits if e["kind"] == kind], "success").mean for kind in kinds]
        shares += [estimate(near, score).mean for score in ("preserved", "near", "clean")]
        track = estimate(edits, "track")
        distance = f"{track.mean:.1f} px ({track.low:.1f} to {track.high:.1f})"
        seeds = len({edit["seed"] for edit in edits})
        lines.append(f"| {name}, {seeds} seed(s) | " + " | ".join(map(_percent, shares)) + f" | {distance} |")
    clips = len({row["clip"] for row in rows})
    return (
        f"The benchmark's development clips ({clips}, 8 frames, every second one), four edits each; "
        "the first four columns say how often the judge sees the request in most frames, *preserved* how often "
        "all that the prompt does not change is preserved, *clean* how often both hold and the subject's centre is "
        "within 4 pixels of its true track on average.\n\n" + "\n".join(lines)
    )


NAMES = {
    "seen": "subject and background seen together", "held out": "never seen together", "style": "with a style",
    "colour": "with a colour",
}  # fmt: skip


def _row(kind: str, scores: dict) -> str:
    return (
        f"| {NAMES[kind]} | "
        + " | ".join(_percent(scores[n]) for n in ("subject", "background", "style", "colour"))
        + " |"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
