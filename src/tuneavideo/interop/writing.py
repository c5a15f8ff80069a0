"""Writers of the files of other programs, from tensors under our names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tuneavideo.errors import CheckpointError
from tuneavideo.interop import mindspore
from tuneavideo.interop.model_configs import CONFIG, MODEL_INDEX, OFFICIAL_UNET, read_json, to_official
from tuneavideo.interop.names import LDM, LDM_V2, MINDONE, UNET, is_temporal, merged, old_vae, renamed
from tuneavideo.interop.reading import Checkpoint
from tuneavideo.models import adapter
from tuneavideo.models.loading import CONFIGS
from tuneavideo.settings import Inflation
from tuneavideo.storage import atomic
from tuneavideo.storage.tensors import Tensors
from tuneavideo.storage.weight_files import write_safetensors, write_torch

CLASSES = {
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
}
# Parts of a pipeline without weights, which are copied.
COPIED = {"tokenizer": ["transformers", "CLIPTokenizer"], "feature_extractor": ["transformers", "CLIPImageProcessor"]}
_STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


def write_mindone(found: Checkpoint, out: Path) -> list[str]:
    """Write one `.ckpt` file with MindONE's names. Returns our names that MindONE does not have."""
    tensors = merged(found.tensors, in_proj=True)
    names = renamed(tensors, MINDONE)
    mindspore.write(out, {names[name]: tensor for name, tensor in tensors.items() if name in names})
    return [name for name in tensors if name not in names]


def write_ldm(found: Checkpoint, out: Path) -> list[str]:
    """Write one `.safetensors` file with the original names. Returns our names that the original does not have."""
    scheme = LDM_V2 if found.configs.get("text_encoder", {}).get("hidden_act") == "gelu" else LDM
    tensors = merged(found.tensors, in_proj=scheme is LDM_V2)
    names = renamed(tensors, scheme)
    write_safetensors(out, {names[name]: tensor for name, tensor in tensors.items() if name in names})
    return [name for name in tensors if name not in names]


def write_diffusers(found: Checkpoint, out: Path, place: Path) -> None:
    """Write a folder of the image model for diffusers; the temporal layers become `adapter/` inside it.

    Args:
        found: Whole models.
        out: Folder to write.
        place: Final path of `out`, for the adapter's config.
    """
    image = {name: tensor for name, tensor in found.tensors.items() if not is_temporal(name)}
    for part, config in found.configs.items():
        atomic.write(out / part / CONFIG, json.dumps(config, indent=2))
        write_safetensors(out / part / f"{_STEMS[part]}.safetensors", _part(image, part))
    _write_index(found, out, {part: CLASSES[part] for part in found.configs}, "StableDiffusionPipeline")
    if temporal := {name: tensor for name, tensor in found.tensors.items() if is_temporal(name)}:
        write_adapter(temporal, out / "adapter", str(place.absolute()), fingerprint(image), found.adapter)


def write_official(found: Checkpoint, out: Path, *, binary: bool) -> None:
    """Write a folder for the published code, with the temporal layers (798 tensors of Stable Diffusion 1) in `unet/`.

    Args:
        found: Whole models.
        out: Folder to write.
        binary: Write `.bin` files, which the published code reads, or safetensors.

    Raises:
        CheckpointError: There are no temporal layers.
    """
    if not found.has_temporal:
        raise CheckpointError("it has no temporal layers, which the published code needs; tune the model first")
    for part, config in found.configs.items():
        config = to_official(config) if part == "unet" else config
        atomic.write(out / part / CONFIG, json.dumps(config, indent=2))
        tensors = {
            old_vae(f"{part}.{name}").removeprefix(f"{part}."): t for name, t in _part(found.tensors, part).items()
        }
        if binary:
            write_torch(out / part / f"{'pytorch_model' if part == 'text_encoder' else _STEMS[part]}.bin", tensors)
        else:
            write_safetensors(out / part / f"{_STEMS[part]}.safetensors", tensors)
    classes = {part: CLASSES[part] for part in found.configs} | {"unet": ["tuneavideo.models.unet", OFFICIAL_UNET]}
    _write_index(found, out, classes, "TuneAVideoPipeline")


def write_adapter(
    tensors: Tensors, out: Path, base: str, fingerprint: Mapping[str, float], config: Mapping[str, Any]
) -> None:
    """Write a folder that `Adapter.load` reads.

    Args:
        tensors: Temporal and tuned layers.
        out: Folder to write.
        base: Name or path of the base.
        fingerprint: Fingerprint of the base; empty if it is unknown.
        config: Config of the adapter that the tensors come from. Without one, the inflation is the published code's.
    """
    write_safetensors(out / adapter.WEIGHTS, {name.removeprefix(UNET): tensor for name, tensor in tensors.items()})
    inflation = config.get("inflation") or Inflation()._asdict()
    adapter.write_config(out, base, inflation, config.get("about") or {}, fingerprint)


def fingerprint(tensors: Tensors) -> dict[str, float]:
    """Compute `adapter.fingerprint` of the UNet among the tensors, one layer at a time."""
    own = ((name.removeprefix(UNET), tensor) for name, tensor in tensors.items() if name.startswith(UNET))
    return adapter.norms((name, tensor.read()) for name, tensor in own if name.endswith(adapter.FINGERPRINTED))


def tuned_layers(found: Checkpoint) -> Tensors:
    """Return the temporal layers and query projections of a whole model, or all tensors of tuned layers alone."""
    if not found.is_whole:
        return found.tensors
    queries = {name for name in found.tensors if name.startswith(UNET) and name.endswith(adapter.FINGERPRINTED)}
    return {name: tensor for name, tensor in found.tensors.items() if name in queries or is_temporal(name)}


def _part(tensors: Tensors, part: str) -> Tensors:
    return {name.removeprefix(f"{part}."): tensor for name, tensor in tensors.items() if name.startswith(f"{part}.")}


def _write_index(found: Checkpoint, out: Path, classes: Mapping[str, list[str]], pipeline: str) -> None:
    """Copy tokenizer and scheduler, and write the index of the pipeline."""
    index: dict[str, Any] = {"_class_name": pipeline, "_diffusers_version": "0.11.1", **classes}
    for part, kind in COPIED.items():
        index[part] = kind if _copy(found.folder, part, out) else [None, None]
    if not _copy(found.folder, "scheduler", out):
        _copy(CONFIGS / "sd1", "scheduler", out)  # those of Stable Diffusion 1 and 2 are equal
    scheduler = read_json(out / "scheduler" / "scheduler_config.json")
    index["scheduler"] = ["diffusers", scheduler.get("_class_name", "PNDMScheduler")]
    index |= {"safety_checker": [None, None], "requires_safety_checker": False}
    atomic.write(out / MODEL_INDEX, json.dumps(index, indent=2))


def _copy(folder: Path | None, part: str, out: Path) -> bool:
    """Copy the files of a part; return whether the folder has it."""
    if folder is None or not (folder / part).is_dir():
        return False
    shutil.copytree(folder / part, out / part, copy_function=shutil.copyfile)
    return True
