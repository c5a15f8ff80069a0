"""Stages of measurements on a GPU; `benchmarks/gpu.sh` runs them.

    python -m benchmarks.gpu STAGE [--device cuda] [--tiny]

Every measurement is added to benchmarks/results/gpu/<device>-<stage>.json at once, so that a stage that is stopped has
what it measured. A stage begins its file anew. `--device cpu --tiny` tries the stages without a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.__main__ import machine, machine_name
from benchmarks.random_base import write as write_base
from benchmarks.resident import Peak
from benchmarks.rows import DTYPES, TASKS, Row
from benchmarks.sized import parts
from tuneavideo import kernels
from tuneavideo.kernels import attention as attention_kernels
from tuneavideo.kernels import channels_last, graphs
from tuneavideo.method import attention

RESULTS = Path(__file__).parent / "results" / "gpu"
BASE = Path(__file__).parents[1] / "build" / "sd15-sized"

Measurement = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Device:
    """Where a stage runs, and whether at a tiny size."""

    name: str
    tiny: bool

    def row(self, task: Any, **more: Any) -> Row:
        """Return a row of 12 frames of 512 x 512 with the SD 1.5 shapes, or its tiny form."""
        row = Row(task, **{"frames": 12, "pixels": 512, "precision": "bf16"} | more)
        return dataclasses.replace(row, base="tiny", frames=3, pixels=64, precision="fp32") if self.tiny else row

    def seconds(self, run: Callable[[], Any], least: float = 1.0) -> float:
        """Return the median seconds of a call, over at least three calls and `least` seconds; the first is left out."""
        clock, times = Peak(self.name), list[float]()
        clock.timed(run)
        while len(times) < 3 or (not self.tiny and sum(times) < least and len(times) < 50):
            times.append(clock.timed(run)[0])
        return sorted(times)[len(times) // 2]


# Whole commands and memory


def command(device: Device) -> Iterator[Measurement]:
    """Time `tuneavideo tune` with one edit: first with few steps, which builds kernels, then with 500."""
    for steps in (3, 4) if device.tiny else (5, 500):
        yield _command(device, steps, "--max-train-steps", str(steps))


def memory(device: Device) -> Iterator[Measurement]:
    """Tune 24 frames within 8 GB: the peak of a whole command against the estimate of its memory plan."""
    yield _command(device, 4, "--max-train-steps", "4", "--memory", "8", frames=6 if device.tiny else 24)


def _command(device: Device, steps: int, *words: str, frames: int = 12) -> Measurement:
    with tempfile.TemporaryDirectory() as folder:
        clip = _clip(Path(folder) / "clip.mp4", 24)
        size = ["--num-frames", str(frames)]
        if device.tiny:
            base, more = "miniature", ["--num-inference-steps", "4", "--num-inv-steps", "4"]
        else:
            base, more = str(BASE if (BASE / "unet").is_dir() else write_base(BASE)), []
            size += ["--resolution", "512", "--mixed-precision", "bf16"]
        tune = ["tune", str(clip), "--base", base, "--prompt", "a ball is rolling", "--edit", "a cube is rolling"]
        timed = [sys.executable, "-W", "ignore", "-m", "benchmarks.timeline", *tune, *size, *more, *words]
        began = time.time()
        done = subprocess.run([*timed, "--out", f"{folder}/run"], capture_output=True, text=True)
        seconds = round(time.time() - began, 2)
    row: Measurement = {"command": " ".join(words), "frames": frames, "steps": steps, "process_seconds": seconds}
    if done.returncode:
        return row | {"failed": (done.stderr.strip() or "no message").splitlines()[-1][:300]}
    return row | json.loads(done.stdout.splitlines()[-1])


def _clip(path: Path, frames: int) -> Path:
    """Write a clip of a disc that moves over a gradient."""
    from tuneavideo.video import Video, write

    row, column = np.mgrid[:512, :512]
    images = np.zeros((frames, 512, 512, 3), np.uint8)
    for number, image in enumerate(images):
        image[..., 0], image[..., 1] = row // 2, column // 2
        image[(row - 256) ** 2 + (column - 100 - 12 * number) ** 2 < 60**2] = (250, 220, 40)
    write(Video(images, 8), path)
    return path


# Changes, one after the other

CHANGES = {
    "clip norm": (attention.ClipGroupNorm, ("forward",)),
    "residual": (channels_last.Residual, ("forward",)),
    "sites": (channels_last.Transformer, ("_operate_on_continuous_inputs", "_get_output_for_continuous_inputs")),
    "gate": (channels_last.Gate, ("forward",)),
    "gather": (attention.SparseCausalAttention, ("forward",)),
    "time": (attention.TemporalAttention, ("attend_in_images",)),
    "block": (attention.VideoBlock, ("_by_kernel",)),
    "text": (attention.TextAttention, ("forward",)),
    "shared": (None, ()),
}
"""Kernels in the order in which they are switched on: the layer that takes them, and its methods."""


@contextmanager
def switched(names: Iterable[str]) -> Iterator[None]:
    """Use the kernels of these changes only."""
    on = set(names)
    with ExitStack() as stack:
        for name, (kind, methods) in CHANGES.items():
            for method in methods:
                stack.enter_context(patch.object(kind, method, _scoped(getattr(kind, method), name in on)))
        if "block" not in on:  # the published block, with or without the kernel of temporal attention
            stack.enter_context(patch.object(attention.VideoBlock, "_as_published", lambda *_, **__: False))
            whole = attention.VideoBlock.forward
            stack.enter_context(patch.object(attention.VideoBlock, "forward", _scoped(whole, "time" in on)))
        if "shared" not in on:
            stack.enter_context(patch.object(attention_kernels, "MAX_SHARED_CHANNELS", 0))
        yield


def _scoped(method: Callable[..., Any], on: bool) -> Callable[..., Any]:
    """Return a method within which kernels are used or not; methods that it calls decide for themselves."""
    works = kernels.works_on

    def run(*args: Any, **more: Any) -> Any:
        with patch.object(kernels, "works_on", works if on else lambda _: False):
            return method(*args, **more)

    return run


def changes(task: str) -> Callable[[Device], Iterator[Measurement]]:
    """Return the stage that measures a task with one change more each time."""

    def stage(device: Device) -> Iterator[Measurement]:
        names = [name for name in CHANGES if task == "inject" or name != "shared"]
        with patch.object(graphs, "enabled", False):
            with switched(()), patch.object(channels_last, "optimise", lambda _: None):
                yield _changed(device, task, "before", "launched")
            yield _changed(device, task, "all", "launched")
        for count in range(len(names) + 1):
            with switched(names[:count]):
                yield _changed(device, task, f"+ {names[count - 1]}" if count else "channels-last", "recorded")

    return stage


def _changed(device: Device, task: str, change: str, how: str) -> Measurement:
    row = device.row(task)
    bench = TASKS[row.task](row, parts(row.base, device.name, DTYPES[row.precision]), device.name)
    for _ in range(3):  # kernels are built and work is recorded
        bench.step()
    peak = Peak(device.name)
    milliseconds = 1e3 * device.seconds(bench.step)
    held = peak.base / 1e9 if device.name == "cuda" else 0
    del bench
    gc.collect()
    return {"task": task, "change": change, "how": how, "ms": round(milliseconds, 2),
            "peak_gb": round(held + peak.above() / 1e9, 2)}  # fmt: skip


# Profiles


def profiles(device: Device) -> Iterator[Measurement]:
    """List the kernels that take most of a step, by PyTorch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device.name == "cuda"
    for task in ("tune", "edit", "inject", "decode"):
        row = device.row(task)
        bench = TASKS[row.task](row, parts(row.base, device.name, DTYPES[row.precision]), device.name)
        for _ in range(4):
            bench.step()
        with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as found:
            Peak(device.name).timed(bench.step)
        rows = [(each.key, each.self_device_time_total if on_gpu else each.self_cpu_time_total, each.count)
                for each in found.key_averages()]  # fmt: skip
        rows.sort(key=lambda each: -each[1])
        top = [{"kernel": name[:100], "ms": round(time / 1e3, 3), "count": count} for name, time, count in rows[:40]]
        yield {"profile": task, "device_ms": round(sum(each[1] for each in rows) / 1e3, 2),
               "kernels": sum(each[2] for each in rows), "top": top}  # fmt: skip
        del bench


