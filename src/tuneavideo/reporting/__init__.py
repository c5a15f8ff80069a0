"""One page that shows runs and needs nothing else: no network, no other file. No torch here.

contents.py    what a run folder holds, as far as it can be read
comparison.py  runs beside each other: edits, scores, settings
curve.py       the loss over the steps
words.py       values as people read them
report.html    the page, a Jinja template
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from tuneavideo.reporting.comparison import differences, meters, pieces, rows
from tuneavideo.reporting.contents import Run, opened
from tuneavideo.reporting.curve import curve
from tuneavideo.reporting.formatting import plain
from tuneavideo.settings import TuneSettings
from tuneavideo.storage import atomic
from tuneavideo.storage.run_folder import RunFolder
from tuneavideo.version import __version__


def write(runs: Sequence[RunFolder], path: Path) -> None:
    """Make the page of some runs; of several, the first is what the others are measured by.

    Raises:
        DiskError: `path` is a file that is no report, or cannot be written.
    """
    atomic.refuse_foreign(path, "tuneavideo</title>")
    names = [run.path.resolve().name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run.path) for run in runs]
    atomic.write(path, page([opened(run, name) for run, name in zip(runs, names, strict=True)]))


def page(runs: Sequence[Run]) -> str:
    """The HTML of the page."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"digest": _digest, "plain": plain}
    aligned = rows(runs)
    return environment.get_template("report.html").render(
        version=__version__,
        runs=runs,
        rows=aligned,
        columns=_columns(1 + len(runs[0].edits)),
        meters=meters(runs, aligned),
        curve=curve(runs),
        differences=differences(runs),
        settings={name: field.description or "" for name, field in TuneSettings.model_fields.items()},
        versions=list(dict.fromkeys(name for run in runs for name in run.versions)),
        pieces=pieces,
    )


def _columns(clips: int, most: int = 5) -> int:
    """Columns that fill all rows as evenly as can be."""
    return math.ceil(clips / math.ceil(clips / most))


def _digest(script: str) -> str:
    """What the page's own policy knows its script by; no other runs."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
