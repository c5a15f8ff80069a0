"""Each metric against clips whose answer is known, and the CLIP scores against a computation by hand."""

from __future__ import annotations

import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel, CLIPTokenizer

from tests.conftest import clip_folder
from tests.shared.metrics import SIDE, passing, still
from tuneavideo import miniature
from tuneavideo.errors import ModelError, VideoError
from tuneavideo.evaluation.metrics import background, clip, flicker, judge_metrics, motion, warp
from tuneavideo.evaluation.metrics.edit_pair import CachedVideo, EditPair, NotMeasurable
from tuneavideo.evaluation.metrics.flow import Dis, Raft, consistent_pixels, load_flow
from tuneavideo.evaluation.metrics.judge import Judge
from tuneavideo.evaluation.metrics.table import METRICS, load_model
from tuneavideo.video import Video, read, write, write_image
from tuneavideo.video.masks import read_mask


def joined(left: Video, right: Video) -> Video:
    """The left half of one clip and the right half of another."""
    half = SIDE // 2
    return Video(np.concatenate([left.frames_THWC[:, :, :half], right.frames_THWC[:, :, half:]], axis=2), 8)


def sample(source: Video, edit: Video, caption: str = "a square", prompt: str = "a red circle") -> EditPair:
    return EditPair(CachedVideo(source), CachedVideo(edit), caption, prompt)


@pytest.fixture(scope="module")
def flow() -> Dis:
    return Dis()


# The scores of LOVEU-TGVE-2023


