"""What jobs tell while they work."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Step:
    """One optimiser step.

    Attributes:
        number: Counted from 1.
        loss: Mean over processes.
        learning_rate: After the step.
        seconds: It took.
        memory: Bytes: the most allocated on a GPU in this step, or resident memory of the process at its end; 0 if not
            measured.
        relative_loss: `loss` over that of the untuned model at the same timesteps, about 1 at first; None if unknown.
    """

    number: int
    loss: float
    learning_rate: float
    seconds: float
    memory: int = 0
    relative_loss: float | None = None


@dataclass(frozen=True)
class Progress:
    """Where a job stands.

    Attributes:
        stage: `plan` (a line on what will be done), `open`, `memory` (what was chosen to fit), `encode`, `tune`,
            `preview`, `invert`, `edit`, `picture`, `evaluate` or `benchmark`; empty if there is nothing new, and the
            job can be stopped here.
        number: Steps of the stage that are done.
        total: Steps of the stage.
        step: The tuning step just made.
        path: The file or folder just finished.
        about: The prompt being edited, the base being opened, and the like.
        ahead: Steps of the stages to come, by stage; with a `plan`.
        scores: What was measured of a run's edits, in the form of `scores.json`.
    """

    stage: str
    number: int = 0
    total: int = 0
    step: Step | None = None
    path: Path | None = None
    about: str = ""
    scores: Mapping[str, Any] | None = None
    ahead: Mapping[str, int] = field(default_factory=dict)


Events = Generator[Progress, None, None]

WORK = {"tune": 3.0, "preview": 2.5, "invert": 1.0, "edit": 3.0}  # predictions of the network in a step, about
ORDER = ("tune", "invert", "edit")


class TimeLeft:
    """Seconds until a job is done: steps ahead at the pace of those made, other stages judged by their work."""

    def __init__(self) -> None:
        self.ahead: dict[str, int] = {}
        self.made: dict[str, tuple[int, float]] = {}
        self.at, self.since = ("", 0), 0.0

    def note(self, each: Progress, now: float) -> None:
        """Count what was made until `now`, in seconds of any clock."""
        if not each.stage:
            return
        self.ahead |= each.ahead
        if each.total and not each.path:
            begun = self.at[1] if self.at[0] == each.stage and self.at[1] < each.number else 0
            steps = 1 if not begun else each.number - begun
            self.ahead[each.stage] = max(0, self.ahead.get(each.stage, each.total - each.number + steps) - steps)
            for earlier in ORDER[: ORDER.index(each.stage)] if each.stage in ORDER else ():
                self.ahead[earlier] = 0  # an inversion may have been kept
            if self.at[0] == each.stage and self.at[1]:  # other things are done before the first step of a stage
                before, seconds = self.made.get(each.stage, (0, 0.0))
                self.made[each.stage] = before + steps, seconds + now - self.since
        self.at, self.since = (each.stage, each.number), now

    def seconds(self) -> float | None:
        """None as long as nothing was made."""
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
        """Leave the bar of the last stage as it is."""
        if self._bar is not None:
            self._bar.close()
