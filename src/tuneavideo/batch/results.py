"""The results file of a batch: a Parquet table with a row for each edit."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

from tuneavideo.batch.roots import RESULTS, Root
from tuneavideo.errors import DiskError, MissingExtra
from tuneavideo.version import __version__

# Columns and their types in Arrow; every other column is a score, a number.
COLUMNS = {
    "job": "string", "run": "string", "state": "string", "error": "string", "video": "string", "prompt": "string",
    "edit": "string", "edit_seed": "int64", "file": "string", "steps": "int64", "loss": "float64",
    "seconds_tuning": "float64", "peak_memory": "int64", "settings": "string",
}  # fmt: skip
MARK = b"tuneavideo"


def check(root: Root) -> None:
    """Raise MissingExtra without pyarrow, and DiskError when the root has a results file of another program."""
    if not importlib.util.find_spec("pyarrow"):
        raise MissingExtra("the results of a batch (pyarrow)", "batch")
    from pyarrow import ArrowException, parquet

    contents = root.read_results()
    try:
        is_ours = contents is None or MARK in (parquet.read_schema(BytesIO(contents)).metadata or {})
    except ArrowException:
        is_ours = False
    if not is_ours:
        raise DiskError(f"{root.place}/{RESULTS} was not written by this command; move it away, or give another --out")


def write(root: Root, rows: Sequence[Mapping[str, Any]]) -> str:
    """Write the results file of a root and return its place. Raises DiskError."""
    import pyarrow
    from pyarrow import parquet

    scores = sorted({name for row in rows for name in row} - COLUMNS.keys())
    types = {**COLUMNS, **dict.fromkeys(scores, "float64")}
    schema = pyarrow.schema([*types.items()], metadata={MARK: __version__.encode()})
    columns = [pyarrow.array([row.get(name) for row in rows], type) for name, type in types.items()]
    file = BytesIO()
    parquet.write_table(pyarrow.table(columns, schema=schema), file)
    return root.write_results(file.getvalue())
