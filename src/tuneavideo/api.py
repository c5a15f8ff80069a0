"""Functions with paths in and paths out; the only module that doors (command line, page, batch) import.

Each job is a generator of `Progress`, so that every door shows it in its own way and cancels by closing it; `tune`,
`edit` and `invert` run such a generator to its end. torch is imported when a job starts, not before.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tuneavideo import miniature
from tuneavideo.bases import BASES
from tuneavideo.config import (
    check_sense,
    check_windows,
    checked,
    layers,
    parse_yaml,
    read_yaml,
    stated_values,
    with_preset,
)
from tuneavideo.errors import RunError, SettingsError
from tuneavideo.jobs import checks, plan
from tuneavideo.progress import Bars, Job, Progress
from tuneavideo.settings import PRESETS, EditSettings, Sampling, TuneSettings
from tuneavideo.storage.run_folder import RunFolder

if TYPE_CHECKING:
    from tuneavideo.interop.convert import Report
    from tuneavideo.interop.foreign_configs import Config

# Settings that save memory and leave the result as it is.
MEMORY_SAVING = {"gradient_checkpointing", "offload", "batch_guidance"}
RESUMED_ANEW = {"edit", "max_train_steps", "learning_rate", "mixed_precision", "memory"} | MEMORY_SAVING | {
    "checkpointing_steps", "checkpoints_total_limit", "validation_steps", "report_to",
}  # fmt: skip

logger = logging.getLogger(__name__)

Listener = Callable[[Progress], None]


def tune(
    video: str | Path,
    prompt: str,
    *,
    edit: str | Iterable[str] = (),
    out: str | Path | None = None,
    config: str | Path | None = None,
    progress: Listener | bool = True,
    **settings: Any,
) -> Path:
    """Teach a text-to-image model the motion of one clip, and edit the clip.

    Args:
        video: Clip to learn from: a video file, a GIF or a folder of images.
        prompt: What the clip shows, in words.
        edit: New prompts to edit the clip with when it is tuned.
        out: Run folder to make; by default the next free `runs/<clip>-<n>`.
        config: YAML file of further settings.
        progress: True shows bars, False nothing; a function is called with a `Progress` after every step.
        **settings: Any field of `TuneSettings`, such as `base`, `preset`, `max_train_steps`, `learning_rate`.

    Returns:
        The run folder; the adapter is in its `adapter/`, the edits are in its `edits/`.

    Raises:
        TuneAVideoError: Something the user can put right; nothing is left half-written.
    """
    read = read_config(config) if config else None
    stated = {"video": str(video), "prompt": prompt, "edit": _listed(edit), **settings}
    job = tuning(_tune_settings(stated, read, str(config)), out=out or (read and read.out))
    done = _listened(job, progress)
    return next(each.path for each in done if each.path)


def resume(run: str | Path, *, progress: Listener | bool = True, **settings: Any) -> Path:
    """Go on with a tuning that was stopped, to the result of an unbroken one.

    Args:
        run: Its run folder.
        progress: True shows bars, False nothing; a function is called with a `Progress` after every step.
        **settings: Only `edit`, `max_train_steps`, `learning_rate`, `mixed_precision`, settings that save memory
            (`gradient_checkpointing`, `offload`, `memory`), what is kept on the way and how edits are made may differ
            from the run's own. `memory` chooses only among those that leave the result as it is.
    """
    done = _listened(tuning(resumed_settings(run, settings), resume=run), progress)
    return next(each.path for each in done if each.path)


def edit(
    run: str | Path,
    prompts: str | Iterable[str],
    *,
    config: str | Path | None = None,
    progress: Listener | bool = True,
    **settings: Any,
) -> list[Path]:
    """Make new videos with the motion of a tuned clip, one per prompt and seed.

    Args:
        run: Run folder of the tuned clip.
        prompts: What the edits should show.
        config: YAML file of settings.
        progress: True shows bars, False nothing; a function is called with a `Progress` after every step.
        **settings: Any field of `Sampling`, such as `guidance_scale` or `strength`; the others are the run's own.

    Returns:
        The folder of each edit, with `edit.mp4`, `side-by-side.mp4` and `edit.json`.
    """
    stated = {"run": str(run), "prompt": _listed(prompts), **settings}
    done = _listened(editing(edit_settings(stated, config)), progress)
    return [each.path for each in done if each.stage == "edit" and each.path]


def invert(run: str | Path, *, progress: Listener | bool = True, **settings: Any) -> Path:
    """Find the noise a tuned clip came from, and keep it in the run folder for edits to start from.

    Returns:
        The safetensors file that holds `latents`, `1 C T H W`; with attention injection `S C T H W`: where edits
        start, at each level that they pass, and clean.
    """
    stated = {"run": str(run), "prompt": ("-",), **settings}
    done = _listened(inverting(edit_settings(stated)), progress)
    return next(each.path for each in reversed(done) if each.path)


def adopt(
    video: str | Path,
    prompt: str,
    checkpoint: str | Path,
    *,
    edit: str | Iterable[str] = (),
    out: str | Path | None = None,
    config: str | Path | None = None,
    own_base: bool = False,
    progress: Listener | bool = True,
    **settings: Any,
) -> Path:
    """Make a run of what another program tuned on a clip, to edit it here.

    Args:
        video: The clip that was tuned on.
        prompt: What the clip shows, in words.
        checkpoint: Folder, .pth, .ckpt or .safetensors of what was tuned.
        edit: New prompts to edit the clip with.
        out: Run folder to make; by default the next free `runs/<clip>-<n>`.
        config: YAML file of further settings.
        own_base: Convert the image model in `checkpoint` too, instead of opening `base`.
        progress: True shows bars, False nothing; a function is called with a `Progress` after every step.
        **settings: Any field of `TuneSettings`.

    Returns:
        The run folder.

    Raises:
        TuneAVideoError: Something the user can put right.
    """
    stated = {"video": str(video), "prompt": prompt, "edit": _listed(edit), **settings}
    job = adopting(tune_settings(stated, config), checkpoint, out=out, own_base=own_base)
    return next(each.path for each in _listened(job, progress) if each.path)


def convert(
    source: str | Path,
    out: str | Path,
    *,
    to: str,
    base: str | None = None,
    like: str | None = None,
    rank: int = 64,
    style: Literal["diffusers", "kohya"] = "diffusers",
    dtype: Literal["fp32", "fp16", "bf16"] | None = None,
    binary: bool = True,
) -> Report:
    """Convert a checkpoint of one program to files of another, one tensor at a time.

    Args:
        source: A run, an adapter, a diffusers folder, the published code's output, tuned layers alone, a MindONE
            `.ckpt` or a single-file checkpoint.
        out: New folder, or file for `mindone`, `ldm` and `lora`.
        to: `diffusers`, `official`, `mindone`, `ldm`, `lora` or `adapter`.
        base: Model that tuned layers were tuned on; by default the one an adapter names.
        like: Model whose configs, tokenizer and scheduler are used where the source has none.
        rank: Rank of a LoRA.
        style: Tensor names of a LoRA.
        dtype: Precision of the new files; by default that of each tensor.
        binary: Write `official` as `.bin`, which the published code reads, or as safetensors.

    Returns:
        Counts and names of used, missing and unused tensors.

    Raises:
        CheckpointError: The source is damaged, malicious, of an unknown format or not a whole model. No file is left
            half-written.
    """
    from tuneavideo.interop import convert

    return convert.convert(
        Path(source), Path(out), to, base=base, like=like, rank=rank, style=style, dtype=dtype, binary=binary
    )


def evaluate(
    runs: str | Path | Iterable[str | Path],
    *,
    metrics: Iterable[str] = (),
    mask: str | Path | None = None,
    clip: str | None = None,
    pick: str | None = None,
    progress: Listener | bool = True,
) -> list[Path]:
    """Measure the edits of runs, and keep the scores in the run folders.

    Args:
        runs: Run folders, or folders of single edits.
        metrics: Names of the metrics (docs/evaluation.md); by default all that suit the run's base.
        mask: Picture, clip or folder of pictures, bright where edits may change the picture.
        clip: Hub id or folder of CLIP, instead of ViT-L/14.
        pick: Hub id or folder of PickScore.
        progress: True shows bars, False nothing; a function is called with a `Progress` after every edit.

    Returns:
        The `scores.json` of every run. What could not be measured is in there too, with the reason.
    """
    places = [runs] if isinstance(runs, str | Path) else [*runs]
    job = evaluating(places, metrics=metrics, mask=mask, clip=clip, pick=pick)
    return [each.path for each in _listened(job, progress) if each.path]


def report(runs: str | Path | Iterable[str | Path], out: str | Path | None = None) -> Path:
    """Show runs on one page: clips in step, prompts, scores, the loss, settings, time and memory.

    Args:
        runs: Run folders; several are compared, with the first as the measure.
        out: HTML file to write, which needs nothing else to be opened; by default `report.html` in the run folder, or
            in the current folder when there are several.

    Returns:
        The file.

    Raises:
        TuneAVideoError: None of the folders is a run, or a place cannot be written. Among runs, a folder that is none
            is left out with a warning. What is damaged or missing within a run is said on its page.
    """
    from tuneavideo.reporting import write

    folders, troubles = list[RunFolder](), list[RunError]()
    for run in [runs] if isinstance(runs, str | Path) else runs:
        try:
            folders.append(RunFolder.open(run))
        except RunError as error:
            troubles.append(error)
    if not folders:
        raise troubles[0] if troubles else SettingsError("no run to report; give one or more run folders")
    for trouble in troubles:
        logger.warning("left out: %s", trouble)
    path = Path(out or (folders[0].report if len(folders) == 1 else RunFolder(Path()).report))
    write(folders, path)
    return path


def tune_settings(stated: Mapping[str, Any], config: str | Path | None = None) -> TuneSettings:
    """Settings of a tuning: what is stated, over the YAML file, the preset, the base and the built-in values."""
    return _tune_settings(stated, read_config(config) if config else None, str(config))


def _tune_settings(stated: Mapping[str, Any], read: Config | None, where: str) -> TuneSettings:
    merged = layers(stated, read.settings if read else {})
    for name in {"video", "base"} & merged.keys():  # a run folder is to be understood from anywhere
        if merged[name] not in BASES and os.path.exists(merged[name]):
            merged[name] = os.path.abspath(merged[name])
    settings = checked(TuneSettings, merged, where if read else "settings")
    check_sense(settings, settings.edit)
    if isinstance(settings.num_frames, int):  # otherwise the clip decides, when the job begins
        check_windows(settings, settings.num_frames)
    return settings


def read_config(path: str | Path) -> Config:
    """Settings of a tuning in a YAML file of ours, of the published code or of MindONE; tells what is idle.

    A relative `video` is one in the file's folder if it is there, otherwise one in the current folder.
    """
    from tuneavideo.interop import foreign_configs

    config = foreign_configs.read_config(path, TuneSettings)
    beside = Path(path).parent / str(config.settings.get("video", ""))
    if "video" in config.settings and beside.exists():
        config.settings["video"] = str(beside)
    return config


def read_edit_config(path: str | Path) -> dict[str, Any]:
    """Settings of edits in a YAML file: one for `edit`, or one for `tune`, of which `edit` are the prompts here."""
    values = parse_yaml(path)
    if values.keys() <= EditSettings.model_fields.keys() or not values.keys() & (
        TuneSettings.model_fields.keys() - EditSettings.model_fields.keys()
    ):
        return stated_values(EditSettings, values, str(path))
    found = read_config(path).settings
    kept = {name: value for name, value in found.items() if name in {*Sampling.model_fields, "preset"}}
    if idle := [name for name in values if name not in {*kept, "edit"}]:
        logger.warning("%s: settings of 'tune', left out here: %s", path, ", ".join(idle))
    return kept | ({"prompt": found["edit"]} if found.get("edit") else {})


def edit_settings(stated: Mapping[str, Any], config: str | Path | None = None) -> EditSettings:
    """Settings of an edit: what is stated, over the YAML file and the run's own values."""
    given = {**(read_edit_config(config) if config else {}), **stated}
    own = with_preset(RunFolder.open(given["run"]).read_settings(), given.get("preset"))
    settings = checked(EditSettings, {**own, **given}, str(config or "settings"))
    check_sense(settings, settings.prompt)
    return settings


