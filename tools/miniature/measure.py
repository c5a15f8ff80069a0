"""Quality of the exported model: accuracy of its pictures by the judge, and reconstruction of drawings."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from tools.miniature import autoencoder
from tools.miniature.judge import accuracy
from tools.miniature.training import generator, pictures
from tools.miniature.world import COLOURED, SUBJECTS, Scene, World, caption, random_scene
from torch import Tensor

from tuneavideo.evaluation.metrics.judge import Judge

STEPS, BATCH = 50, 32
GUIDANCES = (3.0, 5.0, 7.5)
KINDS = ("seen", "held out", "style", "colour")


def wanted(kind: str, rng: random.Random) -> Scene:
    """Choose a scene to request: a pair seen in training, one never seen, one in a style, or one in a colour."""
    while True:
        scene = random_scene(rng, held_out=kind == "held out")
        if kind == "colour" and not (scene.colour and scene.style is None):
            continue
        if kind == "style" and (not scene.style or scene.colour):
            continue
        if kind in ("seen", "held out") and (scene.style or scene.colour):
            continue
        return scene


def open_pipeline(model: Path) -> StableDiffusionPipeline:
    """Load the exported model in single precision."""
    pipeline = StableDiffusionPipeline.from_pretrained(model, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.unet.to(memory_format=torch.channels_last)
    return pipeline


@torch.no_grad()
def paint(pipeline: StableDiffusionPipeline, captions: list[str], seed: int, guidance: float) -> Tensor:
    """Generate a picture for every caption, `N 3 64 64` in -1..1."""
    rng, parts = torch.Generator().manual_seed(seed), []
    for start in range(0, len(captions), BATCH):
        made = pipeline(
            captions[start : start + BATCH], num_inference_steps=STEPS, guidance_scale=guidance, generator=rng,
            output_type="np",
        )  # fmt: skip
        parts.append(torch.from_numpy(made.images).permute(0, 3, 1, 2) * 2 - 1)
    return torch.cat(parts)


@torch.no_grad()
def correct(judge: Judge, painted: Tensor, scenes: list[Scene]) -> dict[str, list[bool]]:
    """Return for every picture whether subject, background, style and colour are the requested ones.

    A requested colour is compared with the most probable one other than "its own": a star's own colour is yellow.
    """
    predicted = judge(painted)
    coloured = torch.tensor([scene.colour is not None for scene in scenes])
    predicted["colour"][coloured, 0] = -torch.inf
    return {
        kind: [
            words[k] == (getattr(scene, kind) or words[0])
            for k, scene in zip(predicted[kind].argmax(1).tolist(), scenes, strict=True)
        ]
        for kind, words in judge.words.items()
    }


def text_to_image(product: Path, kind: str, count: int, seed: int | str, guidance: float) -> dict:
    """Measure accuracy over `count` captions of one kind, and the subject's accuracy for each subject."""
    torch.set_num_threads(1)
    pipeline, judge = open_pipeline(product / "model"), Judge.open(product / "judge")
    rng = generator("captions", kind, seed)
    scenes = [wanted(kind, rng) for _ in range(count)]
    painted = paint(pipeline, [caption(s) for s in scenes], rng.getrandbits(32), guidance)
    right = correct(judge, painted, scenes)
    by_subject = {
        subject: _share([r for r, s in zip(right["subject"], scenes, strict=True) if s.subject == subject])
        for subject in SUBJECTS
        if any(s.subject == subject for s in scenes)
    }
    print(kind, seed, guidance, {name: _share(answers) for name, answers in right.items()}, flush=True)
    return {name: _share(answers) for name, answers in right.items()} | {"by subject": by_subject}


def best_guidance(pool: ProcessPoolExecutor, product: Path, count: int) -> float:
    """Find the best guidance scale over all kinds of captions, on other captions than are reported."""
    tried = {
        scale: [pool.submit(text_to_image, product, kind, count, "guidance", scale) for kind in KINDS]
        for scale in GUIDANCES
    }
    attribute = {"seen": "subject", "held out": "subject", "style": "subject", "colour": "colour"}
    right = {
        scale: sum(run.result()[attribute[kind]] for kind, run in zip(KINDS, runs, strict=True))
        for scale, runs in tried.items()
    }
    return max(right, key=lambda scale: right[scale])