# Kernels against torch


def kernel_times(device: Device) -> Iterator[Measurement]:
    """Time each kernel, forward and with gradients, and what torch has for it; on a GPU only."""
    if device.name != "cuda":
        return
    from tuneavideo.kernels import along_time, few_keys, group_norm, pointwise, shared_map

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, device=device.name, dtype=torch.bfloat16)

    def measured(name: str, sizes: Sequence[int], ours: Any, torchs: Any, *given: Tensor, grad: int = 0) -> Measurement:
        inputs = [x.requires_grad_() if number < grad else x for number, x in enumerate(given)]
        row: Measurement = {"kernel": name, "sizes": list(sizes)}
        found = [run(*inputs) for run in (ours, torchs)]
        row["difference"] = float((found[0].float() - found[1].float()).norm() / found[1].float().norm())
        for side, run in (("us", ours), ("torch_us", torchs)):
            row[side] = round(1e6 * device.seconds(torch.no_grad()(lambda run=run: run(*inputs)), 0.1), 1)
            if grad:
                dy = torch.ones_like(found[0])
                both = lambda run=run, dy=dy: torch.autograd.grad(run(*inputs), inputs[:grad], dy)  # noqa: E731
                row[f"{side}_with_gradients"] = round(1e6 * device.seconds(both, 0.1), 1)
        return row

    for frames, side, width in ((12, 64, 320), (12, 64, 960), (12, 32, 640), (12, 8, 1280), (24, 64, 320)):
        weight, bias, x = drawn(width), drawn(width), drawn(frames, side * side, width)
        yield measured(
            "group norm", (frames, side * side, width),
            lambda x, w, b, f=frames: group_norm.group_norm(x, 32, w, b, 1e-5, frames=f, silu=True),
            lambda x, w, b: functional.silu(
                functional.group_norm(x.movedim(-1, 0).flatten(1)[None], 32, w, b, 1e-5)
            )[0].unflatten(1, x.shape[:2]).movedim(0, -1),
            x, weight, bias, grad=1,
        )  # fmt: skip
    scale = 40**-0.5
    for frames, side, width in ((12, 64, 320), (24, 64, 320), (12, 32, 640), (12, 16, 1280)):
        yield measured(
            "along time", (frames, side * side, width),
            lambda q, k, v, f=frames: along_time.attend(q, k, v, frames=f, heads=8, scale=scale),
            lambda q, k, v: attention_kernels.attend(
                *(x.transpose(0, 1) for x in (q, k, v)), heads=8, scale=scale).transpose(0, 1),
            *(drawn(frames, side * side, width) for _ in range(3)), grad=3,
        )  # fmt: skip
    yield measured(
        "few keys", (12 * 4096, 77, 320),
        lambda q, k, v: few_keys.attend(q, k, v, heads=8, scale=scale),
        lambda q, k, v: attention_kernels.attend(q, k, v, heads=8, scale=scale),
        drawn(1, 12 * 4096, 320), drawn(1, 77, 320), drawn(1, 77, 320), grad=1,
    )  # fmt: skip
    for tokens, width in ((4096, 320), (1024, 640)):
        weight, bias, pair = drawn(width), drawn(width), [drawn(12, tokens, width) for _ in range(2)]
        yield measured(
            "sum and layer norm", (12, tokens, width),
            lambda x, y, w, b: pointwise.layer_norm(x, y, w, b, 1e-5)[1],
            lambda x, y, w, b: functional.layer_norm(x + y, x.shape[-1:], w, b, 1e-5), *pair, weight, bias, grad=2,
        )  # fmt: skip
        yield measured(
            "gate", (12, tokens, 8 * width), pointwise.gate,
            lambda x: x.chunk(2, -1)[0] * functional.gelu(x.chunk(2, -1)[1]), drawn(12, tokens, 8 * width), grad=1,
        )  # fmt: skip
        index = torch.tensor([[0, max(t - 1, 0)] for t in range(2, 12)], dtype=torch.int32, device=device.name)
        yield measured(
            "gather", (12, tokens, width), lambda x, n: pointwise.gather(x, n.flatten())[1],
            lambda x, n: x[:, n.flatten().long()], drawn(1, 12, tokens, width), index, grad=1,
        )  # fmt: skip
        yield measured(
            "shared map", (12, tokens, width),
            lambda q, k, v, n: shared_map.attend(q, k, v, n, heads=8, scale=scale),
            lambda q, k, v, n: attention_kernels.attend(
                q, k[n.long()].flatten(1, 2), v[:, n.long()].flatten(2, 3).flatten(0, 1), heads=8, scale=scale
            ).unflatten(0, (3, -1)),
            drawn(10, tokens, width), drawn(12, tokens, width), drawn(3, 12, tokens, width), index,
        )  # fmt: skip


STAGES: dict[str, Callable[[Device], Iterator[Measurement]]] = {
    "command": command, "memory": memory, "kernels": kernel_times, "profiles": profiles,
    **{f"changes-{task}": changes(task) for task in ("tune", "edit", "inject")},
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to see that a stage runs")
    options = parser.parse_args()
    name = f"{machine_name(options.device)}{'-tiny' if options.tiny else ''}-{options.stage}"
    path, rows, failed = RESULTS / f"{name}.json", list[Measurement](), False
    path.parent.mkdir(parents=True, exist_ok=True)
    for row in STAGES[options.stage](Device(options.device, options.tiny)):
        print(json.dumps({key: value for key, value in row.items() if key != "top"}), flush=True)
        rows.append(row)
        failed |= "failed" in row
        lines = ",\n  ".join(json.dumps(each) for each in rows)
        path.write_text(f'{{"machine": {json.dumps(machine(options.device))},\n "measurements": [\n  {lines}\n]}}\n')
    sys.exit(failed)


if __name__ == "__main__":
    main()