def resumed_settings(run: str | Path, stated: Mapping[str, Any]) -> TuneSettings:
    """A run's own settings with those changes that leave its result comparable; refuses others."""
    own = RunFolder.open(run).read_settings().model_dump()
    new = checked(TuneSettings, {**own, **stated})
    if os.path.abspath(new.video) == own["video"]:
        new = new.model_copy(update={"video": own["video"]})
    free = {*Sampling.model_fields, *RESUMED_ANEW} - {"window"}  # what is tuned on
    fixed = [name for name in stated if name not in free and own[name] != getattr(new, name)]
    if fixed:
        raise SettingsError(
            f"{run}: {fixed[0]} cannot change when a run is resumed; it is {own.get(fixed[0], 'unknown')!r}. "
            "Leave it out, or start a new run"
        )
    check_sense(new, new.edit)
    if not new.memory or new.memory == own["memory"]:
        return new
    values = new.model_dump()  # the memory plan chooses what saves memory and is not stated
    return checked(TuneSettings, {n: value for n, value in values.items() if n not in MEMORY_SAVING or value != own[n]})


def tuning(settings: TuneSettings, *, out: str | Path | None = None, resume: str | Path | None = None) -> Job:
    """Tune a clip, save the adapter and make the edits; closing the job early leaves a run that can be resumed.

    Raises:
        TuneAVideoError: At once, before torch is imported: the clip or the base is missing, or `out` cannot be used.
    """
    checks.check_tune_inputs(settings, out, resumed=resume is not None)
    return _tuning(settings, out, resume)


