"""Digests of small jobs, to see that a change of the code changes no result.

    python -m benchmarks.unchanged record FOLDER
    python -m benchmarks.unchanged compare FOLDER

Every job runs on the CPU in full precision with one thread, at tiny size or on the bundled miniature. `record` keeps
a digest of each adapter, inversion, set of scores and converted file, and the frames of each edit. `compare` makes them
again and prints what differs; frames are also compared by grey levels. The exit code is 1 if anything differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from tests.conftest import base_folder
from tests.families import family_folder
from tests.shared.style import PROMPT, style_files

from tuneavideo import api, miniature
from tuneavideo.settings import TuneSettings
from tuneavideo.video import Video, read, write

BRIEF = {"max_train_steps": 4, "num_inference_steps": 4, "num_inv_steps": 4, "mixed_precision": "no", "stride": 1}
TINY = BRIEF | {"num_frames": 4, "learning_rate": 1e-2, "guidance_scale": 3.0, "gradient_checkpointing": True}
TUNED: dict[str, dict[str, Any]] = {
    "plain": {},
    "windows": {"num_frames": 6, "window": 3},
    "accumulated": {"gradient_accumulation_steps": 2, "train_batch_size": 2, "use_ema": True, "snr_gamma": 5.0},
    "v prediction": {"base": "sd2"},
    "sd2": {"base": "turbo"},
    "xl": {"base": "xl"},
    # more than 64 MiB of frames
    "on disk": {"base": "coarse", "num_frames": 88, "window": 22, "width": 512, "height": 512, "max_train_steps": 1,
                "num_inference_steps": 2, "num_inv_steps": 2},
}  # fmt: skip
EDITED: dict[str, dict[str, Any]] = {
    "guidance apart": {"batch_guidance": False, "guidance_interval": (0.0, 0.5)},
    "fresh noise": {"fresh_noise": 0.3, "seeds": (1, 2)},
    "strength": {"strength": 0.5},
    "unipc": {"sampler": "unipc"},
    "feature reuse": {"feature_reuse": 2},
    "no injection": {"attention_injection": 0.0, "sampler": "euler-ancestral"},
}
PRESETS = {"default": {}, "official": {}, "fast": {"num_inv_steps": None}}
TARGETS = {
    "diffusers": "diffusers", "official": "official", "mindone": "mindone.ckpt", "ldm": "ldm.safetensors",
    "lora": "lora.safetensors", "adapter": "adapter",
}  # fmt: skip


class Results:
    """Digests by name, and the frames of edits."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.digests = folder, dict[str, str]()

    def run(self, name: str, run: Path) -> None:
        self.digests[f"{name}: adapter"] = tensors(run / "adapter" / "adapter.safetensors")
        self.digests[f"{name}: losses"] = digest(
            *(str(json.loads(line)["loss"]) for line in (run / "steps.jsonl").read_text().splitlines())
        )
        self.inversions(name, run)
        for number, folder in enumerate(sorted((run / "edits").glob("*"))):
            self.edit(f"{name} {number}", folder)

    def inversions(self, name: str, run: Path) -> None:
        kept = sorted(tensors(path) for path in (run / "inversion").glob("*.safetensors"))
        self.digests[f"{name}: inversions"] = digest(*kept)

    def edit(self, name: str, folder: Path) -> None:
        frames = read(folder / "frames").frames_THWC
        self.digests[f"{name}: frames"] = digest(frames.tobytes())
        np.save(self.folder / f"{name}.npy", frames)

    def file(self, name: str, path: Path, scratch: Path) -> None:
        bare = path.read_bytes().replace(str(scratch).encode(), b"")  # a config names its base's folder
        self.digests[name] = tensors(path) if path.suffix == ".safetensors" else digest(bare)


def digest(*parts: str | bytes) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part.encode() if isinstance(part, str) else part)
    return found.hexdigest()[:16]


