"""Conversion of checkpoints between programs, one tensor at a time, with a report."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from tuneavideo.bases import BASES
from tuneavideo.errors import CheckpointError
from tuneavideo.interop import lora, model_configs, writing
from tuneavideo.interop.names import PARTS, is_temporal
from tuneavideo.interop.reading import Checkpoint, read_checkpoint
from tuneavideo.storage import atomic
from tuneavideo.storage.weight_files import write_safetensors

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TARGETS = ("diffusers", "official", "mindone", "ldm", "lora", "adapter")
# Targets of one file.
SUFFIXES = {"mindone": ".ckpt", "ldm": ".safetensors", "lora": ".safetensors"}
_TEMPORAL = {
    "diffusers": "its temporal layers are in {out}/adapter, for this program",
    "ldm": "its temporal layers are in the file; image programs ignore them",
}


@dataclass
class Report:
    """Tensors of a converted checkpoint.

    Attributes:
        kind: Program of the source (see `Checkpoint.kind`).
        used: Number of its tensors in the new files.
        missing: Names of a whole model that the source lacks.
        unused: Names of the source that are not in the new files, with the reason.
        different: Tensors of another shape than the models need.
        notices: Further facts for the user.
        error: Relative error of a LoRA.
    """

    kind: str
    used: int = 0
    missing: list[str] = field(default_factory=list)
    unused: dict[str, str] = field(default_factory=dict)
    different: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    error: float | None = None

    def lines(self) -> list[str]:
        """Summarise the report for the terminal."""
        counts = Counter(self.unused.values())
        lines = [f"{self.kind}: {self.used} tensors used, {len(self.missing)} missing, {len(self.unused)} left over"]
        lines += [f"left over: {count}, {why}" for why, count in counts.items()]
        if self.error is not None:
            lines.append(f"relative error of the LoRA: {self.error:.2%} of the change's norm")
        return lines + self.notices


def convert(
    source: Path,
    out: Path,
    to: str,
    *,
    base: str | None = None,
    like: str | None = None,
    rank: int = 64,
    style: lora.Style = "diffusers",
    dtype: str | None = None,
    binary: bool = True,
) -> Report:
    """Convert a checkpoint; see `api.convert` for the arguments."""
    _check_target(out, to)
    found = read_checkpoint(source)
    report = Report(found.kind, unused=dict(found.unused))
    found.tensors = {name: tensor.to(DTYPES[dtype] if dtype else None) for name, tensor in found.tensors.items()}
    if base is None and not found.is_whole and to != "adapter":
        base = found.adapter.get("base")
        if base is None:
            raise CheckpointError(f"{source} holds tuned layers only; give the model they were tuned on with --base")
    image = read_checkpoint(local_path(base)) if base else None
    if to == "lora":
        _write_lora(found, image, out, rank, style, report)
    elif to == "adapter":
        _write_adapter(found, image, out, base, report)
    else:
        whole = found.over(image) if image and not found.is_whole else found
        _write_models(_with_configs(whole, like, report), out, to, binary, report)
    return report


def local_path(base: str) -> Path:
    """Return file or folder of a base on this computer. Raises CheckpointError if there is none."""
    source = BASES[base].source if base in BASES else base
    if os.path.exists(source):
        return Path(source)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, local_files_only=True))
    except Exception as error:  # of several types for names that are no hub ids
        raise CheckpointError(
            f"{base!r} does not exist: no such path, and not in the hub's cache; download it with "
            f"'hf download {source}' ({str(error).splitlines()[0][:120]})"
        ) from None


def _check_target(out: Path, to: str) -> None:
    if to not in TARGETS:
        raise CheckpointError(f"--to {to}: known are {', '.join(TARGETS)}")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise CheckpointError(f"{out} exists; give a new path")
    if to in SUFFIXES and out.suffix != SUFFIXES[to]:
        raise CheckpointError(f"{out}: --to {to} writes one file; give a path that ends with {SUFFIXES[to]}")


def _with_configs(found: Checkpoint, like: str | None, report: Report) -> Checkpoint:
    """Add configs, tokenizer and scheduler of the model `like`, or else the configs of the family."""
    parts = {part.rstrip(".") for part in PARTS if any(name.startswith(part) for name in found.tensors)}
    configs, folder = found.configs, found.folder
    if like:
        model = read_checkpoint(local_path(like))
        configs, folder = {**configs, **model.configs}, model.folder
    if found.is_whole and (lacking := parts - configs.keys()):
        family = model_configs.family_folder(found.tensors)
        added = {part: model_configs.read_json(family / part / model_configs.CONFIG) for part in sorted(lacking)}
        configs = {**added, **configs}
        report.notices.append(f"configs are those of {family.name}; --like takes those of another model")
    return replace(found, configs={part: configs[part] for part in configs if part in parts}, folder=folder)


def _write_models(found: Checkpoint, out: Path, to: str, binary: bool, report: Report) -> None:
    fit = model_configs.compare(found.tensors, found.configs)
    report.missing, report.different, report.used = fit.missing, fit.different, fit.used
    report.unused |= dict.fromkeys(fit.unused, "not needed by the models of its config")
    if wrong := [*fit.different, *(f"{name} is missing" for name in fit.missing)]:
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise CheckpointError(f"not a whole model: {wrong[0]}{more}; see --like and --base")
    extra = set(fit.unused)
    found = replace(found, tensors={name: t for name, t in found.tensors.items() if name not in extra})
    if found.folder is None and to in ("diffusers", "official"):
        report.notices.append("it has no tokenizer, nor has the new folder; --like takes that of another model")
    if to in SUFFIXES:
        unnamed = (writing.write_mindone if to == "mindone" else writing.write_ldm)(found, out)
        report.unused |= dict.fromkeys(unnamed, f"{to} has no name for it")
        report.used -= len(unnamed)
    else:
        with atomic.replacing(out) as draft:
            if to == "diffusers":
                writing.write_diffusers(found, draft, out)
            else:
                writing.write_official(found, draft, binary=binary)
    if found.has_temporal and to in _TEMPORAL:
        report.notices.append(_TEMPORAL[to].format(out=out))


def _write_lora(
    found: Checkpoint, image: Checkpoint | None, out: Path, rank: int, style: lora.Style, report: Report
) -> None:
    if image is None:
        raise CheckpointError("a LoRA is a difference: give the model that the layers were tuned on with --base")
    tuned = lora.merged(found.tensors, image.tensors)
    made = lora.factorize(tuned, image.tensors, rank, style)
    write_safetensors(out, made.tensors)
    report.used, report.error = sum(name.endswith(lora.TUNED) for name in tuned), made.error
    report.notices.append("a LoRA holds the tuned query projections only; the temporal layers are left out")


def _write_adapter(found: Checkpoint, image: Checkpoint | None, out: Path, base: str | None, report: Report) -> None:
    tensors = writing.tuned_layers(found)
    if not any(map(is_temporal, tensors)):
        raise CheckpointError("it has no temporal layers: an adapter is made of a tuned model")
    fingerprint = writing.fingerprint(image.tensors) if image else found.adapter.get("fingerprint", {})
    with atomic.replacing(out) as draft:
        writing.write_adapter(tensors, draft, base or found.adapter.get("base", ""), fingerprint, found.adapter)
    report.used = len(tensors)
    if not fingerprint:
        report.notices.append("without --base the adapter does not name its model, and fits any of the same shapes")
