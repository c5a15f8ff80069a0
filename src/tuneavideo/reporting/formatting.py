"""Values as people read them."""

from __future__ import annotations

import os
from typing import Any


def duration(seconds: float) -> str:
    """Seconds as people read them."""
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def plain(value: Any) -> str:
    """A setting or name as people write it; of a path on this machine, only the name."""
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
    return os.path.basename(text.rstrip("/")) if text and os.path.isabs(text) else text or ""
