"""The table of metrics, and the models they need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from huggingface_hub import try_to_load_from_cache

from tuneavideo.evaluation.metrics import background, clip, flicker, flow, judge_metrics, motion, warp
from tuneavideo.evaluation.metrics.edit_pair import EditPair
from tuneavideo.evaluation.metrics.judge import Judge
from tuneavideo.storage import cache

CLIP = "openai/clip-vit-large-patch14"
PICK = "yuvalkirstain/PickScore_v1"
PICK_PROCESSORS = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"

Requirement = Literal["clip", "pick", "flow", "judge", "mask", "pixels"]
"""Input of a metric besides the edit: a model, the mask, or nothing more than pixels."""
LEADERBOARD = "Tune-A-Video, the baseline of the LOVEU-TGVE-2023 leaderboard"


@dataclass(frozen=True)
class Metric:
    """A row of the table.

    Attributes:
        unit: Unit of the value; "" for a plain number.
        better: Whether higher or lower values are better.
        about: Short description; the function's docstring has the full one.
        requires: The model that it uses, the mask, or the pixels alone.
        function: Computes the value from an edit and what the metric requires.
        baseline: Published value of Tune-A-Video on LOVEU-TGVE-2023, and its source.
    """

    unit: str
    better: Literal["higher", "lower"]
    about: str
    requires: Requirement
    function: Callable[[EditPair, Any], float]
    baseline: tuple[float, str] | None = None


_TGVE_FRAMES = (0.924, "Tune-A-Video on LOVEU-TGVE-2023, as the EVE paper (Singer et al. 2024) has it")
METRICS: dict[str, Metric] = {
    "clip_frame": Metric("", "higher", "mean cosine of CLIP features of all pairs of frames", "clip",
                         clip.frame_consistency, _TGVE_FRAMES),
    "clip_text": Metric("", "higher", "100 x cosine of CLIP features of frame and prompt", "clip",
                        clip.text_alignment, (27.12, LEADERBOARD)),
    "pick_score": Metric("", "higher", "PickScore of frame and prompt: human preference", "pick",
                         clip.text_alignment, (20.36, LEADERBOARD)),
    "clip_direction": Metric("", "higher", "cosine of the change of the frames and the change of the caption", "clip",
                             clip.direction),
    "background_psnr": Metric("dB", "higher", "PSNR to the source outside the mask", "mask",
                              background.background_psnr),
    "background_ssim": Metric("", "higher", "structural similarity to the source outside the mask", "mask",
                              background.background_ssim),
    "warp_error": Metric("1e-3", "lower", "difference of frames warped along the source's motion", "flow",
                         warp.warp_error),
    "motion_fidelity": Metric("", "higher", "similarity of moving tracks in source and edit", "flow",
                              motion.motion_fidelity),
    "motion_fidelity_all": Metric("", "higher", "similarity of all tracks in source and edit, static ones too", "flow",
                                  motion.motion_fidelity_all),
    "flicker": Metric("levels", "lower", "change from frame to frame where the source is static, of 255", "pixels",
                      flicker.flicker),
    "success": Metric("", "higher", "fraction of frames that show what the prompt changes", "judge",
                      judge_metrics.success),
    "subject_seen": Metric("", "higher", "fraction of frames that show the prompt's subject", "judge",
                           judge_metrics.attribute_seen("subject")),
    "background_seen": Metric("", "higher", "fraction of frames that show the prompt's background", "judge",
                              judge_metrics.attribute_seen("background")),
    "style_seen": Metric("", "higher", "fraction of frames in the prompt's style", "judge",
                         judge_metrics.attribute_seen("style")),
    "preserved": Metric("", "higher", "fraction of frames that keep what the prompt does not change", "judge",
                        judge_metrics.preserved),
    "track_distance": Metric("px at 64", "lower", "distance of the subject's centre from the source's", "judge",
                             judge_metrics.track_distance),
    "judge_consistency": Metric("", "higher", "mean cosine of the judge's features of all pairs of frames", "judge",
                                judge_metrics.consistency),
}  # fmt: skip


class LoadedModel(NamedTuple):
    """A model of metrics, with its name and revision for `scores.json`."""

    model: Any
    name: str
    revision: str | None


def load_model(requirement: Requirement, *, clip_source: str = CLIP, pick_source: str = PICK) -> LoadedModel:
    """Load what metrics require, other than a mask.

    Args:
        requirement: The kind of model.
        clip_source: Hub id or folder of CLIP.
        pick_source: Hub id or folder of PickScore.

    Raises:
        ModelError: The model cannot be loaded.
    """
    if requirement == "clip":
        return _with_revision(clip.ClipModel(clip_source), clip_source)
    if requirement == "pick":
        has_tokenizer = Path(pick_source, "tokenizer_config.json").is_file()
        return _with_revision(clip.ClipModel(pick_source, None if has_tokenizer else PICK_PROCESSORS), pick_source)
    if requirement == "flow":
        model = flow.load_flow()
        return LoadedModel(model, model.name, model.revision)
    if requirement == "judge":
        judge = Judge.open()
        return LoadedModel(judge, "judge of the miniature", cache.key(judge))
    return LoadedModel(None, requirement, None)


def _with_revision(model: clip.ClipModel, source: str) -> LoadedModel:
    """Add the hub's commit, or a digest of the weights of a folder."""
    config = None if Path(source).exists() else try_to_load_from_cache(source, "config.json")
    revision = Path(config).parent.name if isinstance(config, str) else cache.key(model.model)
    return LoadedModel(model, source, revision)