def tensors(path: Path) -> str:
    """Return a digest of names, shapes, types and bytes of the tensors in a file."""
    found = load_file(path)
    parts = [(name, str(x.dtype), str(tuple(x.shape)), x.reshape(-1).view(torch.uint8)) for name, x in found.items()]
    return digest(*(each for *about, raw in sorted(parts, key=lambda part: part[0]) for each in (*about, bytes(raw))))


def square(folder: Path, count: int, side: int) -> Path:
    """Write frames of a moving square as PNG: an encoder with threads does not write the same video twice."""
    frames = np.full((count, side, side, 3), 200, np.uint8)
    for t in range(count):
        left = 2 + 4 * t % (side - 8)
        frames[t, 10:18, left : left + 8] = (200, 30, 30)
    write(Video(frames, 8.0), folder)
    return folder


def coarse_folder(folder: Path) -> Path:
    """Write the tiny base with a VAE of stride 32, so that large frames have small latents."""
    base_folder(folder)
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    stages = {"block_out_channels": (4,) * 6, "down_block_types": ("DownEncoderBlock2D",) * 6}
    torch.manual_seed(1)
    AutoencoderKL.from_config(vae.config, **stages, up_block_types=("UpDecoderBlock2D",) * 6).save_pretrained(
        folder / "vae"
    )
    return folder


class Jobs:
    """The jobs, which share a folder: later ones use the runs of earlier ones."""

    def __init__(self, folder: Path, results: Results) -> None:
        self.folder, self.results = folder, results
        self.bases = {"sd1": base_folder(folder / "bases/sd1")}
        self.bases |= {kind: family_folder(kind, folder / "bases" / kind) for kind in ("sd2", "turbo", "xl")}
        self.bases["coarse"] = coarse_folder(folder / "bases/coarse")
        self.clip, self.long = square(folder / "square", 6, 32), square(folder / "long", 88, 64)

    def by_name(self) -> dict[str, Callable[[], Any]]:
        """Return every job by its name, in the order in which they are run."""
        styles = self.folder / "styles"
        styles.mkdir()
        found: dict[str, Callable[[], Any]] = {}
        found |= {name: partial(self.tune, name, **settings) for name, settings in TUNED.items()}
        found |= {f"edit: {name}": partial(self.edit, name, **settings) for name, settings in EDITED.items()}
        found |= {f"style: {name}": partial(self.edit, name, **each) for name, each in style_files(styles).items()}
        found |= {f"miniature {preset}": partial(self.bundled, preset) for preset in PRESETS}
        found["resumed"] = self.resumed
        found |= {f"to {to}": partial(self.converted, to, "plain") for to in TARGETS}
        return found | {"adopted": self.adopted, "scores": self.scored, "report": self.reported}

    def tune(self, name: str, **settings: Any) -> None:
        run = api.tune(
            self.long if name == "on disk" else self.clip, "a square", edit="a red circle",
            base=str(self.bases[settings.pop("base", "sd1")]), out=self.folder / name, formats=("frames",),
            **TINY | settings,
        )  # fmt: skip
        self.results.run(name, run)

    def edit(self, name: str, **settings: Any) -> None:
        for number, each in enumerate(api.edit(self.folder / "plain", PROMPT, formats=("frames",), **settings)):
            self.results.edit(f"{name} {number}", each)

    def bundled(self, preset: str) -> None:
        own, name = miniature.clips()[0], f"miniature {preset}"
        run = api.tune(
            str(own["path"]), own["caption"], edit=miniature.DEMO_EDITS[0], preset=preset, num_frames=4,
            formats=("frames",), out=self.folder / name, **BRIEF | PRESETS[preset],
        )  # fmt: skip
        self.results.run(name, run)

    def resumed(self) -> None:
        job = api.Job.tune(self._settings(checkpointing_steps=2), out=self.folder / "resumed")
        for each in job:
            if each.step and each.step.number == 3:
                job.close()
                break
        self.results.run("resumed", api.resume(self.folder / "resumed"))

    def converted(self, to: str, source: str) -> None:
        out = self.folder / f"{source} as {TARGETS[to]}"
        api.convert(self.folder / source, out, to=to, **({"rank": 2} if to == "lora" else {}))
        for path in sorted(out.rglob("*")) if out.is_dir() else [out]:
            if path.suffix in (".safetensors", ".ckpt") or path.name.endswith("config.json"):
                self.results.file(f"{source} to {to}: {path.relative_to(self.folder)}", path, self.folder)

    def adopted(self) -> None:
        for _ in api.Job.adopt(self._settings(), self.folder / "plain as official", out=self.folder / "adopted"):
            pass
        self.results.digests["adopted: adapter"] = tensors(self.folder / "adopted/adapter/adapter.safetensors")
        self.results.edit("adopted", next((self.folder / "adopted/edits").iterdir()))

    def scored(self) -> None:
        (file,) = api.evaluate(self.folder / "miniature default")
        found = json.loads(file.read_text(encoding="utf-8"))
        self.results.digests["scores"] = json.dumps(found["edits"], sort_keys=True)

    def reported(self) -> None:
        page = api.report([self.folder / "plain", self.folder / "accumulated"], self.folder / "report.html")
        text = page.read_text(encoding="utf-8")
        self.results.digests["report: curves"] = digest(*re.findall(r'points="[^"]*"| d="[^"]*"', text))

    def _settings(self, **settings: Any) -> TuneSettings:
        values = {"video": str(self.clip), "prompt": "a square", "edit": ("a red circle",)}
        return api.tune_settings(values | {"base": str(self.bases["sd1"]), "formats": ("frames",)} | TINY | settings)


