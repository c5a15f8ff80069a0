"""Job files of the benchmarks, for `tuneavideo batch`, and scores of the miniature's runs.

    python -m benchmarks.job_files tgve FOLDER_OF_THE_BENCHMARK tgve.yaml [--base sd1.4]
    tuneavideo batch tgve.yaml --scores [--ray auto]               76 clips, four edits each

    python -m benchmarks.job_files miniature miniature.yaml [--part report] [--seeds 3]
    tuneavideo batch miniature.yaml
    python -m benchmarks.job_files score runs/miniature            clean and good edits, as 'benchmark miniature' counts

Edits are written as frames, from which scores are exact.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tuneavideo import miniature
from tuneavideo.storage.run_folder import RunFolder


def tgve(data: Path, base: str) -> dict[str, Any]:
    """Return the job file of LOVEU-TGVE-2023, whose folder has the frames, and the configs or the table."""
    from tuneavideo.evaluation.tgve import read_clips

    clips = [_plain(clip.settings()) | {"video": str(clip.frames.absolute())} for clip in read_clips(data)]
    return {"defaults": {"base": base}, "clips": clips}


def small(part: str, seeds: int) -> dict[str, Any]:
    """Return the job file of a part of the miniature's bundled clips."""
    clips = [
        {
            "video": str(clip["path"]), "prompt": clip["caption"], "edit": [edit["prompt"] for edit in clip["edits"]],
            "stride": clip.get("stride", 2), "num_frames": clip.get("num_frames", 8),
        }
        for clip in miniature.clips(harder=part.startswith("harder")) if clip["set"] == part
    ]  # fmt: skip
    return {
        "defaults": {"base": "miniature", "formats": ["frames"]}, "clips": clips, "grid": {"seed": [*range(seeds)]},
    }  # fmt: skip


def score(root: Path) -> dict[str, Any]:
    """Return the fractions of clean and good edits of the runs in a folder."""
    from tuneavideo import video as videos
    from tuneavideo.evaluation.miniature import references_of, score_edits
    from tuneavideo.models import pipelines

    known = {str(clip["path"]): clip for clip in (*miniature.clips(), *miniature.clips(harder=True))}
    pipe, edits = pipelines.load_image_pipeline("miniature", device="cpu"), list[dict[str, Any]]()
    for run in map(RunFolder, sorted(root.iterdir())):
        if not run.is_tuned:
            continue
        settings = run.read_settings()
        clip = known[settings.video]
        by_prompt = {run.read_edit(edit)["prompt"]: run.read_clip(edit) for edit in run.whole_edits()}
        made = [videos.read(by_prompt[edit["prompt"]]) for edit in clip["edits"]]
        side, count = made[0].height, made[0].frames
        source = videos.read(settings.video, stride=settings.stride or 1, count=count, size=(side, side))
        edits += score_edits(references_of(clip, settings, source, pipe), source, made)
    return {"edits": len(edits)} | {name: sum(edit[name] for edit in edits) / len(edits) for name in ("clean", "good")}


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_subparsers(dest="what", required=True)
    one = which.add_parser("tgve")
    one.add_argument("data", type=Path)
    one.add_argument("--base", default="sd1.4")
    two = which.add_parser("miniature")
    two.add_argument("--part", default="development")
    two.add_argument("--seeds", type=int, default=1)
    for each in (one, two):
        each.add_argument("file", type=Path)
    which.add_parser("score").add_argument("root", type=Path)
    options = parser.parse_args(argv)
    if options.what == "score":
        print(json.dumps(score(options.root)))
        return
    contents = tgve(options.data, options.base) if options.what == "tgve" else small(options.part, options.seeds)
    options.file.write_text(yaml.safe_dump(contents, sort_keys=False, allow_unicode=True), encoding="utf-8")
    print(f"{options.file}: {len(contents['clips'])} clips")


if __name__ == "__main__":
    main()
