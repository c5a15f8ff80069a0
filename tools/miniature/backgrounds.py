"""The eight backgrounds, as shapes that a pen fills, outlines or lets glow."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

from PIL import Image, ImageDraw
from tools.miniature.artwork import DARK

Colour = tuple[int, int, int]
Point = tuple[float, float]


class Pen:
    """Draws shapes given in 0..1 on a square canvas, a new one or `image`, each as the style has it."""

    def __init__(self, pixels: int, style: str | None, image: Image.Image | None = None) -> None:
        self.pixels, self.style = pixels, style
        paper = {"line drawing": (255, 255, 255), "neon style": DARK}.get(style, (0, 0, 0))
        self.image = image or Image.new("RGB", (pixels, pixels), paper)
        self.canvas = ImageDraw.Draw(self.image)

    def _looks(self, colour: Colour) -> dict[str, object]:
        width = max(1, round(self.pixels * 0.016))
        if self.style == "line drawing":
            return {"fill": (255, 255, 255), "outline": (0, 0, 0), "width": width}
        if self.style == "neon style":
            brightest = max(*colour, 1)
            glow = tuple(int(90 + 150 * (c / brightest) ** 2 - 60 * (c < 0.7 * brightest)) for c in colour)
            return {"fill": DARK, "outline": glow, "width": width}
        return {"fill": colour}

    def sky(self, top: Colour, bottom: Colour) -> None:
        """Cover the canvas with a gradient; styles of lines leave it empty."""
        if self.style is None:
            strip = Image.new("RGB", (1, 2))
            strip.putpixel((0, 0), top)
            strip.putpixel((0, 1), bottom)
            self.image.paste(strip.resize((self.pixels, self.pixels), Image.Resampling.BILINEAR))

    def polygon(self, points: list[Point], colour: Colour) -> None:
        self.canvas.polygon([(x * self.pixels, y * self.pixels) for x, y in points], **self._looks(colour))

    def box(self, left: float, top: float, right: float, bottom: float, colour: Colour) -> None:
        self.polygon([(left, top), (right, top), (right, bottom), (left, bottom)], colour)

    def disc(self, x: float, y: float, radius: float, colour: Colour) -> None:
        box = [(v * self.pixels) for v in (x - radius, y - radius, x + radius, y + radius)]
        self.canvas.ellipse(box, **self._looks(colour))

    def dot(self, x: float, y: float, radius: float, colour: Colour) -> None:
        """A disc too small to be outlined."""
        ink = (0, 0, 0) if self.style == "line drawing" else colour
        self.canvas.ellipse([(v * self.pixels) for v in (x - radius, y - radius, x + radius, y + radius)], fill=ink)

    def ground(self, height: Callable[[float], float], colour: Colour) -> None:
        """Fill from the curve `height(x)` down to the lower edge and beyond."""
        curve = [(x / 16, height(x / 16)) for x in range(-1, 18)]
        self.polygon([*curve, (1.1, 1.1), (-0.1, 1.1)], colour)


def _varied(rng: random.Random, colour: Colour, amount: int = 12) -> Colour:
    shift = rng.randint(-amount, amount)
    return tuple(min(255, max(0, c + shift)) for c in colour)


def _hill(rng: random.Random, level: float, swing: float) -> Callable[[float], float]:
    phase, waves = rng.uniform(0, 6.3), rng.uniform(0.5, 1.1)
    return lambda x: level + swing * math.sin(6.3 * waves * x + phase)


def _cloud(pen: Pen, rng: random.Random) -> None:
    x, y, r = rng.uniform(0.08, 0.92), rng.uniform(0.08, 0.24), rng.uniform(0.06, 0.085)
    turns = [k * 6.2832 / 18 for k in range(18)]
    wide = [r * (2.0 if abs(math.cos(turn)) > 0.5 else 1.6) * math.cos(turn) for turn in turns]
    tall = [r * math.sin(turn) * (1 if math.sin(turn) < 0 else 0.5) for turn in turns]
    pen.polygon([(x + dx, y + dy) for dx, dy in zip(wide, tall, strict=True)], (250, 250, 255))


def grass(pen: Pen, rng: random.Random) -> None:
    pen.sky(_varied(rng, (70, 150, 240)), _varied(rng, (200, 230, 255)))
    for _ in range(rng.randint(0, 2)):
        _cloud(pen, rng)
    level = rng.uniform(0.56, 0.7)
    pen.ground(_hill(rng, level, 0.025), _varied(rng, (85, 180, 50)))
    for _ in range(rng.randint(3, 5)):
        x, y = rng.uniform(0.03, 0.97), rng.uniform(level + 0.12, 0.97)
        pen.polygon(
            [(x - 0.05, y), (x - 0.03, y - 0.07), (x, y - 0.02), (x + 0.03, y - 0.07), (x + 0.05, y)], (50, 130, 35)
        )


def beach(pen: Pen, rng: random.Random) -> None:
    pen.sky(_varied(rng, (80, 175, 245)), _varied(rng, (190, 232, 255)))
    pen.disc(rng.uniform(0.12, 0.88), rng.uniform(0.12, 0.2), rng.uniform(0.07, 0.095), (255, 225, 70))
    sea = rng.uniform(0.5, 0.6)
    pen.ground(lambda _: sea, _varied(rng, (15, 105, 190)))
    pen.ground(_hill(rng, sea + rng.uniform(0.13, 0.2), 0.02), _varied(rng, (240, 215, 150)))


def snow(pen: Pen, rng: random.Random) -> None:
    pen.sky(_varied(rng, (150, 175, 205)), _varied(rng, (215, 225, 238)))
    level = rng.uniform(0.56, 0.7)
    for _ in range(rng.randint(1, 3)):
        x, h = rng.uniform(0.05, 0.95), rng.uniform(0.2, 0.3)
        pen.polygon([(x - 0.09, level + 0.05), (x, level - h), (x + 0.09, level + 0.05)], (45, 105, 85))
    pen.ground(_hill(rng, level, 0.03), _varied(rng, (243, 247, 252), 6))
    for _ in range(rng.randint(6, 9)):
        pen.dot(rng.random(), rng.uniform(0, level), 0.017, (255, 255, 255))


def night(pen: Pen, rng: random.Random) -> None:
    pen.sky(_varied(rng, (12, 12, 45), 8), _varied(rng, (40, 40, 110), 8))
    for _ in range(rng.randint(7, 11)):
        pen.dot(rng.random(), rng.uniform(0, 0.66), 0.014, (235, 235, 200))
    pen.disc(rng.uniform(0.12, 0.88), rng.uniform(0.13, 0.22), rng.uniform(0.075, 0.1), (250, 240, 200))
    pen.ground(_hill(rng, rng.uniform(0.74, 0.82), 0.02), _varied(rng, (16, 34, 40), 6))


def desert(pen: Pen, rng: random.Random) -> None:
    pen.sky(_varied(rng, (245, 140, 60)), _varied(rng, (255, 205, 140)))
    far, near = rng.uniform(0.54, 0.62), rng.uniform(0.72, 0.8)
    pen.ground(_hill(rng, far, 0.05), _varied(rng, (226, 165, 90)))
    x, y = rng.uniform(0.08, 0.92), rng.uniform(far + 0.1, near + 0.06)
    pen.box(x - 0.025, y - 0.24, x + 0.025, y, (60, 130, 60))
    pen.polygon([(x - 0.025, y - 0.1), (x - 0.09, y - 0.1), (x - 0.09, y - 0.19), (x - 0.055, y - 0.19),
                 (x - 0.055, y - 0.14), (x - 0.025, y - 0.14)], (60, 130, 60))  # fmt: skip
    pen.polygon([(x + 0.025, y - 0.08), (x + 0.09, y - 0.08), (x + 0.09, y - 0.17), (x + 0.055, y - 0.17),
                 (x + 0.055, y - 0.12), (x + 0.025, y - 0.12)], (60, 130, 60))  # fmt: skip
    pen.ground(_hill(rng, near, 0.04), _varied(rng, (205, 140, 70)))


def water(pen: Pen, rng: random.Random) -> None:
    pen.sky(_varied(rng, (40, 150, 215)), _varied(rng, (8, 50, 120)))
    for _ in range(rng.randint(2, 4)):
        x, tall, lean = rng.uniform(0.04, 0.96), rng.uniform(0.22, 0.4), rng.uniform(-0.06, 0.06)
        pen.polygon([(x - 0.04, 1), (x + lean - 0.02, 1 - 0.6 * tall), (x - lean, 1 - tall),
                     (x + lean + 0.03, 1 - 0.6 * tall), (x + 0.04, 1)], (20, 140, 90))  # fmt: skip
    pen.ground(_hill(rng, rng.uniform(0.9, 0.94), 0.02), _varied(rng, (170, 160, 110)))
    for _ in range(rng.randint(4, 6)):
        pen.disc(rng.uniform(0.03, 0.97), rng.uniform(0.03, 0.8), rng.uniform(0.02, 0.035), (150, 215, 245))


def city(pen: Pen, rng: random.Random) -> None:
    pen.sky(_varied(rng, (140, 160, 190)), _varied(rng, (210, 215, 225)))
    road, left = rng.uniform(0.72, 0.8), rng.uniform(-0.12, 0.0)
    while left < 1:
        wide, top = rng.uniform(0.17, 0.26), rng.uniform(0.18, 0.44)
        pen.box(
            left, top, left + wide, road, _varied(rng, rng.choice([(165, 105, 85), (120, 115, 125), (190, 160, 120)]))
        )
        for column in (0.28, 0.7):
            for row in range(3):
                x, y = left + column * wide, top + 0.08 + 0.13 * row
                pen.box(x - 0.024, y - 0.03, x + 0.024, y + 0.03, (250, 225, 130))
        left += wide + rng.uniform(0, 0.03)
    pen.ground(lambda _: road, _varied(rng, (70, 70, 78), 8))
    start = rng.uniform(-0.2, 0.0)
    for dash in range(5):
        x = start + 0.27 * dash
        pen.box(x, (road + 1) / 2 - 0.012, x + 0.14, (road + 1) / 2 + 0.012, (235, 235, 235))


def room(pen: Pen, rng: random.Random) -> None:
    pen.sky(_varied(rng, (225, 165, 185)), _varied(rng, (240, 190, 205)))
    floor = rng.uniform(0.66, 0.76)
    x, y = rng.choice([rng.uniform(0.08, 0.2), rng.uniform(0.52, 0.64)]), rng.uniform(0.08, 0.16)
    pen.box(x, y, x + 0.3, y + 0.3, (250, 250, 250))
    for column in (0.025, 0.16):
        for row in (0.025, 0.16):
            pen.box(x + column, y + row, x + column + 0.115, y + row + 0.115, (120, 190, 235))
    pen.ground(lambda _: floor, _varied(rng, (150, 95, 55)))
    pen.box(-0.1, floor, 1.1, floor + 0.035, (250, 240, 235))
    middle, wide = rng.uniform(0.3, 0.7), rng.uniform(0.2, 0.3)
    low = rng.uniform(floor + 0.14, 0.94)
    left, right = middle - wide, middle + wide
    pen.polygon([(left, low), (left + 0.07, low - 0.08), (right - 0.07, low - 0.08), (right, low)], (90, 60, 150))


BACKGROUNDS: dict[str, Callable[[Pen, random.Random], None]] = {
    "grass": grass, "beach": beach, "snow": snow, "night": night, "desert": desert, "water": water, "city": city,
    "room": room,
}  # fmt: skip
