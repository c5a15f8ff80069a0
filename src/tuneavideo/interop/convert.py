"""From the files of one program to those of another, with a report. Tensors pass one by one."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from tuneavideo.bases import BASES
from tuneavideo.errors import CheckpointError
from tuneavideo.interop import lora, safe, shapes, writing
from tuneavideo.interop.names import PARTS
from tuneavideo.interop.opening import Checkpoint, opened_at
from tuneavideo.storage import atomic

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TARGETS = ("diffusers", "official", "mindone", "ldm", "lora", "adapter")
SUFFIX = {"mindone": ".ckpt", "ldm": ".safetensors", "lora": ".safetensors"}


@dataclass
class Report:
    """What became of the tensors of a checkpoint.

    Attributes:
        kind: Whose it was.
        used: How many of its tensors are in the new files.
        missing: Ours that a whole model would have and it did not.
        unused: Names in it that were of no use, and why.
        different: Tensors of another shape than the models want.
        notices: What else to know.
        error: Of a LoRA: its distance from the change it stands for, as a share of that.
    """

    kind: str
    used: int = 0
    missing: list[str] = field(default_factory=list)
    unused: dict[str, str] = field(default_factory=dict)
    different: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    error: float | None = None

    def lines(self) -> list[str]:
        """What a person wants to know."""
        counts = Counter(self.unused.values())
        told = [f"{self.kind}: {self.used} tensors used, {len(self.missing)} missing, {len(self.unused)} left over"]
        told += [f"left over: {count}, {why}" for why, count in counts.items()]
        if self.error is not None:
            told.append(f"the LoRA is {self.error:.2%} of the change's norm away from it")
        return told + self.notices


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
    """See `api.convert`."""
    _check_target(out, to)
    found = opened_at(source)
    report = Report(found.kind, unused=dict(found.left))
    found.tensors = {name: tensor.to(DTYPES[dtype] if dtype else None) for name, tensor in found.tensors.items()}
    if base is None and not found.is_whole and to != "adapter":
        base = found.learned.get("base")
        if base is None:
            raise CheckpointError(f"{source} holds tuned layers only; say with --base which model they were tuned on")
    below = opened_at(place(base)) if base else None
    if to in ("lora", "adapter"):
        _layers(found, below, out, to, base, rank, style, report)
    else:
        whole = found.over(below) if below and not found.is_whole else found
        _models(_described(whole, like, report), out, to, binary, report)
    return report


def place(base: str) -> Path:
    """Where a base lies on this machine. Raises CheckpointError when it does not."""
    source = BASES[base].source if base in BASES else base
    if os.path.exists(source):
        return Path(source)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, local_files_only=True))
    except Exception as error:  # names that are no hub ids raise errors of their own
        raise CheckpointError(
            f"{base!r} is not there: no such path, and not in the hub's cache; download it with 'hf download {source}' "
            f"({str(error).splitlines()[0][:120]})"
        ) from None


def _check_target(out: Path, to: str) -> None:
    if to not in TARGETS:
        raise CheckpointError(f"--to {to}: known are {', '.join(TARGETS)}")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise CheckpointError(f"{out} exists; give a new path")
    if to in SUFFIX and out.suffix != SUFFIX[to]:
        raise CheckpointError(f"{out}: --to {to} writes one file; give a path that ends with {SUFFIX[to]}")


def _described(found: Checkpoint, like: str | None, report: Report) -> Checkpoint:
    """With configs, tokenizer and scheduler: its own, those of `like`, or what its shapes tell."""
    parts = {part.rstrip(".") for part in PARTS if any(name.startswith(part) for name in found.tensors)}
    if like:
        model = opened_at(place(like))
        found = replace(found, configs={**found.configs, **model.configs}, folder=model.folder)
    if found.is_whole and parts - found.configs.keys():
        found = replace(found, configs={**shapes.configs(found.tensors), **found.configs})
        report.notices.append(
            "configs were read from the shapes of the tensors; --like takes those of a model you name"
        )
    return replace(found, configs={part: config for part, config in found.configs.items() if part in parts})


def _models(found: Checkpoint, out: Path, to: str, binary: bool, report: Report) -> None:
    """Whole models."""
    fit = shapes.fit(found.tensors, found.configs)
    report.missing, report.different = fit.missing, fit.different
    report.unused |= dict.fromkeys(fit.unused, "not wanted by the models of its config")
    if fit.missing or fit.different:
        wrong = fit.different[0] if fit.different else f"{fit.missing[0]} is missing"
        more = len(fit.missing) + len(fit.different) - 1
        raise CheckpointError(
            f"no whole model: {wrong}" + (f", and {more} more" if more else "") + "; see --like and --base"
        )
    found = replace(found, tensors={name: t for name, t in found.tensors.items() if name not in set(fit.unused)})
    report.used = fit.used
    if found.folder is None and to in ("diffusers", "official"):
        report.notices.append("there is no tokenizer in it: the folder has none; --like takes that of a model you name")
    if to in SUFFIX:
        unnamed = (writing.mindone if to == "mindone" else writing.ldm)(found, out)
        report.unused |= dict.fromkeys(unnamed, f"{to} has no name for it")
        report.used -= len(unnamed)
    else:
        with atomic.replacing(out) as draft:
            writing.diffusers(found, draft, out) if to == "diffusers" else writing.published(
                found, draft, binary=binary
            )
    if any(map(writing.is_temporal, found.tensors)) and to in _TEMPORAL:
        report.notices.append(_TEMPORAL[to].format(out=out))


_TEMPORAL = {
    "diffusers": "its temporal layers are in {out}/adapter, for this program",
    "ldm": "its temporal layers are in the file; programs for images pass over them",
}


def _layers(
    found: Checkpoint,
    below: Checkpoint | None,
    out: Path,
    to: str,
    base: str | None,
    rank: int,
    style: Any,
    report: Report,
) -> None:
    """Tuned layers only."""
    if to == "lora":
        if below is None:
            raise CheckpointError("a LoRA is a difference: say with --base which model the layers were tuned on")
        made = lora.factored(found.tensors, below.tensors, rank, style)
        safe.write(out, made.tensors, {"format": "pt"})
        report.used, report.error = sum(name.endswith(writing.TUNED) for name in found.tensors), made.error
        report.notices.append("a LoRA holds the tuned query projections only; the temporal layers have no place in it")
        return
    tensors = writing.tuned(found)
    if not any(map(writing.is_temporal, tensors)):
        raise CheckpointError("it has no temporal layers: an adapter is made of a tuned model")
    norms = writing.fingerprint(below.tensors) if below else found.learned.get("fingerprint", {})
    name = base or found.learned.get("base", "")
    with atomic.replacing(out) as draft:
        writing.write_adapter(tensors, draft, name, norms, found.learned)
    report.used = len(tensors)
    if not norms:
        report.notices.append("without --base the adapter does not know its model, and fits any of the same shapes")
