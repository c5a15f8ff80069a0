"""Flags of the commands: those of settings by tyro, others by argparse; mistakes are one line. No torch here."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import io
import re
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from tuneavideo.errors import SettingsError

ALIASES = {"base": ("--model",)}


def parser(name: str, about: str | None, among: Any = None) -> argparse.ArgumentParser:
    """The parser of a command, or of one among the kinds of a command."""
    make = among.add_parser if among else argparse.ArgumentParser
    made = make(name if among else f"tuneavideo {name}", description=about)
    made.add_argument("--json", action="store_true", help="print the result for machines")
    made.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return made


def of_evaluate(about: str | None) -> argparse.ArgumentParser:
    """What `evaluate` takes."""
    made = parser("evaluate", about)
    made.add_argument("places", nargs="+", metavar="RUN_OR_EDIT", help="run folder, or folder of one edit")
    made.add_argument("--metrics", nargs="+", metavar="NAME", default=(), help="only these; see docs/evaluation.md")
    made.add_argument("--mask", metavar="PATH", help="picture, clip or folder, bright where edits may change it")
    _add_models(made)
    return made


def of_benchmark(about: str | None) -> argparse.ArgumentParser:
    """What `benchmark` takes."""
    whole = argparse.ArgumentParser("tuneavideo benchmark", description=about)
    which = whole.add_subparsers(dest="name", required=True, metavar="BENCHMARK")
    tgve = parser("tgve", "LOVEU-TGVE-2023: 76 clips, 4 edits each; goes on where it was stopped.", which)
    tgve.add_argument("--data", required=True, metavar="DIR", help="its frames, and its configs or its table")
    tgve.add_argument("--clips", type=_count, help="so many clips only, evenly spread")
    tgve.add_argument("--base", help="base model (default sd1.4)")
    tgve.add_argument("--preset", help="preset (default: default)")
    tgve.add_argument("--config", metavar="PATH", help="YAML file of settings, which beat the benchmark's configs")
    _add_models(tgve)
    small = parser("miniature", "The bundled model on the bundled clips, read by the bundled judge.", which)
    small.add_argument("variants", nargs="*", help="presets, or untuned (default: untuned official default)")
    small.add_argument("--quick", action="store_true", help="4 clips instead of 12")
    small.add_argument("--seeds", type=_count, help="how many seeds (default 1)")
    small.add_argument("--part", choices=("development", "report"), help="which clips (default development)")
    small.add_argument("--processes", type=_count, help="clips at a time (default: one for each core)")
    for each in (tgve, small):
        each.add_argument("--out", metavar="DIR", help="folder to make or go on with")
    return whole


def of_convert(about: str | None) -> argparse.ArgumentParser:
    """What `convert` takes."""
    made = parser("convert", about)
    made.add_argument("source", help="a run, adapter, diffusers folder, .ckpt, .pth, .bin or .safetensors")
    made.add_argument("out", help="new folder; a file for mindone (.ckpt), ldm and lora (.safetensors)")
    made.add_argument("--to", required=True, choices=("diffusers", "official", "mindone", "ldm", "lora", "adapter"))
    made.add_argument("--base", help="model that tuned layers were tuned on; by default the one an adapter names")
    made.add_argument("--like", help="model to take configs, tokenizer and scheduler from, where there are none")
    made.add_argument("--rank", type=_count, default=64, help="of a LoRA (64)")
    made.add_argument("--style", choices=("diffusers", "kohya"), default="diffusers", help="names of a LoRA")
    made.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), help="precision; by default that of each tensor")
    made.add_argument("--no-binary", action="store_true", help="official as safetensors instead of .bin")
    return made


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"found {text}; give 1 or more")
    return number


def _add_models(to: argparse.ArgumentParser) -> None:
    to.add_argument("--clip", metavar="MODEL", help="hub id or folder of CLIP, instead of ViT-L/14")
    to.add_argument("--pick", metavar="MODEL", help="hub id or folder of PickScore")


def options(name: str, about: str | None, argv: Sequence[str], **more: str) -> argparse.Namespace:
    """Parse a command that has no settings; `more` options and their meanings, flags but for `runs` and `out`."""
    made = parser(name, about)
    for option, meaning in more.items():
        if option == "runs":
            made.add_argument("runs", nargs="+", metavar="RUN", help=meaning)
        elif option == "out":
            made.add_argument("--out", metavar="PATH", help=meaning)
        else:
            made.add_argument(f"--{option}", action="store_true", help=meaning)
    return read(made, argv)


def read(made: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse words, or say in one line what is wrong with them."""
    with _one_line(made.prog):
        options, unknown = made.parse_known_args(argv)
    if unknown:
        raise SettingsError(_left_over(unknown, made.prog, re.findall(r"--[a-z][a-z-]+", made.format_help())))
    return options


