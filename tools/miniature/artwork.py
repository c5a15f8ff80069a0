"""The open artwork the world is drawn from: Noto Emoji (Apache-2.0), as published in an npm package."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import tarfile
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

PACKAGE, VERSION = "@iconify-json/noto", "1.2.9"
ARCHIVE = f"iconify-json-noto-{VERSION}.tgz"
SPRITES = "sprites.json"

SUBJECTS = {
    "dog": "dog", "cat": "cat", "rabbit": "rabbit", "panda": "panda", "penguin": "penguin", "turtle": "turtle",
    "duck": "duck", "frog": "frog", "fish": "fish", "butterfly": "butterfly", "car": "automobile", "rocket": "rocket",
    "ball": "soccer-ball", "star": "star", "balloon": "balloon", "robot": "robot",
}  # fmt: skip
"""The word of the world, and the name of its drawing in the package."""

COLOURS = {
    "red": (225, 35, 40), "blue": (35, 95, 230), "green": (45, 170, 60), "yellow": (250, 205, 30),
    "purple": (150, 60, 205),
}  # fmt: skip
COLOURED = ("car", "ball", "star", "balloon", "fish", "butterfly")
"""Subjects that come in colours; the others keep their own."""

NEON = {
    "dog": (255, 150, 90), "cat": (255, 190, 40), "rabbit": (240, 240, 255), "panda": (90, 255, 255),
    "penguin": (255, 120, 40), "turtle": (120, 255, 60), "duck": (60, 230, 160), "frog": (160, 255, 40),
    "fish": (60, 140, 255), "butterfly": (80, 190, 255), "car": (255, 60, 60), "rocket": (255, 90, 160),
    "ball": (255, 255, 255), "star": (255, 235, 60), "balloon": (255, 70, 70), "robot": (120, 200, 255),
}  # fmt: skip
DARK = (14, 10, 30)
"""What a neon sign stands before."""


def fetch(folder: Path) -> Path:
    """Download the sprites of the world into `folder`, once; return their file."""
    sprites = folder / SPRITES
    if sprites.exists():
        return sprites
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / ARCHIVE).exists():
        subprocess.run(["npm", "pack", "--silent", f"{PACKAGE}@{VERSION}"], cwd=folder, check=True)
    with tarfile.open(folder / ARCHIVE) as archive:
        icons = json.load(archive.extractfile("package/icons.json"))["icons"]
    used = {word: icons[name]["body"] for word, name in SUBJECTS.items()}
    sprites.write_text(json.dumps(used))
    return sprites


@lru_cache(maxsize=4)
def _bodies(file: Path) -> dict[str, str]:
    return json.loads(file.read_text())


@lru_cache(maxsize=64)
def drawing(file: Path, subject: str, pixels: int) -> Image.Image:
    """Draw the subject as RGBA, cropped to its outline and centred in a square of `pixels`."""
    import resvg_py

    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 128 128">{_bodies(file)[subject]}</svg>'
    raw = resvg_py.svg_to_bytes(svg_string=svg, width=2 * pixels, height=2 * pixels)
    data = base64.b64decode(raw) if isinstance(raw, str) else bytes(raw)
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    image = image.crop(image.getchannel("A").point(lambda a: 255 * (a > 40)).getbbox())
    side = int(max(image.size) * 1.12)
    square = Image.new("RGBA", (side, side))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square.resize((pixels, pixels), Image.Resampling.BOX)


def recoloured(image: Image.Image, subject: str, colour: tuple[int, int, int]) -> Image.Image:
    """Exchange the main colour of a drawing; light and shade stay."""
    rgba = np.asarray(image).astype(np.float32) / 255
    rgb, target = rgba[..., :3], np.array(colour, np.float32) / 255
    high, low = rgb.max(-1), rgb.min(-1)
    painted = high > 0.6 if subject == "ball" else (high - low > 0.3 * high) & (high > 0.25)
    light = rgb @ np.array([0.3, 0.59, 0.11], np.float32)
    opaque = rgba[..., 3] > 0.5
    ratio = (light / np.median(light[painted & opaque]))[..., None]
    shaded = target * np.minimum(ratio, 1) + (1 - target) * np.clip(ratio - 1, 0, 1) * 0.6
    rgba[..., :3] = np.where(painted[..., None], shaded, rgb)
    return Image.fromarray((rgba.clip(0, 1) * 255).astype(np.uint8))


def outlined(image: Image.Image) -> tuple[Image.Image, Image.Image, Image.Image]:
    """Return edges, dark parts and silhouette of a drawing as grey images; edges are about 1/22 of its side thick."""
    alpha = image.getchannel("A")
    flat = Image.new("RGBA", image.size, (128, 128, 128, 255))
    flat.alpha_composite(image)
    grey = flat.convert("L")
    width = max(3, image.width // 40 * 2 + 1)
    smooth = flat.convert("RGB").filter(ImageFilter.GaussianBlur(width / 6))
    steep = [
        np.asarray(c.filter(ImageFilter.MaxFilter(width)), np.float32)
        - np.asarray(c.filter(ImageFilter.MinFilter(width)))
        for c in smooth.split()
    ]
    rim = np.asarray(alpha.filter(ImageFilter.MaxFilter(width)), np.float32) - np.asarray(
        alpha.filter(ImageFilter.MinFilter(width))
    )
    edges = np.maximum(np.clip((np.max(steep, 0) - 70) * 6, 0, 255), rim)
    dark = np.clip((70 - np.asarray(grey, np.float32)) * 8, 0, 255) * (np.asarray(alpha) > 128)
    silhouette = alpha.filter(ImageFilter.MaxFilter(width))
    return Image.fromarray(edges.astype(np.uint8)), Image.fromarray(dark.astype(np.uint8)), silhouette


@lru_cache(maxsize=512)
def sprite(file: Path, subject: str, colour: str | None, style: str | None, pixels: int) -> Image.Image:
    """Draw the subject in a style: RGBA, a square of `pixels`."""
    image = drawing(file, subject, pixels)
    if style not in ("line drawing", "neon style"):
        return recoloured(image, subject, COLOURS[colour]) if colour else image
    edges, dark, silhouette = outlined(image)
    if style == "line drawing":
        ink = np.maximum(np.asarray(edges), np.asarray(dark))
        drawn = Image.fromarray(255 - ink).convert("RGB")
    else:
        glow = COLOURS[colour] if colour else NEON[subject]
        mask = np.asarray(edges, np.float32)[..., None] / 255
        drawn = Image.fromarray((mask * np.array(glow) + (1 - mask) * np.array(DARK)).astype(np.uint8))
    drawn.putalpha(silhouette)
    return drawn