def by_hand(folder: Path, video: Video, prompt: str) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Compute features of frames and prompt before normalisation, and the scale, step by step."""
    model = CLIPModel.from_pretrained(folder).eval()
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    rows = []
    for image in video.frames_THWC:
        picture = Image.fromarray(image).resize((480, 480)).resize((32, 32), Image.Resampling.BICUBIC)
        pixels = torch.tensor((np.asarray(picture) / 255 - mean) / std, dtype=torch.float32).permute(2, 0, 1)[None]
        rows.append(model.visual_projection(model.vision_model(pixels).pooler_output)[0])
    tokens = CLIPTokenizer.from_pretrained(folder)([prompt], return_tensors="pt").input_ids
    text = model.text_projection(model.text_model(tokens).pooler_output)[0]
    return torch.stack(rows).detach(), text.detach(), float(np.exp(model.logit_scale.item()))


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(a @ b / (a @ a).sqrt() / (b @ b).sqrt())


@pytest.mark.parametrize("seed", [0, 7])
def test_the_scores_of_the_benchmark_are_those_computed_by_hand(seed: int, clip_model: Path) -> None:
    video, prompt = passing((3, 1), seed, frames=4), "a red jumps"
    pictures, text, scale = by_hand(clip_model, video, prompt)
    pairs = [cosine(a, b) for a, b in combinations(pictures, 2)]
    pair, model = sample(still(seed, frames=4), video, prompt=prompt), clip.ClipModel(str(clip_model))
    assert clip.frame_consistency(pair, model) == pytest.approx(np.mean(pairs), abs=1e-4)
    texts = [scale * cosine(each, text) for each in pictures]
    assert clip.text_alignment(pair, model) == pytest.approx(np.mean(texts), abs=1e-4)
    assert METRICS["pick_score"].function(pair, model) == pytest.approx(np.mean(texts), abs=1e-4)


def test_text_alignment_is_what_the_model_itself_calls_logits_per_image(clip_model: Path) -> None:
    video, model = passing((3, 1), frames=3), clip.ClipModel(str(clip_model))
    resized = [Image.fromarray(image).resize((480, 480)) for image in video.frames_THWC]
    inputs = model.image_processor(images=resized, return_tensors="pt") | model.tokenizer(
        ["a square"], return_tensors="pt"
    )
    logits = model.model(**inputs).logits_per_image
    pair = sample(video, video, prompt="a square")
    assert clip.text_alignment(pair, model) == pytest.approx(float(logits.mean()), abs=1e-4)


def test_the_scale_of_pick_score_is_exponentiated(clip_model: Path, tmp_path: Path) -> None:
    """The same weights under two scales: scores differ by the ratio of their exponentials."""
    pair = sample(still(), still())
    low, high = clip.ClipModel(str(clip_model)), clip.ClipModel(str(clip_folder(tmp_path, scale=4.0)))
    ratio = clip.text_alignment(pair, high) / clip.text_alignment(pair, low)
    assert ratio == pytest.approx(np.e, rel=1e-5)


def test_a_still_clip_agrees_with_itself_wholly(clip_model: Path) -> None:
    assert clip.frame_consistency(sample(still(), still()), clip.ClipModel(str(clip_model))) == pytest.approx(
        1, abs=1e-6
    )


def test_direction_is_the_cosine_of_two_changes(clip_model: Path) -> None:
    source, edit, model = still(0, 2), still(1, 2), clip.ClipModel(str(clip_model))
    (before, caption, _), (after, prompt, _) = (
        by_hand(clip_model, source, "a square"),
        by_hand(clip_model, edit, "snow"),
    )

    def unit(features: torch.Tensor) -> torch.Tensor:
        return features / features.norm(dim=-1, keepdim=True)

    wanted = cosine((unit(after) - unit(before))[0], unit(prompt) - unit(caption))
    assert clip.direction(sample(source, edit, prompt="snow"), model) == pytest.approx(wanted, abs=1e-4)
    with pytest.raises(NotMeasurable, match="requests no change"):
        clip.direction(sample(source, edit, prompt="a square"), model)


def test_a_model_that_is_not_there_is_named_with_what_to_do() -> None:
    with pytest.raises(ModelError, match="^openai/clip-vit-large-patch14 .*--clip, --pick.*hf download"):
        load_model("clip")


def test_results_name_the_folder_and_its_weights(clip_model: Path, tmp_path: Path) -> None:
    (one, other) = (
        load_model("clip", clip_source=str(place)) for place in (clip_model, clip_folder(tmp_path, scale=4.0))
    )
    assert one.name == str(clip_model) and one.revision != other.revision
    assert load_model("pick", pick_source=str(clip_model)).revision == one.revision


# Motion


def test_flow_finds_how_a_texture_moves_and_what_leaves_the_frame(flow: Dis) -> None:
    (forward, *_), (backward, *_) = flow.flows(passing((3, -2), frames=2))
    inner = np.s_[12:-12, 12:-12]
    assert np.abs(forward[inner] - (3, -2)).mean() < 0.1 and np.abs(backward[inner] + (3, -2)).mean() < 0.1
    visible = consistent_pixels(forward, backward)
    assert visible[inner].all() and not visible[:, -2:].any() and not visible[:2].any()


def test_a_torchvision_that_does_not_work_is_replaced_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    assert load_flow().name == "DIS flow (OpenCV)"
    assert "using DIS flow: operator torchvision::nms does not exist" in caplog.text


def test_raft_finds_how_a_texture_moves() -> None:
    pytest.importorskip("torchvision", reason="RAFT comes with torchvision, which is optional")
    (forward, *_), _ = Raft().flows(passing((3, -2), frames=2))
    assert np.abs(forward[12:-12, 12:-12] - (3, -2)).mean() < 0.3


def test_an_edit_that_moves_as_its_source_has_little_warp_error(flow: Dis) -> None:
    frozen, moving = still(1), passing((3, 1), seed=1)
    assert warp.warp_error(sample(passing((3, 1)), moving), flow) < 3
    a, b = frozen.frames_THWC[0, :-1, :-3] / 255, frozen.frames_THWC[0, 1:, 3:] / 255
    lost = 1000 * ((a - b) ** 2).sum(axis=2).mean()
    assert warp.warp_error(sample(passing((3, 1)), frozen), flow) == pytest.approx(lost, rel=0.1) and lost > 30


def test_warp_error_counts_a_known_change_of_light(flow: Dis) -> None:
    brighter = Video(np.stack([np.full((SIDE, SIDE, 3), 50 + 10 * t, np.uint8) for t in range(4)]), 8)
    value = warp.warp_error(sample(still(frames=4), brighter), flow)
    assert value == pytest.approx(1000 * 3 * (10 / 255) ** 2, rel=1e-4)


@pytest.mark.parametrize(
    ("source", "edit", "value"),
    [
        (passing((3, 1)), passing((3, 1)), 1),
        (passing((3, 0)), passing((2, 0), seed=1), 1),  # slower, the same way
        (passing((3, 0)), passing((-3, 0), seed=1), -1),
        (passing((3, 0)), passing((0, 3), seed=1), 0),
        (passing((3, 0)), still(1), 0),  # a frozen edit of a moving clip
        (still(), passing((3, 0), seed=1), 0),
        (still(), still(1), 1),
        # every track of the edit has its like, half of the source's have not: they move against all of the edit's
        (joined(passing((-2, 0)), passing((2, 0), seed=2)), passing((2, 0), seed=1), 0.5),
    ],
)
def test_motion_fidelity_is_the_similarity_of_tracks_in_both_directions(
    source: Video, edit: Video, value: float, flow: Dis
) -> None:
    assert motion.motion_fidelity(sample(source, edit), flow) == pytest.approx(value, abs=0.07)


def test_static_points_are_similar_and_do_not_reward_a_frozen_edit(flow: Dis) -> None:
    half = joined(still(), passing((0, 3), seed=2))
    assert motion.motion_fidelity_all(sample(half, half), flow) == pytest.approx(1, abs=1e-6)
    frozen = sample(half, still(1))
    assert motion.motion_fidelity(frozen, flow) == 0
    assert motion.motion_fidelity_all(frozen, flow) == pytest.approx((1 + 0.5) / 2, abs=0.12)


def test_similarity_of_tracks_written_by_hand() -> None:
    steps = np.array([[[1.0, 0], [0, 1]], [[1, 0], [0, 0]], [[0, 0], [0, 0]]])
    tracks = motion.Tracks(steps, np.ones((3, 2), bool), np.array([True, True, False]))
    assert motion.track_similarity(tracks, tracks) == pytest.approx(np.array([[1, 0.5, 0], [0.5, 1, 0.5], [0, 0.5, 1]]))


# Flicker


def test_flicker_of_noise_is_the_mean_difference_of_two_draws() -> None:
    noisy = 128 + np.random.default_rng(0).normal(0, 10, (8, SIDE, SIDE, 3))
    value = flicker.flicker(sample(still(frames=8), Video(noisy.round().astype(np.uint8), 8)))
    assert value == pytest.approx(2 * 10 / np.sqrt(np.pi), rel=0.01)
    assert flicker.flicker(sample(still(), still(1))) == 0


def test_flicker_is_measured_where_the_source_is_static() -> None:
    source = joined(passing((3, 1)), still())
    known = joined(passing((-1, 2), seed=1), still(2))
    assert flicker.flicker(sample(source, known)) < 0.2  # chance pixels of the moving half that did not change
    assert flicker.flicker(sample(still(), known)) > 5
    with pytest.raises(NotMeasurable, match="hardly any pixel of the source is static"):
        strobe = Video(np.stack([np.full((SIDE, SIDE, 3), 90 * (t % 2), np.uint8) for t in range(4)]), 8)
        flicker.flicker(sample(strobe, still(frames=4)))


# Background


INSIDE = np.zeros((1, SIDE, SIDE), bool)
INSIDE[:, 16:48, 16:48] = True


def mask(_: EditPair) -> np.ndarray:
    return INSIDE


def changed(outside: int, inside: int) -> Video:
    frames = np.where(INSIDE[..., None], np.uint8(inside), np.uint8(outside))
    return Video(np.repeat(frames, 3, axis=0) + np.zeros((1, 1, 1, 3), np.uint8), 8)


def test_psnr_counts_the_pixels_outside_the_mask_and_no_others() -> None:
    value = background.background_psnr(sample(changed(100, 0), changed(110, 255)), mask)
    assert value == pytest.approx(20 * np.log10(255 / 10))
    assert background.background_psnr(sample(changed(100, 0), changed(100, 255)), mask) == pytest.approx(
        148.13, abs=0.01
    )


def test_ssim_of_flat_pictures_is_its_formula_and_does_not_see_into_the_mask() -> None:
    c = (0.01 * 255) ** 2
    value = background.background_ssim(sample(changed(100, 0), changed(150, 255)), mask)
    assert value == pytest.approx((2 * 100 * 150 + c) / (100**2 + 150**2 + c), abs=1e-6)
    textured = still(frames=3)
    edited = Video(np.where(INSIDE[..., None], changed(0, 255).frames_THWC, textured.frames_THWC), 8)
    assert background.background_ssim(sample(textured, edited), mask) == pytest.approx(1, abs=1e-9)
    assert background.background_ssim(sample(textured, still(1, frames=3)), mask) < 0.5


def test_what_leaves_no_background_or_is_too_small_has_no_value() -> None:
    for metric in (background.background_psnr, background.background_ssim):
        with pytest.raises(NotMeasurable, match="outside the mask"):
            metric(sample(still(), still(1)), lambda _: np.ones((1, SIDE, SIDE), bool))
    tiny = Video(np.zeros((2, 8, 8, 3), np.uint8), 8)
    with pytest.raises(NotMeasurable, match="8 x 8 are smaller than a window"):
        background.background_ssim(sample(tiny, tiny), lambda _: np.zeros((1, 8, 8), bool))


def test_a_mask_is_a_picture_or_as_many_as_the_clip_has(tmp_path: Path) -> None:
    picture = np.repeat(np.uint8(255) * INSIDE[0][::2, ::2, None], 3, axis=2)
    write_image(picture, tmp_path / "mask.png")
    assert (read_mask(tmp_path / "mask.png", still(), "crop") == INSIDE).mean() > 0.95
    write(Video(np.stack([picture] * 6), 8), tmp_path / "masks")
    assert read_mask(tmp_path / "masks", still(), "crop").shape == (6, SIDE, SIDE)
    with pytest.raises(VideoError, match="masks: expected 1 frame or 4, as the clip has; found 6"):
        read_mask(tmp_path / "masks", still(frames=4), "crop")
    write_image(np.full((8, 8, 3), 255, np.uint8), tmp_path / "white.png")
    with pytest.raises(VideoError, match="white.png: all of it is bright"):
        read_mask(tmp_path / "white.png", still(), "crop")


# The miniature's judge


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.open()


def test_the_request_of_a_prompt_is_found_word_by_word(judge: Judge) -> None:
    value = judge_metrics.requested("A balloon is rising in the snow, black and white", judge)
    assert value == {"subject": "balloon", "background": "snow", "style": "black and white"}
    assert judge_metrics.requested("it moves", judge) == {"style": "none"}


def test_the_judge_measures_success_and_preservation(judge: Judge) -> None:
    """Of two bundled clips on one path, the second stands for an edit of the first: a rabbit in place of a dog."""
    clips = {each["name"]: read(each["path"], size=(64, 64)) for each in miniature.clips()}
    source, edit = clips["dog-jumping"], clips["rabbit-jumping"]
    seen = judge.read(edit)
    prompt = f"a rabbit is jumping, {seen.most('background')}"
    pair = sample(source, edit, "a dog is jumping on the grass", prompt)
    assert judge_metrics.success(pair, judge) > 0.9 and judge_metrics.attribute_seen("subject")(pair, judge) > 0.9
    assert judge_metrics.track_distance(pair, judge) < 3 and judge_metrics.consistency(pair, judge) > 0.8
    kept = sample(source, source, "a dog is jumping on the grass", "a cat is jumping on the grass")
    assert judge_metrics.success(kept, judge) == 0 and judge_metrics.preserved(kept, judge) == 1
    for prompt, why in {"a dog on the grass": "changes nothing", "it": "names no subject"}.items():
        with pytest.raises(NotMeasurable, match=why):
            metric = judge_metrics.success if why.startswith("changes") else judge_metrics.attribute_seen("subject")
            metric(sample(source, edit, "a dog is jumping on the grass", prompt), judge)


def test_the_background_of_a_drawn_clip_is_outside_its_subjects(judge: Judge) -> None:
    clip_ = miniature.clips()[0]
    video = read(clip_["path"], size=(64, 64))
    inside = judge_metrics.subject_mask(sample(video, video, clip_["caption"], clip_["edits"][0]["prompt"]), judge)
    x, y = np.array(clip_["track"]).astype(int).T
    assert inside[np.arange(video.frames), y, x].all() and 0.2 < inside.mean() < 0.5
    with pytest.raises(NotMeasurable, match="another background or style"):
        judge_metrics.subject_mask(sample(video, video, "a dog on the grass", "a dog on the beach"), judge)