def _share(answers: list[bool]) -> float:
    return round(sum(answers) / len(answers), 4)


@torch.no_grad()
def chroma_error(pipeline: StableDiffusionPipeline, world: World, count: int = 128) -> float:
    """Measure the mean absolute error of the colour differences after the autoencoder, in levels of 255."""
    rng = generator("chroma")
    drawn = pictures(world, [random_scene(rng, held_out=None) for _ in range(count)])
    back = pipeline.vae.decode(pipeline.vae.encode(drawn).latent_dist.mode()).sample.clamp(-1, 1)
    return round(float(autoencoder.chroma(back - drawn).abs().mean() * 127.5), 2)


def grid(pipeline: StableDiffusionPipeline, file: Path, guidance: float, zoom: int = 2) -> None:
    """Generate four pictures of every subject: two of pairs seen in training, a style, and a colour or unseen pair."""
    rng = generator("grid")
    scenes = []
    for subject in SUBJECTS:
        last = "colour" if subject in COLOURED else "held out"
        for kind in ("seen", "seen", "style", last):
            scenes.append(next(s for s in iter(lambda k=kind: wanted(k, rng), None) if s.subject == subject))
    painted = paint(pipeline, [caption(s) for s in scenes], 0, guidance)
    images = ((painted.permute(0, 2, 3, 1).numpy() + 1) * 127.5).round().astype(np.uint8)
    rows = [np.concatenate(list(images[start : start + 8]), axis=1) for start in range(0, 64, 8)]
    whole = Image.fromarray(np.concatenate(rows))
    whole.resize((whole.width * zoom, whole.height * zoom), Image.Resampling.NEAREST).save(file, optimize=True)


def measure(product: Path, world: World, count: int, seeds: int, processes: int, again: Sequence[str] = ()) -> None:
    """Write `measured.json` and the grid next to the model; `again` measures only some kinds of captions."""
    file = product / "measured.json"
    before = json.loads(file.read_text()) if again else {}
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        guidance = before.get("guidance") or best_guidance(pool, product, count // 8)
        runs = {
            kind: [pool.submit(text_to_image, product, kind, count, seed, guidance) for seed in range(seeds)]
            for kind in again or KINDS
        }
        kinds = {kind: _mean([run.result() for run in of_kind]) for kind, of_kind in runs.items()}
    if again:
        before["text to image"].update(kinds)
        file.write_text(json.dumps(before, indent=2) + "\n")
        return
    pipeline, judge = open_pipeline(product / "model"), Judge.open(product / "judge")
    measured = {
        "count": count, "seeds": seeds, "steps": STEPS, "guidance": guidance,
        "judge": accuracy(judge, world, count=2048),
        "autoencoder": {
            "psnr": round(autoencoder.psnr(pipeline.vae, world, "cpu", 256), 2),
            "chroma error": chroma_error(pipeline, world),
        },
        "millions": {
            part: round(sum(p.numel() for p in getattr(pipeline, part).parameters()) / 1e6, 3)
            for part in ("vae", "text_encoder", "unet")
        },
        "training": json.loads((product / "model" / "training.json").read_text())["training"],
        "text to image": kinds,
    }  # fmt: skip
    file.write_text(json.dumps(measured, indent=2) + "\n")
    grid(pipeline, product / "samples.png", guidance)


def _mean(runs: list[dict]) -> dict:
    """Return the mean over seeds of every number, nested or not."""
    first = runs[0]
    return {
        name: _mean([run[name] for run in runs if name in run]) if isinstance(value, dict)
        else round(float(np.mean([run[name] for run in runs if name in run])), 4)
        for name, value in first.items()
    }  # fmt: skip
