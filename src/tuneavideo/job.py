"""Jobs: checked when they are created, and run step by step or to their end."""

from __future__ import annotations

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
from tuneavideo.storage.run_folder import RunFolder

Listener = Callable[[Progress], None]


class Job(Iterator[Progress]):
    """A job that yields a `Progress` after every step.

    Creating a job checks the paths and names that it needs, and raises TuneAVideoError before torch is imported.
    Iterating it does the work. Closing it stops the work; a tuning that is closed can be resumed.
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
            The `Progress` of every file or folder that was finished, in order.
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
        """Tune a model on a clip, save the adapter and make the edits; `resume` is the run folder to continue."""
        checks.check_tune_inputs(settings, out, resumed=resume is not None)

        def events() -> Events:
            if not resume:
                plan.choose_frames(settings)  # raises VideoError before torch is imported
            yield Progress("plan", about=plan.describe_base(settings.base))
            from tuneavideo.jobs import tune

            yield from tune.tune(settings, out=out, resume=resume)

        return cls(events())

    @classmethod
    def edit(cls, settings: EditSettings) -> Job:
        """Edit a tuned clip."""
        checks.check_edit_inputs(settings)

        def events() -> Events:
            yield _loading(settings)
            from tuneavideo.jobs import edit

            yield from edit.edit(settings)

        return cls(events())

    @classmethod
    def invert(cls, settings: EditSettings) -> Job:
        """Invert a tuned clip to the timestep that its edits start from."""
        checks.check_edit_inputs(settings)

        def events() -> Events:
            yield _loading(settings)
            from tuneavideo.jobs import invert

            yield from invert.invert(settings)

        return cls(events())

    @classmethod
    def adopt(
        cls, settings: TuneSettings, checkpoint: str | Path, *, out: str | Path | None = None, own_base: bool = False
    ) -> Job:
        """Import weights that another program tuned on the clip, and make the edits.

        `own_base` converts the image model in `checkpoint` too; otherwise `settings.base` is used.
        """
        checks.check_weights(checkpoint)
        checks.check_tune_inputs(settings, out, own_base=own_base)

        def events() -> Events:
            plan.choose_frames(settings)
            yield Progress("plan", about=plan.describe_base(str(checkpoint) if own_base else settings.base))
            from tuneavideo.jobs import import_run

            yield from import_run.adopt(settings, Path(checkpoint), out=out, own_base=own_base)

        return cls(events())

    @classmethod
    def evaluate(
        cls, places: Iterable[str | Path], *, metrics: Iterable[str] = (), mask: str | Path | None = None, **models: Any
    ) -> Job:
        """Score the edits of runs; `models` are `clip` and `pick` of `EvaluationSettings`."""
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
        """Tune, edit and score the clips of LOVEU-TGVE-2023; finished clips are kept. Ends with `results.json`.

        Args:
            data: Folder of the benchmark: its frames, and its configs or its table.
            out: Folder for runs, submission and results.
            clips: Number of clips, evenly spread. None: all.
            config: YAML file of settings; it and `settings` override the benchmark's configs.
            clip: Hub id or folder of CLIP, instead of ViT-L/14.
            pick: Hub id or folder of PickScore.
            **settings: Any field of `TuneSettings`, such as `base` (by default `sd1.4`) or `preset`.
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
        """Compare presets on the bundled clips with the bundled classifier; ends with `results.json`.

        Args:
            variants: Presets, or `untuned`; differences are relative to the first.
            out: Folder for the results; rows that are there already are kept.
            quick: Use 4 clips instead of 12.
            seeds: Number of seeds.
            part: `development` clips or `report` clips.
            processes: Number of clips computed at the same time. None: one per CPU core.
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
        """Tune the miniature on its first clip, edit it four times, and draw `edits.png` of source and edits."""
        clip = miniature.clips()[0]
        stated = {"video": str(clip["path"]), "prompt": clip["caption"], "edit": miniature.DEMO_EDITS, "stride": 2}
        if quick:
            stated |= {"max_train_steps": 5, "num_inference_steps": 5, "num_inv_steps": 5}
        settings = tune_settings(stated)

        def events() -> Events:
            yield Progress("plan", about=plan.describe_base(settings.base))
            from tuneavideo.jobs import demo

            yield from demo.demo(settings, out=out)

        return cls(events())


def _loading(settings: EditSettings) -> Progress:
    own = RunFolder.open(settings.run).read_settings().base
    return Progress("plan", about=plan.describe_base(settings.edit_model or own))


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
