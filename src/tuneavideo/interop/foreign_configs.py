"""YAML files of the published code and of MindONE as settings of this program. Does not import torch.

A table row gives the name of their key here or, after `NOT:`, the reason why it has no effect here. Such keys are
listed in one line; unknown keys are refused.
"""

from __future__ import annotations

import difflib
import logging
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tuneavideo.bases import BASES
from tuneavideo.config import parse_values, parse_yaml
from tuneavideo.errors import SettingsError
from tuneavideo.setting_types import Settings
from tuneavideo.settings import TuneSettings

logger = logging.getLogger(__name__)

NOT = "NOT:"
_SAME_FRAMES = f"{NOT} edits have the frames of the tuned clip"
_SAME_SIZE = f"{NOT} edits have the size of the tuned clip"
_RESUME = f"{NOT} --resume RUN continues a run that was stopped"
_BASE = f"{NOT} version names the base; --base takes a file"
OFFICIAL: dict[str, str] = {
    "pretrained_model_path": "base", "output_dir": "out",
    "train_data.video_path": "video", "train_data.prompt": "prompt",
    "train_data.n_sample_frames": "num_frames", "train_data.num_frames": "num_frames",
    "train_data.width": "width", "train_data.height": "height",
    "train_data.sample_start_idx": "start",
    "train_data.sample_frame_rate": "stride", "train_data.frame_rate": "stride",
    "validation_data.prompts": "edit",
    "validation_data.video_length": _SAME_FRAMES, "validation_data.num_frames": _SAME_FRAMES,
    "validation_data.width": _SAME_SIZE, "validation_data.height": _SAME_SIZE,
    "validation_data.num_inference_steps": "num_inference_steps",
    "validation_data.guidance_scale": "guidance_scale",
    "validation_data.use_inv_latent": "fresh_noise", "validation_data.num_inv_steps": "num_inv_steps",
    "use_8bit_adam": "optimizer",
    "resume_from_checkpoint": _RESUME,
    "enable_xformers_memory_efficient_attention": f"{NOT} PyTorch's own attention is used",
} | {
    name: name for name in (
        "learning_rate", "scale_lr", "lr_scheduler", "lr_warmup_steps", "train_batch_size", "max_train_steps",
        "gradient_accumulation_steps", "gradient_checkpointing", "checkpointing_steps", "validation_steps",
        "trainable_modules", "adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon", "max_grad_norm",
        "mixed_precision", "seed",
    )
}  # fmt: skip
MINDONE: dict[str, str] = {
    "video_path": "video", "sample_start_idx": "start", "sample_interval": "stride", "image_size": "resolution",
    "version": "base", "output_path": "out", "ckpt_save_interval": "checkpointing_steps",
    "start_learning_rate": "learning_rate", "scheduler": "lr_scheduler", "optim": "optimizer",
    "weight_decay": "adam_weight_decay", "warmup_steps": "lr_warmup_steps",
    "pretrained_model_path": _BASE, "pretrained_model_file": _BASE,
    "model_config": f"{NOT} the config of the base is used",
    "end_learning_rate": f"{NOT} schedules end at 0", "decay_steps": f"{NOT} schedules end with the tuning",
    "resume": _RESUME,
} | {
    name: name for name in (
        "prompt", "num_frames", "train_batch_size", "max_train_steps", "trainable_modules", "betas", "use_ema",
        "clip_grad", "max_grad_norm", "gradient_accumulation_steps", "seed",
    )
} | dict.fromkeys(("init_loss_scale", "loss_scale_factor", "scale_window"), f"{NOT} bf16 needs no loss scale") | (
    dict.fromkeys((
        "mode", "use_parallel", "enable_modelarts", "num_workers", "num_parallel_workers", "json_data_path",
        "train_config", "data_path", "image_filter_size", "image_filter", "random_crop", "filter_small_size",
        "patch_size", "dataset_sink_mode", "unet_initialize_random", "callback_size", "epochs", "start_epoch",
        "save_checkpoint_steps", "keep_checkpoint_max", "ckpt_max_keep", "log_level", "log_interval", "dropout",
        "device_target", "device_id", "max_device_memory", "enable_flash_attention", "use_recompute", "task",
        "train_data_path", "vae_slicing", "profile", "train_steps", "shuffle",
    ), f"{NOT} settings of MindSpore and its devices")
)  # fmt: skip
OFFICIAL_DEFAULTS = {
    "preset": "official", "learning_rate": 3e-5, "num_frames": 8, "width": 512, "height": 512,
    "num_inference_steps": 50,
}  # fmt: skip
MINDONE_DEFAULTS = {
    "base": "sd1.5", "num_frames": 12, "start": 0, "stride": 2, "resolution": 512, "fit": "stretch",
    "adam_epsilon": 1e-6, "adam_weight_decay": 0.01, "seed": 3407,
}  # fmt: skip
VERSIONS = {"1.5": "sd1.5", "2.0": "sd2.0-base", "2.1": "sd2.1-base", "2.0-v": "sd2.0", "2.1-v": "sd2.1"}
SCHEDULES = {"constant": "constant", "cosine_decay": "cosine", "polynomial_decay": "polynomial"}
OPTIMIZERS = {
    "adamw": "tuneavideo.interop.optimizer.UncorrectedAdamW",
    "adam": "torch.optim.Adam",
    "sgd": "torch.optim.SGD",
}
NO_CLIPPING = 1e9


