"""Flags of the commands that have no settings. No torch here."""

from __future__ import annotations

import argparse
from typing import Any


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


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"found {text}; give 1 or more")
    return number


def _add_models(to: argparse.ArgumentParser) -> None:
    to.add_argument("--clip", metavar="MODEL", help="hub id or folder of CLIP, instead of ViT-L/14")
    to.add_argument("--pick", metavar="MODEL", help="hub id or folder of PickScore")
