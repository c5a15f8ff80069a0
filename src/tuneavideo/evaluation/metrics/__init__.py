"""Metrics of an edit and its source clip, one module per family.

edit_pair.py      the input of every metric: an edit and its source
clip.py           CLIP frame consistency, text alignment and direction; PickScore
background.py     PSNR and SSIM outside a mask
flow.py           optical flow, by OpenCV or torchvision
warp.py           warp error
motion.py         motion fidelity
flicker.py        temporal flicker
judge.py          the classifier of the miniature's drawn world
judge_metrics.py  metrics that use this classifier
table.py          names, units, directions, published baselines
"""

from __future__ import annotations

import difflib

from tuneavideo.errors import SettingsError

NAMES = (
    "clip_frame", "clip_text", "pick_score", "clip_direction", "background_psnr", "background_ssim", "warp_error",
    "motion_fidelity", "motion_fidelity_all", "flicker", "success", "subject_seen", "background_seen", "style_seen",
    "preserved", "track_distance", "judge_consistency",
)  # fmt: skip
"""Names of the metrics in `table`, which imports torch."""


def check_metric(name: str) -> None:
    """Raise SettingsError for the name of a metric that does not exist."""
    if name not in NAMES:
        near = difflib.get_close_matches(name.lower(), NAMES, n=1)
        advice = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(NAMES)}"
        raise SettingsError(f"unknown metric {name!r}; {advice}")


def format_score(value: float | None, digits: int = 4) -> str:
    """Format a score with this many significant digits, or as a dash if there is none."""
    return "-" if value is None else f"{value:#.{digits}g}"
