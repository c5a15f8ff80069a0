"""Jobs of the tests of batches."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import yaml

from tests.conftest import moving_square
from tuneavideo.batch.job_file import read_jobs
from tuneavideo.batch.job_run import run_job
from tuneavideo.storage.run_folder import RunFolder

STUB = "tests.batch_stub:stub"
SMALL = {"num_frames": 2, "max_train_steps": 2, "num_inference_steps": 1, "num_inv_steps": 1, "checkpointing_steps": 1,
         "learning_rate": 1e-2, "gradient_checkpointing": False, "mixed_precision": "no"}  # fmt: skip


def job_file(folder: Path, base: Path, **contents: Any) -> Path:
    """Write a job file of one clip and its settings beside the clip."""
    moving_square(folder / "square.mp4")
    clip = {"video": "square.mp4", "prompt": "a square", "edit": ["a circle"]}
    whole = {"defaults": {"base": str(base), **SMALL}, "clips": [clip], **contents}
    file = folder / "jobs.yaml"
    file.write_text(yaml.safe_dump(whole))
    return file


def contents_of(root: Path) -> dict[str, str]:
    """Return digests of the adapters and edits of all runs."""
    files = [*root.glob("*/adapter/adapter.safetensors"), *root.glob("*/edits/*/edit.mp4")]
    return {str(file.relative_to(root)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def edits(root: Path, name: str) -> list[str]:
    run = RunFolder(root / name)
    return [json.loads((edit / "edit.json").read_text())["prompt"] for edit in run.whole_edits()]


def written(path: Path, **contents) -> Path:
    path.write_text(yaml.safe_dump(contents))
    return path


def run_all(file: Path, root: Path, *, scores: bool = False) -> dict[str, dict]:
    """Run all jobs of a file in this process; return the last message of each."""
    return {job.name: [*run_job(job, str(root), scores, lambda: False)][-1] for job in read_jobs(file)}