def _tuning(settings: TuneSettings, out: str | Path | None, resume: str | Path | None) -> Job:
    if not resume:
        plan.choose_frames(settings)  # a clip that cannot be read is told before torch is imported
    yield Progress("plan", about=plan.describe_base(settings.base))
    from tuneavideo.jobs import tune

    yield from tune.tune(settings, out=out, resume=resume)


def editing(settings: EditSettings) -> Job:
    """Make the edits of a tuned clip. Raises TuneAVideoError at once when a file that they need is missing."""
    checks.check_edit_inputs(settings)
    return _editing(settings)


def _editing(settings: EditSettings) -> Job:
    yield _loading(settings)
    from tuneavideo.jobs import edit

    yield from edit.edit(settings)


def inverting(settings: EditSettings) -> Job:
    """Invert a tuned clip to the level its edits start from. Raises like `editing`."""
    checks.check_edit_inputs(settings)
    return _inverting(settings)


def _inverting(settings: EditSettings) -> Job:
    yield _loading(settings)
    from tuneavideo.jobs import invert

    yield from invert.invert(settings)


def adopting(
    settings: TuneSettings, checkpoint: str | Path, *, out: str | Path | None = None, own_base: bool = False
) -> Job:
    """Make a run of what another program tuned on the clip, and the edits `settings` name.

    `own_base` converts the image model in `checkpoint` too, into the run; otherwise `settings.base` is taken.
    """
    checks.check_weights(checkpoint)
    checks.check_tune_inputs(settings, out, own_base=own_base)
    return _adopting(settings, Path(checkpoint), out, own_base)


