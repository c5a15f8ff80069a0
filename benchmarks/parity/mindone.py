"""Comparison with MindONE's checkpoints, models, samplers and optimiser.

Its GELU is an approximation (tanh); where its numbers were made with it, it is put in for the check.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, UNet2DConditionModel
from diffusers.models.activations import GEGLU
from torch.nn.functional import gelu
from transformers import CLIPTextModel

from benchmarks.parity.compare import DDIM, Difference, absolute, relative, same
from benchmarks.parity.ddim import Walk
from benchmarks.parity.golden import Golden, Place, levels
from tuneavideo import api
from tuneavideo.errors import CheckpointError
from tuneavideo.interop import mindspore
from tuneavideo.interop.optimizer import UncorrectedAdamW
from tuneavideo.interop.reading import read_checkpoint
from tuneavideo.method.inflate import VideoUNet
from tuneavideo.method.noise import Sampler
from tuneavideo.method.sampling import generate
from tuneavideo.models.adapter import Adapter

UNET, INVERSION, MODEL = 5e-5, 1e-4, 5e-5  # absolute
ADAMW = 2e-7  # absolute: four steps between numbers of float16 that small
GUIDANCE, STEPS, HEADS, RATE = 7.5, 4, 4, 3e-5  # as recorded
CHECKPOINT = "tiny_sd_v1.ckpt"


class Models:
    """The tiny checkpoint as a diffusers folder, opened strictly."""

    def __init__(self, checkpoint: Path) -> None:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "tiny"
            self.report = api.convert(checkpoint, folder, to="diffusers")
            config = folder / "text_encoder" / "config.json"  # no tensor tells how many heads there are
            config.write_text(json.dumps(json.loads(config.read_text()) | {"num_attention_heads": HEADS}))
            unet, self.unet_info = UNet2DConditionModel.from_pretrained(folder / "unet", output_loading_info=True)
            self.vae, self.vae_info = AutoencoderKL.from_pretrained(folder / "vae", output_loading_info=True)
            text, self.text_info = CLIPTextModel.from_pretrained(folder / "text_encoder", output_loading_info=True)
            self.text = text.eval()
            self.video = Adapter.load(folder / "adapter").attach(unet.eval()).video

    def strictness(self) -> Iterator[Difference]:
        for part, info in (("UNet", self.unet_info), ("VAE", self.vae_info), ("text encoder", self.text_info)):
            left = {key: sorted(info[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
            yield same(f"{part}'s names", [name for names in left.values() for name in names], [])


@functools.cache
def opened(checkpoint: Path) -> Models:
    return Models(checkpoint)


def container(place: Place, _: Golden) -> Iterator[Difference]:
    """Compare the contents of files, and the bytes of files written again."""
    if "enc" in place.path.name:
        yield same("refused", _refusal(place.path), "encrypted")
        return
    found, recorded = mindspore.read(place.path), np.load(place.path.with_name("small.npz"))
    for name in recorded.files:
        if not name.endswith("::bf16_bits"):
            bits = f"{name}::bf16_bits"
            theirs = torch.from_numpy(recorded[bits]).view(torch.bfloat16) if bits in recorded.files else recorded[name]
            theirs, ours = torch.as_tensor(theirs), found.pop(name).read()
            yield same(f"{name}: type", ours.dtype, theirs.dtype)
            yield same(name, torch.equal(ours, theirs), True)
    appended = (
        {"epoch_num": 7, "loss_scale": 65536.0, "note": "hello", "flag": True} if "append" in place.path.name else {}
    )
    yield same("appended", {n: v if isinstance(v, str) else v.read().item() for n, v in found.items()}, appended)
    yield from written_again(place.path)


def conversion(place: Place, _: Golden) -> Iterator[Difference]:
    """Compare the names of the whole checkpoint, its models, and its conversion there and back."""
    rows = [row.split("\t") for row in place.path.with_name("names_v1.txt").read_text().splitlines()]
    found = mindspore.entries(place.path)
    yield same("names", [(e.tag, str(e.shape), e.kind) for e in found], [(r[1], r[2], r[3]) for r in rows])
    yield from written_again(place.path)
    models = opened(place.path)
    yield same(
        "missing, unused, different",
        (models.report.missing, models.report.unused, models.report.different),
        ([], {}, []),
    )
    yield from models.strictness()
    with tempfile.TemporaryDirectory() as folder:
        api.convert(place.path, Path(folder) / "there", to="diffusers")
        api.convert(Path(folder) / "there", Path(folder) / "back.ckpt", to="mindone")
        yield same("there and back", (Path(folder) / "back.ckpt").read_bytes() == place.path.read_bytes(), True)


def written_again(path: Path) -> Iterator[Difference]:
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        mindspore.write(copy, mindspore.read(path), crc="crc" in path.name)
        yield same("written again", copy.read_bytes() == path.read_bytes(), True)


@torch.no_grad()
def models(place: Place, golden: Golden) -> Iterator[Difference]:
    """Compare UNet, text encoder, VAE and the inversion."""
    tiny = opened(place.path.with_name(CHECKPOINT))
    with approximate(tiny.video):
        yield from unet(tiny.video, golden, "tanh")
        walk = Walk(tiny.video, levels(), len(golden["inv_timesteps"]))
        yield same("timesteps", walk.levels.inversion_grid(walk.steps, "leading"), golden["inv_timesteps"].tolist())
        yield relative("alphas", walk.levels.alphas, golden["alphas_cumprod_f32"], DDIM)
        inverted = walk.inverted(golden["latents"], golden["clip_out_empty"])[-1]
        yield absolute("inv_xT", inverted, golden["inv_xT"], INVERSION)
    yield from unet(tiny.video, golden, "erf")
    for name in ("clip_out", "clip_out_empty"):
        ids = golden[name.replace("out", "ids")]
        yield absolute(name, tiny.text(ids).last_hidden_state, golden[name], MODEL)
    yield absolute(
        "vae_moments", tiny.vae.encode(golden["vae_img"]).latent_dist.parameters, golden["vae_moments"], MODEL
    )
    decoded = tiny.vae.decode(golden["vae_z"] / tiny.vae.config.scaling_factor).sample
    yield absolute("vae_dec", decoded, golden["vae_dec"], MODEL)


def unet(video: VideoUNet, golden: Golden, kind: str) -> Iterator[Difference]:
    t = golden["unet_t"]
    for name, x, text in (
        ("unet_y", golden["unet_x"], golden["unet_context"]),
        ("unet_y_b2", golden["unet_x_b2"], golden["unet_context_b2"]),
        ("unet_y_f1", golden["unet_x"][:, :, :1], golden["unet_context"]),
    ):
        yield absolute(f"{name}_{kind}gelu", video(x, t.expand(len(x)), text), golden[f"{name}_{kind}gelu"], UNET)


@torch.no_grad()
def samplers(place: Place, golden: Golden) -> Iterator[Difference]:
    """Compare the inversion, and each sampler of MindONE from its end."""
    tiny, texts = opened(place.path.with_name(CHECKPOINT)), Golden(place.path.with_name("golden_v1.npz"))
    text, negative = texts["clip_out"], texts["clip_out_empty"]
    with approximate(tiny.video):
        walk = Walk(tiny.video, levels(), STEPS)
        yield absolute("inv_xT", walk.inverted(golden["latents"], negative)[-1], golden["inv_xT"], INVERSION)
        for name, sampler in {
            "sample_ddim": walk.levels.sampler("ddim", STEPS, spacing="leading"),
            "sample_plms": walk.levels.sampler("plms", STEPS, spacing="leading"),
            "sample_dpm": continuous(walk, "dpmsolver"),
            "sample_dpmpp": continuous(walk, "dpmsolver++"),
        }.items():
            steps = generate(tiny.video, sampler, golden["inv_xT"], text, negative, GUIDANCE)
            yield relative(name, list(steps)[-1].latents, golden[name], DDIM)


def continuous(walk: Walk, algorithm: str) -> Any:
    """Run DPM-Solver at MindONE's continuous timesteps; diffusers uses integers."""
    config = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "final_sigmas_type": "sigma_min",
    }
    scheduler = DPMSolverMultistepScheduler(**config, algorithm_type=algorithm)
    scheduler.set_timesteps(STEPS)
    count = len(walk.levels.alphas)
    times = torch.linspace(1, 1 / count, STEPS + 1, dtype=torch.float64).half().double()  # it keeps them in float16
    places = (times * count - 1).clamp(min=0)
    known = walk.levels.alphas.double().log() / 2
    logs = torch.from_numpy(np.interp(places, np.arange(count), known))
    scheduler.sigmas = ((1 - (2 * logs).exp()).sqrt() / logs.exp()).float()
    scheduler.timesteps = places[:-1].float()
    return Sampler(scheduler, 0)


