"""The sample clips: scenes whose subject moves, the true track of its centre, and edits of each, drawn as well."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from tools.miniature.world import WIDE, Scene, World, caption

from tuneavideo.video import resize

FRAMES, FPS, PIXELS = 16, 8, 256
SMALL = 64
"""Side of the frames of true edits."""
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
    """A scene in motion, and four edits: another subject, background, style, and subject and background at once.

    Attributes:
        grow: Factor of the subject's size in the last frame; between, it changes in equal ratios.
        pan: Pixels by which the camera moves to the right between frames, 1 or -1.
        challenge: What makes a clip of the second version of the benchmark hard.
    """

    name: str
    set: str
    scene: Scene
    path: Callable[[float], Place]
    subject: str
    background: str
    style: str
    two: tuple[str, str]
    frames: int = FRAMES
    grow: float = 1.0
    pan: int | None = None
    challenge: str | None = None

    def scenes(self) -> list[Scene]:
        """Return the scene of every frame."""
        scenes = []
        for frame in range(self.frames):
            u = frame / (self.frames - 1)
            x, y, angle = self.path(u)
            camera = self.pan and ((frame if self.pan > 0 else self.frames - 1 - frame), (WIDE - SMALL) // 2)
            size = self.scene.size * self.grow**u
            scenes.append(replace(self.scene, x=x, y=y, angle=angle, size=size, camera=camera))
        return scenes

    def changes(self) -> dict[str, dict[str, str | None]]:
        """Return what each edit changes in every scene, by kind of edit."""
        colourless = self.style in ("line drawing", "black and white")
        return {
            "subject": {"subject": self.subject, "colour": None},
            "background": {"background": self.background},
            "style": {"style": self.style, "colour": None if colourless else self.scene.colour},
            "two": {"subject": self.two[0], "background": self.two[1], "colour": None},
        }

    def edits(self) -> list[dict[str, str | None]]:
        """Return the prompts of the edits and their expected attributes."""
        wanted = {kind: replace(self.scene, **change) for kind, change in self.changes().items()}
        return [
            {"kind": kind, "prompt": caption(s), "subject": s.subject, "background": s.background, "style": s.style}
            for kind, s in wanted.items()
        ]

    def true_edits(self, world: World) -> np.ndarray:
        """Draw the edits, next to each other: frames of `SMALL` rows and four times `SMALL` columns."""
        rows = [[world.draw(_edited(s, change), PIXELS) for s in self.scenes()] for change in self.changes().values()]
        edits = [[resize(frame, SMALL, SMALL, "stretch") for frame in frames] for frames in rows]
        return np.concatenate(edits, axis=2)


def _edited(scene: Scene, change: dict[str, str | None]) -> Scene:
    """Apply an edit to a scene; a car stays upright."""
    return replace(scene, **change, angle=0.0 if change.get("subject") == "car" else scene.angle)


def _clip(
    name: str, seed: int, what: str, path: Callable[[float], Place], edits: str, size: float = 28,
    *, post: float | None = None, bystander: tuple[str, float, float, float] | None = None, **more: Any,
) -> Clip:  # fmt: skip
    """A row of the table; `what` is 'set, colour, subject, background, motion', `edits` names the four in order."""
    chosen, colour, subject, background, motion = what.split()
    other, elsewhere, style, both, where = (word.replace("_", " ") for word in edits.split())
    scene = Scene(
        subject, background, None, None if colour == "-" else colour, motion, size=size, seed=seed,
        flip=(subject in FACING_LEFT) != (path is swim), post=post, bystander=bystander,
    )  # fmt: skip
    return Clip(name, SETS[chosen], scene, path, other, elsewhere, style, (both, where), **more)


SETS = {"dev": "development", "report": "report", "hard": "harder", "hard-report": "harder-report"}
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


HARDER = (
    _clip("dog-jumping-camera", 41, "hard - dog grass jumping", hop,
          "cat beach black_and_white panda snow", 28, pan=1, challenge="camera"),
    _clip("penguin-walking-camera", 42, "hard - penguin snow walking", sway,
          "robot city neon_style frog grass", 30, pan=-1, challenge="camera"),
    _clip("robot-dancing-camera", 43, "hard-report - robot room dancing", zigzag,
          "dog desert line_drawing cat beach", 28, pan=1, challenge="camera"),
    _clip("fish-swimming-camera", 44, "hard-report - fish water swimming", circle,
          "turtle snow black_and_white duck grass", 28, pan=-1, challenge="camera"),
    _clip("panda-walking-nearer", 45, "hard - panda grass walking", sway,
          "rabbit snow black_and_white robot beach", 24, grow=1.7, challenge="size"),
    _clip("balloon-floating-away", 46, "hard blue balloon city floating", rise,
          "rocket desert neon_style star snow", 38, grow=0.62, challenge="size"),
    _clip("duck-swimming-away", 47, "hard-report - duck water swimming", swim,
          "fish night line_drawing penguin snow", 38, grow=0.62, challenge="size"),
    _clip("frog-jumping-nearer", 48, "hard-report - frog grass jumping", zigzag,
          "cat desert black_and_white dog city", 24, grow=1.7, challenge="size"),
    _clip("cat-running-behind-a-post", 49, "hard - cat room running", drive,
          "dog desert neon_style panda grass", 32, post=32, challenge="occlusion"),
    _clip("turtle-moving-behind-a-post", 50, "hard - turtle beach moving", drive,
          "panda snow black_and_white frog water", 32, post=40, challenge="occlusion"),
    _clip("rabbit-running-behind-a-post", 51, "hard-report - rabbit snow running", drive,
          "penguin city line_drawing dog beach", 32, post=26, challenge="occlusion"),
    _clip("ball-rolling-behind-a-post", 52, "hard-report red ball grass rolling", drive,
          "star water black_and_white penguin desert", 30, post=26, challenge="occlusion"),
    _clip("butterfly-flying-long", 53, "hard - butterfly grass flying", circle,
          "star night neon_style duck beach", 30, frames=24, challenge="long"),
    _clip("dog-running-long", 54, "hard - dog snow running", zigzag,
          "frog room black_and_white rabbit city", 30, frames=24, challenge="long"),
    _clip("star-falling-long", 55, "hard-report yellow star city falling", bounce,
          "balloon water line_drawing ball beach", 28, frames=24, challenge="long"),
    _clip("cat-dancing-long", 56, "hard-report - cat night dancing", sway,
          "dog grass black_and_white panda snow", 30, frames=24, challenge="long"),
    _clip("dog-running-past-a-star", 57, "hard - dog grass running", drive,
          "rabbit beach black_and_white panda snow", 28, bystander=("star", 12, 11, 18), challenge="bystander"),
    _clip("car-driving-past-a-balloon", 58, "hard blue car city driving", drive,
          "robot snow neon_style dog desert", 30, bystander=("balloon", 51, 12, 20), challenge="bystander"),
    _clip("penguin-walking-past-a-ball", 59, "hard-report - penguin snow walking", drive,
          "frog grass line_drawing cat beach", 30, bystander=("ball", 13, 12, 20), challenge="bystander"),
    _clip("rabbit-running-past-a-star", 60, "hard-report - rabbit desert running", drive,
          "turtle snow neon_style duck water", 28, bystander=("star", 51, 12, 20), challenge="bystander"),
)  # fmt: skip
"""Clips with a moving camera, a subject whose size changes, a post in front, 24 frames, another subject."""


def draw(world: World, folder: Path) -> None:
    """Write every clip and its true edits, and their descriptions, `clips.json` and `harder.json`."""
    (folder / "true-edits").mkdir(parents=True, exist_ok=True)
    for name, clips in (("clips.json", CLIPS), ("harder.json", HARDER)):
        rows = []
        for clip in clips:
            scenes, file = clip.scenes(), f"{clip.name}.mp4"
            _write(folder / file, np.stack([world.draw(scene, PIXELS) for scene in scenes]), "20", "yuv420p")
            _write(folder / "true-edits" / file, clip.true_edits(world), "6", "yuv444p")
            rows.append({
                "name": clip.name, "file": file, "caption": caption(clip.scene),
                "subject": clip.scene.subject, "background": clip.scene.background, "motion": clip.scene.motion,
                "set": clip.set, "track": [[round(s.x, 2), round(s.y, 2)] for s in scenes], "edits": clip.edits(),
            } | _harder(clip, scenes))  # fmt: skip
        lines = ",\n".join(json.dumps(row) for row in rows)
        (folder / name).write_text(f"[\n{lines}\n]\n")


def _harder(clip: Clip, scenes: list[Scene]) -> dict[str, Any]:
    """Return the fields of a clip of the second version."""
    if not clip.challenge:
        return {}
    own: dict[str, Any] = {"challenge": clip.challenge}
    if clip.pan:
        own["camera"] = [scene.camera for scene in scenes]
    if clip.scene.bystander:
        own["bystander"] = clip.scene.bystander[1:]
    if clip.frames != FRAMES:
        own |= {"stride": 1, "num_frames": clip.frames}
    return own


def _write(file: Path, frames_THWC: np.ndarray, quality: str, pixel_format: str) -> None:
    """Write H.264 with a constant rate factor, the same bytes on every machine."""
    with av.open(file, "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(FPS), options={"crf": quality, "preset": "slow"})
        stream.height, stream.width = frames_THWC.shape[1:3]
        stream.pix_fmt, stream.thread_count = pixel_format, 1
        for frame in frames_THWC:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode(None))
