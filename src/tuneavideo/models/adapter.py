"""Adapters: the added and the tuned layers of a run, with their config, without the base."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from tuneavideo.errors import AdapterError
from tuneavideo.method.inflate import VideoUNet, added_parameters, deflate, inflate, video_unet
from tuneavideo.settings import Inflation
from tuneavideo.storage import atomic, cache

CONFIG, WEIGHTS = "adapter_config.json", "adapter.safetensors"
FORMAT = 1
# Copies of one base in fp16, bf16 or fp32 have norms that agree to 1e-4.
SAME_BASE = 5e-4
T = TypeVar("T")
FINGERPRINTED = ("attn1.to_q.weight", "attn2.to_q.weight")


def fingerprint(unet: UNet2DConditionModel) -> dict[str, float]:
    """Norms of the query projections of an *untuned* UNet: equal for copies of one base in any precision."""
    return norms((name, weight) for name, weight in _parameters(unet).items() if name.endswith(FINGERPRINTED))


def norms(weights: Iterable[tuple[str, Tensor]]) -> dict[str, float]:
    """Compute the norm of each layer's weight."""
    return {name.removesuffix(".weight"): float(weight.detach().cpu().double().norm()) for name, weight in weights}


def write_config(
    folder: Path, base: str, inflation: Mapping[str, Any], about: Mapping[str, Any], fingerprint: Mapping[str, float]
) -> None:
    """Write `adapter_config.json`. Raises DiskError."""
    config = {"format": FORMAT, "base": base, "inflation": inflation, "about": about, "fingerprint": fingerprint}
    atomic.write(folder / CONFIG, json.dumps(config, indent=1))


