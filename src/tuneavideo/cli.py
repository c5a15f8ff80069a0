"""The command line: flags in, progress and paths out. Everything it does is in `api`."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from tuneavideo import __version__
from tuneavideo.errors import SettingsError, TuneAVideoError
from tuneavideo.progress import Job, Progress


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command, or say in one line why not; exit codes are 0 and those of `_fail` and `_stopped`."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(_help())
    elif name == "--version":
        print(__version__)
    elif name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        advice = f"did you mean '{near[0]}'?" if near else f"commands are {', '.join(COMMANDS)}"
        _fail(SettingsError(f"unknown command '{name}'; {advice}"))
    else:
        try:
            COMMANDS[name](rest)
        except KeyboardInterrupt:
            _stopped()
        except Exception as error:
            if "--debug" in rest:
                traceback.print_exc()
            _fail(error)


def demo(argv: Sequence[str]) -> None:
    """Tune the bundled miniature model on a bundled clip and make four edits."""
    from tuneavideo import api

    options = _options(
        "demo", demo.__doc__, argv, out="run folder to make", quick="a few steps only, to see that it runs"
    )
    done = _Show(options.json).run(api.demoing(out=options.out, quick=options.quick))
    _report(options.json, done, picture=done["files"][-1])


def tune(argv: Sequence[str]) -> None:
    """Teach a text-to-image model the motion of one clip, and edit the clip."""
    from tuneavideo import api
    from tuneavideo.settings import TuneSettings, layers, read_yaml

    early = _early(argv)
    if early.resume and {word.split("=")[0] for word in argv} & {"--config", "--out"}:
        raise SettingsError(
            f"--resume {early.resume} keeps that run's folder and settings; leave out --config and --out"
        )
    if early.resume:
        stated = api.resumed_settings(early.resume, {}).model_dump()
    else:
        given = {name: value for name, value in (("base", early.base), ("preset", early.preset)) if value}
        stated = layers(given, read_yaml(early.config, TuneSettings) if early.config else {})
    settings, options = _parse("tune", tune.__doc__, argv, TuneSettings, stated, "video", ("edit",), RESUMABLE)
    if options.resume:
        job = api.tuning(api.resumed_settings(options.resume, settings), resume=options.resume)
    else:
        job = api.tuning(api.tune_settings(settings), out=options.out)
    _report(options.json, _Show(options.json).run(job))


def edit(argv: Sequence[str]) -> None:
    """Make new videos with the motion of a tuned clip, one per prompt."""
    settings, options = _edit_settings("edit", edit.__doc__, argv)
    from tuneavideo import api

    _report(options.json, _Show(options.json).run(api.editing(settings)))


def invert(argv: Sequence[str]) -> None:
    """Find the noise a tuned clip came from, and keep it for edits to start from."""
    settings, options = _edit_settings("invert", invert.__doc__, [*argv, "--prompt", "-"])
    from tuneavideo import api

    _report(options.json, _Show(options.json).run(api.inverting(settings)))


def models(argv: Sequence[str]) -> None:
    """List the base models known by name, and which of them are on this machine."""
    from tuneavideo import api

    options = _options("models", models.__doc__, argv)
    known = api.models()
    if options.json:
        print(json.dumps(known, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "model", "opened from", "here", box=None)
    for row in known:
        source = "(bundled)" if row["name"] == "miniature" else row["source"]
        table.add_row(row["name"], row["note"], source, "yes" if row["here"] else "no")
    Console().print(table)
    print("Any Stable Diffusion 1.x or 2.x works: give --base a hub id, a folder or a .safetensors file.")


def doctor(argv: Sequence[str]) -> None:
    """Say what this machine has and what is missing, for you and for a bug report."""
    from tuneavideo.doctor import examined, lines

    options = _options("doctor", doctor.__doc__, argv)
    found = examined()
    print(json.dumps(found, indent=1) if options.json else "\n".join(lines(found)))
    if any(each["impossible"] for each in found["missing"]):
        raise SystemExit(1)


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "demo": demo,
    "tune": tune,
    "edit": edit,
    "invert": invert,
    "models": models,
    "doctor": doctor,
}
RESUMABLE = {"out": "run folder to make", "resume": "run folder of a stopped tuning to go on with"}


class _Show:
    """Progress of a job on the terminal; the first Ctrl-C ends the job after the step at hand."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet or os.environ.get("RANK", "0") != "0"
        self.interrupted = False
        self.done: dict[str, Any] = {"run": None, "edits": [], "files": []}
        self.tasks: dict[str, Any] = {}
        self.at = ("", "")
        self.began = time.perf_counter()

    def run(self, job: Job) -> dict[str, Any]:
        """Run the job to its end; returns the run folder, the edits and other files it made."""
        _hush()
        before = signal.signal(signal.SIGINT, self._interrupt)
        try:
            with self._bar() as bar:
                for each in job:
                    self._show(bar, each)
                    self._note(bar, each)
                    if self.interrupted:
                        job.close()
                        break
        except KeyboardInterrupt:
            job.close()
        finally:
            signal.signal(signal.SIGINT, before)
        if self.interrupted:
            _stopped(self.done["run"])
        return self.done | {"seconds": round(time.perf_counter() - self.began, 1)}

    def _interrupt(self, *_: Any) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        os.write(2, b"stopping after the step at hand; Ctrl-C again stops at once\n")  # print cannot be used in here

    def _bar(self) -> Any:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (TextColumn("{task.description:<8}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        console = Console(stderr=True)
        return Bar(
            *columns, TextColumn("{task.fields[note]}"), console=console, disable=self.quiet or not console.is_terminal
        )

    def _show(self, bar: Any, each: Progress) -> None:
        """One bar per stage, begun anew for every prompt."""
        name = (each.stage, each.about if each.stage in ("edit", "preview") else "")
        if each.total:
            if each.stage not in self.tasks:
                self.tasks[each.stage] = bar.add_task(each.stage, total=each.total, note="")
            elif name != self.at and each.stage != "tune":
                bar.reset(self.tasks[each.stage], total=each.total)
            self.at = name
            bar.update(self.tasks[each.stage], completed=each.number, note=_told(each))
            if bar.disable and each.number * 10 // each.total > (each.number - 1) * 10 // each.total:
                self._say(bar, f"{each.stage} {each.number}/{each.total} {_told(each)}")

    def _say(self, bar: Any, line: str) -> None:
        if not self.quiet:
            bar.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _note(self, bar: Any, each: Progress) -> None:
        if each.step:
            self.done |= {"steps": each.step.number, "loss": each.step.loss}
        if each.stage == "memory":
            self._say(bar, each.about)
        if not each.path:
            return
        if each.stage in ("open", "encode", "tune"):
            self.done["run"] = str(each.path)
        else:
            self.done["edits" if each.stage == "edit" else "files"].append(str(each.path))
        if each.stage != "open":  # a mistake found in opening takes the folder away again
            self._say(bar, f"{_MADE[each.stage]}: {each.path}")


_MADE = {
    "encode": "run",
    "tune": "tuned",
    "preview": "preview",
    "invert": "inversion",
    "edit": "edit",
    "picture": "picture",
}


def _told(each: Progress) -> str:
    if each.step is None:
        return each.about
    rate, memory = 1 / each.step.seconds, each.step.memory / 2**30
    return f"loss {each.step.loss:.4f}  {rate:.1f} steps/s  {memory:.1f} GiB"


def _report(as_json: bool, done: Mapping[str, Any], **more: Any) -> None:
    if os.environ.get("RANK", "0") != "0":
        return
    if as_json:
        print(json.dumps({**done, **more}))
    else:
        where = more.get("picture") or done["run"] or (done["edits"] or done["files"])[-1]
        print(f"done in {done['seconds']:.0f} s: {where}")


def _stopped(run: str | None = None) -> None:
    """Exit code 130: stopped by Ctrl-C."""
    how = f"tuneavideo tune --resume {run}" if run else "the same command"
    print(f"tuneavideo: stopped; go on with: {how}", file=sys.stderr)
    raise SystemExit(130)


def _fail(error: Exception) -> None:
    """Exit code 2: something the user can put right; 1: something that should not happen."""
    expected = isinstance(error, TuneAVideoError)
    told = [str(error)] if expected else [
        f"unexpected {type(error).__name__}: {' '.join(str(error).split())[:300]}",
        "--debug shows where; please report it with what 'tuneavideo doctor' prints",
    ]  # fmt: skip
    print(f"tuneavideo: {'; '.join([*told, *getattr(error, '__notes__', ())])}", file=sys.stderr)
    raise SystemExit(2 if expected else 1)


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.__doc__}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: tuneavideo COMMAND ...",
            "",
            "Tune a text-to-image model on one short clip, then edit the clip with new prompts.",
            "",
            *lines,
            "",
            "tuneavideo COMMAND --help says more; tuneavideo --version which this is.",
        ]
    )