@dataclass
class Config:
    """Settings of a YAML file under our names.

    Attributes:
        settings: Settings of `TuneSettings`.
        out: Run folder, if the file names one.
        notices: Differences from the other program, for the user.
        dry_run: Only print the command.
    """

    settings: dict[str, Any]
    out: str | None = None
    notices: list[str] = field(default_factory=list)
    dry_run: bool = False


def read_config(path: Path | str, kind: type[Settings]) -> Config:
    """Read a YAML file of this program, the published code or MindONE. Logs one line about keys without effect.

    Args:
        path: YAML file.
        kind: Settings that a file of this program holds.

    Raises:
        SettingsError: The file cannot be read, or has an unknown key or value.
    """
    values = parse_yaml(path)
    if "train_data" in values or "validation_data" in values:
        config = from_official(values, str(path))
    elif values.keys() & {"sample_interval", "start_learning_rate", "image_size", "version", "model_config"}:
        config = from_mindone(values, str(path))
    else:
        out = values.pop("out", None)
        return Config(parse_values(kind, values, str(path)), None if out is None else str(out))
    if config.notices:
        logger.warning("%s: %s", path, "; ".join(config.notices))
    return config


def from_official(values: Mapping[str, Any], where: str) -> Config:
    """Convert settings of the published code. `where` begins the error messages. Raises SettingsError."""
    config = _renamed(_flattened(values), OFFICIAL, where)
    own = config.settings
    if "edit" in own:
        own["edit"] = _prompts(own["edit"], where)
    if own.pop("fresh_noise", True) is False:
        own["fresh_noise"] = 1.0
    if own.pop("optimizer", False):
        own["optimizer"] = "adamw8bit"
    scaled = own.pop("scale_lr", False)
    if "base" in own:
        own["base"] = _known_base(str(own["base"]), config)
    own = config.settings = parse_values(TuneSettings, {**OFFICIAL_DEFAULTS, **own}, where)
    if scaled:
        own["learning_rate"] *= own.get("train_batch_size", 1) * own.get("gradient_accumulation_steps", 1)
        config.notices.append(f"scale_lr: learning_rate is {own['learning_rate']:g}; several processes do not raise it")
    return config


