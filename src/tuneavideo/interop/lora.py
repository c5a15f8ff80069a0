"""LoRAs: of the tuned query projections, for programs without video layers; and those of an adapter, merged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from tuneavideo.errors import CheckpointError
from tuneavideo.interop.names import UNET
from tuneavideo.models.adapter import FINGERPRINTED as TUNED
from tuneavideo.models.adapter import loras
from tuneavideo.storage.tensors import LazyTensor, Tensors

Style = Literal["diffusers", "kohya"]


@dataclass(frozen=True)
class Factorization:
    """Tensors of a LoRA, and its relative error: the norm of what it lacks over the norm of the change."""

    tensors: Tensors
    error: float


def factorize(
    tuned: Mapping[str, LazyTensor], base: Mapping[str, LazyTensor], rank: int, style: Style = "diffusers"
) -> Factorization:
    """Approximate the change of the query projections by products of `rank` (Eckart-Young theorem).

    Args:
        tuned: Tuned layers.
        base: UNet they were tuned on.
        rank: Rank of each product.
        style: Names of diffusers or of kohya's scripts.

    Raises:
        CheckpointError: No layer was tuned, or the base has other shapes.
    """
    out: dict[str, Tensor] = {}
    lost = total = 0.0
    for name in sorted(name for name in tuned if name.startswith(UNET) and name.endswith(TUNED)):
        if name not in base or base[name].shape != tuned[name].shape:
            raise CheckpointError(
                f"{name.removeprefix(UNET)} is not in the base, or has another shape; give its own --base"
            )
        change = tuned[name].read().float() - base[name].read().float()
        if not change.any():
            continue
        down, up = _product(change, rank)
        lost += float((up @ down - change).double().square().sum())
        total += float(change.double().square().sum())
        out |= _named(name.removeprefix(UNET).removesuffix(".weight"), down, up, style)
    if not out:
        raise CheckpointError("no query projection differs from the base: there is nothing to make a LoRA of")
    return Factorization({name: LazyTensor.of(tensor) for name, tensor in out.items()}, (lost / total) ** 0.5)


def merged(tuned: Tensors, base: Tensors) -> Tensors:
    """Replace the LoRAs of an adapter by whole matrices, and add the temporal layers as they start (see `inflate`).

    Raises:
        CheckpointError: The base lacks a layer, or has another shape.
    """
    pairs = list(loras(tuned))
    if not pairs:
        return tuned
    start = {}
    for name, tensor in base.items():
        block, found, layer = name.partition(".attn1.")
        if found and name.startswith(UNET):
            start[f"{block}.attn_temp.{layer}"] = _zeros(tensor) if layer.startswith("to_out.") else tensor
        elif ".norm1." in name and ".transformer_blocks." in name:
            start[name.replace(".norm1.", ".norm_temp.")] = tensor
    weights, whole = {**base, **start}, {name: tensor for name, tensor in tuned.items() if ".lora_" not in name}
    for name, down, up in pairs:
        if name not in weights or weights[name].shape != (up.shape[0], down.shape[1]):
            raise CheckpointError(
                f"{name.removeprefix(UNET)} is not in the base, or has another shape; give its own --base"
            )
        whole[name] = _sum(weights[name], down, up)
    return start | whole


def _zeros(tensor: LazyTensor) -> LazyTensor:
    return LazyTensor(tensor.dtype, tensor.shape, lambda: torch.zeros(tensor.shape, dtype=tensor.dtype))


def _sum(weight: LazyTensor, down: LazyTensor, up: LazyTensor) -> LazyTensor:
    def read() -> Tensor:
        return (weight.read().float() + up.read().float() @ down.read().float()).to(weight.dtype)

    return LazyTensor(weight.dtype, weight.shape, read)


def _product(change: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return `down` (rank x in) and `up` (out x rank) whose product is nearest to `change`.

    A layer narrower than `rank` is padded with zeros: programs misread alphas when ranks differ.
    """
    u, s, v = torch.linalg.svd(change, full_matrices=False)
    root = s[:rank].sqrt()
    more = rank - len(root)
    return pad(root[:, None] * v[:rank], (0, 0, 0, more)).contiguous(), pad(u[:, :rank] * root, (0, more)).contiguous()


def _named(layer: str, down: Tensor, up: Tensor, style: Style) -> dict[str, Tensor]:
    if style == "diffusers":
        return {f"{UNET}{layer}.lora_A.weight": down, f"{UNET}{layer}.lora_B.weight": up}
    prefix = f"lora_unet_{layer.replace('.', '_')}"
    alpha = torch.tensor(float(len(down)))  # alpha / rank = 1
    return {f"{prefix}.lora_down.weight": down, f"{prefix}.lora_up.weight": up, f"{prefix}.alpha": alpha}
