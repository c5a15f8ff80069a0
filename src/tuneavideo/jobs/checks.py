"""Checks of paths and names before a job. This module must not import torch: errors are reported within a second."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from tuneavideo import bases
from tuneavideo.config import weighted
from tuneavideo.errors import AdapterError, CheckpointError, SettingsError, VideoError
from tuneavideo.evaluation.metrics import check_metric
from tuneavideo.settings import EditSettings, TuneSettings
from tuneavideo.storage import atomic
from tuneavideo.storage.run_folder import COPY, OTHER_PLACE, RunFolder


def check_tune_inputs(
    settings: TuneSettings, out: str | Path | None, *, resumed: bool = False, own_base: bool = False
) -> None:
    """Raise TuneAVideoError when clip or base is missing, or the run folder holds files or cannot be written.

    Args:
        settings: Settings of the tuning.
        out: Run folder to create. None: one in `runs`.
        resumed: Whether the run exists already, with its frames.
        own_base: Whether the base is converted from the checkpoint, instead of `settings.base`.
    """
    if not own_base:
        bases.check_base(settings.base)
    if resumed:
        return
    if not os.path.exists(settings.video):
        from tuneavideo.video.sources import READABLE

        raise VideoError(f"{settings.video} does not exist; give {READABLE}")
    if os.environ.get("RANK", "0") == "0":  # the first of several processes makes the folder
        if out is not None:
            RunFolder.check_free(out)
        atomic.check_writable(Path(out or "runs"), OTHER_PLACE)


def is_clip(place: str | Path) -> bool:
    """Return whether a place is a file, or a folder of images that is no run folder."""
    path = Path(place)
    if not path.is_dir():
        return path.is_file()
    from tuneavideo.video.sources import PICTURES

    return not RunFolder(path).settings.is_file() and any(file.suffix.lower() in PICTURES for file in path.iterdir())


def check_edit_inputs(settings: EditSettings) -> None:
    """Raise TuneAVideoError when a file that the edits need is missing, or the run cannot be written."""
    check_edit_files(settings)
    run = RunFolder.open(settings.run)
    if settings.step is not None:
        run.require_model(settings.step)
    atomic.check_writable(run.path, COPY)


def check_edit_files(settings: EditSettings) -> None:
    """Raise TuneAVideoError when a model or file that the edits need is missing."""
    if settings.edit_model is not None:
        bases.check_base(settings.edit_model)
    for each in settings.lora:
        _check_exists("LoRA", weighted(each)[0])
    for each in settings.embedding:
        _check_exists("embedding", each, hub=False)
    if settings.controlnet is not None:
        _check_exists("ControlNet", settings.controlnet)
    if settings.control not in ("canny", "depth") and not os.path.exists(settings.control):
        raise SettingsError(
            f"control {settings.control!r} does not exist; give canny, depth, a video or a folder of maps"
        )
    _check_mask(settings.mask)
    if settings.ip_adapter is not None and len(Path(settings.ip_adapter).parts) < 2:
        _check_exists("IP-Adapter", settings.ip_adapter, hub=False)
    if settings.ip_image is not None:
        _check_exists("ip_image", settings.ip_image, hub=False)


def check_evaluate_inputs(places: Iterable[str | Path], metrics: Iterable[str], mask: Path | None) -> None:
    """Raise TuneAVideoError when a metric is unknown, the mask is missing, or no place is a run or an edit."""
    for name in metrics:
        check_metric(name)
    places = [*places]
    if places and not any(
        Path(place, "edit.json").is_file() or RunFolder(Path(place)).settings.is_file() for place in places
    ):
        RunFolder.open(places[0])
    _check_mask(mask)


def check_weights(path: str | Path) -> None:
    """Raise CheckpointError when there is no such file or folder of weights."""
    if not os.path.exists(path):
        raise CheckpointError(f"{path} does not exist; give a file or folder of weights")


def _check_mask(mask: str | Path | None) -> None:
    if mask is not None and not os.path.exists(mask):
        raise VideoError(f"mask {mask} does not exist; give a picture, a clip or a folder of pictures")


def _check_exists(what: str, place: str, *, hub: bool = True) -> None:
    if os.path.exists(place) or (hub and bases.is_hub_id(place)):
        return
    raise AdapterError(f"{what} {place}: no such file or folder" + (", and no hub id (OWNER/NAME)" if hub else ""))
