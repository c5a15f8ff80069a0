"""Time and memory of long clips, and visibility of seams between windows; writes benchmarks/results/windows.json.

    python -m benchmarks.windows --clip man-skiing.mp4 [--only linear memory seams]

linear: floating-point operations and seconds of one prediction in windows, 8 to 128 frames, with a line fitted.
memory: the most resident memory of a tuning step and an edit of one step at 512 x 512, of one window and of 1,000
    frames, each in a fresh process, the imports subtracted; UNet and VAE are stubs of few channels.
seams: the miniature, tuned on a real clip; by how much neighbouring frames of an edit differ beyond those of the
    source, where windows border on each other and elsewhere.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results" / "windows.json"
WINDOW, SIDE, LONG = 8, 512, 1000
EDITS = ("a red cat", "a man, neon style", "a dog is on the beach")
FRAMES = (8, 16, 24, 32, 48, 64, 96, 128)
STUB = {"sample_size": 64, "block_out_channels": (32, 64), "layers_per_block": 1, "cross_attention_dim": 24,
        "attention_head_dim": 4, "norm_num_groups": 8, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}  # fmt: skip
# At 512 x 512, attention at the finest level would take all the time.
COARSE = STUB | {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
                 "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}  # fmt: skip


def linear() -> dict[str, Any]:
    """Measure one prediction for clips of several lengths."""
    import torch
    from diffusers import UNet2DConditionModel
    from torch.utils.flop_counter import FlopCounterMode

    from tuneavideo.method.inflate import inflate
    from tuneavideo.method.windows import WindowedUNet, Windows

    torch.set_num_threads(1)
    unet = WindowedUNet(inflate(UNet2DConditionModel(**STUB).eval()), Windows(WINDOW, 2))  # pyright: ignore
    text, t, rows = torch.randn(1, 77, 24), torch.tensor(500), {}
    for frames in FRAMES:
        x, seconds = torch.randn(1, 4, frames, 16, 16), []
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            unet(x, t, text)
        for _ in range(5):
            began = time.process_time()
            with torch.no_grad():
                unet(x, t, text)
            seconds.append(time.process_time() - began)
        windows = len(unet.windows.spans(frames, 500.0))
        rows[frames] = {"windows": windows, "gflop": counter.get_total_flops() / 1e9, "cpu_seconds": min(seconds)}
    return {"window": WINDOW, "overlap": 2, "rows": rows, "fit": {name: _fit(rows, name) for name in rows[8]}}


def _fit(rows: dict[int, dict[str, float]], name: str) -> dict[str, float]:
    """Fit a line to the rows; return it with its explained variance and the exponent of a power law."""
    x, y = np.array(list(rows)), np.array([row[name] for row in rows.values()])
    slope, start = np.polyfit(x, y, 1)
    unexplained = ((y - slope * x - start) ** 2).sum() / ((y - y.mean()) ** 2).sum()
    power = np.polyfit(np.log(x), np.log(y), 1)[0]
    return {"per_frame": float(slope), "start": float(start), "r2": float(1 - unexplained), "power": float(power)}


def memory(work: Path) -> dict[str, Any]:
    """Measure peak memory minus that of the imports, in bytes."""
    _write_stub(work / "base")
    _write_clip(work / "clip.mp4", LONG)
    peaks = {}
    for name, frames in (("imports", 0), ("window", WINDOW), ("long", LONG)):
        began = time.perf_counter()
        words = [sys.executable, "-m", "benchmarks.windows", "--child", str(frames), "--work", str(work)]
        peaks[name] = int(subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()[-1])
        print(name, peaks[name], f"{time.perf_counter() - began:.0f} s", flush=True)
    window, long = (peaks[name] - peaks["imports"] for name in ("window", "long"))
    return {"frames": LONG, "side": SIDE, "window": WINDOW, "imports": peaks["imports"], "window_bytes": window,
            "long_bytes": long, "ratio": long / window}  # fmt: skip


def child(frames: int, work: Path) -> None:
    """Run one job in this process and print the peak of resident memory."""
    from tuneavideo import api

    if frames:
        api.tune(
            work / "clip.mp4", "a square", edit=["a circle"], base=str(work / "base"), out=work / f"run-{frames}",
            num_frames=frames, window=WINDOW, max_train_steps=1, num_inference_steps=1, num_inv_steps=1,
        )  # fmt: skip
    import tuneavideo.jobs.tune  # noqa: F401

    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def _write_stub(folder: Path) -> None:
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from tuneavideo import miniature

    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(miniature.MODEL / "tokenizer")
    text = CLIPTextConfig(vocab_size=len(tokenizer), hidden_size=24, intermediate_size=32, num_hidden_layers=1,
                          num_attention_heads=2, max_position_embeddings=tokenizer.model_max_length)  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), norm_num_groups=4, layers_per_block=1, sample_size=SIDE,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(text), tokenizer=tokenizer, unet=UNet2DConditionModel(**COARSE),  # pyright: ignore
        scheduler=DDIMScheduler(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,  # pyright: ignore
    ).save_pretrained(folder)  # fmt: skip


def _write_clip(path: Path, frames: int) -> None:
    from tuneavideo.video import VideoStream, write

    write(VideoStream(_drawn(frames), 24.0), path)


def _drawn(frames: int) -> Iterator[np.ndarray]:
    for t in range(frames):
        image = np.full((SIDE, SIDE, 3), 200, np.uint8)
        left = round(200 + 150 * np.sin(t / 20))
        image[200:300, left : left + 100] = (200, 30, 30)
        yield image


def seams(clip: Path, work: Path, frames: int = 64, steps: int = 8) -> dict[str, Any]:
    """Edit a real clip in windows of 8 frames, with attention injection."""
    from tuneavideo import api
    from tuneavideo.method import editing, inversion
    from tuneavideo.method.inflate import video_unet
    from tuneavideo.method.noise import NoiseSchedule
    from tuneavideo.method.windows import WindowedUNet, Windows
    from tuneavideo.models import codec, pipelines
    from tuneavideo.storage import cache
    from tuneavideo.storage.run_folder import RunFolder
    from tuneavideo.video import read

    run = RunFolder(api.tune(clip, "a man", out=work / "run", num_frames=frames, window=WINDOW, max_train_steps=100))
    pipe, source = pipelines.load_pipeline("miniature", adapter=run.adapter), read(run.source)
    noise_schedule, kept = NoiseSchedule.of(pipe.scheduler), cache.read(run.latents)
    assert kept
    negative, caption, *texts = codec.embed(pipe, ["", "a man", *EDITS]).split(1)
    settings = run.read_settings().model_copy(update={"num_inference_steps": steps})
    rows: dict[str, Any] = {}
    cuts = {"whole": Windows(frames, 0)} | {
        f"overlap {overlap}, {'moving' if moving else 'fixed'}": Windows(WINDOW, overlap, moving)
        for overlap, moving in ((0, False), (0, True), (2, False), (2, True), (4, True))
    }
    for name, windows in cuts.items():
        began, unet = time.process_time(), WindowedUNet(video_unet(pipe.unet), windows)
        path = inversion.path_to(editing.sampler_of(noise_schedule, settings), noise_schedule, steps, "trailing")
        *_, inverted = editing.invert(unet, noise_schedule, kept["mean"], negative, path)
        grid, made = inverted.trajectory.timesteps[::-1], []
        for text in texts:
            sampler, trajectory = editing.sampler_of(noise_schedule, settings), inverted.trajectory
            *_, edit = editing.edit(
                unet, noise_schedule, sampler, settings, trajectory, kept["mean"], caption, text, negative
            )
            made.append(codec.decode(pipe, edit.latents, 8.0)[0].frames_THWC)
        cut = Windows(WINDOW, 0) if windows.holds(frames) else windows
        borders = [span.start for span in cut.spans(frames, float(grid[0]))[1:]]  # of the last step
        rows[name] = _flicker(made, source.frames_THWC, borders) | {"cpu_seconds": time.process_time() - began}
        print(name, json.dumps(rows[name]), flush=True)
    return {"clip": clip.name, "frames": frames, "window": WINDOW, "steps": steps, "edits": EDITS, "rows": rows}


def _flicker(edits: list[np.ndarray], source: np.ndarray, borders: list[int]) -> dict[str, float]:
    """Return mean absolute differences of neighbouring frames (0..255) minus the source's, at borders and elsewhere."""
    own, *steps = (np.abs(np.diff(clip.astype(float), axis=0)).mean(axis=(1, 2, 3)) for clip in (source, *edits))
    excess = np.concatenate([step - own for step in steps])
    at = np.tile(np.isin(np.arange(1, len(source)), borders), len(edits))
    spread = excess[~at].std(ddof=1) / at.sum() ** 0.5 if at.any() else 0.0
    values = {"border": excess[at].mean(), "inside": excess[~at].mean(), "error_of_border": spread}
    return {name: round(float(value), 3) for name, value in values.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clip", type=Path, help="a real clip of 64 frames or more, such as man-skiing.mp4")
    parser.add_argument("--only", nargs="*", default=["linear", "memory", "seams"])
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        return child(options.child, options.work)
    for name in options.only:
        with tempfile.TemporaryDirectory() as work:
            parts = {
                "linear": linear,
                "memory": lambda w=work: memory(Path(w)),
                "seams": lambda w=work: seams(options.clip, Path(w)),
            }
            result = parts[name]()
        results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
        RESULTS.write_text(json.dumps(results | {name: result}, indent=1) + "\n")
        print(name, json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
