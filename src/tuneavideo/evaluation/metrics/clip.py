"""CLIP scores as defined by the script of LOVEU-TGVE-2023 (`scripts/run_eval.py`), and CLIP direction.

PickScore is a CLIP fine-tuned on human preferences; its formula is that of text alignment.
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
from tuneavideo.evaluation.metrics.edit_pair import EditPair, NotMeasurable
from tuneavideo.video import Video

SIDE = 480
"""Side to which Pillow resizes frames before CLIP's own image processor, as in the benchmark."""
BATCH = 16
LOAD_ERRORS = (OSError, ValueError, KeyError, HTTPError)
"""Errors of missing or damaged files, unknown names and a hub that does not answer."""


class ClipModel:
    """A CLIP model with its tokenizer and image processor.

    Args:
        source: Hub id or folder of the model.
        processors: Hub id or folder of tokenizer and image processor; by default `source`.

    Raises:
        ModelError: One of them cannot be loaded.
    """

    def __init__(self, source: str, processors: str | None = None) -> None:
        self.model = _load(CLIPModel, source).requires_grad_(False).eval().to(PartialState().device)
        self.tokenizer = _load(AutoTokenizer, processors or source)
        self.image_processor = _load(AutoImageProcessor, processors or source, backend="pil")  # same on all machines

    @property
    def scale(self) -> float:
        """The learned factor of cosines: the exponential of `logit_scale`."""
        return float(self.model.logit_scale.exp())

    @torch.no_grad()
    def images(self, video: Video) -> Tensor:
        """Compute the frames' image features of unit length, `T D`."""
        frames = video.frames_THWC
        return torch.cat([self._features(frames[t : t + BATCH]) for t in range(0, len(frames), BATCH)])

    def _features(self, frames_THWC: np.ndarray) -> Tensor:
        pictures = [Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC) for image in frames_THWC]
        prepared = self.image_processor(images=pictures, return_tensors="pt").to(self.model.device)
        return normalize(self.model.get_image_features(**prepared).pooler_output, dim=-1).float().cpu()

    @torch.no_grad()
    def text(self, prompt: str) -> Tensor:
        """Compute a prompt's text features of unit length, `D`; tokens beyond the model's limit are left out."""
        tokens = self.tokenizer([prompt], truncation=True, return_tensors="pt").to(self.model.device)
        return normalize(self.model.get_text_features(**tokens).pooler_output, dim=-1)[0].float().cpu()


def frame_consistency(pair: EditPair, clip: ClipModel) -> float:
    """Compute the mean cosine of the image features over all pairs of different frames, at most 1."""
    features = pair.edit.features(clip.images)
    frames = len(features)
    if frames < 2:
        raise NotMeasurable("one frame has no other to agree with")
    cosines = features @ features.T
    return float(cosines.fill_diagonal_(0).sum() / (frames * (frames - 1)))


def text_alignment(pair: EditPair, clip: ClipModel) -> float:
    """Compute the mean over frames of the scale (100 for CLIP ViT-L/14) times the cosine of image and prompt."""
    return float((pair.edit.features(clip.images) @ clip.text(pair.prompt)).mean()) * clip.scale


def direction(pair: EditPair, clip: ClipModel) -> float:
    """Compute the mean over frames of the cosine of the image's change and the caption's change, -1..1.

    Source: StyleGAN-NADA (Gal et al. 2021), on features of unit length as in InstructPix2Pix (Brooks et al. 2023).
    """
    if pair.prompt == pair.caption:
        raise NotMeasurable("the prompt is the caption, so it requests no change")
    text_change = clip.text(pair.prompt) - clip.text(pair.caption)
    image_change = pair.edit.features(clip.images) - pair.source.features(clip.images)
    return float(cosine_similarity(image_change, text_change[None], dim=-1).mean())


def _load(kind: Any, source: str, **options: Any) -> Any:
    """Load from a folder or the hub's cache, or else download if the hub answers one short request."""
    try:
        try:
            return kind.from_pretrained(source, local_files_only=True, **options)
        except LOAD_ERRORS:
            if Path(source).exists() or HF_HUB_OFFLINE:
                raise
        model_info(source, timeout=10)  # a download without a network is tried again and again, for a minute
        return kind.from_pretrained(source, **options)
    except LOAD_ERRORS as error:
        raise ModelError(
            f"{source} cannot be loaded: {_load_problem(source, error)}; give a folder (--clip, --pick), or run "
            f"'hf download {source}' where there is a network"
        ) from error


def _load_problem(source: str, error: Exception) -> str:
    if Path(source).exists():
        return shorten(str(error), 160, placeholder=" ...")
    if isinstance(error, RepositoryNotFoundError | HFValidationError):
        return "there is no such folder, and no such model on the hub"
    hub = "HF_HUB_OFFLINE is set" if HF_HUB_OFFLINE else "the hub cannot be reached"
    return f"it is not in the hub's cache, and {hub}"
