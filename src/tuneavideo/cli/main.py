"""Commands of the command line: each parses its options, runs a job and prints the results."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib.util
import io
import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tuneavideo import __version__
from tuneavideo.cli import arguments
from tuneavideo.cli.batch import batch
from tuneavideo.cli.completion import completion_script
from tuneavideo.cli.console import Show, report_done, stopped
from tuneavideo.cli.options import Command
from tuneavideo.errors import MissingExtra, SettingsError, TuneAVideoError, error_line
from tuneavideo.job import Job
from tuneavideo.progress import Events


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; an error is one line. The exit codes are in docs/run-folder.md."""
    try:
        try:
            _main(list(sys.argv[1:] if argv is None else argv))
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # the reader of the output has closed it: print nothing more, at exit neither
        quiet = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(quiet, stream.fileno())
        raise SystemExit(CLOSED_PIPE) from None


def _main(argv: list[str]) -> None:
    name, *rest = argv or ["help"]
    if name == "help" and rest[:1] and rest[0] in COMMANDS:
        name, rest = rest[0], [*rest[1:], "--help"]
    if name in ("-V", "--version") or (name in COMMANDS and name != "mindone" and {"-V", "--version"} & {*rest}):
        print(__version__)
    elif name in ("-h", "--help", "help"):
        print(_help())
    elif name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        advice = f"did you mean '{near[0]}'?" if near else f"commands are {', '.join(COMMANDS)}"
        _fail(SettingsError(f"unknown command '{name}'; {advice}"))
    else:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read when it is imported
        try:
            COMMANDS[name](rest)
        except KeyboardInterrupt:
            stopped()
        except BrokenPipeError:
            raise
        except Exception as error:
            if "--debug" in rest:
                traceback.print_exc()
            _fail(error)


def demo(argv: Sequence[str]) -> None:
    """Tune the bundled miniature model on a bundled clip and make four edits."""
    from tuneavideo import api

    options = arguments.options(
        "demo", demo.__doc__, argv, out="Run folder to create.", quick="A few steps only, as a test."
    )
    done = Show(options.json).run(api.Job.demo(out=options.out, quick=options.quick))
    report_done(options.json, done, picture=done["files"][-1])


def tune(argv: Sequence[str]) -> None:
    """Tune a text-to-image model on one clip, and edit the clip."""
    from tuneavideo import api
    from tuneavideo.settings import TuneSettings

    command = Command(
        "tune", tune.__doc__, TuneSettings, "video", "edit",
        "tuneavideo tune skiing.mp4 --prompt 'a man is skiing' --edit 'a panda is skiing'", RESUMABLE,
    )  # fmt: skip
    given, options = arguments.parse(command, argv, _tuning_defaults)
    if options.resume and (options.config or options.out):
        raise SettingsError(
            f"--resume {options.resume} keeps that run's folder and settings; leave out --config and --out"
        )
    if options.resume:
        job = api.Job.tune(api.resumed_settings(options.resume, given), resume=options.resume)
    else:
        config = _config(command, given, options)
        settings = api.merge_settings(given, config)
        job = api.Job.tune(settings, out=options.out or (config and config.out))
    report_done(options.json, Show(options.json).run(job))


def edit(argv: Sequence[str]) -> None:
    """Make new videos with the motion of a clip, one per prompt: of a tuned clip, or without tuning."""
    from tuneavideo import api
    from tuneavideo.settings import ClipEditSettings

    command = Command(
        "edit", edit.__doc__, ClipEditSettings, "run", "prompt",
        "tuneavideo edit runs/skiing-1 --prompt 'a panda is skiing'",
        {"out": "Run folder to create for a clip that is edited without tuning. By default the next free runs/CLIP-N."},
    )  # fmt: skip
    given, options = _parse_edit(command, argv)
    report_done(options.json, Show(options.json).run(api.edit_job(given, options.config, options.out)))


def invert(argv: Sequence[str]) -> None:
    """Invert a tuned clip to noise, and keep the latents for later edits."""
    from tuneavideo import api
    from tuneavideo.settings import EditSettings

    example = "tuneavideo invert runs/skiing-1"
    command = Command("invert", invert.__doc__, EditSettings, "run", "prompt", example, hidden="prompt")
    given, options = _parse_edit(command, argv, prompt=("-",))
    settings = api.edit_settings(given, options.config)
    report_done(options.json, Show(options.json).run(api.Job.invert(settings)))


def adopt(argv: Sequence[str]) -> None:
    """Make a run of weights that another program tuned on a clip, to edit it here."""
    from tuneavideo import api
    from tuneavideo.settings import TuneSettings

    command = Command(
        "adopt", adopt.__doc__, TuneSettings, "video", "edit",
        "tuneavideo adopt skiing.mp4 --checkpoint tuned/ --prompt 'a man is skiing' --edit 'a panda is skiing'",
        {"out": RESUMABLE["out"], "checkpoint": "Folder, .pth, .ckpt or .safetensors of the tuned weights."},
    )  # fmt: skip
    given, options = arguments.parse(command, argv, _tuning_defaults)
    config = _config(command, given, options)
    if not options.checkpoint:
        raise SettingsError("--checkpoint is missing: a folder, .pth, .ckpt or .safetensors of the tuned weights")
    has_base = "base" in given or (config and "base" in config.settings)
    settings = api.merge_settings(given, config)
    out, own_base = options.out or (config and config.out), options.checkpoint.is_dir() and not has_base
    job = api.Job.adopt(settings, options.checkpoint, out=out, own_base=own_base)
    report_done(options.json, Show(options.json).run(job))


