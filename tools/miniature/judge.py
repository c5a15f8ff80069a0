"""Training of the judge, a classifier and locator of the world's subjects, on drawings only.

So that it uses shape and not colour alone, half of its drawings are grey, recoloured or inverted, and
most hold blobs in another subject's colours.
"""

from __future__ import annotations

import random

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tools.miniature.artwork import COLOURS, NEON
from tools.miniature.muon import Pair
from tools.miniature.training import Run, Settings, generator, learn
from tools.miniature.world import PIXELS, PLACES, STYLES, SUBJECTS, Scene, World, random_scene
from torch import Tensor

from tuneavideo.evaluation.metrics.judge import Judge

BACKGROUNDS = tuple(PLACES)
ALL_STYLES = ("none", *STYLES)
ALL_COLOURS = ("own", *COLOURS)
WORDS = {"subject": SUBJECTS, "background": BACKGROUNDS, "style": ALL_STYLES, "colour": ALL_COLOURS}


def recoloured(picture_HWC: np.ndarray, rng: random.Random) -> np.ndarray:
    """Exchange or remove the colours of a picture; shapes stay."""
    if rng.random() < 0.4:
        grey = picture_HWC.astype(np.float32) @ np.array([0.3, 0.59, 0.11], np.float32)
        return np.repeat(grey[..., None], 3, axis=-1).astype(np.uint8)
    hue, saturation, value = Image.fromarray(picture_HWC).convert("HSV").split()
    turn = rng.randint(25, 230)
    turned = Image.merge("HSV", (hue.point(lambda h: (h + turn) % 256), saturation, value))
    return np.asarray(turned.convert("RGB"))


def with_distractors(picture_HWC: np.ndarray, scene: Scene, rng: random.Random) -> np.ndarray:
    """Add blobs in subjects' colours outside the subject."""
    image = Image.fromarray(picture_HWC)
    canvas = ImageDraw.Draw(image)
    for _ in range(rng.randint(1, 2)):
        x, y, r, s = rng.uniform(0, PIXELS), rng.uniform(0, PIXELS), rng.uniform(3, 10), rng.uniform(3, 10)
        if abs(x - scene.x) < r + scene.size / 2 and abs(y - scene.y) < s + scene.size / 2:
            continue
        colour = rng.choice([*NEON.values(), *COLOURS.values(), (40, 40, 40), (250, 250, 250), (130, 130, 130)])
        canvas.ellipse([x - r, y - s, x + r, y + s], fill=colour)
    return np.asarray(image)


def softened(picture_HWC: np.ndarray, rng: random.Random) -> np.ndarray:
    """Add blur and noise, as in a picture of a model."""
    small = rng.randint(36, 60)
    image = Image.fromarray(picture_HWC).resize((small, small), Image.Resampling.BOX)
    soft = np.asarray(image.resize((PIXELS, PIXELS), Image.Resampling.BICUBIC), np.float32)
    noise = np.random.default_rng(rng.getrandbits(32)).normal(0, rng.uniform(0, 12), soft.shape)
    return (soft + noise).clip(0, 255).astype(np.uint8)


def example(world: World, rng: random.Random) -> tuple[np.ndarray, Scene, bool]:
    """Return a training drawing, its scene, and whether its colours are still those of background and style."""
    scene = random_scene(rng, held_out=None)
    picture, true_colours = world.draw(scene), True
    if scene.style in (None, "neon style") and rng.random() < 0.45:
        picture, true_colours = recoloured(picture, rng), False
    if rng.random() < 0.35 and scene.style is None:
        picture = with_distractors(picture, scene, rng)
    return softened(picture, rng) if rng.random() < 0.35 else picture, scene, true_colours


def labels(scenes: list[Scene], device: str = "cpu") -> dict[str, Tensor]:
    """Return the labels of scenes; the centre is that of the whole subject, even if the frame cuts it."""
    rows = {
        "subject": [SUBJECTS.index(s.subject) for s in scenes],
        "background": [BACKGROUNDS.index(s.background) for s in scenes],
        "style": [ALL_STYLES.index(s.style or "none") for s in scenes],
        "colour": [ALL_COLOURS.index(s.colour or "own") for s in scenes],
    }
    answers = {name: torch.tensor(row, device=device) for name, row in rows.items()}
    return answers | {"centre": torch.tensor([[s.x, s.y] for s in scenes], device=device)}


def to_tensor(pictures: list[np.ndarray], device: str = "cpu") -> Tensor:
    return torch.from_numpy(np.stack(pictures)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def train(settings: Settings) -> None:
    """Train a judge for the settings' steps; the state is `judge.pt`."""
    torch.manual_seed(settings.seed + 1)
    torch.set_num_threads(1)
    judge = Judge(WORDS).to(settings.device)
    run, world = Run(settings, "judge", Pair(judge, settings.rate), model=judge), World.open(settings.build)
    for step, _ in run:
        rng = generator("judge", settings.seed, step)
        loss = _loss(judge, [example(world, rng) for _ in range(settings.batch)], settings.device)
        learn(run, loss, judge.parameters(), highest_norm=10.0)
    run.log(str(accuracy(judge, world, settings.device)))


def _loss(judge: Judge, examples: list[tuple[np.ndarray, Scene, bool]], device: str) -> Tensor:
    pictures, scenes, true_colours = zip(*examples, strict=True)
    predicted, right = judge(to_tensor(list(pictures), device)), labels(list(scenes), device)
    kept = torch.tensor(true_colours, device=device).float()
    style = F.cross_entropy(predicted["style"], right["style"], reduction="none")
    colour = F.cross_entropy(predicted["colour"], right["colour"], reduction="none")
    background = F.cross_entropy(predicted["background"], right["background"])
    centre = F.smooth_l1_loss(predicted["centre"], right["centre"], beta=2.0)
    return (
        F.cross_entropy(predicted["subject"], right["subject"])
        + background
        + (kept * (style + 0.5 * colour)).mean()
        + 0.2 * centre
    )


@torch.no_grad()
def accuracy(judge: Judge, world: World, device: str = "cpu", count: int = 512, seed: int = 0) -> dict[str, float]:
    """Measure accuracy on held-out drawings, plain and recoloured, and the mean error of the centre in pixels."""
    rng = generator("judge, held out", seed)
    scenes = [random_scene(rng, held_out=None) for _ in range(count)]
    drawn = [world.draw(scene) for scene in scenes]
    right = labels(scenes, device)
    predicted = judge(to_tensor(drawn, device))
    scores = {name: (predicted[name].argmax(1) == right[name]).float().mean() for name in WORDS}
    scores["pixels"] = (predicted["centre"] - right["centre"]).norm(dim=1).mean()
    plain = [i for i, scene in enumerate(scenes) if scene.style is None]
    other = judge(to_tensor([recoloured(drawn[i], rng) for i in plain], device))["subject"].argmax(1)
    scores["subject, recoloured"] = (other == right["subject"][plain]).float().mean()
    return {name: round(float(score), 4) for name, score in scores.items()}
