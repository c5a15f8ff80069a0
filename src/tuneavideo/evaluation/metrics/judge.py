"""Judge: a classifier and subject locator for the miniature's drawn world (trained by `tools/miniature`)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tuneavideo import miniature
from tuneavideo.video import Video, resize

STRIDES = ((1, 2), (2, 1), (2, 1), (1, 1))
WIDTHS = (16, 48, 96, 96)


class Judge(nn.Module):
    """A small convolutional classifier and locator.

    Args:
        words: The classes of `subject`, `background`, `style` and `colour`, in the order of their scores.
        pixels: Side of the pictures it was trained on, the unit of centres.
    """

    def __init__(self, words: Mapping[str, Sequence[str]], pixels: int = 64) -> None:
        super().__init__()
        self.words, self.pixels = {kind: tuple(names) for kind, names in words.items()}, pixels
        layers: list[nn.Module] = []
        for (before, after), strides in zip(pairwise((3, *WIDTHS)), STRIDES, strict=True):
            for channels, stride in zip((before, after), strides, strict=True):
                conv = nn.Conv2d(channels, after, 3, stride=stride, padding=1)
                layers += [conv, nn.GroupNorm(8, after), nn.SiLU()]
        self.features = nn.Sequential(*layers)
        self.where = nn.Conv2d(WIDTHS[-1], 1, 1)
        for kind, names in self.words.items():
            setattr(self, kind, nn.Linear(WIDTHS[-1], len(names)))
        self.offset = nn.Linear(WIDTHS[-1], 2)

    def forward(self, pictures_NCHW: Tensor, ignored_NHW: Tensor | None = None) -> dict[str, Tensor]:
        """Classify pictures and locate their subjects.

        Subject and colour use features pooled at the subject, background and style those of the whole picture.

        Args:
            pictures_NCHW: Values in -1..1.
            ignored_NHW: True where no subject is looked for.

        Returns:
            Scores of each attribute, the subject's `centre` (x and y, `N 2`) and `features` (`N D`).
        """
        features = self.features(pictures_NCHW)
        side = features.shape[-1]
        where = self.where(features)
        if ignored_NHW is not None:
            ignored = nn.functional.adaptive_max_pool2d(ignored_NHW[:, None].float(), side) > 0
            where = where.masked_fill(ignored, -torch.inf)
        attention = where.flatten(2).softmax(-1)
        found = torch.einsum("nqs,ncs->nc", attention, features.flatten(2))
        steps = (torch.arange(side, device=features.device) + 0.5) * (self.pixels / side)
        grid = torch.stack([steps.repeat(side), steps.repeat_interleave(side)])
        overall = features.mean(dim=(2, 3))
        seen = {"subject": found, "background": overall, "style": overall, "colour": found}
        scores = {kind: getattr(self, kind)(seen[kind]) for kind in self.words}
        centre = torch.einsum("ns,ds->nd", attention[:, 0], grid) + self.offset(found)
        return scores | {"centre": centre, "features": torch.cat([found, overall], dim=1)}

    def save(self, folder: Path) -> None:
        """Write weights in half precision, and the classes."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: w.half().contiguous() for name, w in self.state_dict().items()}, folder / "judge.safetensors")
        (folder / "judge.safetensors").chmod(0o644)
        (folder / "config.json").write_text(json.dumps({"pixels": self.pixels, "words": self.words}, indent=1) + "\n")

    @classmethod
    def open(cls, folder: Path = miniature.JUDGE) -> Judge:
        """Load a judge that `save` wrote; by default the bundled one."""
        judge = cls(**json.loads((folder / "config.json").read_text()))
        judge.load_state_dict({name: w.float() for name, w in load_file(folder / "judge.safetensors").items()})
        return judge.requires_grad_(False).eval()

    @torch.no_grad()
    def read(self, video: Video, ignored_THW: Tensor | None = None) -> Reading:
        """Classify every frame of a clip, resized to the judge's size; see `forward` for `ignored_THW`."""
        frames = torch.from_numpy(np.stack([resize(i, self.pixels, self.pixels, "stretch") for i in video.images]))
        scores = self(frames.permute(0, 3, 1, 2).float() / 127.5 - 1, ignored_THW)
        seen = {kind: [names[k] for k in scores[kind].argmax(1).tolist()] for kind, names in self.words.items()}
        return Reading(seen, scores["centre"], scores["features"])


@dataclass(frozen=True)
class Reading:
    """The judge's result for T frames.

    Attributes:
        seen: The predicted word of every frame, by attribute.
        centres_TD: The subject's centres, x and y, in pixels of a 64-pixel frame.
        features_TD: Features of the judge.
    """

    seen: dict[str, list[str]]
    centres_TD: Tensor
    features_TD: Tensor

    def most(self, kind: str) -> str:
        """Return the most frequent word of an attribute, the first of equals."""
        return Counter(self.seen[kind]).most_common(1)[0][0]

    def shows(self, kind: str, word: str) -> bool:
        """Return whether more than half of the frames show a word."""
        return self.seen[kind].count(word) * 2 > len(self.seen[kind])

    def track_distance(self, track_TD: Tensor) -> float:
        """Compute the mean distance of the subject's centre from a track `T 2`, in pixels of a 64-pixel frame."""
        return float((self.centres_TD - track_TD).norm(dim=1).mean())

    def consistency(self) -> float:
        """Compute the mean cosine of the features over all pairs of frames, 1 for a static clip."""
        unit = nn.functional.normalize(self.features_TD, dim=1)
        frames = len(unit)
        return float(((unit @ unit.T).sum() - frames) / (frames * (frames - 1)))
