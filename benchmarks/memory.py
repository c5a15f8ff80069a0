"""Memory estimates of tuning Stable Diffusion, without a GPU; writes benchmarks/results/memory.json.

    python -m benchmarks.memory

Counted on torch's meta device, in bf16 as autocast computes on a GPU, without and with Triton kernels (which must be
installed): weights, gradients and Adam's moments, and the tensors that autograd saves. Not counted: what a kernel needs
while it runs, and what the allocator wastes. A lower bound, therefore.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from tuneavideo.bases import BASES
from tuneavideo.kernels import traced_on_meta
from tuneavideo.models.loading import CONFIGS, FAMILIES
from tuneavideo.settings import TuneSettings
from tuneavideo.training import memory_trace

RESULTS = Path(__file__).parent / "results" / "memory.json"
FRAMES = (4, 8, 12, 16, 24)


def weights(folder: Path) -> int:
    """Count the parameters of a family's autoencoder and text encoders."""
    kinds = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    encoders = [kind(kind.config_class.from_pretrained(folder / name))
                for name, kind in kinds.items() if (folder / name).is_dir()]  # fmt: skip
    autoencoder = AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae"))
    return sum(parameter.numel() for model in (autoencoder, *encoders) for parameter in model.parameters())


class Family:
    """Models of one shape on the meta device, inflated for tuning."""

    def __init__(self, name: str, by_kernels: bool = False) -> None:
        with torch.device("meta"):
            rest = 2 * weights(CONFIGS / name)
        config = UNet2DConditionModel.load_config(CONFIGS / name / "unet")
        self.by_kernels = by_kernels
        self.video = memory_trace.blank_unet(config, TuneSettings(video="-", prompt="-"), by_kernels)
        unet = self.video.unet
        self.learned = sum(parameter.numel() for parameter in unet.parameters() if parameter.requires_grad)
        frozen = sum(parameter.numel() for parameter in unet.parameters()) - self.learned
        self.fixed = 2 * frozen + 4 * 4 * self.learned + rest  # weight, gradient and two moments in float32

    def gb(self, frames: int, side: int, checkpointing: bool) -> float:
        with traced_on_meta() if self.by_kernels else nullcontext():
            saved = memory_trace.saved(self.video, frames, side, side, checkpointing, casts=True)
        return round((self.fixed + saved) / 1e9, 1)


def main() -> None:
    families = {name: Family(name) for name in FAMILIES.values()}
    sd1, by_kernels = families["sd1"], Family("sd1", by_kernels=True)
    rows = {
        frames: {
            "checkpointing_gb": sd1.gb(frames, 64, True), "plain_gb": sd1.gb(frames, 64, False),
            "kernels_checkpointing_gb": by_kernels.gb(frames, 64, True),
            "kernels_plain_gb": by_kernels.gb(frames, 64, False),
        }
        for frames in FRAMES
    }  # fmt: skip
    bases = {name: families[base.family].gb(base.frames, base.settings["resolution"] // 8, True)
             for name, base in BASES.items() if base.family}  # fmt: skip
    fixed = round(sd1.fixed / 1e9, 1)
    result = {"what": "lower bound, SD1.5 512x512 bf16, batch 1", "learned": sd1.learned, "fixed_gb": fixed}
    result |= {"frames": rows, "bases_gb": bases}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
