"""The bundled miniature: a 64-pixel Stable Diffusion of a drawn world, its sample clips and their edits.

Paths and captions only. The model card is README.md in this folder, the recipe is `tools/miniature`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
MODEL = FOLDER / "model"
CLIPS = FOLDER / "clips"
JUDGE = FOLDER / "judge"
DEMO_EDITS = (  # of the first clip; the edits in clips.json are for measuring
    "a panda is jumping on the grass",
    "a dog is jumping on the beach",
    "a dog is jumping on the grass, black and white",
    "a panda is jumping in the snow",
)


def clips(*, harder: bool = False) -> list[dict[str, Any]]:
    """Return the bundled clips.

    Args:
        harder: Harder clips instead. `challenge` is `camera` (it moves; `camera` is its position in every frame, pixels
            at 64), `size` (the subject's changes), `occlusion` (by a post), `long` (24 frames) or `bystander` (another
            subject; `bystander` is its centre and longest side).

    Returns:
        A dict per clip: `name`, `path`, `caption`, `track` (true centre of the subject in every frame, pixels at 64),
        `set` (`development` or `report`; `harder` or `harder-report`), the attributes of the scene, four `edits`, and
        the path of the `true_edits`, a video of all four side by side.
    """
    listed = json.loads((CLIPS / ("harder.json" if harder else "clips.json")).read_text(encoding="utf-8"))
    paths = ({"path": CLIPS / clip["file"], "true_edits": CLIPS / "true-edits" / clip["file"]} for clip in listed)
    return [clip | own for clip, own in zip(listed, paths, strict=True)]


def unknown_words(text: str) -> list[str]:
    """Return the words of a text that the model was not trained on, in their order."""
    vocabulary = json.loads((MODEL / "tokenizer/tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    words = dict.fromkeys(re.findall(r"[^\W\d_]+", text.lower()))
    return [word for word in words if f"{word}</w>" not in vocabulary or (len(word) == 1 and word != "a")]
