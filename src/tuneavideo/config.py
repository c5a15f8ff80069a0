"""Merging and validation of settings: flag > YAML file > preset > base > default.

Defaults and presets are in `settings`, the values of bases in `bases`.
"""

from __future__ import annotations

import difflib
import json
import logging
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_origin

import yaml
from pydantic import (
    Field,
    TypeAdapter,
    ValidationError,
)

from tuneavideo.bases import BASES, canonical_name
from tuneavideo.errors import SettingsError
from tuneavideo.setting_types import Settings, as_chosen, choices
from tuneavideo.settings import PRESETS, Sampling, TuneSettings

logger = logging.getLogger(__name__)

# Options of the command line that are no settings.
COMMAND_OPTIONS = {"out", "config", "resume", "checkpoint", "json", "debug"}
SHOWN = 8  # known names in an error message

# Settings of earlier versions, with the values at which they had no effect; None: any value.
REMOVED: dict[str, tuple[Any, ...] | None] = {
    "timestep_sampling": ("uniform",),
    "noise_shared": (0,),
    "debias_weight": (0,),
    "prior_weight": (0,),
    "early_stopping": (None,),
    "early_stopping_steps": None,
    "early_stopping_patience": None,
}

Kind = TypeVar("Kind", bound=Settings)


def layers(flags: Mapping[str, Any], yaml_values: Mapping[str, Any]) -> dict[str, Any]:
    """Merge the values of base, preset, YAML file and flags; the later precede. Raises SettingsError for the preset."""
    values = {**yaml_values, **flags}
    if "base" in values:
        values["base"] = canonical_name(str(values["base"]))
    base = BASES.get(values.get("base", "miniature"))
    preset = as_chosen(TuneSettings.model_fields["preset"].annotation, values.get("preset", "default"))
    if preset not in PRESETS:
        raise SettingsError(f"unknown preset {preset!r}{_suggestion(str(preset), PRESETS)}")
    if "preset" in values:
        values["preset"] = preset
    return {**(base.settings if base else {}), **PRESETS[preset], **values}


def with_preset(own: TuneSettings, preset: str | None) -> dict[str, Any]:
    """Return the sampling settings of a run, with another preset in place of its own if one is given."""
    values = own.model_dump(include=set(Sampling.model_fields))
    if preset is None:
        return values
    before, after = (layers({"base": own.base, "preset": name}, {}) for name in (own.preset, preset))
    for name, field in Sampling.model_fields.items():
        if name in PRESETS[after["preset"]] or values[name] == before.get(name, field.default):
            values[name] = after.get(name, field.default)
    if "num_inference_steps" in PRESETS[after["preset"]]:
        # the run's number of inversion steps belongs to its number of denoising steps
        values["num_inv_steps"] = after.get("num_inv_steps")
    return values


def check_windows(settings: Sampling, frames: int, *, controlnet: bool = False) -> None:
    """Check settings that do not work for a clip in windows.

    Args:
        settings: Settings of the edits.
        frames: Number of frames of the clip.
        controlnet: Whether the edits use a ControlNet.

    Raises:
        SettingsError: The clip is in windows, and `feature_reuse` or a ControlNet is set.
    """
    window = min(settings.window or frames, frames)
    if window == frames:
        return
    why = f"{frames} frames, windows of {window}"
    if settings.feature_reuse > 1:
        raise SettingsError(
            f"feature_reuse {settings.feature_reuse} does not go with windows ({why}): set feature_reuse to 1, or "
            f"window to {frames}",
            resume_flags="--feature-reuse 1",
        )
    if controlnet:
        raise SettingsError(f"controlnet does not go with windows ({why}): leave it out, or set window to {frames}")


def read_yaml(path: Path | str, kind: type[Settings]) -> dict[str, Any]:
    """Read settings of a YAML file, each checked by itself.

    Raises:
        SettingsError: It is no mapping of names to values, a name is unknown, or a value is wrong.
    """
    return parse_values(kind, parse_yaml(path), str(path))


def parse_yaml(path: Path | str) -> dict[str, Any]:
    """Read names and values of a YAML file. Raises SettingsError when it is no mapping of names to values."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError, yaml.YAMLError) as error:  # a date may have a month 13
        raise SettingsError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())[:300]}") from None
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise SettingsError(f"{path}: expected lines like 'learning_rate: 3e-5'; found {type(values).__name__}")
    return values


def parse_values(kind: type[Settings], values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Convert values to the types of their settings, each by itself. Raises SettingsError for a wrong name or value."""
    values = _known_values(kind, values, where)
    return {name: _read_value(kind, name, value, where) for name, value in values.items()}


def checked(kind: type[Kind], values: Mapping[str, Any], where: str = "settings") -> Kind:
    """Validate values of settings.

    Args:
        kind: Class of the settings.
        values: Values by name; missing ones have their defaults.
        where: Source of the values, which begins the error message.

    Raises:
        SettingsError: Values are wrong, unknown or missing; the message has one line.
    """
    try:
        return kind.model_validate(_known_values(kind, values, where))
    except ValidationError as error:
        raise SettingsError(f"{where}: {_describe_errors(error)}") from None


