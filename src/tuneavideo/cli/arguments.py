"""Flags of the commands: those of settings by tyro, others by argparse; mistakes are one line. No torch here."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import io
import os
import re
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_origin

from tuneavideo.cli.options import ALIASES, COMMON, CONFIG, GROUPS, HELP, METAVARS, OUTPUT, WORDS, Command, short_help
from tuneavideo.errors import SettingsError
from tuneavideo.settings import choices

_STEPS = "--max-train-steps (of tuning) or --num-inference-steps (of an edit)"
_TUNED = "frames and size are chosen when a clip is tuned: 'tuneavideo tune'"
_DEVICE = "a GPU is used if there is one; set CUDA_VISIBLE_DEVICES=1 for another, CUDA_VISIBLE_DEVICES= for the CPU"
# Options of other programs, or of another command, and what to do here: for every command, and for single ones.
ELSEWHERE: dict[str, dict[str, str]] = {
    "": {
        **dict.fromkeys(("--device", "--gpu", "--gpus", "--cuda", "--cpu", "--gpu-id"), _DEVICE),
        **dict.fromkeys(("--cfg", "--cfg-scale", "--guidance", "--scale"), "use --guidance-scale"),
        **dict.fromkeys(("--fp16", "--bf16", "--fp32", "--half", "--precision", "--dtype"), "use --mixed-precision"),
        **dict.fromkeys(("--threads", "--num-threads"), "set OMP_NUM_THREADS"),
    },
    "tune": {
        **dict.fromkeys(("--steps", "--num-steps", "--iterations", "--epochs"), f"use {_STEPS}"),
        **dict.fromkeys(("--train-steps", "--max-steps"), "use --max-train-steps"),
        **dict.fromkeys(("--frames", "--n-frames", "--length"), "use --num-frames"),
        **dict.fromkeys(("--video", "--clip", "--input", "-i"), "the clip comes first, without an option"),
        **dict.fromkeys(("--output", "--output-dir", "--outdir", "-o"), "use --out"),
        **dict.fromkeys(("--lr", "--rate"), "use --learning-rate"),
        **dict.fromkeys(("--size", "--res", "--pixels"), "use --resolution, or --width and --height"),
        **dict.fromkeys(("--batch", "--batch-size"), "use --train-batch-size"),
        **dict.fromkeys(("--caption", "-p"), "use --prompt"),
        "--lora": "style LoRAs are an option of edits: 'tuneavideo edit --lora'",
    },
    "edit": {
        **dict.fromkeys(("--steps", "--num-steps", "--max-train-steps"), "use --num-inference-steps"),
        "--base": "an edit takes the base that was tuned; use --edit-model for another of the same shape",
        "--model": "an edit takes the base that was tuned; use --edit-model for another of the same shape",
        **dict.fromkeys(("--out", "--output", "--output-dir", "-o"), "edits are written into RUN/edits"),
        **dict.fromkeys(("--run", "--video", "--clip", "--input", "-i"), "the run comes first, without an option"),
        **dict.fromkeys(("--frames", "--num-frames", "--resolution", "--size", "--width", "--height"), _TUNED),
        **dict.fromkeys(("--seed",), "use --seeds"),
        **dict.fromkeys(("--caption", "-p", "--text"), "use --prompt"),
        **dict.fromkeys(("--mixed-precision", "--offload", "--memory"), "it is taken from the run's settings"),
        "--adapter": "the run comes first, without an option, and has its adapter",
        "--resume": "a stopped edit goes on with the same command; 'tuneavideo tune --resume' goes on with a tuning",
    },
}  # fmt: skip
ELSEWHERE |= {"invert": ELSEWHERE["edit"], "adopt": ELSEWHERE["tune"]}


def parser(name: str, about: str | None, among: Any = None) -> argparse.ArgumentParser:
    """The parser of a command, or of one among the kinds of a command."""
    made: argparse.ArgumentParser = (
        among.add_parser(name, description=about, help=about)
        if among
        else argparse.ArgumentParser(f"tuneavideo {name}", description=about)
    )
    for option, meaning in OUTPUT.items():
        made.add_argument(f"--{option}", action="store_true", help=meaning)
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
    which = whole.add_subparsers(dest="name", required=True, metavar="{tgve,miniature}")
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
        options, unknown = made.parse_known_args(["--help" if word == "--help-all" else word for word in argv])
    if unknown:
        raise SettingsError(
            _left_over(unknown, made.prog.split()[-1], re.findall(r"--[a-z][a-z-]+", made.format_help()))
        )
    return options


def early(argv: Sequence[str]) -> argparse.Namespace:
    """The flags that other flags' defaults hang on."""
    made = argparse.ArgumentParser(add_help=False, allow_abbrev=False, argument_default=None)
    for name in ("base", "preset", "config", "resume"):
        made.add_argument(f"--{name}", *(ALIASES["base"] if name == "base" else ()), dest=name, nargs="?")
    return made.parse_known_args(argv)[0]


