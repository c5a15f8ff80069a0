"""How good an edit is: one file per family of metrics, and the table of them all.

sample.py      what is measured: an edit and the clip it was made of
clip.py        CLIP frame consistency, text alignment and direction; PickScore
background.py  PSNR and SSIM outside a mask
flow.py        optical flow, by OpenCV or torchvision
warp.py        warp error
motion.py      motion fidelity
flicker.py     temporal flicker
judge.py       the judge of the miniature world
drawn.py       what the judge sees of an edit on the miniature
table.py       names, units, directions, and published numbers to stand beside
"""

import difflib

from tuneavideo.errors import SettingsError

NAMES = (
    "clip_frame", "clip_text", "pick_score", "clip_direction", "background_psnr", "background_ssim", "warp_error",
    "motion_fidelity", "motion_fidelity_all", "flicker", "success", "subject_seen", "background_seen", "style_seen",
    "preserved", "track_distance", "judge_consistency",
)  # fmt: skip
"""Names of the metrics in `table`, which imports torch."""


def check_metric(name: str) -> None:
    """Raise SettingsError when there is no such metric."""
    if name not in NAMES:
        near = difflib.get_close_matches(name.lower(), NAMES, n=1)
        advice = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(NAMES)}"
        raise SettingsError(f"unknown metric {name!r}; {advice}")
