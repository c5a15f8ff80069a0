"""The report: one self-contained HTML page of one or more runs. Imports no torch.

contents.py    contents of a run folder
comparison.py  edits, scores and settings of several runs side by side
curve.py       loss curve
formatting.py  durations, settings, paths
report.html    Jinja template of the page
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from tuneavideo.reporting.comparison import differences, meters, pieces, rows
from tuneavideo.reporting.contents import Run, read_run
from tuneavideo.reporting.curve import curve
from tuneavideo.reporting.formatting import plain
from tuneavideo.settings import TuneSettings
from tuneavideo.storage import atomic
from tuneavideo.storage.run_folder import RunFolder
from tuneavideo.version import __version__


def write(runs: Sequence[RunFolder], path: Path) -> None:
    """Write the page of some runs; scores are compared with those of the first.

    Raises:
        DiskError: `path` is a file that is no report, or cannot be written.
    """
    atomic.refuse_foreign(path, "tuneavideo</title>")
    names = [run.path.resolve().name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run.path) for run in runs]
    atomic.write(path, page([read_run(run, name) for run, name in zip(runs, names, strict=True)]))


def page(runs: Sequence[Run]) -> str:
    """Render the HTML of the page."""
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
    """Return the number of columns, at most `most`, that fills the rows most evenly."""
    return math.ceil(clips / math.ceil(clips / most))


def _digest(script: str) -> str:
    """Return the SHA-256 digest by which the page's content security policy allows its only script."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
