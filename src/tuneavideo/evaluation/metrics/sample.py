"""What is measured: an edit beside the clip it was made of. T frames, H rows, W columns."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tuneavideo.video import Video

Found = TypeVar("Found")


class NotMeasurable(Exception):
    """A metric has no value for this edit; says why."""


@dataclass
class Shown:
    """A clip, and what was found out about it: it is found out once, by however many metrics."""

    video: Video
    known: dict[Hashable, Any] = field(default_factory=dict)

    def once(self, find: Callable[[Video], Found]) -> Found:
        """What `find` says of the clip."""
        if find not in self.known:
            self.known[find] = find(self.video)
        return self.known[find]


@dataclass(frozen=True)
class Sample:
    """An edit, its `source` of as many frames and the same size, the source's `caption` and the edit's `prompt`."""

    source: Shown
    edit: Shown
    caption: str
    prompt: str
