"""Settings of a job from all their sources: the caller, a YAML file, a run folder, presets and the table of bases."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuneavideo.bases import BASES
from tuneavideo.config import check_sense, check_windows, checked, layers, parse_yaml, stated_values, with_preset
from tuneavideo.errors import SettingsError
from tuneavideo.settings import EditSettings, Sampling, TuneSettings
from tuneavideo.storage.run_folder import RunFolder

if TYPE_CHECKING:
    from tuneavideo.interop.foreign_configs import Config

# Settings that save memory and leave the result as it is.
MEMORY_SAVING = {"gradient_checkpointing", "offload", "batch_guidance"}
RESUMED_ANEW = {"edit", "max_train_steps", "learning_rate", "mixed_precision", "memory"} | MEMORY_SAVING | {
    "checkpointing_steps", "checkpoints_total_limit", "validation_steps", "report_to",
}  # fmt: skip

logger = logging.getLogger(__name__)


def tune_settings(stated: Mapping[str, Any], config: str | Path | None = None) -> TuneSettings:
    """Settings of a tuning: what is stated, over the YAML file, the preset, the base and the built-in values."""
    return merge_settings(stated, read_config(config) if config else None, str(config))


def merge_settings(stated: Mapping[str, Any], read: Config | None, where: str) -> TuneSettings:
    merged = layers(stated, read.settings if read else {})
    for name in {"video", "base"} & merged.keys():  # a run folder is to be understood from anywhere
        if merged[name] not in BASES and os.path.exists(merged[name]):
            merged[name] = os.path.abspath(merged[name])
    settings = checked(TuneSettings, merged, where if read else "settings")
    check_sense(settings, settings.edit)
    if isinstance(settings.num_frames, int):  # otherwise the clip decides, when the job begins
        check_windows(settings, settings.num_frames)
    return settings


def read_config(path: str | Path) -> Config:
    """Settings of a tuning in a YAML file of ours, of the published code or of MindONE; tells what is idle.

    A relative `video` is one in the file's folder if it is there, otherwise one in the current folder.
    """
    from tuneavideo.interop import foreign_configs

    config = foreign_configs.read_config(path, TuneSettings)
    beside = Path(path).parent / str(config.settings.get("video", ""))
    if "video" in config.settings and beside.exists():
        config.settings["video"] = str(beside)
    return config


def read_edit_config(path: str | Path) -> dict[str, Any]:
    """Settings of edits in a YAML file: one for `edit`, or one for `tune`, of which `edit` are the prompts here."""
    values = parse_yaml(path)
    if values.keys() <= EditSettings.model_fields.keys() or not values.keys() & (
        TuneSettings.model_fields.keys() - EditSettings.model_fields.keys()
    ):
        return stated_values(EditSettings, values, str(path))
    found = read_config(path).settings
    kept = {name: value for name, value in found.items() if name in {*Sampling.model_fields, "preset"}}
    if idle := [name for name in values if name not in {*kept, "edit"}]:
        logger.warning("%s: settings of 'tune', left out here: %s", path, ", ".join(idle))
    return kept | ({"prompt": found["edit"]} if found.get("edit") else {})


def edit_settings(stated: Mapping[str, Any], config: str | Path | None = None) -> EditSettings:
    """Settings of an edit: what is stated, over the YAML file and the run's own values."""
    given = {**(read_edit_config(config) if config else {}), **stated}
    own = with_preset(RunFolder.open(given["run"]).read_settings(), given.get("preset"))
    settings = checked(EditSettings, {**own, **given}, str(config or "settings"))
    check_sense(settings, settings.prompt)
    return settings


def resumed_settings(run: str | Path, stated: Mapping[str, Any]) -> TuneSettings:
    """A run's own settings with those changes that leave its result comparable; refuses others."""
    own = RunFolder.open(run).read_settings().model_dump()
    new = checked(TuneSettings, {**own, **stated})
    if os.path.abspath(new.video) == own["video"]:
        new = new.model_copy(update={"video": own["video"]})
    free = {*Sampling.model_fields, *RESUMED_ANEW} - {"window"}  # what is tuned on
    fixed = [name for name in stated if name not in free and own[name] != getattr(new, name)]
    if fixed:
        raise SettingsError(
            f"{run}: {fixed[0]} cannot change when a run is resumed; it is {own.get(fixed[0], 'unknown')!r}. "
            "Leave it out, or start a new run"
        )
    check_sense(new, new.edit)
    if not new.memory or new.memory == own["memory"]:
        return new
    values = new.model_dump()  # the memory plan chooses what saves memory and is not stated
    return checked(TuneSettings, {n: value for n, value in values.items() if n not in MEMORY_SAVING or value != own[n]})
