"""Options of the commands, parsed by argparse; errors are one line. This module must not import torch."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin

from tuneavideo.cli.options import HELP, METAVARS, OUTPUT, Command, help_of
from tuneavideo.errors import SettingsError, TuneAVideoError

_STEPS = "--max-train-steps (of tuning) or --num-inference-steps (of an edit)"
_TUNED = "frames and size are chosen when a clip is tuned: 'tuneavideo tune'"
_DEVICE = "a GPU is used if there is one; set CUDA_VISIBLE_DEVICES=1 for another, CUDA_VISIBLE_DEVICES= for the CPU"
# Options of other programs or of another command, and their replacements: for every command, and for single ones.
FOREIGN_OPTIONS: dict[str, dict[str, str]] = {
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
        **dict.fromkeys(("--video", "--clip", "--input", "-i"), "the clip is given without an option"),
        **dict.fromkeys(("--output", "--output-dir", "--outdir", "-o"), "use --out"),
        **dict.fromkeys(("--lr", "--rate"), "use --learning-rate"),
        **dict.fromkeys(("--size", "--res", "--pixels"), "use --resolution, or --width and --height"),
        **dict.fromkeys(("--batch", "--batch-size"), "use --train-batch-size"),
        **dict.fromkeys(("--caption", "-p"), "use --prompt"),
        "--lora": "style LoRAs are an option of edits: 'tuneavideo edit --lora'",
    },
    "edit": {
        **dict.fromkeys(("--steps", "--num-steps", "--max-train-steps"), "use --num-inference-steps"),
        "--base": "edits use the base that was tuned; use --edit-model for another of the same architecture",
        "--model": "edits use the base that was tuned; use --edit-model for another of the same architecture",
        **dict.fromkeys(("--out", "--output", "--output-dir", "-o"), "edits are written into RUN/edits"),
        **dict.fromkeys(("--run", "--video", "--clip", "--input", "-i"), "the run is given without an option"),
        **dict.fromkeys(("--frames", "--num-frames", "--resolution", "--size", "--width", "--height"), _TUNED),
        **dict.fromkeys(("--seed",), "use --seeds"),
        **dict.fromkeys(("--caption", "-p", "--text"), "use --prompt"),
        **dict.fromkeys(("--mixed-precision", "--offload", "--memory"), "it is taken from the run's settings"),
        "--adapter": "the run is given without an option; its adapter is used",
        "--resume": "a stopped edit continues with the same command; 'tuneavideo tune --resume' continues a tuning",
    },
}  # fmt: skip
FOREIGN_OPTIONS |= {"invert": FOREIGN_OPTIONS["edit"], "adopt": FOREIGN_OPTIONS["tune"]}


class Parser(argparse.ArgumentParser):
    """A parser that raises SettingsError instead of printing its usage."""

    def error(self, message: str) -> NoReturn:
        raise SettingsError(f"{message}; '{self.prog} --help' lists the options")


def parser(name: str, about: str | None, among: Any = None) -> Parser:
    """Return the parser of a command, or add one to the subparsers `among`."""
    made: Parser = (
        among.add_parser(name, description=about, help=about)
        if among
        else Parser(f"tuneavideo {name}", description=about)
    )
    for option, meaning in OUTPUT.items():
        made.add_argument(f"--{option}", action="store_true", help=meaning)
    return made


def of_evaluate(about: str | None) -> Parser:
    """Return the parser of `evaluate`."""
    made = parser("evaluate", about)
    made.add_argument("places", nargs="+", metavar="RUN_OR_EDIT", help="Run folder, or folder of one edit.")
    made.add_argument(
        "--metrics",
        nargs="+",
        metavar="NAME",
        default=(),
        help="Names of metrics (docs/evaluation.md). By default all that suit the base.",
    )
    made.add_argument(
        "--mask", metavar="PATH", help="Picture, clip or folder of pictures, bright where edits may change the clip."
    )
    _add_models(made)
    return made


def of_benchmark(about: str | None) -> Parser:
    """Return the parser of `benchmark`."""
    whole = Parser("tuneavideo benchmark", description=about)
    which = whole.add_subparsers(dest="name", required=True, metavar="{tgve,miniature}")
    tgve = parser("tgve", "LOVEU-TGVE-2023: 76 clips, 4 edits each; a stopped benchmark continues.", which)
    tgve.add_argument(
        "--data",
        required=True,
        metavar="DIR",
        help="Folder of the benchmark: its frames, and its configs or its table.",
    )
    tgve.add_argument("--clips", type=count, help="Number of clips, evenly spread. By default all.")
    tgve.add_argument("--base", help="Base model. (default: sd1.4)")
    tgve.add_argument("--preset", help="Preset. (default: default)")
    tgve.add_argument(
        "--config", metavar="PATH", help="YAML file of settings, which precede those of the benchmark's configs."
    )
    _add_models(tgve)
    small = parser("miniature", "The bundled model on the bundled clips, scored by the bundled classifier.", which)
    small.add_argument("variants", nargs="*", help="Presets, or untuned. (default: untuned official default)")
    small.add_argument("--quick", action="store_true", help="Use 4 clips only.")
    small.add_argument("--seeds", type=count, help="Number of seeds. (default: 1)")
    small.add_argument(
        "--part",
        choices=("development", "report", "harder", "harder-report"),
        help="Part of the clips. (default: development)",
    )
    small.add_argument("--processes", type=count, help="Number of clips at the same time. By default one per CPU core.")
    for each in (tgve, small):
        each.add_argument("--out", metavar="DIR", help="Folder for the results; a stopped benchmark continues there.")
    return whole


def of_web(about: str | None) -> Parser:
    """Return the parser of `web`."""
    made = parser("web", about)
    made.add_argument("--root", type=Path, default=Path("runs"), help="Folder of the runs. (default: runs)")
    made.add_argument(
        "--host", default="127.0.0.1",
        help="Address to listen on. Another than that of this computer needs the token of the printed link. "
        "(default: 127.0.0.1)",
    )  # fmt: skip
    made.add_argument("--port", type=int, default=7860, help="Port to listen on; 0 takes a free one. (default: 7860)")
    made.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME",
        help="Name under which a proxy shows the page. It needs the token of the printed link, too. Repeatable.",
    )  # fmt: skip
    made.add_argument("--models", type=Path, metavar="DIR", help="Folder of base models that the page offers.")
    made.add_argument(
        "--captions", metavar="MODEL",
        help="Folder, or hub id in the hub's cache, of a model that suggests captions (BLIP, GIT). By default the "
        "first one in the cache. Nothing is downloaded.",
    )  # fmt: skip
    return made


def of_convert(about: str | None) -> Parser:
    """Return the parser of `convert`."""
    made = parser("convert", about)
    made.add_argument("source", help="Run, adapter, diffusers folder, .ckpt, .pth, .bin or .safetensors.")
    made.add_argument("out", help="New folder; a new file for mindone (.ckpt), ldm and lora (.safetensors).")
    made.add_argument("--to", required=True, choices=("diffusers", "official", "mindone", "ldm", "lora", "adapter"))
    made.add_argument("--base", help="Base of tuned layers. By default the base that an adapter names.")
    made.add_argument("--like", help="Model with configs, tokenizer and scheduler, if the source has none.")
    made.add_argument("--rank", type=count, default=64, help="Rank of a LoRA. (default: 64)")
    made.add_argument(
        "--style",
        choices=("diffusers", "kohya"),
        default="diffusers",
        help="Tensor names of a LoRA. (default: diffusers)",
    )
    made.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), help="Precision. By default that of each tensor.")
    made.add_argument("--no-binary", action="store_true", help="Write official as safetensors instead of .bin.")
    return made


def count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"found {text}; give 1 or more")
    return number


def _add_models(to: Parser) -> None:
    to.add_argument("--clip", metavar="MODEL", help="Hub id or folder of CLIP. By default ViT-L/14.")
    to.add_argument("--pick", metavar="MODEL", help="Hub id or folder of PickScore.")


def options(name: str, about: str | None, argv: Sequence[str], **more: str) -> argparse.Namespace:
    """Parse a command without settings; `more` are options with descriptions, flags except for `runs` and `out`."""
    made = parser(name, about)
    for option, meaning in more.items():
        if option == "runs":
            made.add_argument("runs", nargs="+", metavar="RUN", help=meaning)
        elif option == "out":
            made.add_argument("--out", metavar="PATH", help=meaning)
        else:
            made.add_argument(f"--{option}", action="store_true", help=meaning)
    return read(made, argv)


def read(made: Parser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse words. Raises SettingsError for unknown ones."""
    options, unknown = made.parse_known_args(["--help" if word == "--help-all" else word for word in argv])
    if unknown:
        known = re.findall(r"--[a-z][a-z-]+", made.format_help())
        raise SettingsError(_left_over(unknown, made.prog.split()[-1], known))
    return options