def check_edits(settings: Sampling, prompts: Iterable[str]) -> None:
    """Check that settings make edits that differ, and warn of settings without effect.

    Args:
        settings: Settings of the edits.
        prompts: Prompts of the edits.

    Raises:
        SettingsError: A prompt is empty or given twice, or there is no seed.
    """
    prompts = list(prompts)
    if not all(prompt.strip() for prompt in prompts):
        raise SettingsError("a new prompt is empty; say in words what the edit should show")
    if twice := next((prompt for prompt in prompts if prompts.count(prompt) > 1), None):
        raise SettingsError(f"the prompt {twice!r} is given twice and would make the same edit twice; give it once")
    if not settings.seeds:
        raise SettingsError("seeds: found none, which makes no edit; give one, such as 0")
    begin, end = settings.guidance_interval
    if begin > end:
        raise SettingsError(f"guidance_interval {begin:g} {end:g}: the first must not be above the second; turn them")
    if settings.negative_prompt and settings.guidance_scale <= 1:
        logger.warning("negative_prompt has no effect at guidance_scale %g; set it above 1", settings.guidance_scale)


def weighted(text: str) -> tuple[str, float]:
    """Split `FILE:0.8` into path or hub id and weight; the weight is 1 without."""
    place, _, weight = text.rpartition(":")
    try:
        return (place, float(weight)) if place else (text, 1.0)
    except ValueError:  # the colon is part of the place, as in C:\\style.safetensors
        return text, 1.0


def _read_value(kind: type[Settings], name: str, value: Any, where: str) -> Any:
    """Convert a YAML value to the type of its setting: a single value may be a list, and `no` is a precision."""
    field = kind.model_fields[name]
    if name == "mixed_precision" and value is False:
        value = "no"
    if get_origin(field.annotation) is tuple:
        value = tuple(value) if isinstance(value, list | tuple) else (value,)
    if choices(field.annotation):
        value = as_chosen(field.annotation, value)
    try:
        kind_of_value: Any = Annotated[field.annotation, Field(), *field.metadata]
        return TypeAdapter(kind_of_value).validate_python(value)
    except ValidationError as error:
        raise SettingsError(f"{where}: {_describe_errors(error, name)}") from None


def _known_values(kind: type[Settings], values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the values of settings of `kind`, without removed settings that have no effect.

    Raises:
        SettingsError: A setting is unknown, or was removed and would have an effect.
    """
    for name, value in values.items():
        if name in kind.model_fields:
            continue
        if name in COMMAND_OPTIONS:
            raise SettingsError(f"{where}: {name!r} is no setting; give --{name} on the command line")
        if name not in REMOVED:
            raise SettingsError(f"{where}: unknown setting {reprlib.repr(name)}{_suggestion(name, kind.model_fields)}")
        neutral = REMOVED[name]
        if neutral is not None and value not in neutral:
            raise SettingsError(f"{where}: the setting {name} was removed (found {reprlib.repr(value)}); leave it out")
    return {name: value for name, value in values.items() if name in kind.model_fields}


def as_yaml(settings: Settings) -> str:
    """Return settings as YAML, from which `read_yaml` and `checked` make the same settings."""
    values = settings.model_dump(mode="json")
    breaks = any(mark in json.dumps(values, ensure_ascii=False) for mark in ("\x85", "\u2028", "\u2029"))
    # PyYAML reads these line breaks as spaces unless they are escaped
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=not breaks)


def _describe_errors(error: ValidationError, name: str = "") -> str:
    """Describe each wrong value once, with all types that it may have; `name` replaces the names of the settings."""
    lines: dict[str, list[Any]] = {}
    for each in error.errors():
        first, *rest = each["loc"] or ("",)
        # the other parts of the location are members of a union
        where = name or ".".join(str(part) for part in (first, *(part for part in rest if isinstance(part, int))))
        lines.setdefault(where, []).append(each)
    return "; ".join(_describe_error(each, where) for where, each in lines.items())


def _describe_error(errors: Sequence[Any], name: str) -> str:
    error = errors[0]
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    if error["type"] == "missing":
        return f"{name} is missing"
    if name == "prompt" and error["type"] == "string_pattern_mismatch":
        return "prompt is empty; say in words what the clip shows"
    found = f"; found {reprlib.repr(error['input'])}"
    if error["type"] == "literal_error":
        near = difflib.get_close_matches(
            str(error["input"]).lower(), re.findall("'([^']+)'", error["ctx"]["expected"]), n=1
        )
        found += f"; did you mean {near[0]!r}?" if near else ""
    messages = [each["msg"].partition(", unable to parse")[0] for each in errors]
    expected = " or ".join(dict.fromkeys(message[0].lower() + message[1:] for message in messages))
    return f"{name}: {expected.replace(' or input should be ', ' or ')}{found}"


def _suggestion(word: str, known: Iterable[str]) -> str:
    names = list(known)
    near = difflib.get_close_matches(word, names, n=1)
    more = ", ... ('tuneavideo tune --help' and 'tuneavideo edit --help' list them)" if len(names) > SHOWN else ""
    return f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(names[:SHOWN])}{more}"
