"""Make the miniature: `python -m tools.miniature`. Stages that are finished are skipped, others resumed."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tools.miniature import autoencoder, card, clips, diffusion, export, judge, measure
from tools.miniature.training import Settings, in_processes
from tools.miniature.world import World

PRODUCT = Path("src/tuneavideo/miniature")


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage of the recipe: steps, pictures per step and process, and rate, on a CPU and on a GPU."""

    run: Callable[[Settings, argparse.Namespace], None]
    cpu: tuple[int, int, float] = (0, 1, 0)
    gpu: tuple[int, int, float] = (0, 1, 0)


def _in_processes(work: Callable[[Settings], None]) -> Callable[[Settings, argparse.Namespace], None]:
    return lambda settings, _: in_processes(work, settings)


def _latents(settings: Settings, chosen: argparse.Namespace) -> None:
    in_processes(partial(diffusion.draw_shards, count=chosen.shards), settings)


def _autoencoder(settings: Settings, chosen: argparse.Namespace) -> None:
    in_processes(partial(autoencoder.train, start_from=chosen.start_from), settings)


def _diffusion(settings: Settings, chosen: argparse.Namespace) -> None:
    in_processes(partial(diffusion.train, start_from=chosen.start_from), settings)


STAGES = {
    "clips": Stage(lambda settings, chosen: clips.draw(World.open(settings.build), chosen.product / "clips")),
    "autoencoder": Stage(_autoencoder, (4000, 4, 3e-3), (2000, 32, 4e-3)),
    "latents": Stage(_latents),
    "diffusion": Stage(_diffusion, (6500, 36, 2e-3), (2000, 512, 3e-3)),
    "decoder": Stage(_in_processes(autoencoder.tune_decoder), (1000, 4, 1e-3), (800, 32, 1e-3)),
    "judge": Stage(lambda settings, _: judge.train(settings), (2000, 64, 2e-3), (1000, 256, 3e-3)),
    "export": Stage(lambda settings, chosen: export.export(settings.build, chosen.product)),
    "measure": Stage(
        lambda settings, chosen: measure.measure(
            chosen.product, World.open(settings.build), chosen.count, chosen.seeds, settings.processes, chosen.again
        )
    ),
    "card": Stage(lambda _, chosen: card.write(chosen.product)),
}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.miniature", description=__doc__)
    parser.add_argument("--build", type=Path, default=Path("build/miniature"), help="where states and artwork are kept")
    parser.add_argument(
        "--stage", choices=STAGES, nargs="+", default=list(STAGES), help="which stages; all, if not given"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--processes", type=int, help="two on a CPU, one on a GPU, if not given")
    parser.add_argument("--steps", type=int, help="length of the training, instead of the stage's own")
    parser.add_argument("--batch", type=int, help="pictures per step and process, instead of the stage's own")
    parser.add_argument("--rate", type=float, help="learning rate, instead of the stage's own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shards", type=int, default=20, help=f"of {diffusion.SHARD} pictures each, to learn from")
    parser.add_argument("--start-from", type=Path, help="an exported model that goes on learning")
    parser.add_argument("--product", type=Path, default=PRODUCT, help="where model, judge, clips and card are written")
    parser.add_argument("--count", type=int, default=256, help="pictures of each kind and seed to measure")
    parser.add_argument("--seeds", type=int, default=3, help="seeds to measure with")
    parser.add_argument("--again", choices=measure.KINDS, nargs="+", default=(), help="measure only these, again")
    return parser.parse_args()


def _settings(stage: Stage, chosen: argparse.Namespace) -> Settings:
    on_cpu = chosen.device == "cpu"
    steps, batch, rate = stage.cpu if on_cpu else stage.gpu
    return Settings(
        chosen.build, chosen.steps or steps, chosen.batch or batch, chosen.rate or rate, device=chosen.device,
        processes=chosen.processes or (2 if on_cpu else 1), seed=chosen.seed,
    )  # fmt: skip


def main() -> None:
    chosen = _arguments()
    chosen.build.mkdir(parents=True, exist_ok=True)
    if chosen.start_from and "autoencoder" not in chosen.stage:
        autoencoder.adopt(chosen.build, chosen.start_from)
    for name in chosen.stage:
        STAGES[name].run(_settings(STAGES[name], chosen), chosen)


if __name__ == "__main__":
    main()