def parse(
    command: Command, argv: Sequence[str], defaults: Callable[[dict[str, Any], Any], Mapping[str, Any]]
) -> tuple[dict[str, Any], argparse.Namespace]:
    """Parse the options of a command, or print its help and exit.

    Args:
        command: The command.
        argv: Words of the command line.
        defaults: Function of the two results to the values that the help shows as defaults.

    Returns:
        The settings that are given, as words that the settings check; and the other options.

    Raises:
        SettingsError: A word is unknown, or a value is missing.
    """
    words = [word for word in argv if word not in HELP]
    if len(words) < len(argv):
        values: Mapping[str, Any] = {}
        with contextlib.suppress(TuneAVideoError):
            values = defaults(*_parsed(command, words))
        print(help_of(command, values, is_complete="--help-all" in argv))
        raise SystemExit(0)
    return _parsed(command, words)


def check_required(command: Command, values: Mapping[str, Any]) -> None:
    """Raise SettingsError when a required setting is not in `values`."""
    missing = [
        METAVARS[name] if name == command.positional else command.flags_of(name)[0]
        for name, each in command.kind.model_fields.items()
        if each.is_required() and name not in values
    ]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise SettingsError(f"{' and '.join(missing)} {verb} missing; for example: {command.example}")


def _parsed(command: Command, argv: Sequence[str]) -> tuple[dict[str, Any], argparse.Namespace]:
    made = Parser(f"tuneavideo {command.name}", add_help=False, allow_abbrev=False)
    for name in command.settings:
        kind = command.kind.model_fields[name].annotation
        options: dict[str, Any] = {"action": "append"} if name == command.repeated else {}
        if kind is bool:
            options = {"action": argparse.BooleanOptionalAction}
        elif get_origin(kind) is tuple and not options:
            options = {"nargs": "*" if ... in get_args(kind) else len(get_args(kind))}
        made.add_argument(*command.flags_of(name), dest=name, default=argparse.SUPPRESS, **options)
    for name in (*command.paths, "config"):
        made.add_argument(f"--{name}", type=Path)
    for name in OUTPUT:
        made.add_argument(f"--{name}", action="store_true")
    others, unknown = made.parse_known_args([*map(_spelt, argv)])
    flags = [word for word in unknown if word.startswith("-")]
    if excess := flags or unknown[1:]:  # the first other word is the positional argument
        raise SettingsError(_left_over(excess, command.name, command.flags))
    given = {name: vars(others).pop(name) for name in command.settings if name in others}
    given = {name: _value(command.kind.model_fields[name].annotation, value) for name, value in given.items()}
    return given | ({command.positional: unknown[0]} if unknown else {}), others


