"""Settings of a job, merged from the caller, a YAML file, a run folder, presets and the table of bases."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuneavideo.bases import BASES
from tuneavideo.config import check_edits, check_windows, checked, layers, parse_values, parse_yaml, with_preset
from tuneavideo.errors import SettingsError
from tuneavideo.jobs.checks import is_clip
from tuneavideo.settings import ClipEditSettings, ClipSettings, EditSettings, Sampling, Styling, TuneSettings
from tuneavideo.storage.run_folder import RunFolder

if TYPE_CHECKING:
    from tuneavideo.interop.foreign_configs import Config

# Options of `edit` that are for clips only, and what to do about them in a run; None: for all others.
CLIP_OPTIONS = {
    "base": "edits use the run's base; use edit_model (--edit-model) for another of the same architecture",
    "out": "edits are written into RUN/edits",
    None: "the caption, frames and size of a run cannot change; leave it out, or make a new run with 'tuneavideo tune'",
}
# Settings that save memory without an effect on the result.
MEMORY_SAVING = {"gradient_checkpointing", "offload", "batch_guidance"}
RESUMABLE = {"edit", "max_train_steps", "learning_rate", "mixed_precision", "memory"} | MEMORY_SAVING | {
    "checkpointing_steps", "checkpoints_total_limit", "validation_steps", "keep_weights", "report_to",
}  # fmt: skip

logger = logging.getLogger(__name__)


def tune_settings(values: Mapping[str, Any], config: str | Path | None = None) -> TuneSettings:
    """Merge settings of a tuning: `values`, then the YAML file, the preset, the base and the defaults."""
    return merge_settings(values, read_config(config) if config else None)


def merge_settings(values: Mapping[str, Any], config: Config | None) -> TuneSettings:
    """Merge `values` with a YAML file that is read already, and check the result.

    Raises:
        SettingsError: A value is wrong, unknown or missing, or values contradict each other.
    """
    merged = layers(values, config.settings if config else {})
    for name in {"video", "base"} & merged.keys():  # the run folder is used from other folders as well
        if merged[name] not in BASES and os.path.exists(merged[name]):
            merged[name] = os.path.abspath(merged[name])
    settings = checked(TuneSettings, merged)
    check_edits(settings, settings.edit)
    if isinstance(settings.num_frames, int):  # otherwise it depends on the clip, and is checked with the clip
        check_windows(settings, settings.num_frames)
    return settings


def read_config(path: str | Path) -> Config:
    """Read the settings of a tuning from a YAML file of ours, of the published code or of MindONE.

    A relative `video` is in the file's folder if it exists there, otherwise in the current folder. Settings without
    effect are logged.
    """
    from tuneavideo.interop import foreign_configs

    config = foreign_configs.read_config(path, TuneSettings)
    neighbour = Path(path).parent / str(config.settings.get("video", ""))
    if "video" in config.settings and neighbour.exists():
        config.settings["video"] = str(neighbour)
    return config


def read_edit_config(path: str | Path) -> dict[str, Any]:
    """Read the settings of edits from a YAML file of `edit`, or of `tune`, whose `edit` are the prompts."""
    values = parse_yaml(path)
    if values.keys() <= EditSettings.model_fields.keys() or not values.keys() & (
        TuneSettings.model_fields.keys() - EditSettings.model_fields.keys()
    ):
        return parse_values(EditSettings, values, str(path))
    found = read_config(path).settings
    kept = {name: value for name, value in found.items() if name in {*Sampling.model_fields, "preset"}}
    if idle := [name for name in values if name not in {*kept, "edit"}]:
        logger.warning("%s: settings of 'tune', left out here: %s", path, ", ".join(idle))
    return kept | ({"prompt": found["edit"]} if found.get("edit") else {})


def is_clip_edit(values: Mapping[str, Any]) -> bool:
    """Return whether values of `edit` are those of a clip, which is edited without tuning."""
    place = str(values.get("run", ""))
    return (
        bool(place) and not RunFolder(Path(place)).settings.is_file() and ("source_prompt" in values or is_clip(place))
    )


def clip_edit_settings(
    values: Mapping[str, Any], config: str | Path | None = None
) -> tuple[TuneSettings, EditSettings]:
    """Merge settings of the edits of a clip without tuning.

    Args:
        values: `run` (the clip), `prompt` (of the edits), `source_prompt`, fields of `TuneSettings` and `Styling`.
        config: YAML file of `tune`, or of `edit`, for values that are not given.

    Returns:
        Settings of the run, with which it can be tuned; and those of the edits.

    Raises:
        SettingsError: A value is wrong, unknown or missing, or values contradict each other.
    """
    given = {**(_read_clip_config(config) if config else {}), **values}
    clip, caption, prompts = given.pop("run"), given.pop("source_prompt", None), given.pop("prompt", ())
    if not caption:
        raise SettingsError(
            f"{clip} is no run folder; to edit a clip without tuning, give its caption with --source-prompt"
        )
    styling = {name: given.pop(name) for name in Styling.model_fields if name in given}
    settings = merge_settings({**given, "video": str(clip), "prompt": caption, "edit": prompts}, None)
    sampling = settings.model_dump(include=set(Sampling.model_fields))
    return settings, checked(EditSettings, {**sampling, **styling, "run": str(clip), "prompt": prompts})


def _read_clip_config(path: str | Path) -> dict[str, Any]:
    values = parse_yaml(path)
    if values.keys() <= ClipEditSettings.model_fields.keys() - {"video", "edit"}:
        return parse_values(ClipEditSettings, values, str(path))
    found = dict(read_config(path).settings)
    renamed = {"prompt": found.pop("edit", ()), "source_prompt": found.pop("prompt", None)}
    found.pop("video", None)
    return found | {name: value for name, value in renamed.items() if value}


def edit_settings(values: Mapping[str, Any], config: str | Path | None = None) -> EditSettings:
    """Merge settings of an edit: `values`, then the YAML file and the settings of the run.

    Raises:
        RunError: There is no such run.
        SettingsError: A value is wrong, unknown or missing, or values contradict each other.
    """
    given = {**(read_edit_config(config) if config else {}), **values}
    for name in given:
        if name in {*ClipSettings.model_fields, "source_prompt", "out"}:
            raise SettingsError(f"{name}: {CLIP_OPTIONS.get(name, CLIP_OPTIONS[None])}")
    own = with_preset(RunFolder.open(given["run"]).read_settings(), given.get("preset"))
    settings = checked(EditSettings, {**own, **given})
    check_edits(settings, settings.prompt)
    return settings


def resumed_settings(run: str | Path, changes: Mapping[str, Any]) -> TuneSettings:
    """Return the settings of a run with changes. Raises SettingsError for a setting that cannot change."""
    own = RunFolder.open(run).read_settings().model_dump()
    new = checked(TuneSettings, {**own, **changes})
    if os.path.abspath(new.video) == own["video"]:
        new = new.model_copy(update={"video": own["video"]})
    free = {*Sampling.model_fields, *RESUMABLE} - {"window"}  # tuning depends on the window
    if RunFolder.open(run).is_untuned:
        free = {*TuneSettings.model_fields} - {*ClipSettings.model_fields, "video", "prompt"}
    fixed = [name for name in changes if name not in free and own[name] != getattr(new, name)]
    if fixed:
        raise SettingsError(
            f"{run}: {fixed[0]} cannot change when a run is resumed; it is {own.get(fixed[0], 'unknown')!r}. "
            "Leave it out, or start a new run"
        )
    check_edits(new, new.edit)
    if not new.memory or new.memory == own["memory"]:
        return new
    values = new.model_dump()  # the memory plan chooses only settings that are not set
    return checked(TuneSettings, {n: value for n, value in values.items() if n not in MEMORY_SAVING or value != own[n]})
