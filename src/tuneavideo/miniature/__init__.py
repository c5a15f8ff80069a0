"""The bundled miniature: a 64-pixel Stable Diffusion of a drawn world, its sample clips and their edits.

Paths and captions only; the model card is in README.md beside this file, the recipe in `tools/miniature`.
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
DEMO_EDITS = (  # of the first clip; its own listed edits are for measuring, and the cat among them loses its shape
    "a panda is jumping on the grass",
    "a dog is jumping on the beach",
    "a dog is jumping on the grass, black and white",
    "a panda is jumping in the snow",
)


def clips() -> list[dict[str, Any]]:
    """The sample clips: `name`, `path`, `caption`, true `track` (pixels at 64), `set` and four `edits` each."""
    listed = json.loads((CLIPS / "clips.json").read_text(encoding="utf-8"))
    return [clip | {"path": CLIPS / clip["file"]} for clip in listed]


def unknown_words(text: str) -> list[str]:
    """Words that the model has not been trained on, in their order; they mean nothing to it."""
    vocabulary = json.loads((MODEL / "tokenizer/tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    words = dict.fromkeys(re.findall(r"[^\W\d_]+", text.lower()))
    return [word for word in words if f"{word}</w>" not in vocabulary or (len(word) == 1 and word != "a")]
