"""What jobs tell while they work."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Step:
    """One optimiser step: `loss` (mean over processes), `learning_rate`, `seconds` it took, `memory` in bytes."""

    number: int
    loss: float
    learning_rate: float
    seconds: float
    memory: int


@dataclass(frozen=True)
class Progress:
    """Where a job stands.

    Attributes:
        stage: `open`, `memory` (what was chosen to fit), `encode`, `tune`, `preview`, `invert`, `edit`, `picture` or
            `evaluate`.
        number: Steps of the stage that are done.
        total: Steps of the stage.
        step: The tuning step just made.
        path: The file or folder just finished.
        about: The prompt being edited, and the like.
        scores: What was measured of a run's edits, in the form of `scores.json`.
    """

    stage: str
    number: int = 0
    total: int = 0
    step: Step | None = None
    path: Path | None = None
    about: str = ""
    scores: Mapping[str, Any] | None = None


Job = Generator[Progress, None, None]
