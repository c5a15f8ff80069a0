"""The table of metrics, and the models they need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from huggingface_hub import try_to_load_from_cache

from tuneavideo.evaluation.metrics import background, clip, drawn, flicker, flow, motion, warp
from tuneavideo.evaluation.metrics.judge import Judge
from tuneavideo.evaluation.metrics.sample import Sample
from tuneavideo.storage import cache

CLIP = "openai/clip-vit-large-patch14"
PICK = "yuvalkirstain/PickScore_v1"
PICK_PREPARED_BY = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"

Need = Literal["clip", "pick", "flow", "judge", "mask", "pixels"]
Published = tuple[float, str]
BOARD = "Tune-A-Video, the baseline of the LOVEU-TGVE-2023 leaderboard"


@dataclass(frozen=True)
class Metric:
    """A row of the table.

    Attributes:
        unit: Of the value; "" for a plain number.
        better: Which values are better.
        about: What it is, in a line; all of it is in the function's docstring.
        need: The model it is measured with, the mask, or the pixels alone.
        function: From a sample and what it needs to the value.
        baseline: What was published of Tune-A-Video on LOVEU-TGVE-2023, and where.
    """

    unit: str
    better: Literal["higher", "lower"]
    about: str
    need: Need
    function: Callable[[Sample, Any], float]
    baseline: Published | None = None


_TGVE_FRAMES = (0.924, "Tune-A-Video on LOVEU-TGVE-2023, as the EVE paper (Singer et al. 2024) has it")
METRICS: dict[str, Metric] = {
    "clip_frame": Metric("", "higher", "mean cosine of CLIP features of all pairs of frames", "clip",
                         clip.frame_consistency, _TGVE_FRAMES),
    "clip_text": Metric("", "higher", "100 x cosine of CLIP features of frame and prompt", "clip",
                        clip.text_alignment, (27.12, BOARD)),
    "pick_score": Metric("", "higher", "PickScore of frame and prompt: what people prefer", "pick",
                         clip.text_alignment, (20.36, BOARD)),
    "clip_direction": Metric("", "higher", "cosine of the change of the frames and the change of the caption", "clip",
                             clip.direction),
    "background_psnr": Metric("dB", "higher", "likeness to the source outside the mask", "mask", background.psnr),
    "background_ssim": Metric("", "higher", "structural similarity to the source outside the mask", "mask",
                              background.ssim),
    "warp_error": Metric("1e-3", "lower", "difference of frames carried along the source's motion", "flow",
                         warp.warp_error),
    "motion_fidelity": Metric("", "higher", "likeness of the tracks that move in source and edit", "flow",
                              motion.motion_fidelity),
    "motion_fidelity_all": Metric("", "higher", "likeness of all tracks in source and edit, resting ones too", "flow",
                                  motion.motion_fidelity_all),
    "flicker": Metric("levels", "lower", "change from frame to frame where the source stands still, of 255", "pixels",
                      flicker.flicker),
    "success": Metric("", "higher", "frames that show what the prompt changes", "judge", drawn.success),
    "subject_seen": Metric("", "higher", "frames that show the prompt's subject", "judge", drawn.seen("subject")),
    "background_seen": Metric("", "higher", "frames that show the prompt's background", "judge",
                              drawn.seen("background")),
    "style_seen": Metric("", "higher", "frames in the prompt's style", "judge", drawn.seen("style")),
    "preserved": Metric("", "higher", "frames that keep what the prompt does not change", "judge", drawn.preserved),
    "track_distance": Metric("px at 64", "lower", "distance of the subject's centre from the source's", "judge",
                             drawn.track_distance),
    "judge_consistency": Metric("", "higher", "mean cosine of the judge's features of all pairs of frames", "judge",
                                drawn.consistency),
}  # fmt: skip


class Opened(NamedTuple):
    """What metrics need, with the name and revision that every result tells."""

    model: Any
    name: str
    revision: str | None


def opened(need: Need, *, clip_place: str = CLIP, pick_place: str = PICK) -> Opened:
    """Open what metrics need; masks are not opened but made.

    Raises:
        ModelError: A model is not there.
    """
    if need == "clip":
        return _named(clip.Clip(clip_place), clip_place)
    if need == "pick":
        own = Path(pick_place, "tokenizer_config.json").is_file()
        return _named(clip.Clip(pick_place, None if own else PICK_PREPARED_BY), pick_place)
    if need == "flow":
        best = flow.best()
        return Opened(best, best.name, best.revision)
    if need == "judge":
        judge = Judge.open()
        return Opened(judge, "judge of the miniature", cache.key(judge))
    return Opened(None, need, None)


def _named(model: clip.Clip, place: str) -> Opened:
    """Revision: the hub's commit, or for a folder a digest of the weights."""
    found = None if Path(place).exists() else try_to_load_from_cache(place, "config.json")
    return Opened(model, place, Path(found).parent.name if isinstance(found, str) else cache.key(model.model))
