"""Export of the trained parts as a Stable Diffusion folder in half precision, and of the judge."""

from __future__ import annotations

import json
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from tools.miniature import autoencoder, diffusion
from tools.miniature.judge import WORDS
from tools.miniature.text import new_tokenizer
from tools.miniature.training import load
from tools.miniature.world import words

from tuneavideo.evaluation.metrics.judge import Judge

PARTS = {
    "autoencoder": "autoencoder", "decoder alone": "decoder", "UNet and text encoder": "diffusion", "judge": "judge",
}  # fmt: skip


def history(build: Path) -> str:
    """Describe how long every part was trained."""
    described: list[str] = []
    for name, part in PARTS.items():
        if state := load(build / f"{part}.pt"):
            described += [state.get("before") or f"{name} {_took(state)}"]
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} cores"
    return ", ".join(described) + f", on {where} ({platform.machine()})"


def _took(state: dict[str, Any]) -> str:
    return f"{state['worked'] / 60:.1f} minutes ({state['step']} steps, {state['seen']} pictures)"


def export(build: Path, product: Path) -> None:
    """Write `product/model` from the states under `build`, and `product/judge` if a judge is trained."""
    vae = autoencoder.finished(build)
    painter = diffusion.finished(build, vae)
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=painter.text, tokenizer=new_tokenizer(words()), unet=painter.unet,
        scheduler=diffusion.new_scheduler(), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    fresh = product / "model.part"
    shutil.rmtree(fresh, ignore_errors=True)
    pipeline.to(torch.float16).save_pretrained(fresh, safe_serialization=True)
    # transformers opens in the precision the config names, diffusers in float32: stock pipelines need both the same
    config = fresh / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
    for file in fresh.rglob("*.safetensors"):
        file.chmod(0o644)
    (fresh / "training.json").write_text(json.dumps({"training": history(build)}) + "\n")
    shutil.rmtree(product / "model", ignore_errors=True)
    fresh.rename(product / "model")
    if state := load(build / "judge.pt"):
        judge = Judge(WORDS)
        judge.load_state_dict(state["model"])
        judge.save(product / "judge")
