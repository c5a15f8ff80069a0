"""Names, groups and help of the options that are settings. This module must not import torch."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_args, get_origin

from tuneavideo.option_groups import COMMON, GROUPS
from tuneavideo.setting_types import Settings
from tuneavideo.settings import Sampling

ALIASES = {"base": ("--model",)}
METAVARS = {"video": "CLIP", "run": "RUN", "prompt": "TEXT", "edit": "TEXT", "start_time": "SECONDS"}
CONFIG = "YAML file of settings. Options take precedence over it."
OUTPUT = {"json": "Print the result as JSON.", "debug": "Print the traceback of an error."}
WIDEST, COLUMN = 100, 34  # columns of the help, and of its options
TYPES = {int: "INT", float: "FLOAT", str: "TEXT"}
HELP = {"-h", "--help", "--help-all"}


@dataclass(frozen=True)
class Command:
    """A command whose options are the fields of settings.

    Attributes:
        name: Name on the command line.
        about: Description in a sentence.
        kind: Class of its settings.
        positional: Name of the setting that is given without an option.
        repeated: Name of the setting whose option is given once for each value.
        example: A call of it, for help and error messages.
        paths: Options that are no settings, each a path, and their descriptions.
        hidden: Name of a setting without an option.
    """

    name: str
    about: str | None
    kind: type[Settings]
    positional: str
    repeated: str
    example: str
    paths: Mapping[str, str] = field(default_factory=dict)
    hidden: str = ""

    @property
    def settings(self) -> list[str]:
        """Names of the settings that are options."""
        return [name for name in self.kind.model_fields if name not in (self.positional, self.hidden)]

    def flags_of(self, setting: str) -> tuple[str, ...]:
        """Return the option of a setting and its aliases; new prompts are `--edit` in every command."""
        aliases = ("--edit",) if self.repeated == setting == "prompt" else ALIASES.get(setting, ())
        return (f"--{setting.replace('_', '-')}", *aliases)

    @property
    def flags(self) -> list[str]:
        """All options."""
        others = (*self.paths, "config", *OUTPUT, "help", "help-all")
        return [flag for name in self.settings for flag in self.flags_of(name)] + [f"--{name}" for name in others]


def help_of(command: Command, values: Mapping[str, Any], *, is_complete: bool) -> str:
    """Return the help of a command.

    Args:
        command: The command.
        values: Values that replace the defaults of its settings.
        is_complete: Show all options with their whole descriptions, otherwise the common ones with a sentence each.
    """
    width = min(shutil.get_terminal_size().columns, WIDEST)
    named = {command.positional, *command.settings, *command.paths, "config", *OUTPUT}
    names = named if is_complete or command.name not in COMMON else named & COMMON[command.name]
    lines = [f"usage: tuneavideo {command.name} [OPTIONS] {METAVARS[command.positional]}", ""]
    lines += textwrap.wrap(command.about or "", width)
    for title, members in GROUPS.items():
        shown = [name for name in members if name in names]
        lines += ["", f"{title}:"] if shown else []
        for name in shown:
            lines += _row(*_described(command, name, values, is_complete), width)
    lines += ["", f"example: {command.example}"]
    if command.positional == "video":
        lines.append("Defaults are those of this --base and --preset; add --base sd1.5 to see that model's.")
    if names != named:
        lines.append(f"'tuneavideo {command.name} --help-all' shows all {len(command.flags)} options.")
    return "\n".join(lines)


def _described(command: Command, name: str, values: Mapping[str, Any], is_complete: bool) -> tuple[str, str]:
    """Return the option of a name with its metavar, and its description with the default value."""
    if name in OUTPUT:
        return f"--{name}", OUTPUT[name]
    if name in command.paths or name == "config":
        return f"--{name} PATH", command.paths.get(name, CONFIG)
    info = command.kind.model_fields[name]
    flags, metavar = command.flags_of(name), _metavar(name, info.annotation, name == command.repeated)
    if info.annotation is bool:
        option = f"{flags[0]}, --no-{flags[0][2:]}"
    else:
        option = metavar if name == command.positional else f"{', '.join(flags[: 1 + is_complete])} {metavar}"
    about = re.sub(r"`(\w+)`", partial(_flag, command), " ".join(str(info.description).split()))
    about = about if is_complete else about.partition(". ")[0].rstrip(".") + "."
    default = values.get(name, () if info.is_required() else info.default)
    if name == command.repeated:
        note = "Repeatable. (required)" if info.is_required() and name not in values else "Repeatable."
    elif command.positional == "run" and name in Sampling.model_fields and name not in values:
        note = "(default: the run's)"
    elif info.is_required() and name not in values:
        note = "(required)"
    elif default in (None, (), ""):
        note = ""
    else:
        note = f"(default: {' '.join(map(str, default)) if isinstance(default, tuple) else default})"
    about = about.partition(" Default: ")[0] if note else about
    return option, f"{about} {note}".rstrip()


def _flag(command: Command, word: re.Match[str]) -> str:
    """Return a word in backquotes, as an option if it is one."""
    return f"`--{word[1].replace('_', '-')}`" if word[1] in command.settings else word[0]


def _metavar(name: str, annotation: Any, is_repeated: bool) -> str:
    """Return the types that a setting accepts, as help names them."""
    if name in METAVARS:
        return METAVARS[name]
    kinds = [*_kinds(annotation)]
    if get_origin(annotation) is not tuple:
        return "|".join(kinds)
    return f"{kinds[0]} ..." if ... in get_args(annotation) and not is_repeated else " ".join(kinds)


def _kinds(annotation: Any) -> Iterator[str]:
    if get_origin(annotation) is Literal:
        yield f"{{{','.join(map(str, get_args(annotation)))}}}"
    elif annotation in TYPES:
        yield TYPES[annotation]
    else:
        for each in get_args(annotation):
            yield from _kinds(each)


def _row(option: str, about: str, width: int) -> list[str]:
    """Lay out an option and its description in two columns."""
    first, *others = textwrap.wrap(about, max(width - COLUMN, 20), break_on_hyphens=False)
    rest = [" " * COLUMN + line for line in others]
    if len(option) > COLUMN - 4:
        return [f"  {option}", " " * COLUMN + first, *rest]
    return [f"  {option}".ljust(COLUMN) + first, *rest]