def _adopting(settings: TuneSettings, checkpoint: Path, out: str | Path | None, own_base: bool) -> Job:
    plan.choose_frames(settings)
    yield Progress("plan", about=plan.describe_base(str(checkpoint) if own_base else settings.base))
    from tuneavideo.jobs import import_run

    yield from import_run.adopt(settings, checkpoint, out=out, own_base=own_base)


def evaluating(
    places: Iterable[str | Path],
    *,
    metrics: Iterable[str] = (),
    mask: str | Path | None = None,
    clip: str | None = None,
    pick: str | None = None,
) -> Job:
    """Measure edits; see `evaluate`. Raises TuneAVideoError at once when a place, a metric or the mask is unknown."""
    places, names, mask = [*places], (*metrics,), Path(mask) if mask else None
    checks.check_evaluate_inputs(places, names, mask)
    return _evaluated(places, names, mask, clip, pick)


def _evaluated(
    places: list[str | Path], metrics: tuple[str, ...], mask: Path | None, clip: str | None, pick: str | None
) -> Job:
    from tuneavideo.evaluation import evaluate as scoring

    yield from scoring.evaluate(places, scoring.EvaluationSettings(metrics, mask, clip, pick))


def benchmarking_tgve(
    data: str | Path,
    *,
    out: str | Path = "runs/tgve",
    clips: int | None = None,
    config: str | Path | None = None,
    clip: str | None = None,
    pick: str | None = None,
    **settings: Any,
) -> Job:
    """Tune, edit and measure the clips of LOVEU-TGVE-2023; goes on where it was stopped. Ends with `results.json`.

    Args:
        data: Folder of the benchmark: its frames, and its configs or its table.
        out: Folder for runs, submission and results.
        clips: How many clips, evenly spread; all if None.
        config: YAML file of settings; it and `settings` beat what the benchmark's configs say.
        clip: Hub id or folder of CLIP, instead of ViT-L/14.
        pick: Hub id or folder of PickScore.
        **settings: Any field of `TuneSettings`, such as `base` (`sd1.4` if none is given) or `preset`.
    """
    from tuneavideo.evaluation import evaluate as scoring
    from tuneavideo.evaluation import tgve
    from tuneavideo.jobs import tune

    further = {"base": "sd1.4", **(read_yaml(config, TuneSettings) if config else {}), **settings}
    yield from tgve.run(
        Path(data), Path(out), tune=tune.tune, complete=lambda own: tune_settings({**own, **further}),
        clips=clips, evaluation=scoring.EvaluationSettings(clip=clip, pick=pick),
    )  # fmt: skip


