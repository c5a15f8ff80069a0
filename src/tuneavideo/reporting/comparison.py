"""Runs beside each other: edits of the same prompt, their scores as bars, settings that differ."""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from tuneavideo.reporting.contents import Edit, Metric, Run, Score
from tuneavideo.reporting.formatting import basename, plain
from tuneavideo.settings import TuneSettings

TASK = {"video", "prompt", "edit", "preset"}  # settings that say what a run is of, not how it was made


class Row(NamedTuple):
    """Edits of one prompt, by run; None where a run has none. `which` tells rows of the same prompt apart."""

    prompt: str
    edits: list[Edit | None]
    which: str = ""

    @property
    def label(self) -> str:
        return f"{self.prompt} ({self.which})" if self.which else self.prompt


def rows(runs: Sequence[Run]) -> list[Row]:
    """Edits of the same prompt beside each other; the second of a run with the second of another, and so on."""
    table: dict[tuple[str, int], list[Edit | None]] = {}
    for column, run in enumerate(runs):
        seen: dict[str, int] = {}
        for edit in run.edits:
            turn = seen[edit.prompt] = seen.get(edit.prompt, -1) + 1
            table.setdefault((edit.prompt, turn), [None] * len(runs))[column] = edit
    turns = Counter(prompt for prompt, _ in table)
    return [
        Row(prompt, edits, _which(turn, edits) if turns[prompt] > 1 else "") for (prompt, turn), edits in table.items()
    ]


def _which(turn: int, edits: Sequence[Edit | None]) -> str:
    """Number, and seed and settings if they are the same in all runs; of one run, the number of the edit's folder."""
    abouts = {edit.about for edit in edits if edit}
    number = edits[0].number if len(edits) == 1 and edits[0] else f"number {turn + 1}"
    return ", ".join(filter(None, [number, abouts.pop() if len(abouts) == 1 else ""]))


class Value(NamedTuple):
    """A score, None where it was not measured, and what it was measured with."""

    number: float | None
    how: str = ""


class Bar(NamedTuple):
    """A score as a bar: its value in words, left end and width in percent, and how it compares."""

    value: str
    left: float
    width: float
    change: str
    verdict: str
    how: str


class Meter(NamedTuple):
    """One metric: a label and a bar per run for every edit; `mark` is where the baseline lies, in percent."""

    name: str
    metric: Metric
    mark: float | None
    rows: list[tuple[str, list[Bar]]]

    @property
    def hows(self) -> list[str]:
        """With what it was measured, each way once."""
        return list(dict.fromkeys(bar.how for _, bars in self.rows for bar in bars if bar.width and bar.how))


def meters(runs: Sequence[Run], aligned: Sequence[Row]) -> list[Meter]:
    """Every metric that any run has scores of, against the first run or, of a single run, the baseline."""
    metrics = {name: each for run in reversed(runs) if run.scores for name, each in run.scores.metrics.items()}
    return [_meter(name, metric, runs, aligned) for name, metric in metrics.items()]


def _meter(name: str, metric: Metric, runs: Sequence[Run], aligned: Sequence[Row]) -> Meter:
    table = [(row.label, _values(name, runs, row)) for row in aligned]
    if len(table) > 1:
        table.insert(0, _means([values for _, values in table]))
    baseline = _finite(metric.baseline)
    known = [value.number for _, values in table for value in values if value.number is not None]
    ends = min(0.0, baseline or 0, *known), max(0.0, baseline or 0, *known)
    bars = []
    for label, values in table:
        standards = [baseline] if len(runs) == 1 else [None, *[values[0].number] * (len(runs) - 1)]
        pairs = zip(values, standards, strict=True)
        bars.append((label, [_bar(value, standard, metric.better, *ends) for value, standard in pairs]))
    return Meter(name, metric, None if baseline is None else _percent(baseline, *ends), bars)


def _values(name: str, runs: Sequence[Run], row: Row) -> list[Value]:
    pairs = zip(runs, row.edits, strict=True)
    scores = [run.scores.of(edit.folder, name) if run.scores and edit else None for run, edit in pairs]
    return [Value(_finite(score.value), _how(score)) if score else Value(None) for score in scores]


def _means(table: Sequence[Sequence[Value]]) -> tuple[str, list[Value]]:
    """A row of means, over those edits that every run has a value of which has any."""
    measured = [run for run in range(len(table[0])) if any(row[run].number is not None for row in table)]
    shared = [row for row in table if all(row[run].number is not None for run in measured)]
    means = [Value(None) for _ in table[0]]
    for run in measured if shared else ():
        means[run] = Value(sum(row[run].number or 0 for row in shared) / len(shared))
    return f"mean of {len(shared)} edits", means


def _bar(value: Value, standard: float | None, better: str, low: float, high: float) -> Bar:
    if value.number is None:
        return Bar("–", 0, 0, "", "", "not measured")
    left, right = sorted((_percent(value.number, low, high), _percent(0, low, high)))
    change, verdict = _compared(value.number, standard, better)
    return Bar(f"{value.number:.4g}".replace("-", "−"), left, right - left, change, verdict, value.how)


def _percent(value: float, low: float, high: float) -> float:
    return 100 * (value - low) / (high - low or 1)


def _compared(value: float, standard: float | None, better: str) -> tuple[str, str]:
    """The difference from a standard, and whether it is better or worse."""
    if standard is None:
        return "", ""
    change = value - standard
    if f"{value:.4g}" == f"{standard:.4g}":
        return "±0", "same"
    return f"{change:+.2g}".replace("-", "−"), "better" if (change > 0) == (better == "higher") else "worse"


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _how(score: Score) -> str:
    """What a score was measured with, in words."""
    model = " ".join(filter(None, [basename(score.model), score.revision and f"at {score.revision[:12]}"]))
    frames = f"{score.frames} frames" if score.frames else ""
    size = f"{score.width} × {score.height}" if score.width and score.height else ""
    return ", ".join(filter(None, [model, frames, size]))


class Difference(NamedTuple):
    """A setting that is not the preset's in some run, or not the same in all: its values, and the preset's, by run."""

    name: str
    values: list[str]
    standard: list[str]


def differences(runs: Sequence[Run]) -> list[Difference]:
    """Where runs differ from their presets (on their bases), or from each other."""
    found = []
    for name in TuneSettings.model_fields:
        values = [plain(run.settings.model_dump()[name]) if run.settings else "–" for run in runs]
        standard = [plain(run.preset[name]) if run.settings else "–" for run in runs]
        known = {value for run, value in zip(runs, values, strict=True) if run.settings}
        if name not in TASK and (values != standard or len(known) > 1):
            found.append(Difference(name, values, standard))
    return found


def pieces(prompt: str, source: str | None) -> list[tuple[str, bool]]:
    """A prompt in pieces, and whether each is new to the source's prompt."""
    if source is None:
        return [(prompt, False)]
    old, new = (re.findall(r"\w+|\s+|[^\w\s]+", text) for text in (source, prompt))
    codes = difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
    return [("".join(new[start:end]), code != "equal") for code, _, _, start, end in codes if end > start]
