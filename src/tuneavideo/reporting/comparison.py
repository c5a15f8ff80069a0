"""Comparison of runs: edits of the same prompt, their scores as bars, different settings."""

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

INPUTS = {"video", "prompt", "edit", "preset"}  # shown elsewhere on the page


class Row(NamedTuple):
    """Edits of one prompt.

    Attributes:
        prompt: The prompt.
        edits: An edit per run; None for a run without one.
        which: Label that distinguishes rows of the same prompt; empty if there is only one.
    """

    prompt: str
    edits: list[Edit | None]
    which: str = ""

    @property
    def label(self) -> str:
        """The prompt and what distinguishes the row."""
        return f"{self.prompt} ({self.which})" if self.which else self.prompt


def rows(runs: Sequence[Run]) -> list[Row]:
    """Align the edits of runs by prompt; the nth edit of a prompt is aligned with the nth of the other runs."""
    table: dict[tuple[str, int], list[Edit | None]] = {}
    for column, run in enumerate(runs):
        counts = Counter[str]()
        for edit in run.edits:
            table.setdefault((edit.prompt, counts[edit.prompt]), [None] * len(runs))[column] = edit
            counts[edit.prompt] += 1
    rows_of = Counter(prompt for prompt, _ in table)
    return [
        Row(prompt, edits, _which(index, edits) if rows_of[prompt] > 1 else "")
        for (prompt, index), edits in table.items()
    ]


def _which(index: int, edits: Sequence[Edit | None]) -> str:
    """Label with the number (of one run, that of the edit's folder), and seed and settings if all runs share them."""
    shared = {edit.about for edit in edits if edit}
    number = edits[0].number if len(edits) == 1 and edits[0] else f"number {index + 1}"
    return ", ".join(filter(None, [number, shared.pop() if len(shared) == 1 else ""]))


class Value(NamedTuple):
    """A score, None if it was not measured, and a description of the model and frames."""

    number: float | None
    how: str = ""


class Bar(NamedTuple):
    """A score as a bar.

    Attributes:
        value: Formatted score.
        left: Left end in percent.
        width: Width in percent.
        change: Formatted difference from the reference; empty without one.
        verdict: `better`, `worse`, `same` or empty.
        how: Description of the model and frames.
    """

    value: str
    left: float
    width: float
    change: str
    verdict: str
    how: str


class Meter(NamedTuple):
    """The bars of one metric.

    Attributes:
        name: Name of the metric.
        metric: Its unit, direction and baseline.
        mark: Position of the baseline in percent; None without one.
        rows: For every edit its label and a bar per run.
    """

    name: str
    metric: Metric
    mark: float | None
    rows: list[tuple[str, list[Bar]]]

    @property
    def hows(self) -> list[str]:
        """Distinct descriptions of models and frames."""
        return list(dict.fromkeys(bar.how for _, bars in self.rows for bar in bars if bar.width and bar.how))


def meters(runs: Sequence[Run], aligned: Sequence[Row]) -> list[Meter]:
    """Build the bars of every metric, compared with the first run or, of a single run, with the baseline."""
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
        references = [baseline] if len(runs) == 1 else [None, *[values[0].number] * (len(runs) - 1)]
        pairs = zip(values, references, strict=True)
        bars.append((label, [_bar(value, reference, metric.better, *ends) for value, reference in pairs]))
    return Meter(name, metric, None if baseline is None else _percent(baseline, *ends), bars)


def _values(name: str, runs: Sequence[Run], row: Row) -> list[Value]:
    pairs = zip(runs, row.edits, strict=True)
    scores = [run.scores.of(edit.folder, name) if run.scores and edit else None for run, edit in pairs]
    return [Value(_finite(score.value), _how(score)) if score else Value(None) for score in scores]


def _means(table: Sequence[Sequence[Value]]) -> tuple[str, list[Value]]:
    """Build the row of means, over the edits that all measured runs have a value of."""
    measured = [run for run in range(len(table[0])) if any(row[run].number is not None for row in table)]
    shared = [row for row in table if all(row[run].number is not None for run in measured)]
    means = [Value(None) for _ in table[0]]
    for run in measured if shared else ():
        means[run] = Value(sum(row[run].number or 0 for row in shared) / len(shared))
    return f"mean of {len(shared)} edits", means


def _bar(value: Value, reference: float | None, better: str, low: float, high: float) -> Bar:
    if value.number is None:
        return Bar("–", 0, 0, "", "", "not measured")
    left, right = sorted((_percent(value.number, low, high), _percent(0, low, high)))
    change, verdict = _compare(value.number, reference, better)
    return Bar(f"{value.number:.4g}".replace("-", "−"), left, right - left, change, verdict, value.how)


def _percent(value: float, low: float, high: float) -> float:
    return 100 * (value - low) / (high - low or 1)


def _compare(value: float, reference: float | None, better: str) -> tuple[str, str]:
    """Format the difference from a reference, and whether it is better or worse."""
    if reference is None:
        return "", ""
    change = value - reference
    if f"{value:.4g}" == f"{reference:.4g}":
        return "±0", "same"
    return f"{change:+.2g}".replace("-", "−"), "better" if (change > 0) == (better == "higher") else "worse"


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _how(score: Score) -> str:
    """Describe the model and frames of a score."""
    model = " ".join(filter(None, [basename(score.model), score.revision and f"at {score.revision[:12]}"]))
    frames = f"{score.frames} frames" if score.frames else ""
    size = f"{score.width} × {score.height}" if score.width and score.height else ""
    return ", ".join(filter(None, [model, frames, size]))


class Difference(NamedTuple):
    """A setting that differs between runs or from a preset.

    Attributes:
        name: Name of the setting.
        values: Its formatted value in every run.
        standard: The formatted value of every run's preset.
    """

    name: str
    values: list[str]
    standard: list[str]


def differences(runs: Sequence[Run]) -> list[Difference]:
    """List the settings that differ from the presets on the runs' bases, or between runs."""
    found = []
    for name in TuneSettings.model_fields:
        values = [plain(run.settings.model_dump()[name]) if run.settings else "–" for run in runs]
        standard = [plain(run.preset[name]) if run.settings else "–" for run in runs]
        known = {value for run, value in zip(runs, values, strict=True) if run.settings}
        if name not in INPUTS and (values != standard or len(known) > 1):
            found.append(Difference(name, values, standard))
    return found


def pieces(prompt: str, source: str | None) -> list[tuple[str, bool]]:
    """Split a prompt into pieces, and mark those that are not in the source's prompt."""
    if source is None:
        return [(prompt, False)]
    old, new = (re.findall(r"\w+|\s+|[^\w\s]+", text) for text in (source, prompt))
    codes = difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
    return [("".join(new[start:end]), code != "equal") for code, _, _, start, end in codes if end > start]
