"""Reader of checkpoints of every known program: recognises a file or folder and gives its tensors our names."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tuneavideo.errors import CheckpointError
from tuneavideo.interop import lora, mindspore
from tuneavideo.interop.model_configs import CONFIG, MODEL_INDEX, OFFICIAL_UNET, from_official, read_json
from tuneavideo.interop.names import (
    BUFFERS,
    LDM_V2,
    PARTS,
    TEXT,
    UNET,
    from_fork,
    is_temporal,
    old_vae,
    renamed,
    scheme_of,
    split,
    with_text_model,
)
from tuneavideo.models import adapter
from tuneavideo.storage import weight_files
from tuneavideo.storage.tensors import Tensors

# Names and prefixes of training state.
STATE = ("adam_m.", "adam_v.", "ema.", "model_ema.", "moments.", "moment1.", "moment2.", "accum.", "optimizer")
COUNTERS = (
    "global_step", "scale_sense", "cur_step", "epoch_num", "current_iterator_step", "last_overflow_iterator_step",
    "learning_rate", "beta1_power", "beta2_power", "loss_scale", "step_num", "epoch", "weight_decay", "updates",
)  # fmt: skip
COMPUTED = ("alphas", "betas", "sqrt_", "log_one", "posterior", "model.alphas", "model.betas", "lvlb", "logvar")
# Usual names of the weights of one model, best first.
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model", "open_clip_pytorch_model")
SUFFIXES = (".safetensors", ".fp16.safetensors", ".non_ema.safetensors", ".bin", ".fp16.bin")
# First parts of a UNet's names without prefix.
_UNET_LAYERS = (
    "conv_in.", "conv_out.", "conv_norm_out.", "time_embedding.", "down_blocks.", "up_blocks.", "mid_block.",
)  # fmt: skip


@dataclass
class Checkpoint:
    """Weights of a program, under our names.

    Attributes:
        kind: `diffusers`, `official`, `mindone`, `ldm`, `adapter` or `tuned layers`.
        tensors: Tensors by our names.
        unused: Other contents of the files, and why they are not used.
        configs: Config of each model whose files have one.
        folder: Folder with tokenizer and scheduler, if there is one.
        adapter: Config of the adapter among the tensors, if there is one.
    """

    kind: str
    tensors: Tensors
    unused: dict[str, str] = field(default_factory=dict)
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)
    folder: Path | None = None
    adapter: dict[str, Any] = field(default_factory=dict)

    @property
    def is_whole(self) -> bool:
        """Whether there is a whole UNet, and not only tuned layers."""
        return f"{UNET}conv_in.weight" in self.tensors

    @property
    def has_temporal(self) -> bool:
        return any(map(is_temporal, self.tensors))

    def over(self, base: Checkpoint) -> Checkpoint:
        """Return the base with these tensors in the place of its own, LoRAs merged."""
        return replace(
            self, tensors=base.tensors | lora.merged(self.tensors, base.tensors), unused=base.unused | self.unused,
            configs=base.configs | self.configs, folder=base.folder,
        )  # fmt: skip


def read_checkpoint(path: Path | str) -> Checkpoint:
    """Recognise a file or folder by its contents, and read names and shapes; tensors are read later.

    Raises:
        CheckpointError: It is missing, damaged, malicious or of an unknown format.
    """
    path = Path(path)
    if not os.path.exists(path):
        raise CheckpointError(f"{path} does not exist; give a file or folder of weights")
    try:
        return _file(path) if path.is_file() else _folder(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None


def read_file(path: Path) -> tuple[Tensors, dict[str, str]]:
    """Read one file of weights: tensors by the file's own names, and its other names with the reason.

    Raises:
        CheckpointError: It is damaged, malicious or of an unknown format.
    """
    with path.open("rb") as file:
        begin = file.read(9)
    if begin[:4] == weight_files.ZIP or begin[:2] == weight_files.PICKLE:
        tensors, others = weight_files.read_torch(path)
        return tensors, dict.fromkeys(others, "no tensor")
    if begin[8:] == b"{" or path.suffix == ".safetensors":
        return weight_files.read_safetensors(path), {}
    if path.suffix not in (".ckpt", ""):
        raise CheckpointError(f"{path}: not a file of weights; give a .safetensors, .ckpt, .pth, .pt or .bin file")
    found = mindspore.read(path)
    tensors = {name: value for name, value in found.items() if not isinstance(value, str)}
    return tensors, {name: "a text" for name in found if name not in tensors}


def _file(path: Path) -> Checkpoint:
    tensors, others = read_file(path)
    kind, ours, unused = _renamed(tensors)
    if not ours:
        first = next(iter(tensors), "no names")[:80]
        raise CheckpointError(
            f"{path} holds {len(tensors)} tensors, none of a Stable Diffusion ({first!r}); "
            "known are diffusers, MindONE, the published code and single files"
        )
    return Checkpoint(kind, ours, others | unused)


def _folder(path: Path) -> Checkpoint:
    adapters = [folder for folder in (path, path / "adapter") if (folder / adapter.CONFIG).is_file()]
    if (path / MODEL_INDEX).is_file():
        parts = {part: path / part for part in (prefix.rstrip(".") for prefix in PARTS) if _weights(path / part)}
        if "unet" not in parts:
            raise CheckpointError(f"{path} holds no UNet weights: looked for unet/{STEMS[0]}.safetensors or .bin")
        found = replace(_parts(parts), folder=path)
        return replace(_adapter(adapters[-1]).over(found), kind=found.kind) if adapters else found
    if adapters:
        return _adapter(adapters[0])
    if _weights(path):
        return _parts({"unet": path})
    raise CheckpointError(
        f"{path} holds no weights: looked for {MODEL_INDEX}, {adapter.CONFIG} and {STEMS[0]}.safetensors or .bin; "
        "give the folder that contains them, or one file"
    )


def _adapter(folder: Path) -> Checkpoint:
    config = adapter.read_config(folder)
    tensors = weight_files.read_safetensors(folder / adapter.WEIGHTS)
    return Checkpoint("adapter", {f"{UNET}{name}": tensor for name, tensor in tensors.items()}, adapter=config)


def _parts(folders: dict[str, Path]) -> Checkpoint:
    """Read the models of a pipeline."""
    found = Checkpoint("diffusers", {})
    for part, folder in folders.items():
        tensors, others = {}, {}
        for file in _weights(folder):
            more, rest = read_file(file)
            tensors, others = tensors | more, others | rest
        _, ours, unused = _renamed(tensors, f"{part}.")
        found.tensors |= ours
        found.unused |= {f"{part}/{name}": why for name, why in {**others, **unused}.items()}
        if (folder / CONFIG).is_file():
            config = read_json(folder / CONFIG)
            if config.get("_class_name") == OFFICIAL_UNET:
                found.kind, config = "official", from_official(config)
            found.configs[part] = config
    return found


def _weights(folder: Path) -> list[Path]:
    """List the files of one model; an index that names files outside the folder is refused."""
    for stem in STEMS:
        for index in folder.glob(f"{stem}*.index.json"):
            names = {str(name) for name in read_json(index).get("weight_map", {}).values()}
            if strange := [name for name in names if Path(name).name != name or not (folder / name).is_file()]:
                raise CheckpointError(
                    f"{index} names {strange[0][:120]!r}, which is no file in its folder; copy the folder again"
                )
            return [folder / name for name in sorted(names)]
        for suffix in SUFFIXES:
            if (folder / f"{stem}{suffix}").is_file():
                return [folder / f"{stem}{suffix}"]
    return []


def _renamed(tensors: Tensors, part: str = "") -> tuple[str, Tensors, dict[str, str]]:
    """Return the kind, the tensors by our names, and the unused names with the reason.

    `part` is the prefix (`unet.`, ...) of the model that the tensors belong to, where their names do not have it.
    """
    if any(name.startswith("model.diffusion_model.") for name in tensors):
        kind, scheme = scheme_of(tensors)
        found = renamed(tensors, scheme, back=True)
        names = {theirs: ours for theirs, ours in found.items() if not _is_idle(theirs, ours, tensors)}
    else:
        names = {name: ours for name in tensors if (ours := _our_name(name, part))}
        kind = "diffusers" if part or f"{UNET}conv_in.weight" in names.values() else "tuned layers"
    ours = {ours: tensors[theirs] for theirs, ours in names.items()}
    return kind, split(ours), {name: _reason(name) for name in tensors if name not in names}


def _is_idle(theirs: str, ours: str, tensors: Iterable[str]) -> bool:
    """Whether a tensor is a buffer, or of OpenCLIP's last layer, which Stable Diffusion 2 does not use."""
    if not theirs.startswith(LDM_V2.text) or f"{LDM_V2.text}text_projection" not in tensors:
        return ours.endswith(BUFFERS)
    prefix = f"{LDM_V2.text}{LDM_V2.text_layers}."
    layers = [name.removeprefix(prefix).split(".")[0] for name in tensors if name.startswith(prefix)]
    last = max((int(layer) for layer in layers if layer.isdecimal()), default=-1)
    return theirs.startswith(f"{prefix}{last}.")


def _our_name(name: str, part: str) -> str | None:
    """Return our name of a tensor of diffusers, the published code or a fork of it."""
    bare = from_fork(name.removeprefix("module.").removeprefix("_orig_mod."))
    if ".conv_temporal." in bare or bare.endswith(BUFFERS) or bare.startswith(STATE) or bare in COUNTERS:
        return None
    if part:
        return old_vae(with_text_model(f"{part}{bare}"), back=True)
    if bare.startswith(PARTS):
        return bare
    return f"{UNET}{bare}" if bare.startswith(_UNET_LAYERS) else None


_REASONS: tuple[tuple[Callable[[str], bool], str], ...] = (
    (lambda name: name.startswith(STATE) or name in COUNTERS, "state of the optimiser or a moving average"),
    (lambda name: ".conv_temporal." in name, "a fork's temporal convolution, which this program does not have"),
    (lambda name: name.endswith(BUFFERS) or name.startswith(COMPUTED), "computed, not learned"),
    (lambda name: name.startswith((TEXT, "cond_stage_model.")), "not used by Stable Diffusion's text encoder"),
)


def _reason(name: str) -> str:
    return next((why for holds, why in _REASONS if holds(name)), "unknown")