def made(folder: Path) -> Results:
    """Run every job; a failure is a result, too."""
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    results = Results(folder)
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["TUNEAVIDEO_CACHE"] = f"{scratch}/cache"
        for name, job in Jobs(Path(scratch), results).by_name().items():
            print(name, flush=True)
            try:
                job()
            except Exception as error:
                results.digests[f"{name}: failed"] = f"{type(error).__name__}: {error}".replace(scratch, "")
    (folder / "digests.json").write_text(json.dumps(results.digests, indent=1), encoding="utf-8")
    return results


def compared(before: Path, after: Path) -> list[str]:
    """Return a line for every result that differs."""
    old, new = (json.loads((folder / "digests.json").read_text(encoding="utf-8")) for folder in (before, after))
    lines = []
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) == new.get(name):
            continue
        frames = f"{name.removesuffix(': frames')}.npy"
        if name == "scores" and old.get(name) and new.get(name):
            left, right = (np.array(numbers(json.loads(each[name]))) for each in (old, new))
            if left.shape != right.shape or not np.allclose(left, right, rtol=0.25):  # videos are encoded by threads
                lines.append("scores: more than a quarter apart")
        elif name.endswith(": frames") and (before / frames).is_file() and (after / frames).is_file():
            left, right = (np.load(folder / frames).astype(int) for folder in (before, after))
            apart = f"{abs(left - right).max()} grey levels" if left.shape == right.shape else "shapes differ"
            lines.append(f"{name}: {apart}")
        else:
            lines.append(f"{name}: was {old.get(name, 'missing')}, is {new.get(name, 'missing')}")
    return [
        *lines,
        f"{len(old.keys() | new.keys()) - len(lines)} of {len(old.keys() | new.keys())} results are the same",
    ]


def numbers(scores: Any) -> list[float]:
    """Return all values of a set of scores, in the order of their names."""
    if isinstance(scores, list):
        return [value for each in scores for value in numbers(each)]
    if isinstance(scores, dict):
        return [value for _, each in sorted(scores.items()) for value in numbers(each)]
    return [float(scores)] if isinstance(scores, int | float) else []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["record", "compare"])
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    if options.action == "record":
        failed = [f"{name}: {text}" for name, text in made(options.folder).digests.items() if name.endswith("failed")]
        print("\n".join(failed))
        return bool(failed)
    with tempfile.TemporaryDirectory() as scratch:
        made(Path(scratch))
        lines = compared(options.folder, Path(scratch))
    print("\n".join(lines))
    return len(lines) > 1


if __name__ == "__main__":
    raise SystemExit(main())
