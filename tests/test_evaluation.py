"""The judge, its scores and the miniature benchmark."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from tuneavideo import miniature
from tuneavideo.evaluation import miniature as bench
from tuneavideo.evaluation import steadiness
from tuneavideo.evaluation.compare import difference, estimate
from tuneavideo.evaluation.metrics.background import psnr
from tuneavideo.evaluation.metrics.judge import Judge, Reading
from tuneavideo.evaluation.metrics.judge_metrics import subject_squares
from tuneavideo.models import codec, pipelines
from tuneavideo.video import Video, read

CLIPS = {clip["name"]: clip for clip in miniature.clips()}
HARDER = {clip["name"]: clip for clip in miniature.clips(harder=True)}


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.open()


def source(clip: dict) -> Video:
    return read(clip["path"], size=(64, 64))


def test_the_judge_sees_what_the_clips_show(judge: Judge) -> None:
    for clip in CLIPS.values():
        reading = judge.read(source(clip))
        seen = [reading.most(kind) for kind in ("subject", "background", "style")]
        assert seen == [clip["subject"], clip["background"], "none"], clip["name"]
        assert reading.track_distance(torch.tensor(clip["track"])) < 2.5, clip["name"]


def test_most_frames_are_more_than_half() -> None:
    half = Reading({"subject": ["dog", "cat"]}, torch.zeros(2, 2), torch.ones(2, 3))
    assert not half.shows("subject", "dog")
    assert half.consistency() == pytest.approx(1)


def test_an_edit_that_changes_nothing_is_preserved_and_near_but_no_success(judge: Judge) -> None:
    clip = CLIPS["dog-jumping"]
    video, track = source(clip), torch.tensor(clip["track"])
    reading = judge.read(video)
    for edit in clip["edits"]:
        scores = bench.score_edit(edit, clip, reading, reading, video, video, track)
        assert (
            scores["preserved"]
            and scores["track"] < bench.MAX_TRACK_DISTANCE
            and not (scores["success"] or scores["clean"])
        )


def test_an_edit_that_does_what_was_requested_is_clean(judge: Judge) -> None:
    clip, other = CLIPS["dog-jumping"], CLIPS["rabbit-jumping"]  # two subjects on one path, each on its own grass
    edit = {"kind": "two", "prompt": "", "subject": "rabbit", "background": "beach", "style": None}
    video, made = source(clip), source(other)
    scores = bench.score_edit(
        edit | {"background": "grass"}, clip | {"background": "snow"}, judge.read(video), judge.read(made), video, made,
        torch.tensor(clip["track"]),
    )  # fmt: skip
    assert scores["success"] and scores["preserved"] and scores["clean"]


def scored(clip: dict, pipe: StableDiffusionPipeline) -> Callable[[Callable[[Video], Video]], list[dict]]:
    """Return a function that scores changed true edits of a clip."""
    settings = bench._settings(bench.CONTROL, clip, 0)
    stride, count = settings.stride or 1, int(settings.num_frames)
    frames = read(clip["path"], stride=stride, count=count, size=(64, 64))
    references = bench.references_of(clip, settings, frames, pipe)
    return lambda change: bench.score_edits(references, frames, [change(truth) for truth in references.truths])


def drawings(clip: dict, pipe: StableDiffusionPipeline) -> None:
    """Check that true edits through the autoencoder are good, and that none is with its frames in another order."""
    score, order = scored(clip, pipe), np.random.default_rng(0).permutation
    through = score(lambda video: codec.decode(pipe, codec.encode(pipe, video)["mean"], video.fps)[0])
    shuffled = score(lambda video: Video(order(video.frames_THWC), video.fps))
    assert all(edit["good"] for edit in through), clip["name"]
    assert not any(edit["good"] for edit in shuffled), clip["name"]


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    return pipelines.load_image_pipeline("miniature", device="cpu")


@pytest.mark.parametrize("name", ["dog-jumping", "robot-dancing-camera"])
def test_true_edits_are_good_and_shuffled_ones_are_not(name: str, pipe: StableDiffusionPipeline) -> None:
    drawings((CLIPS | HARDER)[name], pipe)


@pytest.mark.long
def test_all_true_edits_are_good_and_no_shuffled_one(pipe: StableDiffusionPipeline) -> None:
    for clip in (CLIPS | HARDER).values():
        drawings(clip, pipe)


def test_a_clean_edit_that_flickers_or_whose_subject_changes_is_not_good(pipe: StableDiffusionPipeline) -> None:
    clip = CLIPS["dog-jumping"]
    score, rows = scored(clip, pipe), np.arange(64)[:, None, None]

    def flickering(video: Video) -> Video:  # a band that comes and goes in the upper corner
        frames = video.frames_THWC.copy()
        frames[::2] = np.where(rows < 12, frames[::2] // 2 + 90, frames[::2])
        return Video(frames, video.fps)

    def repainted(video: Video) -> Video:  # colours of the subject alternate
        frames, inside = video.frames_THWC.copy(), subject_squares(video, torch.tensor(clip["track"])[::2])
        inside[::2] = False
        frames[inside] = 255 - frames[inside] // 2
        return Video(frames, video.fps)

    true, flicker, subject = (score(change) for change in (lambda video: video, flickering, repainted))
    assert all(edit["true_psnr"] > 100 and edit["true_features"] == 0 for edit in true)
    assert all(edit["flicker_ratio"] > 3 and not edit["good"] for edit in flicker)
    assert all(edit["subject_ratio"] > 1.5 and not edit["good"] for edit in subject)
    assert all(a["flicker"] == pytest.approx(b["flicker"], abs=1) for a, b in zip(true, subject, strict=True))


def test_a_moving_camera_is_no_flicker() -> None:
    wide = np.random.default_rng(0).integers(0, 255, (64, 80, 3), dtype=np.uint8)
    video = Video(np.stack([wide[:, left : left + 64] for left in range(0, 16, 2)]), 8)
    centres, camera = torch.full((8, 2), 32.0), torch.tensor([[left, 8] for left in range(0, 16, 2)])
    assert steadiness.flicker(video, centres, camera_TD=camera) == 0
    assert (steadiness.flicker(video, centres) or 0) > 50
    assert steadiness.flicker(video, *(centres + shift for shift in (-20, 20))) is not None


def test_a_background_is_compared_outside_the_subject_only() -> None:
    before = Video(np.full((2, 64, 64, 3), 100, np.uint8), 8)
    after = Video(before.frames_THWC + np.uint8(10), 8)
    after.frames_THWC[:, 22:42, 22:42] = 255  # where the subject is
    centres = torch.full((2, 2), 32.0)
    assert psnr(before, after, ~subject_squares(before, centres)) == pytest.approx(20 * np.log10(255 / 10))


def test_differences_are_paired_by_clip() -> None:
    theirs = [{"clip": name, "track": value} for name, value in (("a", 1.0), ("a", 3.0), ("b", 10.0))]
    ours = [edit | {"track": edit["track"] + 1} for edit in theirs]
    result = difference(ours, theirs, "track")
    assert (result.mean, result.low, result.high) == (1.0, 1.0, 1.0)
    assert estimate(theirs, "track").mean == 6.0
    one = estimate(theirs[:2], "track")
    assert (one.mean, one.low, one.high) == (2.0, 2.0, 2.0), "of one clip there is no interval"


def test_a_row_is_appended_whole_after_one_that_was_cut_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, rows = tmp_path / "rows.jsonl", [{"key": "a"}, {"key": "b", "version": 2}]
    file.write_text(json.dumps(rows[0]) + '\n{"key": "b", "edi')
    monkeypatch.setattr(bench, "_compute", lambda *_: iter(rows[1:]))
    assert [*bench.benchmark([], file)] == rows[1:]
    assert bench.read_rows(file) == rows


def test_a_row_of_the_first_version_is_computed_again_and_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, clip = tmp_path / "rows.jsonl", next(iter(CLIPS.values()))
    key = bench._key(bench.CONTROL, clip, 0)
    file.write_text(json.dumps({"key": key, "edits": []}) + "\n")
    new = {"key": key, "version": bench.VERSION, "edits": []}
    monkeypatch.setattr(bench, "_compute", lambda runs, _: iter([new] * len(runs)))
    assert [*bench.benchmark([bench.CONTROL], file, clips=1)] == bench.read_rows(file) == [new]
    assert [*bench.benchmark([bench.CONTROL], file, clips=1)] == [new], "it is not computed a third time"
    assert len(file.read_text().splitlines()) == 2


@pytest.mark.long
def test_rows_are_computed_once_and_come_out_the_same(tmp_path: Path) -> None:
    short = {"max_train_steps": 1, "num_inference_steps": 2, "attention_injection": 0.0}
    variants = [bench.Variant("short", short)]
    first, again = ([*filter(None, bench.benchmark(variants, tmp_path / name, clips=1))] for name in ("a", "b"))
    assert [row["edits"] for row in first] == [row["edits"] for row in again]
    assert len(first) == 1 and len(first[0]["edits"]) == 4
    with (tmp_path / "a").open("a") as file:
        file.write('{"key": "cut sh')  # as by a full disk
    assert [*bench.benchmark(variants, tmp_path / "a", clips=1)] == bench.read_rows(tmp_path / "a") == first
    stages = first[0]["stages"]
    assert stages["edit"]["tflop"] == pytest.approx(8 * stages["invert"]["tflop"], rel=1e-2)  # 4 prompts, guided


@pytest.mark.long
def test_a_mask_of_the_true_edit_keeps_what_it_does_not_change() -> None:
    variant = bench.Variant("masked", {"num_inference_steps": 2}, tuned=False, masked=True)
    references, clip, edited, _ = bench.edits_of_clip(variant, CLIPS["dog-jumping"], 0)
    kinds = [edit["kind"] for edit in CLIPS["dog-jumping"]["edits"]]
    subject, truth = edited[kinds.index("subject")], references.truths[kinds.index("subject")]
    kept = (subject.frames_THWC == clip.frames_THWC).all(axis=3)
    same = (np.abs(truth.frames_THWC.astype(int) - clip.frames_THWC) <= bench.LEAST_CHANGE).all(axis=3)
    assert 0.3 < kept.mean() < same.mean()
    assert kept[~same].mean() < 0.05
