"""Parts of the tests of job that others use."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

BRIEF = {"num_frames": 3, "max_train_steps": 4, "learning_rate": 1e-2, "num_inference_steps": 3,
         "gradient_checkpointing": False, "guidance_scale": 3.0}  # fmt: skip


def same(a: Path, b: Path) -> bool:
    left, right = load_file(a / "adapter/adapter.safetensors"), load_file(b / "adapter/adapter.safetensors")
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