def convert(argv: Sequence[str]) -> None:
    """Convert weights of one program to files of another."""
    options = vars(arguments.read(arguments.of_convert(convert.__doc__), argv))
    source, out, binary = options.pop("source"), options.pop("out"), not options.pop("no_binary")
    as_json, _ = options.pop("json"), options.pop("debug")
    from tuneavideo import api
    from tuneavideo.jobs import checks

    checks.check_weights(source)
    from tuneavideo.models import quiet

    quiet.silence_libraries()
    report = api.convert(source, out, binary=binary, **options)
    print(json.dumps(dataclasses.asdict(report)) if as_json else "\n".join([*report.lines(), f"done: {out}"]))


def mindone(argv: Sequence[str]) -> None:
    """Run MindONE's commands (train, infer) with its flags, and print the same command of this program."""
    from tuneavideo import api
    from tuneavideo.interop import mindone_flags

    if argv[:1] in (["-h"], ["--help"], ["--help-all"]):
        more = "'tuneavideo mindone train --help' and 'tuneavideo mindone infer --help' list the flags."
        print(f"usage: tuneavideo mindone {{train,infer}} ...\n\n{mindone.__doc__}\n\n{more}")
        return
    if argv[:1] not in (["train"], ["infer"]):
        raise SettingsError("mindone: give 'mindone train' or 'mindone infer', and MindONE's flags")
    checkpoint = ""
    if argv[0] == "train":
        config = mindone_flags.train(argv[1:])
    else:
        config, checkpoint = mindone_flags.infer(argv[1:])
    print("\n".join(config.notices), file=sys.stderr)
    if config.dry_run:
        return
    settings = api.tune_settings(config.settings)
    job = api.Job.adopt(settings, checkpoint, out=config.out) if checkpoint else api.Job.tune(settings, out=config.out)
    report_done(False, Show(False).run(job))


def evaluate(argv: Sequence[str]) -> None:
    """Measure the edits of a tuned clip, and write the scores into the run folder."""
    from tuneavideo import api
    from tuneavideo.cli import tables

    options = arguments.read(arguments.of_evaluate(evaluate.__doc__), argv)
    job = api.Job.evaluate(
        options.places, metrics=options.metrics, mask=options.mask, clip=options.clip, pick=options.pick
    )
    scores: dict[str, Any] = {}
    try:
        Show(options.json).run(_collecting_scores(job, scores))
    finally:  # scores are shown even if they could not be written
        if options.json and scores:
            print(json.dumps(scores))
        for file, contents in () if options.json else scores.items():
            tables.show_scores(file, contents)
    if not any(edit["scores"] for contents in scores.values() for edit in contents["edits"]):
        raise SettingsError(f"nothing was measured of {', '.join(options.metrics) or 'any metric'}")


def _collecting_scores(job: Job, scores: dict[str, Any]) -> Events:
    """Yield the events of a job, and collect its scores by file."""
    for each in job:
        if each.scores:
            scores[each.about] = each.scores
        yield each


def benchmark(argv: Sequence[str]) -> None:
    """Tune, edit and measure the clips of a benchmark, and print the results."""
    from tuneavideo import api
    from tuneavideo.cli import tables

    options = vars(arguments.read(arguments.of_benchmark(benchmark.__doc__), argv))
    name, as_json, _ = (options.pop(key) for key in ("name", "json", "debug"))
    given = {key: value for key, value in options.items() if value}
    job = (api.Job.benchmark_tgve if name == "tgve" else api.Job.benchmark_miniature)(**given)
    file = Path(Show(as_json, resumable=False).run(job)["files"][-1])
    if as_json:
        print(file.read_text(encoding="utf-8"))
    elif name == "tgve":
        print(file.with_suffix(".md").read_text(encoding="utf-8"))
    else:
        tables.show_variants(json.loads(file.read_text(encoding="utf-8")))


def report(argv: Sequence[str]) -> None:
    """Write an HTML page on runs: clips, scores, the loss, settings."""
    from tuneavideo import api

    meanings = {
        "runs": "Run folders, or folders of runs; several are compared.",
        "out": "HTML file to write. By default report.html.",
    }
    options = arguments.options("report", report.__doc__, argv, **meanings)
    page = api.report(options.runs, options.out)
    print(json.dumps({"report": str(page), "runs": options.runs}) if options.json else f"report: {page}")