def benchmarking_miniature(
    variants: Iterable[str] = ("untuned", "official", "default"),
    *,
    out: str | Path = "runs/miniature-benchmark",
    quick: bool = False,
    seeds: int = 1,
    part: str = "development",
    processes: int | None = None,
) -> Job:
    """Compare presets on the bundled clips, which the bundled judge reads; ends with `results.json`.

    Args:
        variants: Presets, or `untuned`; differences are taken from the first.
        out: Folder for the rows, which are not computed again, and the results.
        quick: 4 clips instead of 12.
        seeds: How many seeds.
        part: `development` clips or `report` clips.
        processes: Clips computed at a time; by default one for each core.
    """
    names = tuple(dict.fromkeys(variants))
    for name in names:
        if name not in (known := ("untuned", *PRESETS)):
            raise SettingsError(f"unknown variant {name!r}; known are {', '.join(known)}")
    from tuneavideo.evaluation import summary

    count = processes or os.cpu_count() or 1
    yield from summary.run_benchmark(names, Path(out), seeds=seeds, part=part, quick=quick, processes=count)


def demoing(out: str | Path | None = None, quick: bool = False) -> Job:
    """Tune the bundled miniature on its first clip, edit it four times, and draw `edits.png` of source and edits."""
    clip = miniature.clips()[0]
    stated = {"video": str(clip["path"]), "prompt": clip["caption"], "edit": miniature.DEMO_EDITS, "stride": 2}
    if quick:
        stated |= {"max_train_steps": 5, "num_inference_steps": 5, "num_inv_steps": 5}
    settings = tune_settings(stated)
    yield Progress("plan", about=plan.describe_base(settings.base))
    from tuneavideo.jobs import demo

    yield from demo.demo(settings, out=out)


def _loading(settings: EditSettings) -> Progress:
    own = RunFolder.open(settings.run).read_settings().base
    return Progress("plan", about=plan.describe_base(settings.edit_model or own))


def models() -> list[dict[str, Any]]:
    """The table of bases.

    Each has `name`, `source`, `note`, own `settings`, default `resolution` and `num_frames`, `memory_gb` (see `Base`),
    and whether it is `here` (on this machine).
    """
    return [
        {
            "name": name,
            "source": base.source,
            "note": base.note,
            "settings": dict(base.settings),
            "resolution": base.settings["resolution"],
            "num_frames": base.frames,
            "memory_gb": base.memory_gb,
            "here": _is_here(base.source),
        }
        for name, base in BASES.items()
    ]


def _is_here(source: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return Path(source).is_absolute() or isinstance(try_to_load_from_cache(source, "model_index.json"), str)


def _listed(prompts: str | Iterable[str]) -> tuple[str, ...]:
    return (prompts,) if isinstance(prompts, str) else tuple(prompts)


def _listened(job: Job, listener: Listener | bool) -> list[Progress]:
    """Run a job to its end; returns where files were finished."""
    bars, finished = Bars() if listener is True else None, []
    with _quiet(), closing(bars) if bars else nullcontext():
        for each in job:
            if bars:
                bars(each)
            elif callable(listener):
                listener(each)
            if each.path:
                finished.append(each)
    return finished


@contextmanager
def _quiet() -> Generator[None, None, None]:
    """Keep loading bars and notices of other libraries from the user, and leave these libraries as they were."""
    name = "TRANSFORMERS_VERBOSITY"  # is read when transformers is imported
    is_ours = name not in os.environ
    os.environ.setdefault(name, "error")
    try:
        from tuneavideo.models import quiet
    finally:
        if is_ours:
            del os.environ[name]
    with quiet.silenced_libraries():
        yield
