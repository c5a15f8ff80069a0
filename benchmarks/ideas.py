"""Variants of the miniature benchmark, with the hypothesis and the decision on each."""

from __future__ import annotations

from typing import Any, NamedTuple

OFFICIAL = {"preset": "official", "guidance_scale": 3.0, "learning_rate": 3e-4, "max_train_steps": 150}
"""The published arithmetic with the best of the rates and numbers of steps in `SWEEP`."""
BRIEF = {"num_inference_steps": 25, "num_inv_steps": 25, "guidance_scale": 3.0}
SWEEP = {
    f"official, rate {rate:g}, {steps} steps": {
        "preset": "official",
        **BRIEF,
        "learning_rate": rate,
        "max_train_steps": steps,
    }
    for rate in (3e-4, 1e-3, 3e-3)
    for steps in (75, 150)
}
"""The published arithmetic at rates and numbers of steps to choose from."""
ANCHOR = {"preset": "official", **BRIEF, "learning_rate": 1e-3, "max_train_steps": 75}
"""What single ideas are added to."""


class Idea(NamedTuple):
    """A change to the anchor, its hypothesis, and the decision with its reason."""

    change: dict[str, Any]
    expected: str
    decision: str = ""


IDEAS = {
    "down blocks learn": Idea(
        {"frozen_modules": ()},
        "the layers that the published code froze help",
        "kept as a correction of the published code: no measurable difference",
    ),
    "temporal attention starts at zero": Idea(
        {"temporal_init": "zero"},
        "tuning starts from the image model",
        "kept as a correction (tuning starts from the image model): no measurable difference",
    ),
    "norms per frame": Idea(
        {"clip_norm": False},
        "frames keep what the image model knows of contrast",
        "not taken: measured on one clip only",
    ),
    "references first + own": Idea(
        {"references": ("first", "own")}, "every frame sees itself: sharper", "not taken: measured on one clip only"
    ),
    "min-SNR 5": Idea(
        {"snr_gamma": 5.0}, "timesteps count more evenly", "not taken: nothing gained, measured on one clip only"
    ),
    "attention injected, 0.4": Idea(
        {"attention_injection": 0.4}, "layout and motion of the clip are kept", "see 0.6; measured on one clip only"
    ),
    "attention injected, 0.6": Idea({"attention_injection": 0.6}, "the same, longer", "kept: the default"),
    "attention injected, 0.8": Idea(
        {"attention_injection": 0.8},
        "the same, nearly to the end",
        "not taken: with temporal consistency 0.6 keeps the motion as well",
    ),
    "guidance 5": Idea(
        {"guidance_scale": 5.0},
        "the prompt is followed more",
        "not alone; kept with attention injection, which needs it to change enough",
    ),
    "guidance in the first 0.6": Idea(
        {"guidance_interval": (0.0, 0.6)},
        "a fifth less work, nothing lost",
        "an option: an eighth less work for a little",
    ),
    "fresh noise 0.2": Idea(
        {"fresh_noise": 0.2},
        "noise more like that of training: better pictures, looser track",
        "an option: seeds differ",
    ),
    "strength 0.8": Idea(
        {"strength": 0.8}, "nearer to the clip for less work", "an option: nearer the track, changes less"
    ),
}

_OURS = {
    "temporal_consistency": 0.0,
    "num_inference_steps": 25,
    "num_inv_steps": 25,
    "max_train_steps": 75,
    "attention_injection": 0.6,
    "guidance_scale": 5.0,
}
COMBINATIONS: dict[str, dict[str, Any]] = {
    "ours": _OURS,
    "ours, 40 steps": _OURS | {"max_train_steps": 40},
    "ours, guidance 4": _OURS | {"guidance_scale": 4.0},
    "ours, injected 0.75": _OURS | {"attention_injection": 0.75},
    "ours, 40 steps, injected 0.75": _OURS | {"max_train_steps": 40, "attention_injection": 0.75},
    "ours, dpm++ in 12 steps": _OURS | {"sampler": "dpm++", "num_inference_steps": 12, "num_inv_steps": 12},
    "ours, not tuned": _OURS | {"max_train_steps": 1, "learning_rate": 1e-9},
}
"""What survived, together."""
BEFORE = {"temporal_consistency": 0.0, "attention_injection": 0.75}
"""The default before there was temporal consistency."""
RANKS: dict[str, dict[str, Any]] = {f"rank {rank}": {"lora_rank": rank, **BEFORE} for rank in (4, 16, 64)}
"""Adapters of LoRAs, with the other settings of `default, not consistent`."""
REPORTED = ("default", "official", "untuned", "official, not tuned")
"""What is measured on the clips that nothing was chosen by."""
STEADY: dict[str, dict[str, Any]] = {"default, not consistent": BEFORE}
"""What temporal consistency is compared with."""
