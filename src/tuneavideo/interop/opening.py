"""What a path is, and its tensors in our names."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tuneavideo.errors import CheckpointError
from tuneavideo.interop import mindspore, official, pickled, safe, shapes
from tuneavideo.interop.lazy import Lazy, Tensors
from tuneavideo.interop.names import LDM, LDM_V2, MINDONE, PARTS, TEXT, UNET, Dialect, opened, renamed
from tuneavideo.models import adapter

# What training programs keep beside the weights.
STATE = ("adam_m.", "adam_v.", "ema.", "model_ema.", "moments.", "moment1.", "moment2.", "accum.", "optimizer")
COUNTERS = (
    "global_step", "scale_sense", "cur_step", "epoch_num", "current_iterator_step", "last_overflow_iterator_step",
    "learning_rate", "beta1_power", "beta2_power", "loss_scale", "step_num", "epoch", "weight_decay", "updates",
)  # fmt: skip
BUFFERS = ("alphas", "betas", "sqrt_", "log_one", "posterior", "model.alphas", "model.betas", "lvlb", "logvar")
# A component's weights by any of their usual names, best first.
WEIGHTS = ("diffusion_pytorch_model", "model", "pytorch_model", "open_clip_pytorch_model")
SUFFIXES = (".safetensors", ".fp16.safetensors", ".non_ema.safetensors", ".bin", ".fp16.bin")
CONFIG, INDEX = "config.json", ".index.json"
MODEL_INDEX = "model_index.json"


@dataclass
class Checkpoint:
    """Weights of some program, in our names.

    Attributes:
        kind: Whose they are: `diffusers`, `official`, `mindone`, `ldm`, `adapter` or `tuned layers`.
        tensors: By our names.
        left: What the file holds beside, and why it is of no use here.
        configs: Config of each model, where the files say it.
        folder: Where tokenizer and scheduler lie, if anywhere.
        learned: Config of the adapter among the tensors, if there is one.
    """

    kind: str
    tensors: Tensors
    left: dict[str, str] = field(default_factory=dict)
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)
    folder: Path | None = None
    learned: dict[str, Any] = field(default_factory=dict)

    @property
    def is_whole(self) -> bool:
        """Whether there is a UNet, and not only tuned layers of one."""
        return f"{UNET}conv_in.weight" in self.tensors

    def over(self, base: Checkpoint) -> Checkpoint:
        """These tensors in the place of a base's."""
        return Checkpoint(
            self.kind,
            {**base.tensors, **self.tensors},
            {**base.left, **self.left},
            {**base.configs, **self.configs},
            base.folder,
            self.learned,
        )


