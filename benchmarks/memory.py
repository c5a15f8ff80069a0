"""What tuning Stable Diffusion 1.5 has to hold in memory, counted without a GPU; writes benchmarks/results/memory.json.

    python -m benchmarks.memory

Counted on torch's meta device, in bf16: weights, gradients and Adam's moments, and the tensors that autograd saves. Not
counted: what a kernel needs while it runs, casts of autocast, and what the allocator wastes. A lower bound, therefore.
"""

from __future__ import annotations

import json
from pathlib import Path

from tuneavideo import counting
from tuneavideo.adapter import tuned_parameters
from tuneavideo.settings import Inflation, TuneSettings

RESULTS = Path(__file__).parent / "results" / "memory.json"
SD15 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
FRAMES = (4, 8, 12, 16, 24)
VAE_AND_TEXT = 2 * (83_653_863 + 123_060_480)  # parameters of the published models, in bytes of bf16


def main() -> None:
    trainable = TuneSettings.model_fields["trainable_modules"].default
    video = counting.blank_unet(SD15, trainable, (), Inflation())
    learned = sum(parameter.numel() for parameter in tuned_parameters(video.unet, trainable).values())
    frozen = sum(parameter.numel() for parameter in video.unet.parameters()) - learned
    fixed = 2 * frozen + 4 * 4 * learned + VAE_AND_TEXT  # weight, gradient and two moments in float32
    rows = {
        frames: {
            "checkpointing_gb": round((fixed + counting.saved(video, frames, 64, 64, True)) / 1e9, 1),
            "plain_gb": round((fixed + counting.saved(video, frames, 64, 64, False)) / 1e9, 1),
        }
        for frames in FRAMES
    }
    result = {"what": "lower bound, SD1.5 512x512 bf16, batch 1", "learned": learned, "fixed_gb": round(fixed / 1e9, 1)}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result | {"frames": rows}, indent=1) + "\n")
    print(json.dumps(result | {"frames": rows}, indent=1))


if __name__ == "__main__":
    main()