def from_mindone(values: Mapping[str, Any], where: str, base: str | None = None) -> Config:
    """Convert settings of MindONE; `base` replaces the base of their version. Raises SettingsError."""
    config = _renamed(values, MINDONE, where)
    own = config.settings
    if "base" in own:
        own["base"] = _look_up(VERSIONS, str(own["base"]), "version", where)
    if base:
        own["base"] = base
    if own.get("lr_scheduler") == "multi_step_decay":
        config.notices.append("scheduler multi_step_decay: not supported, constant is used")
        own["lr_scheduler"] = "constant"
    elif "lr_scheduler" in own:
        own["lr_scheduler"] = _look_up(SCHEDULES, own["lr_scheduler"], "scheduler", where)
    if own.get("lr_warmup_steps") and own.get("lr_scheduler", "constant") == "constant":
        own["lr_scheduler"] = "constant_with_warmup"
    own["optimizer"] = _look_up(OPTIMIZERS, own.get("optimizer", "adamw"), "optim", where)
    betas = own.pop("betas", (0.9, 0.98))
    if not isinstance(betas, list | tuple) or len(betas) != 2:
        raise SettingsError(f"{where}: betas: expected two numbers, found {str(betas)[:80]!r}")
    own["adam_beta1"], own["adam_beta2"] = betas
    if own.pop("clip_grad", None) is False:
        own["max_grad_norm"] = NO_CLIPPING
    config.settings = parse_values(TuneSettings, {**MINDONE_DEFAULTS, **own}, where)
    config.notices += frame_notices(config.settings)
    return config


def frame_notices(settings: Mapping[str, Any]) -> list[str]:
    """Describe the frames if they differ: MindONE reads `stride` frames for each one it uses, and uses the last."""
    start, stride = settings.get("start", 0), settings.get("stride", 1)
    here, there = (", ".join(str(first + n * stride) for n in range(3)) for first in (start, stride - 1))
    if here == there:
        return []
    return [
        f"frames: here {here}, ...; MindONE used {there}, ... whatever the start (--start {stride - 1} selects those)"
    ]


def to_command(command: str, settings: Mapping[str, Any], **more: str | None) -> str:
    """Format settings and further options as a command line of this program."""
    words = ["tuneavideo", command, shlex.quote(str(settings.get("video", "CLIP")))]
    for name, value in {**settings, **{name: value for name, value in more.items() if value}}.items():
        flag = f"--{name.replace('_', '-')}"
        if name == "video":
            continue
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        elif name == "edit":
            words += [f"--edit {shlex.quote(prompt)}" for prompt in value]
        else:
            each = value if isinstance(value, list | tuple) else [value]
            words.append(f"{flag} {' '.join(shlex.quote(str(one)) for one in each)}")
    return " ".join(words)


def _renamed(values: Mapping[str, Any], table: Mapping[str, str], where: str) -> Config:
    config, unused = Config({}), {}
    for key, value in values.items():
        new = _look_up(table, key, "key", where)
        if new.startswith(NOT):
            unused.setdefault(new.removeprefix(NOT).strip(), []).append(key)
        elif new == "out":
            config.out = str(value)
        elif value is not None:
            config.settings[new] = value
    config.notices += [f"{', '.join(keys)}: {why}" for why, keys in unused.items()]
    return config


def _look_up(table: Mapping[str, str], key: Any, what: str, where: str) -> str:
    if not isinstance(key, str) or key not in table:
        near = difflib.get_close_matches(str(key), table, n=1)
        advice = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(list(table)[:8])}, ..."
        raise SettingsError(f"{where}: unknown {what} {str(key)[:80]!r}; {advice}")
    return table[key]


def _flattened(values: Mapping[str, Any]) -> dict[str, Any]:
    """Join the keys of the two sections with a dot; prompts by type of edit stay nested."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        is_section = key in ("train_data", "validation_data") and isinstance(value, dict)
        out |= {f"{key}.{name}": inner for name, inner in value.items()} if is_section else {key: value}
    return out


def _prompts(value: Any, where: str) -> list[str]:
    """List the prompts of a list, or of a dict by type of edit (style, object, background, multiple)."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict | list):
        return [prompt for each in (value.values() if isinstance(value, dict) else value)
                for prompt in _prompts(each, where)]  # fmt: skip
    raise SettingsError(f"{where}: validation_data.prompts: expected prompts, found {str(value)[:80]!r}")


def _known_base(name: str, config: Config) -> str:
    """Return a path that exists, or else the known base whose name ends like it."""
    if os.path.exists(name):
        return name
    last = name.rstrip("/").split("/")[-1]
    for known, base in BASES.items():
        if base.source.split("/")[-1] == last:
            if name != base.source:
                config.notices.append(f"{name} does not exist: {known} is used")
            return known
    return name