class approximate:
    """Replace GELU by MindONE's approximation within the context."""

    def __init__(self, video: VideoUNet) -> None:
        self.layers = [layer for layer in video.unet.modules() if isinstance(layer, GEGLU)]

    def __enter__(self) -> None:
        for layer in self.layers:
            layer.gelu = lambda gate: gelu(gate, approximate="tanh")

    def __exit__(self, *_: Any) -> None:
        for layer in self.layers:
            del layer.gelu


def optimizer(_: Place, golden: Golden) -> Iterator[Difference]:
    """Compare three steps of its AdamW with the recorded gradients."""
    names = [name.removesuffix("@0") for name in golden if name.endswith("@0") and not name.startswith("grad:")]
    weights = {name: torch.nn.Parameter(golden[f"{name}@0"].clone()) for name in names}
    adamw = UncorrectedAdamW(weights.values(), lr=RATE)
    for step in range(3):
        for name, weight in weights.items():
            weight.grad = golden[f"grad:{name}@{step}"].to(weight.dtype)
        adamw.step()
        for name, weight in weights.items():
            yield absolute(f"{name}@{step + 1}", weight, golden[f"{name}@{step + 1}"], ADAMW)


def _refusal(path: Path) -> str:
    try:
        read_checkpoint(path)
    except CheckpointError as error:
        return "encrypted" if "encrypted" in str(error) else str(error)
    return "read"