def _options(name: str, about: str | None, argv: Sequence[str], **more: str) -> argparse.Namespace:
    """Parse a command that has no settings; `more` options and their meanings, all flags but `out`."""
    parser = argparse.ArgumentParser(f"tuneavideo {name}", description=about)
    for option, meaning in more.items():
        if option == "out":
            parser.add_argument("--out", metavar="PATH", help=meaning)
        else:
            parser.add_argument(f"--{option}", action="store_true", help=meaning)
    parser.add_argument("--json", action="store_true", help="print the result for machines")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def _early(argv: Sequence[str]) -> argparse.Namespace:
    """The flags that other flags' defaults hang on."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, argument_default=None)
    for name in ("base", "preset", "config", "resume"):
        parser.add_argument(f"--{name}", nargs="?")
    return parser.parse_known_args(argv)[0]


def _edit_settings(name: str, about: str | None, argv: Sequence[str]) -> tuple[Any, Any]:
    from tuneavideo import api
    from tuneavideo.runs import RunFolder
    from tuneavideo.settings import EditSettings, Sampling, read_yaml

    early = _early(argv)
    stated = read_yaml(early.config, EditSettings) if early.config else {}
    runs = [word for word in (*argv, str(stated.get("run", ""))) if os.path.isfile(os.path.join(word, "settings.yaml"))]
    if runs:
        own = RunFolder.open(runs[0]).read_settings()
        stated = own.model_dump(include=set(Sampling.model_fields)) | stated
    settings, options = _parse(name, about, argv, EditSettings, stated, "run", ("prompt",), {})
    return api.edit_settings(settings), options


def _parse(
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
    parsed = tyro.cli(command, prog=f"tuneavideo {name}", description=about, args=list(argv))
    flags = {word.removeprefix("--").removeprefix("no-").replace("-", "_") for word in given}
    stays = {key for key, field in kind.model_fields.items() if getattr(parsed.settings, key) == field.default}
    left_alone = stays - flags - values.keys()
    return {key: value for key, value in vars(parsed.settings).items() if key not in left_alone}, parsed


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
        hint = Annotated[hint, tyro.conf.arg(help=field.description)]
        missing = () if key in repeated else tyro.MISSING
        defaults[key] = values.get(key, missing if field.is_required() else field.default)
        fields.append((key, hint, dataclasses.field(default=defaults[key])))
    arguments = dataclasses.make_dataclass(kind.__name__, fields, frozen=True)
    return arguments, arguments(**defaults)


def _hush() -> None:
    """Loading bars and notices of libraries say nothing to the user of a command."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for noisy in ("pipeline_utils", "stable_diffusion.pipeline_stable_diffusion"):
        logging.getLogger(f"diffusers.pipelines.{noisy}").setLevel(logging.ERROR)
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
