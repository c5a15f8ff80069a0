"""The sample clips: scenes whose subject moves, the true track of its centre, and edits of each."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from tools.miniature.world import Scene, World, caption

FRAMES, FPS, PIXELS = 16, 8, 256
Place = tuple[float, float, float]
"""Centre of the subject in pixels of a 64-pixel frame, and its angle in degrees."""


def hop(u: float) -> Place:
    return 15 + 34 * u, 44 - 17 * abs(math.sin(3 * math.pi * u)), 8 * math.cos(3 * math.pi * u)


def drive(u: float) -> Place:
    return 15 + 34 * u, 44, 0


def rise(u: float) -> Place:
    return 32 + 3 * math.sin(2 * math.pi * u), 47 - 32 * u, 0


def fall(u: float) -> Place:
    return 30 + 6 * u, 15 + 33 * u * u, 8 - 16 * u


def roll(u: float) -> Place:
    return 14 + 36 * u, 45, -150 * u


def circle(u: float) -> Place:
    return 32 + 14 * math.cos(2 * math.pi * u), 31 + 13 * math.sin(2 * math.pi * u), 0


def zigzag(u: float) -> Place:
    return 15 + 34 * u, 22 + 20 * abs(1 - (3 * u) % 2), 0


def sway(u: float) -> Place:
    return 32 + 14 * math.sin(2 * math.pi * u), 36 - 6 * math.cos(4 * math.pi * u), 10 * math.sin(2 * math.pi * u)


def bounce(u: float) -> Place:
    return 14 + 36 * u, 46 - 28 * (1 - u / 2) * abs(math.sin(2.5 * math.pi * u + math.pi / 2)), 0


def swim(u: float) -> Place:
    return 49 - 34 * u, 33 + 7 * math.sin(3 * math.pi * u), 6 * math.cos(3 * math.pi * u)


@dataclass(frozen=True, slots=True)
class Clip:
    """A scene in motion, and four edits: another subject, background, style, and subject and background at once."""

    name: str
    set: str
    scene: Scene
    path: Callable[[float], Place]
    subject: str
    background: str
    style: str
    two: tuple[str, str]

    def scenes(self) -> list[Scene]:
        """Return the scene of every frame."""
        places = [self.path(frame / (FRAMES - 1)) for frame in range(FRAMES)]
        return [replace(self.scene, x=x, y=y, angle=angle) for x, y, angle in places]

    def edits(self) -> list[dict[str, str | None]]:
        """Return the prompts of the edits and their expected attributes."""
        colourless = self.style in ("line drawing", "black and white")
        wanted = {
            "subject": replace(self.scene, subject=self.subject, colour=None),
            "background": replace(self.scene, background=self.background),
            "style": replace(self.scene, style=self.style, colour=None if colourless else self.scene.colour),
            "two": replace(self.scene, subject=self.two[0], background=self.two[1], colour=None),
        }
        return [
            {"kind": kind, "prompt": caption(s), "subject": s.subject, "background": s.background, "style": s.style}
            for kind, s in wanted.items()
        ]


def _clip(name: str, seed: int, what: str, path: Callable[[float], Place], edits: str, size: float = 28) -> Clip:
    """A row of the table; `what` is 'set, colour, subject, background, motion', `edits` names the four in order."""
    chosen, colour, subject, background, motion = what.split()
    other, elsewhere, style, both, where = (word.replace("_", " ") for word in edits.split())
    scene = Scene(
        subject, background, None, None if colour == "-" else colour, motion, size=size, seed=seed,
        flip=(subject in FACING_LEFT) != (path is swim),
    )  # fmt: skip
    return Clip(name, SETS[chosen], scene, path, other, elsewhere, style, (both, where))


SETS = {"dev": "development", "report": "report"}
FACING_LEFT = ("cat", "rabbit", "turtle", "duck", "fish", "car", "penguin")
"""Subjects that the artwork shows looking to the left."""

CLIPS = (
    _clip("dog-jumping", 11, "dev - dog grass jumping", hop, "cat beach black_and_white panda snow", 30),
    _clip("car-driving", 12, "dev red car city driving", drive, "robot snow neon_style ball desert", 32),
    _clip("rocket-flying", 13, "dev - rocket night flying", rise, "star desert line_drawing balloon city", 32),
    _clip("fish-swimming", 14, "dev - fish water swimming", swim, "turtle night black_and_white duck grass", 30),
    _clip("ball-bouncing", 15, "dev blue ball beach bouncing", bounce, "frog room neon_style star snow", 26),
    _clip("cat-running", 16, "dev - cat room running", drive, "rabbit grass line_drawing dog desert", 30),
    _clip("balloon-floating", 17, "dev red balloon snow floating", sway,
          "butterfly desert black_and_white rocket night", 32),
    _clip("butterfly-flying", 18, "dev - butterfly grass flying", circle,
          "star city neon_style fish water", 28),
    _clip("penguin-walking", 19, "dev - penguin snow walking", drive, "duck grass black_and_white robot desert", 32),
    _clip("robot-dancing", 20, "dev - robot desert dancing", zigzag, "panda room neon_style dog night", 28),
    _clip("turtle-moving", 21, "dev - turtle beach moving", drive, "frog water line_drawing car desert", 30),
    _clip("star-falling", 22, "dev yellow star night falling", fall, "ball water black_and_white balloon grass", 28),
    _clip("rabbit-jumping", 23, "report - rabbit grass jumping", hop, "frog snow black_and_white cat desert", 30),
    _clip("panda-rolling", 24, "report - panda room rolling", drive, "ball night neon_style dog beach", 28),
    _clip("duck-swimming", 25, "report - duck water swimming", swim, "fish beach line_drawing penguin snow", 30),
    _clip("frog-jumping", 26, "report - frog desert jumping", hop, "rabbit grass black_and_white turtle night", 28),
    _clip("dog-running", 27, "report - dog city running", zigzag, "cat water neon_style robot room", 30),
    _clip("car-driving-in-the-desert", 28, "report green car desert driving", drive,
          "turtle grass black_and_white ball city", 32),
    _clip("rocket-falling", 29, "report - rocket water falling", fall, "butterfly night line_drawing star desert", 30),
    _clip("butterfly-floating", 30, "report purple butterfly snow floating", zigzag,
          "star beach neon_style balloon room", 28),
    _clip("ball-rolling", 31, "report - ball grass rolling", roll, "star snow black_and_white car city", 28),
    _clip("star-flying", 32, "report red star beach flying", circle, "balloon room neon_style rocket night", 28),
    _clip("balloon-rising", 33, "report blue balloon city floating", rise,
          "rocket grass black_and_white fish water", 30),
    _clip("cat-dancing", 34, "report - cat night dancing", sway, "dog beach line_drawing panda water", 30),
)  # fmt: skip


def draw(world: World, folder: Path) -> None:
    """Write every clip, and their description, `clips.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for clip in CLIPS:
        scenes = clip.scenes()
        _write(folder / f"{clip.name}.mp4", np.stack([world.draw(scene, PIXELS) for scene in scenes]))
        rows.append({
            "name": clip.name, "file": f"{clip.name}.mp4", "caption": caption(clip.scene),
            "subject": clip.scene.subject, "background": clip.scene.background, "motion": clip.scene.motion,
            "set": clip.set, "track": [[round(s.x, 2), round(s.y, 2)] for s in scenes], "edits": clip.edits(),
        })  # fmt: skip
    lines = ",\n".join(json.dumps(row) for row in rows)
    (folder / "clips.json").write_text(f"[\n{lines}\n]\n")


def _write(file: Path, frames_THWC: np.ndarray) -> None:
    with av.open(file, "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(FPS), options={"crf": "20", "preset": "slow"})
        stream.width = stream.height = PIXELS
        stream.pix_fmt, stream.thread_count = "yuv420p", 1
        for frame in frames_THWC:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode(None))
