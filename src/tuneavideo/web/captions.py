"""Captions of clips by a captioning model that is on this computer; nothing is downloaded.

The model runs on the CPU, beside jobs, in a process of its own: `python -m tuneavideo.web.captions`.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from tuneavideo.errors import ModelError
from tuneavideo.web.requests import answer, answer_of, short

KINDS = ("blip", "git", "vision-encoder-decoder")  # `model_type` of models that need no prompt
WORDS = 30  # most tokens of a caption
LONGEST = 180.0  # seconds


class Captioner:
    """The captioning model of the page.

    Args:
        model: Folder or hub id. None: the first one in the hub's cache.
    """

    def __init__(self, model: str | None = None) -> None:
        self.model, self._turn = model, asyncio.Lock()

    @cached_property
    def folder(self) -> Path | None:
        """The folder of the model; None if there is none on this computer."""
        if self.model and Path(self.model).is_dir():
            return Path(self.model)
        return next((folder for folder in cached(self.model) if kind_of(folder) in KINDS), None)

    @property
    def is_available(self) -> bool:
        return self.folder is not None

    async def describe(self, picture: str) -> str:
        """Return a caption of a PNG picture (base64). Raises ModelError without a model, or when it fails."""
        if self.folder is None:
            raise ModelError("there is no captioning model on this computer; give one with --captions")
        hidden = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        async with self._turn:
            answer = await answer_of(
                "tuneavideo.web.captions", {"folder": str(self.folder), "picture": picture}, seconds=LONGEST,
                kind=ModelError, what="captioning", env=os.environ | hidden,
            )  # fmt: skip
        return answer["caption"]


def cached(model: str | None = None) -> Iterator[Path]:
    """Yield the folders of the models with weights in the hub's cache, or of the one with an id."""
    from huggingface_hub.constants import HF_HUB_CACHE

    name = f"models--{model.replace('/', '--')}" if model else "models--*"
    for config in sorted(Path(HF_HUB_CACHE).glob(f"{name}/snapshots/*/config.json")):
        if any(config.parent.glob("*.safetensors")) or any(config.parent.glob("pytorch_model*.bin")):
            yield config.parent


def kind_of(folder: Path) -> str:
    """Return the `model_type` of a model's config; empty if it cannot be read."""
    try:
        return str(json.loads((folder / "config.json").read_bytes())["model_type"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def caption(folder: str, picture: str) -> dict[str, str]:
    """Describe a PNG picture (base64) with the model of a folder; return the words as `caption`."""
    import torch
    from PIL import Image
    from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

    image = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    model: Any = AutoModelForImageTextToText.from_pretrained(folder, **options).eval()
    pixels = AutoImageProcessor.from_pretrained(folder, **options)(images=image, return_tensors="pt").pixel_values
    with torch.inference_mode():
        [tokens] = model.generate(pixel_values=pixels, max_new_tokens=WORDS, do_sample=False)
    words = AutoTokenizer.from_pretrained(folder, **options).decode(tokens, skip_special_tokens=True).split()
    return {"caption": " ".join(words)}


if __name__ == "__main__":
    answer(caption, lambda error, _: f"the captioning model failed: {short(error)}")
