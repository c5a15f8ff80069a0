"""Names, groups and short help of the options. This module must not import torch."""

from __future__ import annotations

import dataclasses
import shutil
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from tuneavideo.settings import Settings

ALIASES = {"base": ("--model",)}
METAVARS = {"video": "CLIP", "run": "RUN", "prompt": "TEXT", "edit": "TEXT"}
# Settings whose words the settings themselves take apart: type for the parser, and how help names a value.
WORDS: dict[str, tuple[Any, str]] = {"seeds": (tuple[str, ...], "INT"), "start_time": (str | None, "SECONDS")}
# Groups of the options in the help; every option is in one of them.
GROUPS: dict[str, tuple[str, ...]] = {
    "clip": (
        "video", "run", "prompt", "num_frames", "start", "start_time", "stride", "sample_fps", "resolution", "width",
        "height", "fit",
    ),
    "model": (
        "base", "preset", "references", "clip_norm", "temporal_init", "trainable_modules", "frozen_modules",
        "edit_model", "lora", "embedding", "controlnet", "control", "control_scale", "ip_adapter", "ip_image",
        "ip_scale",
    ),
    "training": (
        "max_train_steps", "learning_rate", "lr_scheduler", "lr_warmup_steps", "train_batch_size",
        "gradient_accumulation_steps", "max_grad_norm", "snr_gamma", "optimizer", "adam_beta1", "adam_beta2",
        "adam_weight_decay", "adam_epsilon", "use_ema", "ema_decay", "seed", "checkpointing_steps",
        "checkpoints_total_limit", "report_to",
    ),
    "editing": (
        "edit", "negative_prompt", "guidance_scale", "guidance_interval", "attention_injection", "strength", "seeds",
        "fresh_noise", "num_inference_steps", "num_inv_steps", "sampler", "timestep_spacing", "feature_reuse",
        "validation_steps",
    ),
    "memory": (
        "memory", "mixed_precision", "gradient_checkpointing", "offload", "batch_guidance", "batch_prompts", "window",
        "window_overlap",
    ),
    "output": ("out", "resume", "checkpoint", "formats", "fps", "config", "json", "debug"),
}  # fmt: skip
# Options that `--help` shows; `--help-all` shows all.
COMMON = {
    "tune": {
        "video", "prompt", "num_frames", "start_time", "resolution", "base", "preset", "max_train_steps",
        "learning_rate", "edit", "guidance_scale", "attention_injection", "memory", "out", "resume",
    },
    "edit": {
        "run", "prompt", "lora", "controlnet", "preset", "negative_prompt", "guidance_scale", "attention_injection",
        "strength", "seeds", "fresh_noise", "num_inference_steps", "fps", "formats",
    },
}  # fmt: skip
OUTPUT = {"json": "Print the result as JSON.", "debug": "Print the traceback of an error."}
CONFIG = "YAML file of settings. Options take precedence over it."
WIDEST, COLUMN = 100, 34  # columns of the short help, and of its options
TYPES = {int: "INT", float: "FLOAT", str: "TEXT"}
HELP = {"-h", "--help", "--help-all"}


@dataclass(frozen=True)
class Command:
    """A command whose flags are the fields of settings.

    Attributes:
        name: As it is typed.
        about: What it does, in a sentence.
        kind: Class of its settings.
        positional: The setting that is given without a flag.
        repeated: The setting whose flag is given once for each value.
        example: A call of it, for its help and for messages.
        paths: Options of the command itself, each a path, and their meanings.
        inherited: Settings whose default is that of the run, unless `stated` has it.
        hidden: A setting without a flag.
    """

    name: str
    about: str | None
    kind: type[Settings]
    positional: str
    repeated: str
    example: str
    paths: Mapping[str, str] = dataclasses.field(default_factory=dict)
    inherited: frozenset[str] = frozenset()
    hidden: str = ""

    def flags_of(self, setting: str) -> tuple[str, ...]:
        """Every flag that a setting goes by; new prompts go by `--edit` in every command."""
        aliases = ("--edit",) if self.repeated == setting == "prompt" else ALIASES.get(setting, ())
        return (f"--{setting.replace('_', '-')}", *aliases)

    @property
    def known(self) -> list[str]:
        """All flags."""
        settings = [name for name in self.kind.model_fields if name not in (self.positional, self.hidden)]
        own = [f"--{name}" for name in (*self.paths, "config", "json", "debug", "help", "help-all")]
        return [flag for name in settings for flag in self.flags_of(name)] + own


def short_help(command: Command, values: Mapping[str, Any]) -> str:
    """Return the help that shows the common options, one sentence each; `values` replace defaults of the settings."""
    width = min(shutil.get_terminal_size().columns, WIDEST)
    given = METAVARS[command.positional]
    lines = [f"usage: tuneavideo {command.name} [OPTIONS] {given}", "", *textwrap.wrap(command.about or "", width)]
    for title, names in GROUPS.items():
        common = [name for name in names if name in COMMON[command.name] and name != command.hidden]
        lines += ["", f"{title}:"] if common else []
        for name in common:
            lines += _row(*_described(command, name, values), width)
    more = f"'tuneavideo {command.name} --help-all' shows all {len(command.known)} options."
    return "\n".join([*lines, "", f"example: {command.example}", more])


def _described(command: Command, name: str, values: Mapping[str, Any]) -> tuple[str, str]:
    """Return how an option is given, and what it does with its default value."""
    if name in command.paths or name not in command.kind.model_fields:
        return f"--{name} PATH", command.paths.get(name, CONFIG)
    field = command.kind.model_fields[name]
    kinds = [WORDS[name][1]] if name in WORDS else dict.fromkeys(_kinds(field.annotation))
    metavar = METAVARS.get(name, "|".join(kinds))
    option = metavar if name == command.positional else f"{command.flags_of(name)[0]} {metavar}"
    about = " ".join(str(field.description).split()).partition(". ")[0].rstrip(".") + "."
    default = values.get(name, () if field.is_required() else field.default)
    if name == command.repeated:
        note = "Repeatable."
    elif name in command.inherited and name not in values:
        note = "(default: the run's)"
    elif field.is_required() and name not in values:
        note = "(required)"
    elif default in (None, (), ""):
        note = ""
    else:
        note = f"(default: {' '.join(map(str, default)) if isinstance(default, tuple) else default})"
    return option, f"{about} {note}".rstrip()


def _kinds(annotation: Any) -> Iterator[str]:
    """Yield the names of the types that a setting accepts."""
    if get_origin(annotation) is Literal:
        yield f"{{{','.join(map(str, get_args(annotation)))}}}"
    elif annotation in TYPES:
        yield TYPES[annotation]
    else:
        for each in get_args(annotation):
            yield from _kinds(each)


def _row(option: str, about: str, width: int) -> list[str]:
    """Lay out an option and its description in two columns."""
    first, *others = textwrap.wrap(about, max(width - COLUMN, 20))
    rest = [" " * COLUMN + line for line in others]
    if len(option) > COLUMN - 4:
        return [f"  {option}", " " * COLUMN + first, *rest]
    return [f"  {option}".ljust(COLUMN) + first, *rest]
