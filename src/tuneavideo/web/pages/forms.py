"""Form fields from the settings: their descriptions, types, bounds and defaults."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, get_origin

from tuneavideo.config import checked, layers, parse_values
from tuneavideo.errors import SettingsError
from tuneavideo.option_groups import GROUPS
from tuneavideo.setting_types import Settings
from tuneavideo.settings import EditSettings, Sampling, Styling, TuneSettings

# Settings that have controls of their own on the page, or that the page does not offer since they name files or code.
ELSEWHERE = {
    "video", "run", "prompt", "edit", "base", "preset", "start", "start_time", "stride", "sample_fps", "num_frames",
    "fit", "report_to", "step", *Styling.model_fields,
}  # fmt: skip
OPTIMIZERS = ("adamw", "adamw8bit", "adafactor", "sgd")
FRAMES = ("num_frames", "start_time", "sample_fps", "stride", "fit")
# The settings that change a result most, with the words of the page and the range of their sliders.
SLIDERS = {
    "max_train_steps": ("Training steps", 10, 1000, 10),
    "attention_injection": ("Keep the clip's motion and layout", 0, 1, 0.05),
    "guidance_scale": ("Follow the prompt", 1, 20, 0.5),
    "strength": ("Strength of the edit", 0.05, 1, 0.05),
}

# Words of the page for other settings beside the sliders.
LABELS = {
    "validation_steps": "Preview every N steps", "keep_weights": "Keep the weights of previews",
    "lora_rank": "Rank of a small adapter", "memory": "Memory in GB", "keep": "Keep what the prompt leaves as it is",
}  # fmt: skip


@dataclass(frozen=True)
class Field:
    """A control of a form.

    Attributes:
        name: Name of the setting.
        label: Words beside the control.
        help: Description of the setting.
        kind: `number`, `text` or `select`.
        value: Default value as text.
        minimum: Lowest number; None without.
        maximum: Highest number; None without.
        step: Distance of the numbers, or `any`.
        choices: Words to choose from; the empty one stands for None.
    """

    name: str
    label: str
    help: str
    kind: str
    value: str
    minimum: float | None = None
    maximum: float | None = None
    step: str = "any"
    choices: tuple[str, ...] = ()


def offered(kind: type[Settings]) -> list[str]:
    """Return the names of the settings that a form of the page may have."""
    return [name for name in kind.model_fields if name not in ELSEWHERE]


def defaults(kind: type[Settings], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the default of every setting, with `values` in their place."""
    return {name: values.get(name, field.default) for name, field in kind.model_fields.items()}


def tune_defaults(base: str, preset: str = "default") -> dict[str, Any]:
    """Return the default values of a tuning on a base. Raises SettingsError for an unknown preset."""
    return defaults(TuneSettings, layers({"base": base, "preset": preset}, {}))


def groups(kind: type[Settings], values: Mapping[str, Any], *, without: Iterable[str] = ()) -> dict[str, list[Field]]:
    """Return the fields of all offered settings, by the groups of `--help-all`."""
    names = {*offered(kind)} - {*without}
    found = {title: [field(kind, name, values[name]) for name in members if name in names]
             for title, members in GROUPS.items()}  # fmt: skip
    return {title: fields for title, fields in found.items() if fields}


def slider(kind: type[Settings], name: str, value: Any) -> Field:
    """Return the field of an important setting with the range of its slider."""
    label, low, high, step = SLIDERS[name]
    made = field(kind, name, value)
    return Field(name, label, made.help, "range", made.value, low, max(high, float(value)), f"{step:g}")


def field(kind: type[Settings], name: str, value: Any) -> Field:
    """Return the field of a setting with a value."""
    info, schema = kind.model_fields[name], schema_of(kind)[name]
    variants = schema.get("anyOf", [schema])
    words = tuple(
        str(word) for each in variants for word in each.get("enum", [each["const"]] if "const" in each else [])
    )
    optional = ("",) if any(each.get("type") == "null" for each in variants) else ()
    about = " ".join(str(info.description).split()).replace("`", "")
    made: dict[str, Any] = {
        "name": name,
        "label": LABELS.get(name, name.replace("_", " ").capitalize()),
        "help": about,
        "value": shown(value),
    }
    if name == "optimizer":
        return Field(**made, kind="select", choices=tuple(dict.fromkeys((*OPTIMIZERS, value))))
    if info.annotation is bool:
        return Field(**made, kind="select", choices=("on", "off"))
    if words and get_origin(info.annotation) is not tuple:
        return Field(**made, kind="select", choices=(*optional, *words))
    numeric = next((each for each in variants if each.get("type") in ("integer", "number")), None)
    if numeric is None:
        return Field(**made, kind="text")
    low = numeric.get("minimum", numeric.get("exclusiveMinimum"))
    is_whole = numeric["type"] == "integer"
    if is_whole and "exclusiveMinimum" in numeric:
        low = numeric["exclusiveMinimum"] + 1
    return Field(
        **made, kind="number", minimum=low, maximum=numeric.get("maximum"), step="1" if is_whole else "any"
    )  # fmt: skip


@cache
def schema_of(kind: type[Settings]) -> dict[str, Any]:
    """Return the JSON schemas of the settings, by name."""
    return kind.model_json_schema()["properties"]


def shown(value: Any) -> str:
    """Return the text of a value in a form."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple | list):
        return " ".join(map(shown, value))
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def read(kind: type[Settings], form: Mapping[str, str], standard: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a form that differ from the default values.

    Args:
        kind: Class of the settings.
        form: Text by name; other names than those of offered settings are ignored.
        standard: Default values that the form showed.

    Raises:
        SettingsError: A value is wrong.
    """
    values = {}
    for name in offered(kind):
        text = form.get(name)
        if text is None or text == shown(standard[name]):
            continue
        info = kind.model_fields[name]
        if info.annotation is bool:
            values[name] = {"on": True, "off": False}.get(text, text)
        elif get_origin(info.annotation) is tuple:
            values[name] = tuple(text.replace(",", " ").split())
        elif text or info.annotation is str:
            values[name] = text
        elif standard[name] is not None and "null" in str(schema_of(kind)[name]):
            values[name] = None
    if values.get("optimizer", OPTIMIZERS[0]) not in OPTIMIZERS:
        raise SettingsError(f"optimizer: expected {', '.join(OPTIMIZERS)}; others need the command line")
    return parse_values(kind, values, "the form")


def prompts(text: str) -> tuple[str, ...]:
    """Return the prompts of a text with one per line."""
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def loaded(comment: str) -> dict[str, Any]:
    """Return prompt, seed and sampling settings from the comment of a downloaded edit.

    Raises:
        SettingsError: The comment has no settings.
    """
    try:
        values = json.loads(comment)["tuneavideo"]
        known = {name: value for name, value in values.items() if name in Sampling.model_fields}
        text = {"prompt": str(values["prompt"]), "seeds": [int(values["seed"])]}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise SettingsError("this video has no settings of tuneavideo; take an mp4 that the page made") from None
    made = checked(EditSettings, {**known, **text, "prompt": (text["prompt"],), "run": "-"})
    return {name: shown(getattr(made, name)) for name in offered(EditSettings)} | {"prompt": text["prompt"]}
