"""Tensors in our names to the files of another program."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tuneavideo.errors import CheckpointError
from tuneavideo.interop import mindspore, official, pickled, safe, shapes
from tuneavideo.interop.lazy import Tensors
from tuneavideo.interop.names import LDM, LDM_V2, MINDONE, UNET, VAE, closed, renamed
from tuneavideo.interop.opening import CONFIG, MODEL_INDEX, Checkpoint
from tuneavideo.models import adapter
from tuneavideo.settings import Inflation
from tuneavideo.storage import atomic

TUNED = ("attn1.to_q.weight", "attn2.to_q.weight")
# Parts of a pipeline that are files to copy, with what model_index.json says of them.
COPIED = {"tokenizer": ["transformers", "CLIPTokenizer"], "feature_extractor": ["transformers", "CLIPImageProcessor"]}
CLASSES = {
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
}
_WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
_OFFICIAL = {"text_encoder": "pytorch_model"}


def is_temporal(name: str) -> bool:
    return name.startswith(UNET) and any(part in name for part in shapes.TEMPORAL)


def in_order(tensors: Tensors) -> Tensors:
    """Temporal layers behind the block they belong to, as programs write them that have them in one model."""
    added: dict[str, Tensors] = {}
    for name in filter(is_temporal, tensors):
        added.setdefault(_block(name), {})[name] = tensors[name]
    last = {_block(name): name for name in tensors if not is_temporal(name)}
    if not added.keys() <= last.keys():
        return tensors
    out: Tensors = {}
    for name in (name for name in tensors if not is_temporal(name)):
        out[name] = tensors[name]
        if last[_block(name)] == name:
            out |= added.get(_block(name), {})
    return out


def _block(name: str) -> str:
    place, found, rest = name.partition(".transformer_blocks.")
    return f"{place}{found}{rest.split('.')[0]}"


def mindone(found: Checkpoint, out: Path) -> list[str]:
    """One `.ckpt` of MindONE's names; returns our names that have none there."""
    tensors = closed(in_order(found.tensors), in_proj=True)
    names = renamed(tensors, MINDONE)
    mindspore.write(out, {names[name]: tensor for name, tensor in tensors.items() if name in names})
    return [name for name in tensors if name not in names]


def ldm(found: Checkpoint, out: Path) -> list[str]:
    """One `.safetensors` file of the first code's names; returns our names that have none there."""
    dialect = LDM_V2 if found.configs.get("text_encoder", {}).get("hidden_act") == "gelu" else LDM
    tensors = closed(found.tensors, in_proj=dialect is LDM_V2)
    names = renamed(tensors, dialect)
    safe.write(out, {names[name]: tensor for name, tensor in tensors.items() if name in names})
    return [name for name in tensors if name not in names]


def diffusers(found: Checkpoint, out: Path, at: Path) -> None:
    """A diffusers folder of the image model in `out`, to be found `at`; temporal layers become `adapter/` inside."""
    image = {name: tensor for name, tensor in found.tensors.items() if not is_temporal(name)}
    for part, config in found.configs.items():
        own = _of(image, part)
        atomic.write(out / part / CONFIG, json.dumps(config, indent=2))
        safe.write(out / part / f"{_WEIGHTS[part]}.safetensors", own)
    _rest(found, out, {part: CLASSES[part] for part in found.configs}, "StableDiffusionPipeline")
    temporal = {name: tensor for name, tensor in found.tensors.items() if is_temporal(name)}
    if temporal:
        write_adapter(temporal, out / "adapter", str(at.absolute()), fingerprint(image), found.learned)


def published(found: Checkpoint, out: Path, *, binary: bool) -> None:
    """The published code's output folder, with all 798 tensors of Stable Diffusion 1 in `unet/`.

    Raises:
        CheckpointError: There are no temporal layers.
    """
    if not any(is_temporal(name) for name in found.tensors):
        raise CheckpointError("there are no temporal layers in it, which the published code asks for; tune it first")
    write, suffix = (pickled.write, ".bin") if binary else (safe.write, ".safetensors")
    for part, config in found.configs.items():
        own = (
            {official.old_vae(f"{VAE}{name}").removeprefix(VAE): t for name, t in _of(found.tensors, part).items()}
            if part == "vae"
            else _of(found.tensors, part)
        )
        told = official.video_config(config) if part == "unet" else config
        atomic.write(out / part / CONFIG, json.dumps(told, indent=2))
        stem = _WEIGHTS[part] if suffix == ".safetensors" else _OFFICIAL.get(part, _WEIGHTS[part])
        write(out / part / f"{stem}{suffix}", own)
    classes = {part: CLASSES[part] for part in found.configs}
    classes["unet"] = ["tuneavideo.models.unet", official.UNET_CLASS]
    _rest(found, out, classes, "TuneAVideoPipeline")


def write_adapter(
    tensors: Tensors, out: Path, base: str, norms: Mapping[str, float], learned: Mapping[str, Any] | None = None
) -> None:
    """An adapter as `Adapter.load` reads it; what was trained elsewhere was trained with the published inflation."""
    learned = learned or {}
    config = {
        "format": adapter.FORMAT,
        "base": base,
        "inflation": learned.get("inflation") or Inflation()._asdict(),
        "about": learned.get("about") or {},
        "fingerprint": dict(norms),
    }
    safe.write(out / adapter.WEIGHTS, {name.removeprefix(UNET): tensor for name, tensor in tensors.items()})
    atomic.write(out / adapter.CONFIG, json.dumps(config, indent=1))


def fingerprint(tensors: Tensors) -> dict[str, float]:
    """As `adapter.fingerprint`, of a UNet on the disk."""
    return {
        name.removeprefix(UNET).removesuffix(".weight"): float(tensor.read().double().norm())
        for name, tensor in tensors.items()
        if name.startswith(UNET) and name.endswith(TUNED)
    }


def tuned(found: Checkpoint, trainable: Iterable[str] = TUNED) -> Tensors:
    """The temporal layers of a checkpoint and its tuned ones; all of them if it has no others."""
    if not found.is_whole:
        return found.tensors
    ends = tuple(trainable)
    return {
        name: t
        for name, t in found.tensors.items()
        if is_temporal(name) or (name.startswith(UNET) and name.endswith(ends))
    }


def _of(tensors: Tensors, part: str) -> Tensors:
    return {name.removeprefix(f"{part}."): tensor for name, tensor in tensors.items() if name.startswith(f"{part}.")}


def _rest(found: Checkpoint, out: Path, classes: Mapping[str, list[str]], pipeline: str) -> None:
    """Tokenizer and scheduler, copied or made, and the index of all."""
    index: dict[str, Any] = {"_class_name": pipeline, "_diffusers_version": "0.11.1", **classes}
    for part, kind in COPIED.items():
        index[part] = kind if _copied(found.folder, part, out) else [None, None]
    if not _copied(found.folder, "scheduler", out):
        atomic.write(out / "scheduler" / "scheduler_config.json", json.dumps(shapes.SCHEDULER, indent=2))
    scheduler = json.loads((out / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    index["scheduler"] = ["diffusers", scheduler.get("_class_name", "PNDMScheduler")]
    index |= {"safety_checker": [None, None], "requires_safety_checker": False}
    atomic.write(out / MODEL_INDEX, json.dumps(index, indent=2))


def _copied(folder: Path | None, part: str, out: Path) -> bool:
    if folder is None or not (folder / part).is_dir():
        return False
    (out / part).mkdir(parents=True, exist_ok=True)
    for file in (folder / part).iterdir():
        if file.is_file():
            shutil.copyfile(file, out / part / file.name)
    return True