def read_config(folder: Path) -> dict[str, Any]:
    """Read `adapter_config.json`. Raises AdapterError when it is damaged or of another format."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        found = config["format"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise AdapterError(f"{folder / CONFIG} is damaged ({error}); make the adapter again or copy it again") from None
    if found != FORMAT:
        raise AdapterError(f"{folder}: adapter format {found}, this version reads {FORMAT}; upgrade")
    return config


@dataclass(frozen=True)
class Adapter:
    """Weights tuned on one clip.

    Attributes:
        tensors: Every added and every tuned tensor, under its name in the UNet. With LoRAs: the tuned tensors only, a
            LoRA in the place of each matrix; the rest follows from the base.
        inflation: How the UNet was inflated.
        base: The base it was learned on, as its user named it.
        fingerprint: See `fingerprint`.
        about: What a person may want to know (caption, steps, versions).
    """

    tensors: dict[str, Tensor]
    inflation: Inflation
    base: str
    fingerprint: dict[str, float]
    about: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, unet: UNet2DConditionModel, tuned: Mapping[str, Tensor], **rest: Any) -> Adapter:
        """Copy the added layers of an inflated UNet and its `tuned` tensors to the CPU."""
        kept = kept_tensors(unet, tuned)
        return cls({name: kept[name].detach().cpu().clone() for name in sorted(kept)}, **rest)

    def save(self, folder: Path | str, dtype: torch.dtype | None = torch.float16) -> Path:
        """Write `adapter.safetensors`, then `adapter_config.json`, into a new or existing folder.

        Raises:
            DiskError: The place cannot be written or is full.
        """
        folder = Path(folder)
        tensors = {name: tensor.to(dtype or tensor.dtype).contiguous() for name, tensor in self.tensors.items()}
        metadata = {"format": "pt", "digest": cache.checksum(tensors), "about": json.dumps(self.about)}
        atomic.write(folder / WEIGHTS, _with_metadata(save(tensors), metadata))
        write_config(folder, self.base, self.inflation._asdict(), self.about, self.fingerprint)
        return folder

    @classmethod
    def load(cls, folder: Path | str) -> Adapter:
        """Read what `save` wrote. Raises AdapterError when files are missing or damaged."""
        folder = Path(folder)
        missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
        if missing:
            raise AdapterError(
                f"{folder} holds no adapter: {missing[0]} is missing; give the 'adapter' folder of a finished run"
            )
        config = read_config(folder)
        try:
            inflation = config["inflation"]
            inflation["references"] = tuple(inflation["references"])
            with safe_open(folder / WEIGHTS, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                metadata = file.metadata() or {}
            if metadata.get("digest", digest := cache.checksum(tensors)) != digest:
                raise ValueError(f"{WEIGHTS} is not what was written")
            about = config["about"] | json.loads(metadata.get("about", "{}"))  # the config may be an older one
            return cls(tensors, Inflation(**inflation), config["base"], config["fingerprint"], about)
        except (ValueError, KeyError, TypeError, SafetensorError) as error:
            raise AdapterError(f"{folder}: the adapter is damaged ({error}); make it again or copy it again") from None

    def attach(self, unet: UNet2DConditionModel, *, any_base: bool = False) -> Attached:
        """Inflate an image UNet in place and give it what was learned, in its own precision and on its device.

        Args:
            unet: Of the base the adapter was learned on.
            any_base: Take the UNet of another base too, if its shape is the same.

        Raises:
            AdapterError: The UNet is of another base or shape; it is left as it was.
        """
        self._check(unet, any_base)
        video = inflate(unet, self.inflation)
        parameters = _parameters(unet)
        added, tensors = added_parameters(unet), merged(self.tensors, parameters)
        replaced = {name: parameters[name].detach().clone() for name in tensors if name not in added}
        _assign(parameters, tensors)
        return Attached(video, replaced)

    def assign(self, unet: UNet2DConditionModel) -> VideoUNet:
        """Copy the tensors, once, into the UNet they were tuned in, which is inflated and keeps its precision."""
        return assign(unet, self.tensors)

    def _check(self, unet: UNet2DConditionModel, any_base: bool) -> None:
        shapes = {name: tuple(p.shape) for name, p in _parameters(unet).items()}
        whole = {name: tuple(tensor.shape) for name, tensor in self.tensors.items() if ".lora_" not in name}
        whole |= {name: (len(up), down.shape[1]) for name, down, up in loras(self.tensors)}
        for name, expected in whole.items():
            if ".attn_temp." in name or ".norm_temp." in name:
                name = name.split(".attn_temp.")[0].split(".norm_temp.")[0] + ".norm1.weight"
                expected = expected[:1]
            if shapes.get(name) != expected:
                raise AdapterError(
                    f"the adapter does not fit this UNet: {name} is {shapes.get(name, 'missing')}, expected "
                    f"{expected}; it was tuned on {self.base!r}: open that base"
                )
        theirs = fingerprint(unet)
        worst = max((abs(theirs[n] / norm - 1) for n, norm in self.fingerprint.items() if n in theirs), default=0.0)
        if worst > SAME_BASE and not any_base:
            raise AdapterError(
                f"the adapter was tuned on another base than this one (its query projections differ by {worst:.1%}): "
                f"it names {self.base!r}; if another one is what you want say --edit-model, otherwise open that base"
            )


@dataclass(frozen=True)
class Attached:
    """An adapter in its place; `detach` gives the image UNet back, bit for bit."""

    video: VideoUNet
    replaced: dict[str, Tensor]

    def detach(self) -> UNet2DConditionModel:
        """Take the added layers out and put the replaced weights back."""
        unet = deflate(self.video.unet)
        _assign(_parameters(unet), self.replaced)
        return unet


def assign(unet: UNet2DConditionModel, tensors: Mapping[str, Tensor]) -> VideoUNet:
    """Copy trained tensors, once, into an inflated UNet, which keeps its precision."""
    parameters = _parameters(unet)
    _assign(parameters, merged(tensors, parameters))
    return video_unet(unet)


def kept_tensors(unet: UNet2DConditionModel, tuned: Mapping[str, T]) -> dict[str, Tensor | T]:
    """Select the tensors of an adapter: with LoRAs the tuned ones alone, otherwise the added layers as well."""
    return dict(tuned) if any(loras(tuned)) else {**added_parameters(unet), **tuned}


def loras(tensors: Mapping[str, T]) -> Iterator[tuple[str, T, T]]:
    """Yield each LoRA among the tensors: name of the weight W that it changes, A and B (W becomes W + B A)."""
    for name, down in tensors.items():
        layer, found, _ = name.partition(".lora_A.")
        if found:
            yield f"{layer}.weight", down, tensors[f"{layer}.lora_B.weight"]


def merged(tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Replace the LoRAs among the tensors by the matrices that they make of the `weights`."""
    whole = {name: tensor for name, tensor in tensors.items() if ".lora_" not in name}
    for name, down, up in loras(tensors):
        change = up.float() @ down.float()
        whole[name] = weights[name].detach().float() + change.to(weights[name].device)
    return whole


def _parameters(unet: UNet2DConditionModel) -> dict[str, nn.Parameter]:
    """Parameters by the names they have without LoRAs: a loaded LoRA puts the layer it changes under `base_layer`."""
    return {name.replace(".base_layer.", "."): parameter for name, parameter in unet.named_parameters()}


def _with_metadata(contents: bytes, metadata: Mapping[str, str]) -> bytes:
    """A safetensors file with metadata in a fixed order, so that equal adapters are equal files; `save` has none."""
    size = int.from_bytes(contents[:8], "little")
    header = {"__metadata__": dict(metadata)} | json.loads(contents[8 : 8 + size])
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + contents[8 + size :]


@torch.no_grad()
def _assign(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        parameters[name].copy_(value)
