"""Tuned query projections as a LoRA, for programs that know nothing of videos."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from tuneavideo.errors import CheckpointError
from tuneavideo.interop.lazy import Lazy, Tensors
from tuneavideo.interop.names import UNET

TUNED = ("attn1.to_q.weight", "attn2.to_q.weight")
Style = Literal["diffusers", "kohya"]


@dataclass(frozen=True)
class Factored:
    """LoRA tensors, and how far they are from the change they stand for, as a share of its norm."""

    tensors: Tensors
    error: float


def factored(tuned: Mapping[str, Lazy], base: Mapping[str, Lazy], rank: int, style: Style = "diffusers") -> Factored:
    """The change of the query projections from `base` to `tuned`, in the best product of `rank` (Eckart-Young).

    Raises:
        CheckpointError: Nothing was tuned, or on a base of another shape.
    """
    out: dict[str, Tensor] = {}
    missed = whole = 0.0
    for name in sorted(name for name in tuned if name.startswith(UNET) and name.endswith(TUNED)):
        if name not in base or base[name].shape != tuned[name].shape:
            raise CheckpointError(
                f"{name.removeprefix(UNET)} is not in the base, or of another shape; give its own --base"
            )
        change = tuned[name].read().float() - base[name].read().float()
        if not change.any():
            continue
        down, up = _product(change, rank)
        missed += float((up @ down - change).double().square().sum())
        whole += float(change.double().square().sum())
        out |= _named(name.removeprefix(UNET).removesuffix(".weight"), down, up, style)
    if not out:
        raise CheckpointError("no query projection differs from the base: there is nothing to make a LoRA of")
    return Factored({name: Lazy.of(tensor) for name, tensor in out.items()}, (missed / whole) ** 0.5)


def _product(change: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """`down` (rank x in) and `up` (out x rank) whose product is nearest to `change`.

    A layer narrower than `rank` is filled up with zeros: programs read alphas wrongly when ranks differ.
    """
    u, s, v = torch.linalg.svd(change, full_matrices=False)
    root = s[:rank].sqrt()
    more = rank - len(root)
    return pad(root[:, None] * v[:rank], (0, 0, 0, more)).contiguous(), pad(u[:, :rank] * root, (0, more)).contiguous()


def _named(layer: str, down: Tensor, up: Tensor, style: Style) -> dict[str, Tensor]:
    if style == "diffusers":
        return {f"{UNET}{layer}.lora_A.weight": down, f"{UNET}{layer}.lora_B.weight": up}
    place = f"lora_unet_{layer.replace('.', '_')}"
    alpha = torch.tensor(float(len(down)))  # so that it counts once
    return {f"{place}.lora_down.weight": down, f"{place}.lora_up.weight": up, f"{place}.alpha": alpha}
