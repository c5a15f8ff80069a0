"""Tune-A-Video: tune a text-to-image model on one clip, then edit the clip with new prompts.

Importing this package is free of torch; the names below are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tuneavideo.version import __version__ as __version__

if TYPE_CHECKING:
    from tuneavideo.api import adopt, convert, edit, evaluate, invert, report, resume, tune
    from tuneavideo.errors import TuneAVideoError
    from tuneavideo.method.inflate import deflate, inflate
    from tuneavideo.models.adapter import Adapter
    from tuneavideo.models.pipelines import load_pipeline
    from tuneavideo.pipeline import TuneAVideoPipeline, TuneAVideoXLPipeline
    from tuneavideo.settings import EditSettings, TuneSettings
    from tuneavideo.video import Video

_HOMES = {
    "Adapter": "models.adapter",
    "EditSettings": "settings",
    "TuneAVideoError": "errors",
    "TuneAVideoPipeline": "pipeline",
    "TuneAVideoXLPipeline": "pipeline",
    "TuneSettings": "settings",
    "Video": "video",
    "adopt": "api",
    "convert": "api",
    "deflate": "method.inflate",
    "edit": "api",
    "evaluate": "api",
    "inflate": "method.inflate",
    "invert": "api",
    "load_pipeline": "models.pipelines",
    "report": "api",
    "resume": "api",
    "tune": "api",
}

__all__ = [
    "Adapter",
    "EditSettings",
    "TuneAVideoError",
    "TuneAVideoPipeline",
    "TuneAVideoXLPipeline",
    "TuneSettings",
    "Video",
    "adopt",
    "convert",
    "deflate",
    "edit",
    "evaluate",
    "inflate",
    "invert",
    "load_pipeline",
    "report",
    "resume",
    "tune",
]


_MODULES = ("api", "models", "video")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
