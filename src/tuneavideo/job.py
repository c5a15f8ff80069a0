"""Jobs: checked when they are created, then iterated or run to their end."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from tuneavideo import miniature
from tuneavideo.config import read_yaml
from tuneavideo.errors import SettingsError
from tuneavideo.job_settings import tune_settings
from tuneavideo.jobs import checks, plan
from tuneavideo.progress import Bars, Events, Progress
from tuneavideo.settings import PRESETS, EditSettings, TuneSettings

Listener = Callable[[Progress], None]


class Job(Iterator[Progress]):
    """A job that yields a `Progress` after every step.

    The constructors check paths and names, and raise TuneAVideoError before torch is imported. The work is done while
    the job is iterated. Closing it stops the work; a tuning that is closed can be resumed.
    """

    def __init__(self, events: Events) -> None:
        self._events = events

    def __next__(self) -> Progress:
        return next(self._events)

    def close(self) -> None:
        """Stop the job after the current step."""
        self._events.close()

    def run(self, progress: Listener | bool = True) -> list[Progress]:
        """Run the job to its end.

        Args:
            progress: True shows bars, False nothing; a function is called with a `Progress` after every step.

        Returns:
            The events with a `path`: one for every file or folder that was finished, in order.

        Raises:
            TuneAVideoError: The job failed for a reason that the user can correct.
        """
        bars, finished = Bars() if progress is True else None, []
        with _quiet(), closing(bars) if bars else nullcontext():
            for each in self:
                if bars:
                    bars(each)
                elif callable(progress):
                    progress(each)
                if each.path:
                    finished.append(each)
        return finished

    @classmethod
    def tune(cls, settings: TuneSettings, *, out: str | Path | None = None, resume: str | Path | None = None) -> Job:
        """Tune a model on a clip, save the adapter and make the edits that `settings` name.

        Args:
            settings: Settings of the tuning; those of `resumed_settings` with `resume`.
            out: Run folder to create. None: the next free `runs/<clip>-<n>`.
            resume: Run folder to continue, instead of `out`.

        Returns:
            A job with the stages `plan`, `open`, `memory`, `encode`, `preview`, `tune`, `invert` and `edit`.

        Raises:
            ModelError: The base is unknown.
            VideoError: The clip does not exist.
            RunError: `out` exists and is not empty.
            DiskError: The run folder cannot be written.
        """
        checks.check_tune_inputs(settings, out, resumed=resume is not None)
        return cls(_events("tune", settings.base, settings, clip=None if resume else settings, out=out, resume=resume))

    @classmethod
    def edit(cls, settings: EditSettings) -> Job:
        """Make the edits of a tuned clip, one per prompt and seed.

        Returns:
            A job with the stages `plan`, `open`, `invert` and `edit`.

        Raises:
            RunError: `settings.run` is no run folder.
            TuneAVideoError: A file or model that `settings` name does not exist, or the run cannot be written.
        """
        checks.check_edit_inputs(settings)
        return cls(_events("edit", plan.base_of(settings), settings))

    @classmethod
    def edit_clip(cls, settings: TuneSettings, edits: EditSettings, *, out: str | Path | None = None) -> Job:
        """Make a run folder of a clip, and edits of it without tuning. `tune` with `resume` tunes it afterwards.

        Args:
            settings: Settings of the run; those of training have an effect when it is tuned.
            edits: Settings of the edits, whose `run` is replaced.
            out: Run folder to create. None: the next free `runs/<clip>-<n>`.

        Returns:
            A job with the stages `plan`, `open`, `encode`, `invert` and `edit`.

        Raises:
            TuneAVideoError: As in `tune` and `edit`.
        """
        checks.check_tune_inputs(settings, out)
        checks.check_edit_files(edits)
        return cls(_events("edit_clip", settings.base, settings, edits, clip=settings, out=out))

    @classmethod
    def measure(cls, settings: TuneSettings, place: str | Path) -> Job:
        """Measure time and memory of a tuning by its first steps, in a folder in `place` that is removed afterwards.

        Returns:
            A job with the stages of `tune`, then `measure`, whose `scores` are what was measured.

        Raises:
            TuneAVideoError: As in `tune`.
        """
        checks.check_tune_inputs(settings, Path(place) / "measured")
        return cls(_events("measure", settings.base, settings, Path(place), clip=settings))

    @classmethod
    def invert(cls, settings: EditSettings) -> Job:
        """Invert a tuned clip to the timestep that its edits start from.

        Returns:
            A job with the stages `plan`, `open` and `invert`; the last `Progress` has the file's path.

        Raises:
            TuneAVideoError: As in `edit`.
        """
        checks.check_edit_inputs(settings)
        return cls(_events("invert", plan.base_of(settings), settings))

    @classmethod
    def adopt(
        cls, settings: TuneSettings, checkpoint: str | Path, *, out: str | Path | None = None, own_base: bool = False
    ) -> Job:
        """Make a run of weights that another program tuned on a clip, and make the edits that `settings` name.

        Args:
            settings: Settings of the run; those of training have no effect.
            checkpoint: Folder, .pth, .ckpt or .safetensors of the tuned weights.
            out: Run folder to create. None: the next free `runs/<clip>-<n>`.
            own_base: Convert the image model in `checkpoint` too. Otherwise `settings.base` is used.

        Returns:
            A job with the stages `plan`, `open`, `tune` (the run is complete), `invert` and `edit`.

        Raises:
            CheckpointError: `checkpoint` does not exist.
            TuneAVideoError: As in `tune`.
        """
        checks.check_weights(checkpoint)
        checks.check_tune_inputs(settings, out, own_base=own_base)
        base, checkpoint = str(checkpoint) if own_base else settings.base, Path(checkpoint)
        return cls(_events("adopt", base, settings, checkpoint, clip=settings, out=out, own_base=own_base))

    @classmethod
    def evaluate(
        cls, places: Iterable[str | Path], *, metrics: Iterable[str] = (), mask: str | Path | None = None, **models: Any
    ) -> Job:
        """Score the edits of runs, and write `scores.json` into each run folder.

        Args:
            places: Run folders, or folders of single edits.
            metrics: Names of metrics. None given: all that suit the base.
            mask: Picture, clip or folder of pictures, bright where edits may change the clip.
            **models: `clip` and `pick`: hub id or folder of CLIP and of PickScore.

        Returns:
            A job with the stage `evaluate`; each run ends with the path and the contents of its `scores.json`.

        Raises:
            SettingsError: A metric is unknown.
            RunError: No place is a run or an edit.
            VideoError: The mask does not exist.
        """
        places, names, mask = [*places], (*metrics,), Path(mask) if mask else None
        checks.check_evaluate_inputs(places, names, mask)

        def events() -> Events:
            from tuneavideo.evaluation import evaluate as scoring

            yield from scoring.evaluate(places, scoring.EvaluationSettings(names, mask, **models))

        return cls(events())

    @classmethod
    def benchmark_tgve(
        cls,
        data: str | Path,
        *,
        out: str | Path = "runs/tgve",
        clips: int | None = None,
        config: str | Path | None = None,
        clip: str | None = None,
        pick: str | None = None,
        **settings: Any,
    ) -> Job:
        """Tune, edit and score the clips of LOVEU-TGVE-2023; finished clips are kept.

        Args:
            data: Folder of the benchmark: its frames, and its configs or its table.
            out: Folder for runs, submission and results.
            clips: Number of clips, evenly spread. None: all.
            config: YAML file of settings; it and `settings` override the benchmark's configs.
            clip: Hub id or folder of CLIP, instead of ViT-L/14.
            pick: Hub id or folder of PickScore.
            **settings: Any field of `TuneSettings`, such as `base` (by default `sd1.4`) or `preset`.

        Returns:
            A job with the stages of `tune`, and `evaluate`; the last `Progress` has the path of `results.json`.
        """

        def events() -> Events:
            from tuneavideo.evaluation import evaluate as scoring
            from tuneavideo.evaluation import tgve
            from tuneavideo.jobs import tune

            further = {"base": "sd1.4", **(read_yaml(config, TuneSettings) if config else {}), **settings}

            yield from tgve.run(
                Path(data), Path(out), tune=tune.tune, complete=lambda own: tune_settings({**own, **further}),
                clips=clips, evaluation=scoring.EvaluationSettings(clip=clip, pick=pick),
            )  # fmt: skip

        return cls(events())

    @classmethod
    def benchmark_miniature(
        cls,
        variants: Iterable[str] = ("untuned", "official", "default"),
        *,
        out: str | Path = "runs/miniature-benchmark",
        quick: bool = False,
        seeds: int = 1,
        part: str = "development",
        processes: int | None = None,
    ) -> Job:
        """Compare presets on the bundled clips with the bundled classifier.

        Args:
            variants: Presets, or `untuned`; differences are relative to the first.
            out: Folder for the results; rows that are there already are kept.
            quick: Use 4 clips only.
            seeds: Number of seeds.
            part: `development` or `report` clips, or those harder to edit, `harder` or `harder-report`.
            processes: Number of clips computed at the same time. None: one per CPU core.

        Returns:
            A job with the stage `benchmark`; the last `Progress` has the path of `results.json`.

        Raises:
            SettingsError: A variant is unknown.
        """
        names, known = tuple(dict.fromkeys(variants)), ("untuned", *PRESETS)
        if unknown := [name for name in names if name not in known]:
            raise SettingsError(f"unknown variant {unknown[0]!r}; known are {', '.join(known)}")

        def events() -> Events:
            from tuneavideo.evaluation import summary

            count = processes or os.cpu_count() or 1
            yield from summary.run_benchmark(names, Path(out), seeds=seeds, part=part, quick=quick, processes=count)

        return cls(events())

    @classmethod
    def demo(cls, out: str | Path | None = None, quick: bool = False) -> Job:
        """Tune the miniature on its first clip, edit it four times, and draw `edits.png` of source and edits.

        Args:
            out: Run folder to create. None: the next free `runs/<clip>-<n>`.
            quick: Make 5 steps of each stage only.

        Returns:
            A job with the stages of `tune`, then `picture`.
        """
        clip = miniature.clips()[0]
        values = {"video": str(clip["path"]), "prompt": clip["caption"], "edit": miniature.DEMO_EDITS, "stride": 2}
        if quick:
            values |= {"max_train_steps": 5, "num_inference_steps": 5, "num_inv_steps": 5}
        settings = tune_settings(values)
        return cls(_events("demo", settings.base, settings, out=out))


def _events(name: str, base: str, *args: Any, clip: TuneSettings | None = None, **options: Any) -> Events:
    """Announce the base, then import `jobs.<name>` and with it torch, and yield the events of its function `<name>`.

    Args:
        name: Name of the module and of its function.
        base: Base to announce.
        *args: Arguments of the function.
        clip: Settings whose frames are looked up first, so that VideoError is raised before torch is imported.
        **options: Keyword arguments of the function.
    """
    if clip:
        plan.choose_frames(clip)
    yield Progress("plan", about=plan.describe_base(base))
    module = importlib.import_module(f"tuneavideo.jobs.{name}")
    yield from getattr(module, name)(*args, **options)


@contextmanager
def _quiet() -> Generator[None, None, None]:
    """Silence loading bars and messages of other libraries within the block."""
    name = "TRANSFORMERS_VERBOSITY"  # transformers reads it when it is imported
    is_ours = name not in os.environ
    os.environ.setdefault(name, "error")
    try:
        from tuneavideo.models import quiet
    finally:
        if is_ours:
            del os.environ[name]
    with quiet.silenced_libraries():
        yield
