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


def clips() -> list[dict[str, Any]]:
    """Return the bundled clips.

    Returns:
        A dict per clip: `name`, `path`, `caption`, `track` (true centre of the subject in every frame, pixels at 64),
        `set` (`development` or `report`), the attributes of the scene, and four `edits`.
    """
    listed = json.loads((CLIPS / "clips.json").read_text(encoding="utf-8"))
    return [clip | {"path": CLIPS / clip["file"]} for clip in listed]


def unknown_words(text: str) -> list[str]:
    """Return the words of a text that the model was not trained on, in their order."""
    vocabulary = json.loads((MODEL / "tokenizer/tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    words = dict.fromkeys(re.findall(r"[^\W\d_]+", text.lower()))
    return [word for word in words if f"{word}</w>" not in vocabulary or (len(word) == 1 and word != "a")]
