"""The drawn world: scenes of one subject before a background, in a style, and the captions that say so.

A scene is a value; the same scene is always the same picture, at any size. Coordinates are those of a 64-pixel frame.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image
from tools.miniature import artwork
from tools.miniature.backgrounds import BACKGROUNDS, Pen

PIXELS = 64
CUT = 5
"""How many pixels of a subject's outline, at most, lie outside the frame."""
SUBJECTS = tuple(artwork.SUBJECTS)
COLOURS = tuple(artwork.COLOURS)
COLOURED = artwork.COLOURED
STYLES = ("line drawing", "black and white", "neon style")
PLACES = {
    "grass": "on the grass", "beach": "on the beach", "snow": "in the snow", "night": "at night",
    "desert": "in the desert", "water": "under water", "city": "in the city", "room": "in the room",
}  # fmt: skip
WIDE, POST_WIDTH, POST_COLOUR = 80, 6, (120, 75, 40)
"""Side of the background before a moving camera, and the width of a post, both in pixels of a 64-pixel frame."""
MOTIONS = (
    "jumping", "driving", "flying", "falling", "rolling", "swimming", "running", "walking", "floating", "bouncing",
    "dancing", "moving",
)  # fmt: skip

HELD_OUT = {
    ("dog", "water"), ("cat", "city"), ("rabbit", "beach"), ("panda", "desert"), ("penguin", "grass"),
    ("turtle", "night"), ("duck", "room"), ("frog", "snow"), ("fish", "desert"), ("butterfly", "water"),
    ("car", "snow"), ("rocket", "grass"), ("ball", "night"), ("star", "room"), ("balloon", "beach"), ("robot", "city"),
}  # fmt: skip
"""Pairs of subject and background that are never shown in training: one for every subject, two for every background."""


@dataclass(frozen=True, slots=True)
class Scene:
    """One picture: what is in it, where (centre, longest side, degrees), and the seed of its background.

    Attributes:
        camera: Left and upper edge of the frame in a background of `WIDE` pixels. None: it is as large as the frame.
        post: Horizontal centre of a post in front of the subject.
        bystander: Another subject, which no caption names: what it is, its centre and its longest side.
    """

    subject: str | None
    background: str
    style: str | None = None
    colour: str | None = None
    motion: str = "moving"
    x: float = 32.0
    y: float = 32.0
    size: float = 34.0
    angle: float = 0.0
    flip: bool = False
    seed: int = 0
    camera: tuple[int, int] | None = None
    post: float | None = None
    bystander: tuple[str, float, float, float] | None = None


@dataclass(frozen=True, slots=True)
class World:
    """The artwork, and methods to draw with it."""

    sprites: Path

    @classmethod
    def open(cls, build: Path) -> World:
        """The world drawn from the artwork under `build`, which is fetched if it is not there."""
        return cls(artwork.fetch(build / "artwork"))

    def draw(self, scene: Scene, pixels: int = PIXELS) -> np.ndarray:
        """The scene as `pixels, pixels, 3` in 0..255."""
        canvas = 2 * pixels
        image = _scenery(scene, canvas)
        if scene.bystander:
            other, x, y, size = scene.bystander
            drawn = artwork.sprite(self.sprites, other, None, _treatment(scene.style), canvas)
            _place(image, drawn, Scene(other, scene.background, x=x, y=y, size=size), canvas / PIXELS)
        if scene.subject:
            drawn = artwork.sprite(self.sprites, scene.subject, scene.colour, _treatment(scene.style), canvas)
            _place(image, drawn, scene, canvas / PIXELS)
        if scene.post is not None:
            left, right = ((scene.post + side * POST_WIDTH / 2) / PIXELS for side in (-1, 1))
            Pen(canvas, _treatment(scene.style), image).box(left, -0.1, right, 1.1, POST_COLOUR)
        image = image.reduce(2)
        if scene.style == "black and white":
            image = image.convert("L").convert("RGB")
        return np.asarray(image)


def _treatment(style: str | None) -> str | None:
    """The style in which shapes are drawn; black and white is only taken of the finished picture."""
    return None if style == "black and white" else style


def _place(image: Image.Image, drawn: Image.Image, scene: Scene, scale: float) -> None:
    """Paste a sprite so that the middle of its outline comes to the scene's `x, y`."""
    side = max(1, round(scene.size * 1.12 * scale))
    if scene.flip:
        drawn = drawn.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    drawn = drawn.resize((side, side), Image.Resampling.BILINEAR, reducing_gap=1.5)
    if scene.angle:
        drawn = drawn.rotate(scene.angle, Image.Resampling.BILINEAR, expand=True)
    corner = (round(scene.x * scale - drawn.width / 2), round(scene.y * scale - drawn.height / 2))
    image.paste(drawn, corner, drawn)


def _scenery(scene: Scene, canvas: int) -> Image.Image:
    """Draw the background, or the part of it that a moving camera shows."""
    style, scale = _treatment(scene.style), canvas // PIXELS
    if scene.camera is None:
        return _background(scene.background, scene.seed, style, canvas).copy()
    left, top = (edge * scale for edge in scene.camera)
    wide = _background(scene.background, scene.seed, style, WIDE * scale)
    return wide.crop((left, top, left + canvas, top + canvas))


@lru_cache(maxsize=8)
def _background(name: str, seed: int, style: str | None, canvas: int) -> Image.Image:
    pen = Pen(canvas, style)
    BACKGROUNDS[name](pen, random.Random(f"{name} {seed}"))
    return pen.image


def caption(scene: Scene, *, colour: bool = True, motion: bool = True, place: bool = True) -> str:
    """Describe the scene in the world's grammar; parts can be left out."""
    words = ["a", scene.colour, scene.subject] if colour and scene.colour else ["a", scene.subject]
    words += ["is", scene.motion] if motion else []
    words += [PLACES[scene.background]] if place else []
    return " ".join(words) + (f", {scene.style}" if scene.style else "")


def random_caption(scene: Scene, rng: random.Random) -> str:
    """Draw a training caption: empty in one of ten, otherwise with parts left out at random."""
    if rng.random() < 0.1:
        return ""
    kept = {"colour": rng.random() < 0.9, "motion": rng.random() < 0.75, "place": rng.random() < 0.9}
    return caption(scene, **kept)


def random_scene(rng: random.Random, *, held_out: bool | None = False) -> Scene:
    """Draw a random scene: of held-out pairs only, of all others (as in training), or of both (`None`)."""
    while True:
        subject, background = rng.choice(SUBJECTS), rng.choice(tuple(PLACES))
        if held_out is None or ((subject, background) in HELD_OUT) == held_out:
            break
    style = rng.choice(STYLES) if rng.random() < 0.5 else None
    coloured = subject in COLOURED and style in (None, "neon style") and rng.random() < 0.75
    size = rng.uniform(26, 42)
    margin = size / 2 - CUT
    return Scene(
        subject, background, style, rng.choice(COLOURS) if coloured else None, rng.choice(MOTIONS),
        x=rng.uniform(margin, PIXELS - margin), y=rng.uniform(margin, PIXELS - margin), size=size,
        angle=rng.uniform(-14, 14) if rng.random() < 0.7 else 0.0, flip=rng.random() < 0.5, seed=rng.getrandbits(32),
    )  # fmt: skip


def words() -> tuple[str, ...]:
    """Return all words of captions."""
    sentences = [*SUBJECTS, *COLOURS, *MOTIONS, *PLACES.values(), *STYLES, "a", "is"]
    return tuple(sorted({word for sentence in sentences for word in sentence.split()}))
