"""Messages of other libraries, and whether the hub can be reached."""

from __future__ import annotations

import logging
import textwrap
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from functools import cache
from typing import Any

from diffusers.utils import logging as diffusers_logging
from huggingface_hub import get_session
from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE
from transformers.utils import logging as transformers_logging

from tuneavideo.bases import is_hub_id

NOISY = tuple(
    f"diffusers.pipelines.{name}" for name in ("pipeline_utils", "stable_diffusion.pipeline_stable_diffusion")
)
SECONDS_FOR_HUB = 5


def silence_libraries() -> None:
    """Turn off progress bars and notices of diffusers and transformers."""
    for noisy in NOISY:
        logging.getLogger(noisy).setLevel(logging.ERROR)
    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


@contextmanager
def silenced_libraries() -> Generator[None, None, None]:
    """Call `silence_libraries`, and restore the libraries afterwards."""
    levels = {name: logging.getLogger(name).level for name in NOISY}
    libraries = (diffusers_logging, transformers_logging)
    verbosity = [each.get_verbosity() for each in libraries]
    bars = [each for each in libraries if each.is_progress_bar_enabled()]
    silence_libraries()
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        for each, before in zip(libraries, verbosity, strict=True):
            each.set_verbosity(before)
        for each in bars:
            each.enable_progress_bar()


@contextmanager
def quiet() -> Generator[None, None, None]:
    """Suppress all logs and warnings of libraries while a file is loaded; errors still pass."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers", "peft")]
    levels = [each.level for each in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for each in loggers:
            each.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for each, level in zip(loggers, levels, strict=True):
                each.setLevel(level)


@cache
def unreachable() -> str:
    """Return why nothing can be downloaded, or an empty text; the hub is asked once."""
    if HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(ENDPOINT, timeout=SECONDS_FOR_HUB)
    except Exception as error:  # of whatever library carries the request
        return f"the hub cannot be reached ({textwrap.shorten(str(error), 80, placeholder=' ...')})"
    return ""


def local_only(place: str) -> dict[str, Any]:
    """Return the option that keeps libraries from repeated requests to a hub that cannot be reached."""
    return {"local_files_only": True} if is_hub_id(place) and unreachable() else {}
