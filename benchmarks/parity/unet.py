"""Comparison of whole UNets: predictions, inner outputs, names of the weights, gradients."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import mse_loss

from benchmarks.parity.compare import FORWARD, GRADIENT, LOSS, Difference, absolute, gradients_agree, relative, same
from benchmarks.parity.golden import OFFICIAL, Golden, Place, image_unet, levels, opened
from tuneavideo.method.inflate import inflate, trainable_parameters
from tuneavideo.method.noise import add_noise


@torch.no_grad()
def forward(place: Place, golden: Golden) -> Iterator[Difference]:
    output = opened(place.path.parent)(*golden.inputs())
    yield absolute("out_f32", output, golden["out_f32"], FORWARD)


@torch.no_grad()
def still(place: Place, golden: Golden) -> Iterator[Difference]:
    """Compare the image UNet and the newly inflated one, whose temporal output projection is zero."""
    unet, (x, t, text) = image_unet(place.path.parent), golden.inputs()
    yield absolute("out_2d_f32", unet(x, t, text).sample, golden["out_2d_f32"], FORWARD)
    output = inflate(unet)(x[:, :, None], t, text)[:, :, 0]
    yield absolute("out_3d_f1_no_temporal_f32", output, golden["out_3d_f1_no_temporal_f32"], FORWARD)


@torch.no_grad()
def taps(place: Place, golden: Golden) -> Iterator[Difference]:
    """Compare inner outputs of the UNet for the inputs of the forward file of the same name.

    They spread up to ten times as wide as the prediction, and rounding grows with them; so does the bound.
    """
    whole = Golden(place.path.with_name(place.path.name.split("_taps")[0] + ".safetensors"))
    video, seen = opened(place.path.parent), {}
    for name in golden:
        layer = video.unet.get_submodule(name)
        layer.register_forward_hook(lambda _, __, output, name=name: seen.update({name: output}))
    video(*whole.inputs())
    for name, output in seen.items():
        output_NC = output if isinstance(output, Tensor) else output[0]
        output_BTC = rearrange(output_NC, "(b t) ... -> b t ...", t=video.clip.frames)
        ours = output_BTC[:, 0] if output_BTC.ndim == 3 else output_BTC.transpose(1, 2)
        bound = FORWARD * float(golden[name].std() / whole["out_f32"].std())
        yield absolute(name, ours, golden[name], bound)


def keys(place: Place, shapes: dict[str, list[int]]) -> Iterator[Difference]:
    """Compare names and shapes of all weights."""
    ours = {name: list(value.shape) for name, value in inflate(image_unet(place.path.parent)).unet.state_dict().items()}
    for name in ours.keys() | shapes.keys():
        yield same(name, ours.get(name), shapes.get(name))


@functools.lru_cache(maxsize=2)  # both dtypes
def differentiated(folder: Path, dtype: torch.dtype) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Compare prediction, loss and gradients of the trained weights for the inputs of the model's `grad` file."""
    golden, video = Golden(folder / "grad.safetensors"), opened(folder, dtype)
    tuned = trainable_parameters(video.unet, OFFICIAL["trainable_modules"])
    prediction = video(golden["noisy_latents"], golden["timesteps"], golden["encoder_hidden_states"])
    loss = mse_loss(prediction, golden["noise"].to(dtype))
    gradients = torch.autograd.grad(loss, list(tuned.values()))
    return prediction.detach(), loss.detach(), dict(zip(tuned, gradients, strict=True))


def grad(place: Place, golden: Golden) -> Iterator[Difference]:
    kind, dtype = ("f64", torch.float64) if "f64" in place.path.stem else ("f32", torch.float32)
    prediction, loss, gradients = differentiated(place.path.parent, dtype)
    if "noisy_latents" in golden:
        alphas = levels().alphas.to(golden["timesteps"].device)
        noisy = add_noise(golden["latents"], golden["noise"], alphas[golden["timesteps"]])
        yield absolute("noisy_latents", noisy, golden["noisy_latents"], FORWARD)
        yield absolute("pred", prediction, golden[f"pred_{kind}"], FORWARD)
        yield relative("loss", loss, golden[f"loss_{kind}"], LOSS)
    yield from gradients_agree(gradients, golden.under("grad."))


def grad_norms(place: Place, facts: dict[str, Any]) -> Iterator[Difference]:
    _, loss, gradients = differentiated(place.path.parent, torch.float32)
    norms = {name: gradient.norm() for name, gradient in gradients.items()}
    yield relative("loss", loss, torch.tensor(facts["loss_f32"]), LOSS)
    yield from gradients_agree(norms, {name: torch.tensor(norm) for name, norm in facts["grad_norm"].items()})
    whole = torch.stack(list(norms.values())).norm()
    yield relative("total_grad_norm", whole, torch.tensor(facts["total_grad_norm"]), GRADIENT)
