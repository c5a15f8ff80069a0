"""Pictures of report edits, chosen by their scores: the best, the median and the worst, or twelve at equal ranks.

    python -m benchmarks.gallery                  docs/quality.png
    python -m benchmarks.gallery --twelve FOLDER  twelve edits, each beside its clip, four times enlarged

Edits are ranked by the distance of the judge's features to those of the true edit. The seed is 0.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.experiments import LEDGER, VARIANTS
from tuneavideo import miniature
from tuneavideo.evaluation.miniature import VERSION, edits_of, edits_of_clip, read_rows
from tuneavideo.video import Video, resize
from tuneavideo.video.montage import contact_sheet

PICTURE = Path(__file__).parent.parent / "docs" / "quality.png"
SHOWN = ("untuned", "default")
"""Variants whose edits are shown between the clip and the true edit."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--twelve", type=Path, metavar="FOLDER")
    chosen = parser.parse_args()
    ranks = ranked()
    if chosen.twelve:
        chosen.twelve.mkdir(parents=True, exist_ok=True)
        for number, edit in enumerate(ranks[round(at)] for at in np.linspace(0, len(ranks) - 1, 12)):
            clip, source, videos, _ = _made(edit, ["default"])
            sheet = contact_sheet([_enlarged(source), *map(_enlarged, videos)], [clip["caption"], edit["prompt"]])
            Image.fromarray(sheet).save(chosen.twelve / f"{number + 1:02}.png")
        return
    parts = list(_parts({"best": ranks[0], "median": ranks[len(ranks) // 2], "worst": ranks[-1]}))
    whole = Image.fromarray(np.concatenate(parts)).quantize(256, dither=Image.Dither.NONE)
    whole.save(PICTURE, optimize=True)


def ranked() -> list[dict[str, Any]]:
    """Return the report edits of the ledger's `default` rows of seed 0, the nearest to the true edit first."""
    rows = [
        row for row in read_rows(LEDGER)
        if (row["variant"], row["set"], row["seed"], row.get("version")) == ("default", "report", 0, VERSION)
    ]  # fmt: skip
    return sorted(edits_of(rows), key=lambda edit: edit["true_features"])


def _parts(edits: Mapping[str, Mapping[str, Any]]) -> Iterator[np.ndarray]:
    for name, edit in edits.items():
        clip, source, videos, truth = _made(edit, SHOWN)
        labels = [f"{name}: {clip['caption']}", *(f"{variant}: {edit['prompt']}" for variant in SHOWN), "true edit"]
        yield contact_sheet([source, *videos, truth], labels, columns=6)


def _made(edit: Mapping[str, Any], variants: Sequence[str]) -> tuple[Mapping[str, Any], Video, list[Video], Video]:
    """Return the clip of an edit, its frames, the edits of some variants, and the true edit."""
    clip = next(clip for clip in miniature.clips() if clip["name"] == edit["clip"])
    number = [each["prompt"] for each in clip["edits"]].index(edit["prompt"])
    made = [edits_of_clip(VARIANTS[name], clip, edit["seed"]) for name in variants]
    references, source, _, _ = made[0]
    return clip, source, [videos[number] for _, _, videos, _ in made], references.truths[number]


def _enlarged(video: Video) -> Video:
    images = [resize(image, 4 * video.width, 4 * video.height, "stretch") for image in video.frames_THWC]
    return Video(np.stack(images), video.fps)


if __name__ == "__main__":
    main()