def _spelt(word: str) -> str:
    """Return a word with `-` for `_` in the name of an option, and as a path if it is a file that begins with `-`."""
    if word.startswith("--"):
        name, *value = word.split("=", 1)
        return "=".join([name.replace("_", "-"), *value])
    return f"./{word}" if word.startswith("-") and os.path.exists(word) else word


def _value(annotation: Any, value: Any) -> Any:
    """Replace words by the literal or the None that they spell, if the setting accepts it."""
    if isinstance(value, list):
        return tuple(_value(annotation, each) for each in value)
    return next((each for each in _literals(annotation) if str(each) == value), value)


def _literals(annotation: Any) -> Iterator[Any]:
    if annotation is type(None):
        yield None
    elif get_origin(annotation) is Literal:
        yield from get_args(annotation)
    else:
        for each in get_args(annotation):
            yield from _literals(each)


def _left_over(words: Sequence[str], command: str, known: Sequence[str]) -> str:
    """Describe unknown words of a command line, and what to do about them."""
    flag = next((word.split("=")[0] for word in words if word.startswith("-")), None)
    if flag is None:
        quoted = " " in words[0]
        advice = "write an option before each value" if quoted else "put words that belong together in quotes"
        return f"unexpected {words[0]!r}; {advice}"
    if flag[1:2] != "-" and len(flag) > 2:
        return f"unknown option {flag!r}; if it is a file, write './{flag}'"
    plain = flag.replace("_", "-").lower()
    advice = FOREIGN_OPTIONS.get(command, {}).get(plain) or FOREIGN_OPTIONS[""].get(plain)
    near = difflib.get_close_matches(plain, known, n=1)
    advice = advice or (f"did you mean {near[0]!r}?" if near else f"'tuneavideo {command} --help' lists the options")
    return f"unknown option {flag!r}; {advice}"
