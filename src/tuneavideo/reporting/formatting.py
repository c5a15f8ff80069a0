"""Formatting of durations, settings and paths for the report."""

from __future__ import annotations

import os
from typing import Any


def duration(seconds: float) -> str:
    """Format seconds with a unit."""
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def plain(value: Any) -> str:
    """Format the value of a setting; of an absolute path only the last part."""
    if value is None or value == () or value == "":
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple | list):
        return ", ".join(map(plain, value))
    if isinstance(value, float):
        return f"{value:g}"
    return basename(value) if isinstance(value, str) else str(value)


def basename(text: str | None) -> str:
    """Return the last part of an absolute path, and any other text as it is."""
    return os.path.basename(text.rstrip("/")) if text and os.path.isabs(text) else text or ""