def early(argv: Sequence[str]) -> argparse.Namespace:
    """The flags that other flags' defaults hang on."""
    made = argparse.ArgumentParser(add_help=False, allow_abbrev=False, argument_default=None)
    for name in ("base", "preset", "config", "resume"):
        made.add_argument(f"--{name}", *ALIASES.get(name, ()), dest=name, nargs="?")
    return made.parse_known_args(argv)[0]


def parse(
    name: str,
    about: str | None,
    argv: Sequence[str],
    kind: Any,
    stated: Mapping[str, Any],
    positional: str,
    repeated: tuple[str, ...],
    paths: Mapping[str, str],
) -> tuple[dict[str, Any], Any]:
    """Read flags over `stated` values: every field of the settings `kind`, and options of the command itself."""
    import tyro

    given = {word.split("=")[0] for word in argv}
    values = {key: value for key, value in stated.items() if not (key in repeated and f"--{key}" in given)}
    arguments, default = _arguments(kind, values, positional, repeated)
    fields: list[Any] = [("settings", tyro.conf.OmitArgPrefixes[arguments], dataclasses.field(default=default))]
    for key, meaning in {"config": "YAML file of settings; flags go before it", **paths}.items():
        described = Annotated[Path | None, tyro.conf.arg(help=meaning, metavar="PATH")]
        fields.append((key, described, dataclasses.field(default=None)))
    for key, meaning in {"json": "print the result for machines", "debug": "show the traceback of an error"}.items():
        described = Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help=meaning)]
        fields.append((key, described, dataclasses.field(default=False)))
    command = dataclasses.make_dataclass(name.title(), fields)
    command.__doc__ = about
    with _one_line(f"tuneavideo {name}"):
        parsed, unknown = tyro.cli(
            command, prog=f"tuneavideo {name}", description=about, args=list(argv), return_unknown_args=True
        )
    if unknown:
        known = [key.replace("_", "-") for key in (*kind.model_fields, *(field[0] for field in fields[1:]))]
        raise SettingsError(_left_over(unknown, f"tuneavideo {name}", [f"--{key}" for key in known]))
    return {
        key: value
        for key, value in vars(parsed.settings).items()
        if key not in _left_alone(parsed, kind, given, values)
    }, parsed


def _left_alone(parsed: Any, kind: Any, given: set[str], values: Mapping[str, Any]) -> set[str]:
    """Settings that nobody stated, not even at their built-in value."""
    flags = {word.removeprefix("--").removeprefix("no-").replace("-", "_") for word in given}
    same = {key for key, field in kind.model_fields.items() if getattr(parsed.settings, key) == field.default}
    return same - flags - values.keys()


@contextlib.contextmanager
def _one_line(command: str) -> Generator[None, None, None]:
    """Make one line of what tyro, in a box, or argparse, below its usage, says of words they cannot parse."""
    with contextlib.redirect_stderr(io.StringIO()) as box:
        try:
            yield
        except SystemExit as stopped:
            if not stopped.code:  # of --help
                raise
            plain = re.sub("\x1b\\[[0-9;]*m", "", box.getvalue())
            lines = [line.strip("│╭╰╮╯─ ") for line in plain.splitlines()[1:]]
            told = " ".join(line for line in lines if line.strip("-")).rpartition(": error: ")[2]
            told = re.split(" For full helptext| Argument helptext", told)[0].rstrip(".")
            raise SettingsError(f"{told}; '{command} --help' tells more") from None


def _left_over(words: Sequence[str], command: str, known: Sequence[str]) -> str:
    """What to do about words of a command line that mean nothing."""
    flag = next((word.split("=")[0] for word in words if word.startswith("-")), None)
    if flag is None:
        return f"{words[0]!r} is one word too many; put words that belong together in quotes"
    near = difflib.get_close_matches(flag.replace("_", "-"), known, n=1)
    return f"unknown option {flag!r}; " + (f"did you mean {near[0]!r}?" if near else f"'{command} --help' lists them")


def _arguments(kind: Any, values: Mapping[str, Any], positional: str, repeated: tuple[str, ...]) -> tuple[Any, Any]:
    """Settings as tyro wants them: a plain class, so that checking (and its one-line errors) stays ours."""
    import tyro

    fields, defaults = [], {}
    for key, field in kind.model_fields.items():
        hint: Any = field.annotation
        if key == positional:
            hint = tyro.conf.Positional[hint]
        if key in repeated:
            hint = Annotated[tuple[str, ...], tyro.conf.UseAppendAction]
        hint = Annotated[hint, tyro.conf.arg(help=field.description, aliases=ALIASES.get(key))]
        missing = () if key in repeated else tyro.MISSING
        defaults[key] = values.get(key, missing if field.is_required() else field.default)
        fields.append((key, hint, dataclasses.field(default=defaults[key])))
    arguments = dataclasses.make_dataclass(kind.__name__, fields, frozen=True)
    return arguments, arguments(**defaults)