def opened_at(path: Path | str) -> Checkpoint:
    """Tell what `path` is, and read its names.

    Raises:
        CheckpointError: It is no checkpoint that is known, damaged or refused.
    """
    path = Path(path)
    if not os.path.exists(path):
        raise CheckpointError(f"{path} is not there; give a file or folder of weights")
    try:
        return _file(path) if path.is_file() else _folder(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None


def contents(path: Path) -> tuple[dict[str, Lazy], dict[str, str]]:
    """Tensors of a file by its own names; and names of what is none, each with its reason."""
    with path.open("rb") as file:
        begin = file.read(9)
    if begin[:4] == pickled.ZIP or begin[:2] == pickled.LEGACY:
        tensors, others = pickled.read(path)
        return tensors, dict.fromkeys(others, "no tensor")
    if begin[8:] == b"{" or path.suffix == ".safetensors":
        return safe.read(path)[0], {}
    if path.suffix not in (".ckpt", ""):
        raise CheckpointError(f"{path}: not a file of weights; give a .safetensors, .ckpt, .pth, .pt or .bin file")
    found = mindspore.read(path)
    tensors = {name: value for name, value in found.items() if not isinstance(value, str)}
    return tensors, {name: "a text" for name in found if name not in tensors}


def in_our_names(tensors: Tensors, part: str = "") -> tuple[str, Tensors, dict[str, str]]:
    """Kind, tensors by our names, and the names that were of no use, with the reason.

    `part` says which model the tensors are of, where their names do not (`unet.`, ...).
    """
    if any(name.startswith("model.diffusion_model.") for name in tensors):
        kind, dialect = dialect_of(tensors)
        names = renamed(tensors, dialect, back=True)
        names = {theirs: ours for theirs, ours in names.items() if not _is_idle(theirs, ours, tensors)}
        useful = {ours: tensors[theirs] for theirs, ours in names.items()}
        return kind, opened(useful), {name: _reason(name) for name in tensors if name not in names}
    names = {name: _plain(name, part) for name in tensors}
    left = {name: _reason(name) for name, ours in names.items() if ours is None}
    found = {ours: tensors[name] for name, ours in names.items() if ours}
    return ("diffusers" if f"{UNET}conv_in.weight" in found or part else "tuned layers"), opened(found), left


def _is_idle(theirs: str, ours: str, tensors: Iterable[str]) -> bool:
    """Buffers; and the last layer of OpenCLIP, which Stable Diffusion 2 does not run."""
    if not theirs.startswith(LDM_V2.text) or f"{LDM_V2.text}text_projection" not in tensors:
        return ours.endswith(shapes.BUFFERS)
    place = f"{LDM_V2.text}{LDM_V2.text_layers}."
    last = max((int(name.removeprefix(place).split(".")[0]) for name in tensors if name.startswith(place)), default=-1)
    return theirs.startswith(f"{place}{last}.")


def dialect_of(names: Iterable[str]) -> tuple[str, Dialect]:
    """Who names whole models so: MindONE, or the first code of Stable Diffusion 1 or 2."""
    names = list(names)
    if any(name.endswith(".gamma") or ".in_layers_norm." in name for name in names):
        return "mindone", MINDONE
    return "ldm", LDM_V2 if any(name.startswith(LDM_V2.text) for name in names) else LDM


def _file(path: Path) -> Checkpoint:
    tensors, left = contents(path)
    kind, ours, more = in_our_names(tensors)
    if not ours:
        first = next(iter(tensors), "no names")[:80]
        raise CheckpointError(
            f"{path} holds {len(tensors)} tensors, none of a Stable Diffusion ({first!r}); "
            "known are diffusers, MindONE, the published code and single files"
        )
    return Checkpoint(kind, ours, left | more)


def _folder(path: Path) -> Checkpoint:
    inner = path / "adapter"
    if (path / MODEL_INDEX).is_file():
        found = _pipeline(path)
        return replace(_adapter(inner).over(found), kind=found.kind) if (inner / adapter.CONFIG).is_file() else found
    if (path / adapter.CONFIG).is_file() or (inner / adapter.CONFIG).is_file():
        return _adapter(path if (path / adapter.CONFIG).is_file() else inner)
    if _weights(path):
        return _components(path, {"unet": path})
    raise CheckpointError(
        f"{path} holds no weights: looked for {MODEL_INDEX}, {adapter.CONFIG} and {WEIGHTS[0]}.safetensors or .bin; "
        "give the folder that contains them, or one file"
    )


def _pipeline(path: Path) -> Checkpoint:
    parts = {part.rstrip("."): path / part.rstrip(".") for part in PARTS if _weights(path / part.rstrip("."))}
    if "unet" not in parts:
        raise CheckpointError(f"{path} holds no UNet weights: looked for unet/{WEIGHTS[0]}.safetensors or .bin")
    found = _components(path, parts)
    found.folder = path
    return found


def _components(path: Path, parts: dict[str, Path]) -> Checkpoint:
    found = Checkpoint("diffusers", {})
    for part, folder in parts.items():
        tensors, left = {}, {}
        for file in _weights(folder):
            more, others = contents(file)
            tensors, left = tensors | more, left | others
        _, ours, unused = in_our_names(tensors, f"{part}.")
        found.tensors |= ours
        found.left |= {f"{part}/{name}": why for name, why in {**left, **unused}.items()}
        if (folder / CONFIG).is_file():
            config = _json(folder / CONFIG)
            if config.get("_class_name") == official.UNET_CLASS:
                found.kind, config = "official", official.image_config(config)
            found.configs[part] = config
    return found


def _weights(folder: Path) -> list[Path]:
    """Files of one component; names that lead out of the folder are refused."""
    for stem in WEIGHTS:
        for index in folder.glob(f"{stem}*{INDEX}"):
            names = {str(name) for name in _json(index).get("weight_map", {}).values()}
            if strange := [name for name in names if Path(name).name != name or not (folder / name).is_file()]:
                raise CheckpointError(
                    f"{index} names {strange[0][:120]!r}, which is no file beside it; copy the folder again"
                )
            return [folder / name for name in sorted(names)]
        for suffix in SUFFIXES:
            if (folder / f"{stem}{suffix}").is_file():
                return [folder / f"{stem}{suffix}"]
    return []


def _adapter(folder: Path) -> Checkpoint:
    config = _json(folder / adapter.CONFIG)
    if config.get("format") != adapter.FORMAT:
        raise CheckpointError(
            f"{folder}: adapter format {config.get('format', 'unknown')}, this version reads {adapter.FORMAT}"
        )
    tensors, _ = safe.read(folder / adapter.WEIGHTS)
    return Checkpoint("adapter", {f"{UNET}{name}": tensor for name, tensor in tensors.items()}, learned=config)


def _plain(name: str, part: str) -> str | None:
    """Our name of a tensor that diffusers, the published code or a fork of it wrote."""
    bare = official.from_fork(name.removeprefix("module.").removeprefix("_orig_mod."))
    if ".conv_temporal." in bare or bare.endswith(shapes.BUFFERS) or bare.startswith(STATE) or bare in COUNTERS:
        return None
    if not part and bare.startswith(PARTS):
        return bare
    if not part:
        known = (
            "conv_in.",
            "conv_out.",
            "conv_norm_out.",
            "time_embedding.",
            "down_blocks.",
            "up_blocks.",
            "mid_block.",
        )
        return f"{UNET}{bare}" if bare.startswith(known) else None
    return official.new_vae(shapes.ours(f"{part}{bare}"))


_REASONS: tuple[tuple[Callable[[str], bool], str], ...] = (
    (lambda name: name.startswith(STATE) or name in COUNTERS, "state of the optimiser or a moving average"),
    (lambda name: ".conv_temporal." in name, "a fork's temporal convolution, which this program does not have"),
    (lambda name: name.endswith(shapes.BUFFERS) or name.startswith(BUFFERS), "computed, not learned"),
    (lambda name: name.startswith((TEXT, "cond_stage_model.")), "not used by Stable Diffusion's text encoder"),
)


def _reason(name: str) -> str:
    return next((why for holds, why in _REASONS if holds(name)), "unknown")


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise CheckpointError(f"{path}: no sound JSON ({str(error)[:120]}); copy it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value
