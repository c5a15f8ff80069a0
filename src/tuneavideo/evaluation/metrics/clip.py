"""Scores by CLIP, as the script of LOVEU-TGVE-2023 (`scripts/run_eval.py`) defines them, and CLIP's direction.

PickScore is a CLIP tuned on what people prefer, and its formula that of text alignment.
"""

from __future__ import annotations

from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from huggingface_hub import model_info
from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.errors import HFValidationError, HTTPError, RepositoryNotFoundError
from PIL import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

from tuneavideo.errors import ModelError
from tuneavideo.evaluation.metrics.sample import NotMeasurable, Sample
from tuneavideo.video import Video

SIDE = 480
"""Frames are brought to this side by Pillow before CLIP's own preparation, as the benchmark does."""
BATCH = 16
FAULTS = (OSError, ValueError, KeyError, HTTPError)
"""What opening raises of files that are missing or damaged, of unknown names and of a hub that does not answer."""


class Clip:
    """A CLIP with its tokenizer and image processor.

    Args:
        place: Hub id or folder of the model.
        prepared_by: Hub id or folder of tokenizer and image processor; by default the model's own.

    Raises:
        ModelError: One of them is not there.
    """

    def __init__(self, place: str, prepared_by: str | None = None) -> None:
        self.model = _loaded(CLIPModel, place).requires_grad_(False).eval().to(PartialState().device)
        self.tokenizer = _loaded(AutoTokenizer, prepared_by or place)
        self.pictures = _loaded(AutoImageProcessor, prepared_by or place, backend="pil")  # same numbers everywhere

    @property
    def scale(self) -> float:
        """What cosines are multiplied by: the exponential of what the model has learned."""
        return float(self.model.logit_scale.exp())

    @torch.no_grad()
    def images(self, video: Video) -> Tensor:
        """Features of unit length, `T D`."""
        frames = video.frames_THWC
        return torch.cat([self._features(frames[t : t + BATCH]) for t in range(0, len(frames), BATCH)])

    def _features(self, frames_THWC: np.ndarray) -> Tensor:
        pictures = [Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC) for image in frames_THWC]
        prepared = self.pictures(images=pictures, return_tensors="pt").to(self.model.device)
        return normalize(self.model.get_image_features(**prepared).pooler_output, dim=-1).float().cpu()

    @torch.no_grad()
    def text(self, prompt: str) -> Tensor:
        """Features of unit length, `D`; words beyond what the model takes are left out."""
        tokens = self.tokenizer([prompt], truncation=True, return_tensors="pt").to(self.model.device)
        return normalize(self.model.get_text_features(**tokens).pooler_output, dim=-1)[0].float().cpu()


def frame_consistency(sample: Sample, clip: Clip) -> float:
    """Mean cosine of the features of all pairs of different frames, at most 1."""
    features = sample.edit.once(clip.images)
    frames = len(features)
    if frames < 2:
        raise NotMeasurable("one frame has no other to agree with")
    cosines = features @ features.T
    return float(cosines.fill_diagonal_(0).sum() / (frames * (frames - 1)))


def text_alignment(sample: Sample, clip: Clip) -> float:
    """Mean over frames of the model's scale (100 for CLIP ViT-L/14) times the cosine of picture and prompt."""
    return float((sample.edit.once(clip.images) @ clip.text(sample.prompt)).mean()) * clip.scale


def direction(sample: Sample, clip: Clip) -> float:
    """Mean over frames of the cosine of the change of the picture and the change of the caption, -1..1.

    Source: StyleGAN-NADA (Gal et al. 2021), on features of unit length as InstructPix2Pix (Brooks et al. 2023) has it.
    """
    if sample.prompt == sample.caption:
        raise NotMeasurable("the prompt is the caption: no change was asked for")
    asked = clip.text(sample.prompt) - clip.text(sample.caption)
    change = sample.edit.once(clip.images) - sample.source.once(clip.images)
    return float(cosine_similarity(change, asked[None], dim=-1).mean())


def _loaded(kind: Any, place: str, **options: Any) -> Any:
    """From a folder or the hub's cache; what is in neither is downloaded, if the hub answers a first question."""
    try:
        try:
            return kind.from_pretrained(place, local_files_only=True, **options)
        except FAULTS:
            if Path(place).exists() or HF_HUB_OFFLINE:
                raise
        model_info(place, timeout=10)  # a download without a network is tried again and again, for a minute
        return kind.from_pretrained(place, **options)
    except FAULTS as error:
        raise ModelError(
            f"{place} cannot be opened: {_why(place, error)}; give a folder (--clip, --pick), or 'hf download {place}' "
            "where there is a network"
        ) from error


def _why(place: str, error: Exception) -> str:
    if Path(place).exists():
        return shorten(str(error), 160, placeholder=" ...")
    if isinstance(error, RepositoryNotFoundError | HFValidationError):
        return "there is no such folder, and no such model on the hub"
    hub = "HF_HUB_OFFLINE is set" if HF_HUB_OFFLINE else "the hub cannot be reached"
    return f"it is not in the hub's cache, and {hub}"
