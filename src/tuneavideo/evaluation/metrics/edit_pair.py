"""The input of every metric: an edit and its source clip. T frames, H rows, W columns."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tuneavideo.video import Video

Features = TypeVar("Features")


class NotMeasurable(Exception):
    """The reason why a metric has no value for an edit."""


@dataclass
class CachedVideo:
    """A video and the features extracted from it, which several metrics share."""

    video: Video
    extracted: dict[Hashable, Any] = field(default_factory=dict)

    def features(self, extract: Callable[[Video], Features]) -> Features:
        """Return `extract(video)`, computed at the first call."""
        if extract not in self.extracted:
            self.extracted[extract] = extract(self.video)
        return self.extracted[extract]


@dataclass(frozen=True)
class EditPair:
    """An edit and its source, with as many frames of the same size.

    Attributes:
        original: The source clip, or the reason why there is none. Metrics read it as `source`.
        edit: The edited clip.
        caption: The prompt of the source.
        prompt: The prompt of the edit.
    """

    original: CachedVideo | str
    edit: CachedVideo
    caption: str
    prompt: str

    @property
    def source(self) -> CachedVideo:
        """The source clip. Raises NotMeasurable if there is none."""
        if isinstance(self.original, str):
            raise NotMeasurable(self.original)
        return self.original
