"""Memory of conversions: `python -m benchmarks.convert [FOLDER]` writes `results/convert.json`.

The checkpoint has the names and shapes of Stable Diffusion 2.1 in MindONE's form, in float32; its numbers are zeros,
which take no disk. Each conversion is a process of its own; memory is the peak beyond that of the imports.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tuneavideo.interop import mindspore, model_configs, names
from tuneavideo.storage.tensors import LazyTensor

RESULTS = Path(__file__).parent / "results" / "convert.json"
UNET = {
    "block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}  # fmt: skip
VAE = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip
TEXT = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16,
    "vocab_size": 49408, "hidden_act": "gelu", "bos_token_id": 0, "eos_token_id": 2,
}  # fmt: skip


def sparse_checkpoint(path: Path) -> int:
    """Write a sparse `.ckpt`; return its size in bytes."""
    import torch

    parts = {"unet": UNET, "vae": VAE, "text_encoder": TEXT}
    wanted = {
        name: shape for part, config in parts.items() for name, shape in model_configs.shapes(part, config).items()
    }
    ours = {name: LazyTensor.of(torch.empty(shape, device="meta")) for name, shape in wanted.items()}
    theirs = names.merged(ours, in_proj=True)
    table = names.renamed(list(theirs), names.MINDONE)
    with path.open("wb") as file:
        for name, tensor in theirs.items():
            file.write(mindspore.header(table[name], "Float32", tensor.shape, tensor.nbytes))
            file.seek(tensor.nbytes, 1)
        file.truncate(file.tell())
        return file.tell()


def measured(source: Path, out: Path, to: str) -> dict[str, float]:
    """Run one conversion in a process of its own; return seconds and megabytes."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", __spec__.name, "--one", str(source), str(out), to],
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def one(source: Path, out: Path, to: str) -> dict[str, float]:
    from tuneavideo import api
    from tuneavideo.interop import convert  # noqa: F401  its imports are not counted

    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    api.convert(source, out, to=to)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"seconds": round(time.perf_counter() - began), "beyond_imports_mb": round(peak / 1024)}


def main(place: Path | None = None) -> None:
    with tempfile.TemporaryDirectory(dir=place) as name:
        folder = Path(name)
        size = sparse_checkpoint(folder / "sd-v2.ckpt")
        results = {"checkpoint_gb": round(size / 1e9, 2)}
        for source, out, to in (
            ("sd-v2.ckpt", "diffusers", "diffusers"),
            ("diffusers", "back.ckpt", "mindone"),
        ):
            results[to] = measured(folder / source, folder / out, to)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(one(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])))
    else:
        main(*map(Path, sys.argv[1:]))