def parse(command: Command, argv: Sequence[str], stated: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    """Read flags over `stated` values: every field of the command's settings, and options of the command itself."""
    given = {re.sub("^--no-", "--", word.split("=")[0].replace("_", "-")) for word in argv}
    values = dict(stated)
    if not given.isdisjoint(command.flags_of(command.repeated)):
        values.pop(command.repeated, None)
    parsed, unknown = _parsed(command, argv, values)
    if unknown:
        raise SettingsError(_left_over(unknown, command.name, command.known))
    lacking = [
        METAVARS[name] if name == command.positional else command.flags_of(name)[0]
        for name, each in command.kind.model_fields.items()
        if each.is_required()
        and name not in values
        and parsed.get(name) in ("", ())
        and given.isdisjoint(command.flags_of(name))
    ]
    if lacking:
        verb = "is" if len(lacking) == 1 else "are"
        raise SettingsError(f"{' and '.join(lacking)} {verb} missing; for example: {command.example}")
    typed = [name for name in command.kind.model_fields if not given.isdisjoint(command.flags_of(name))]
    settings = {**values, **{name: parsed[name] for name in (*typed, command.positional)}}
    return settings, argparse.Namespace(**{name: parsed[name] for name in (*command.paths, "config", *OUTPUT)})


def positional(command: Command, argv: Sequence[str]) -> str | None:
    """What stands in the positional argument's place; None if there is nothing, or if the words cannot be read."""
    try:
        parsed, _ = _parsed(command, [word for word in argv if word not in HELP], {})
    except SettingsError:  # is told when the words are read again
        return None
    return parsed[command.positional] or None


def _parsed(command: Command, argv: Sequence[str], values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the value of every option, and the words left over. Print help if `argv` has an option for it."""
    import tyro

    given = [f"./{word}" if word[:1] == "-" and word[1:2] != "-" and os.path.exists(word) else word for word in argv]
    is_help = not HELP.isdisjoint(given)
    if is_help and "--help-all" not in given and command.name in COMMON:
        print(short_help(command, values))
        raise SystemExit(0)
    made, given = _fields(command, values, is_help), ["--help"] if is_help else given
    about = f"{command.about}\n\nexample:\n  {command.example}"
    with _one_line(f"tuneavideo {command.name}"):
        parsed, unknown = tyro.cli(
            made, prog=f"tuneavideo {command.name}", description=about, args=given, return_unknown_args=True
        )
    flat = vars(parsed)
    for group in [name for name, value in flat.items() if dataclasses.is_dataclass(value)]:
        flat |= vars(flat.pop(group))
    return flat, unknown


def _fields(command: Command, values: Mapping[str, Any], is_help: bool) -> Any:
    """Make the dataclass that tyro parses: the positional argument, and a dataclass for each group of options.

    Its types are plain ones: settings check the values, with errors of one line.

    Args:
        command: The command.
        values: Values that replace the defaults of the settings.
        is_help: Whether help is printed. Missing values are errors of tyro's then, so that it marks what is required.
    """
    import tyro

    made = {
        name: _field(command, name, values, is_help) for name in command.kind.model_fields if name != command.hidden
    }
    for name, meaning in {**command.paths, "config": CONFIG}.items():
        hint = Annotated[Path | None, tyro.conf.arg(help=meaning, metavar="PATH", help_behavior_hint="")]
        made[name] = name, hint, dataclasses.field(default=None)
    for name, meaning in OUTPUT.items():
        hint = Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help=meaning, help_behavior_hint="")]
        made[name] = name, hint, dataclasses.field(default=False)
    fields = [made.pop(command.positional)]
    for title, names in GROUPS.items():
        if inner := [made[name] for name in names if name in made]:
            group = dataclasses.make_dataclass(title, inner, kw_only=True)
            fields.append((title, tyro.conf.OmitArgPrefixes[group], dataclasses.field(default_factory=group)))
    return dataclasses.make_dataclass(command.name.title(), fields, kw_only=True)


def _field(command: Command, name: str, values: Mapping[str, Any], is_help: bool) -> tuple[str, Any, Any]:
    """Return name, type and default of an option. Choices are plain words, which the settings accept in any case."""
    import tyro

    about = command.kind.model_fields[name]
    words, several = choices(about.annotation), get_origin(about.annotation) is tuple
    hint, metavar, shown = about.annotation, METAVARS.get(name), None
    default: Any = values.get(name, () if name == command.repeated else "" if about.is_required() else about.default)
    if name in WORDS:
        hint, metavar = WORDS[name]
    elif words:
        hint, metavar = tuple[str, ...] if several else str | None, f"{{{','.join(words)}}}"
    if name in WORDS and default is not None:
        default = tuple(map(str, default)) if isinstance(default, tuple) else str(default)
    if default in (None, (), ""):
        shown = ""
    if name in command.inherited and name not in values:
        shown = "(default: the run's)"
    if is_help and default == "" and about.is_required():
        shown, default = None, tyro.MISSING
    if several and metavar and name != command.repeated:
        metavar += " ..."
    if name == command.repeated:
        shown = "(give it once for each)"
        hint = Annotated[tuple[str, ...], tyro.conf.UseAppendAction]
    if name == command.positional:
        hint = tyro.conf.Positional[hint]
    aliases = command.flags_of(name)[1:]
    more = tyro.conf.arg(
        help=" ".join(str(about.description).split()), metavar=metavar, aliases=aliases, help_behavior_hint=shown
    )
    return name, Annotated[hint, more], dataclasses.field(default=default)


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
            if union := re.match(r"Error parsing (\S+): no type matching (\S+) .*? from \['(.*?)'\]", told):
                kinds = " or ".join(kind.strip("{}") for kind in union[2].split("|") if kind != "{None}")
                told = f"{union[1]}: expected {kinds}; found {union[3]!r}"
            raise SettingsError(f"{told}; '{command} --help' tells more") from None


def _left_over(words: Sequence[str], command: str, known: Sequence[str]) -> str:
    """What to do about words of a command line that mean nothing."""
    flag = next((word.split("=")[0] for word in words if word.startswith("-")), None)
    if flag is None:
        quoted = " " in words[0]
        advice = "write an option before each value" if quoted else "put words that belong together in quotes"
        return f"unexpected {words[0]!r}; {advice}"
    if flag[1:2] != "-" and len(flag) > 2:
        return f"unknown option {flag!r}; if it is a file, write './{flag}'"
    plain = flag.replace("_", "-").lower()
    advice = ELSEWHERE.get(command, {}).get(plain) or ELSEWHERE[""].get(plain)
    near = difflib.get_close_matches(plain, known, n=1)
    advice = advice or (f"did you mean {near[0]!r}?" if near else f"'tuneavideo {command} --help' lists the options")
    return f"unknown option {flag!r}; {advice}"
