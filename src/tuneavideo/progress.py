"""Progress of jobs: events, the time left, and tqdm bars."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Step:
    """One optimiser step.

    Attributes:
        number: Number of the step, from 1.
        loss: Mean loss over the processes.
        learning_rate: Learning rate after the step.
        seconds: Duration of the step.
        memory: Peak memory of the step on a GPU, otherwise resident memory of the process at its end, in bytes; 0 if
            not measured.
        relative_loss: `loss` divided by that of the untuned model at the same timesteps, about 1 at first; None if
            unknown.
    """

    number: int
    loss: float
    learning_rate: float
    seconds: float
    memory: int = 0
    relative_loss: float | None = None


@dataclass(frozen=True)
class Progress:
    """Progress of a job after a step.

    Attributes:
        stage: `plan` (a line that describes the job), `open` (the base is loaded), `memory` (a line on the memory
            plan), `encode`, `tune`, `preview`, `invert`, `edit`, `picture`, `evaluate` or `benchmark`; empty when the
            job can be stopped and there is nothing new.
        number: Number of steps of the stage that are done.
        total: Number of steps of the stage.
        step: The tuning step, after each.
        path: The file or folder that was finished.
        about: The line, the prompt of the edit, or the base.
        ahead: Number of steps of each stage to come, with a `plan`.
        scores: Scores of the edits of a run, in the form of `scores.json`; or what was measured.
        picture: Function that decodes a few frames of the edits as they are after this step, uint8 `H W 3`; to be
            called before the next step.
    """

    stage: str
    number: int = 0
    total: int = 0
    step: Step | None = None
    path: Path | None = None
    about: str = ""
    scores: Mapping[str, Any] | None = None
    ahead: Mapping[str, int] = field(default_factory=dict)
    picture: Callable[[], Any] | None = None


Events = Generator[Progress, None, None]

WORK = {"tune": 3.0, "preview": 2.5, "invert": 1.0, "edit": 3.0}  # approximate evaluations of the UNet per step
ORDER = ("tune", "invert", "edit")


class TimeLeft:
    """The time until a job is done: the steps ahead at the pace of the stage, or at a pace estimated by its work."""

    def __init__(self) -> None:
        self.ahead: dict[str, int] = {}
        self.made: dict[str, tuple[int, float]] = {}
        self.at, self.since = ("", 0), 0.0

    def note(self, each: Progress, now: float) -> None:
        """Record an event at the time `now`, in seconds of any clock."""
        if not each.stage:
            return
        self.ahead |= each.ahead
        if each.total and not each.path:
            begun = self.at[1] if self.at[0] == each.stage and self.at[1] < each.number else 0
            steps = 1 if not begun else each.number - begun
            self.ahead[each.stage] = max(0, self.ahead.get(each.stage, each.total - each.number + steps) - steps)
            for earlier in ORDER[: ORDER.index(each.stage)] if each.stage in ORDER else ():
                self.ahead[earlier] = 0  # an inversion may be read from the run folder
            if self.at[0] == each.stage and self.at[1]:  # the first step of a stage includes preparations
                before, seconds = self.made.get(each.stage, (0, 0.0))
                self.made[each.stage] = before + steps, seconds + now - self.since
        self.at, self.since = (each.stage, each.number), now

    def seconds(self) -> float | None:
        """Return the time left in seconds; None before the first step."""
        spent = sum(seconds for _, seconds in self.made.values())
        work = sum(WORK.get(stage, 1.0) * steps for stage, (steps, _) in self.made.items())
        if not work:
            return None
        paces = {stage: seconds / steps for stage, (steps, seconds) in self.made.items()}
        return sum(steps * paces.get(stage, WORK.get(stage, 1.0) * spent / work) for stage, steps in self.ahead.items())


class Bars:
    """A listener that shows each stage of a job as a tqdm bar; `TQDM_DISABLE=1` turns all of them off."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._shown: tuple[str, str] | None = None

    def __call__(self, each: Progress) -> None:
        from tqdm.auto import tqdm

        if not each.total:
            return
        if self._shown != (each.stage, each.about):
            self.close()
            name = f"{each.stage}: {each.about}" if each.about else each.stage
            self._bar, self._shown = tqdm(total=each.total, desc=name[:60]), (each.stage, each.about)
        if each.step:
            self._bar.set_postfix(loss=f"{each.step.loss:.3g}", refresh=False)
        self._bar.update(each.number - self._bar.n)

    def close(self) -> None:
        """Close the bar of the last stage, which stays visible."""
        if self._bar is not None:
            self._bar.close()