def web(argv: Sequence[str]) -> None:
    """Serve a page in the browser, on which clips are tuned and edited."""
    options = arguments.read(arguments.of_web(web.__doc__), argv)
    if missing := [each for each in ("starlette", "uvicorn") if not importlib.util.find_spec(each)]:
        raise MissingExtra(f"the page ({missing[0]})", "web")
    from tuneavideo.web import server

    server.serve(options.root, options.host, options.port, options.allow_host, options.models, options.captions)


def models(argv: Sequence[str]) -> None:
    """List the base models with names, and which of them are on this machine."""
    from tuneavideo import api

    options = arguments.options("models", models.__doc__, argv)
    known = api.models()
    if options.json:
        print(json.dumps(known, indent=1))
        return
    from tuneavideo.cli import tables

    tables.show_models(known)
    print(
        "Memory is the minimum for tuning on that many frames, counted, not measured (bf16, gradient checkpointing).\n"
        "Any Stable Diffusion 1.x, 2.x or XL works: give --base a hub id, a folder, or a .safetensors or .ckpt file."
    )


def doctor(argv: Sequence[str]) -> None:
    """Print the environment and what is missing, for a bug report."""
    from tuneavideo.cli.environment import examined, lines

    options = arguments.options("doctor", doctor.__doc__, argv)
    found = examined()
    print(json.dumps(found, indent=1) if options.json else "\n".join(lines(found)))
    if any(each["impossible"] for each in found["missing"]):
        raise SystemExit(1)


def completion(argv: Sequence[str]) -> None:
    """Print a script for bash and zsh that completes commands and options: source <(tuneavideo completion)."""
    made = arguments.parser("completion", completion.__doc__)
    made.add_argument("shell", nargs="?", choices=("bash", "zsh"), help="The script is the same for both.")
    arguments.read(made, argv)
    print(completion_script({name: _help_of(name) for name in COMMANDS}))


def _help_of(name: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit):
        COMMANDS[name](["--help-all"])
    return shown.getvalue()


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "demo": demo,
    "tune": tune,
    "edit": edit,
    "invert": invert,
    "adopt": adopt,
    "convert": convert,
    "mindone": mindone,
    "evaluate": evaluate,
    "batch": batch,
    "benchmark": benchmark,
    "report": report,
    "web": web,
    "models": models,
    "doctor": doctor,
    "completion": completion,
}
CLOSED_PIPE = 141  # exit code of a program that SIGPIPE ended, in a shell
RESUMABLE = {
    "out": "Run folder to create. By default the next free runs/CLIP-N.",
    "resume": "Run folder to continue: of a stopped tuning, or of a finished one with more --max-train-steps.",
}


def _fail(error: Exception) -> None:
    """Print an error and exit: with 2 if the user can correct it, with 1 if it is a fault of the program."""
    print(f"tuneavideo: {error_line(error)}", file=sys.stderr)
    raise SystemExit(2 if isinstance(error, TuneAVideoError) else 1)


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
            "Begin with 'tuneavideo demo', then:",
            "  tuneavideo tune skiing.mp4 --prompt 'a man is skiing' --edit 'a panda is skiing'",
            "",
            "'tuneavideo COMMAND --help' shows a command's options, 'tuneavideo --version' the version.",
        ]
    )


def _config(command: Command, given: Mapping[str, Any], options: Any) -> Any:
    """Read the YAML file of a tuning, if one is given. Raises SettingsError when a required setting is missing."""
    from tuneavideo import api

    config = api.read_config(options.config) if options.config else None
    arguments.check_required(command, {**(config.settings if config else {}), **given})
    return config


def _tuning_defaults(given: Mapping[str, Any], options: Any) -> Mapping[str, Any]:
    """Return the default values of a tuning: those of its base, preset and file, or of the run to resume."""
    from tuneavideo import api
    from tuneavideo.config import layers

    if getattr(options, "resume", None):
        return api.resumed_settings(options.resume, {}).model_dump()
    chosen = {name: given[name] for name in ("base", "preset") if name in given}
    return layers(chosen, api.read_config(options.config).settings if options.config else {})


def _parse_edit(command: Command, argv: Sequence[str], **hidden: Any) -> tuple[dict[str, Any], Any]:
    """Return the given settings of an edit, and the other options of its command.

    Raises:
        SettingsError: A required setting is missing.
    """
    from tuneavideo import api
    from tuneavideo.config import layers, with_preset
    from tuneavideo.storage.run_folder import RunFolder

    def merged(given: Mapping[str, Any], options: Any) -> dict[str, Any]:
        return {**(api.read_edit_config(options.config) if options.config else {}), **given, **hidden}

    def defaults(given: Mapping[str, Any], options: Any) -> dict[str, Any]:
        if api.is_clip_edit(given):
            return layers({name: value for name, value in given.items() if name in ("base", "preset")}, {})
        values = merged(given, options)
        if "run" not in values:
            return values
        return with_preset(RunFolder.open(values["run"]).read_settings(), values.get("preset")) | values

    given, options = arguments.parse(command, argv, defaults)
    given |= hidden
    if not api.is_clip_edit(given):
        arguments.check_required(command, merged(given, options))
    elif not options.config:
        arguments.check_required(command, given)
    return given, options
