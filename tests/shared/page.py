"""A root folder of the page with a tuned run, and requests to it without a worker."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from starlette.testclient import TestClient

from tuneavideo import miniature
from tuneavideo.settings import EditSettings, TuneSettings
from tuneavideo.storage.run_folder import RunFolder
from tuneavideo.video import read, write
from tuneavideo.web.app import Page
from tuneavideo.web.server import application

HOME, CLIP = "http://localhost:7860", "/clips/dog-jumping"
ORIGIN = {"origin": HOME}
FORM = {"base": "miniature", "preset": "default", "prompt": "a dog is jumping", "num_frames": "8", "sample_fps": "4"}


def client(root: Path, captions: str | None = None, **options: Any) -> TestClient:
    return TestClient(
        application(Page(root, captions=captions), with_workers=False, **options), HOME, headers=ORIGIN,
        follow_redirects=False, raise_server_exceptions=False,
    )  # fmt: skip


def tuned_run(root: Path) -> RunFolder:
    """Make the run `dog-1`, tuned in 3 steps, with kept weights of step 2 and an edit with HTML in its prompt."""
    run, clip = RunFolder(root / "dog-1"), miniature.clips()[0]
    run.path.mkdir(parents=True)
    settings = TuneSettings(video=str(clip["path"]), prompt="<b>a dog</b>", num_frames=8, max_train_steps=3)
    run.write_settings(settings, {})
    source = read(clip["path"], count=8)
    write(source, run.source)
    run.adapter.mkdir()
    save_file({"x": np.zeros(3, np.float16)}, run.adapter / "adapter.safetensors")
    config = {"format": 1, "base": "miniature", "about": {"steps": 3, "max_train_steps": 3}}
    (run.adapter / "adapter_config.json").write_text(json.dumps(config))
    run.weights(2).parent.mkdir()
    save_file({"x": np.zeros(3, np.float16)}, run.weights(2))
    own = EditSettings(run="-", prompt=("-",), num_inference_steps=7)
    with run.new_edit("<script>alert(1)</script>") as (draft, _):
        write(source, draft / "edit.mp4")
        made = own.model_dump(mode="json", exclude={"run", "prompt", "seeds"})
        text = {"prompt": "<script>alert(1)</script> '\"", "seed": 4, "tuned_steps": 3}
        (draft / "edit.json").write_text(json.dumps(text | made))
    run.log_step({"number": 3, "loss": 0.1, "learning_rate": 1e-3, "seconds": 0.5, "memory": 10**9})
    return run
