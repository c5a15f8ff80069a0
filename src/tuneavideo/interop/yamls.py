"""Settings of the published code and of MindONE as ours. No torch here.

A row says what a key of theirs is called here, or, after `NOT:`, why it means nothing here; such keys are told in one
line, and unknown ones refused.
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
from tuneavideo.config import parse_yaml, stated_values
from tuneavideo.errors import SettingsError
from tuneavideo.settings import Settings, TuneSettings

logger = logging.getLogger(__name__)

NOT = "NOT:"
OFFICIAL: dict[str, str] = {
    "pretrained_model_path": "base",
    "output_dir": "out",
    "train_data.video_path": "video",
    "train_data.prompt": "prompt",
    "train_data.n_sample_frames": "num_frames",
    "train_data.num_frames": "num_frames",
    "train_data.width": "width",
    "train_data.height": "height",
    "train_data.sample_start_idx": "start",
    "train_data.sample_frame_rate": "stride",
    "train_data.frame_rate": "stride",
    "validation_data.prompts": "edit",
    "validation_data.video_length": f"{NOT} edits have the frames that were tuned on",
    "validation_data.num_frames": f"{NOT} edits have the frames that were tuned on",
    "validation_data.width": f"{NOT} edits have the size that was tuned on",
    "validation_data.height": f"{NOT} edits have the size that was tuned on",
    "validation_data.num_inference_steps": "num_inference_steps",
    "validation_data.guidance_scale": "guidance_scale",
    "validation_data.use_inv_latent": "fresh_noise",
    "validation_data.num_inv_steps": "num_inv_steps",
    "learning_rate": "learning_rate",
    "scale_lr": "scale_lr",
    "lr_scheduler": "lr_scheduler",
    "lr_warmup_steps": "lr_warmup_steps",
    "train_batch_size": "train_batch_size",
    "max_train_steps": "max_train_steps",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_checkpointing": "gradient_checkpointing",
    "checkpointing_steps": "checkpointing_steps",
    "validation_steps": "validation_steps",
    "trainable_modules": "trainable_modules",
    "adam_beta1": "adam_beta1",
    "adam_beta2": "adam_beta2",
    "adam_weight_decay": "adam_weight_decay",
    "adam_epsilon": "adam_epsilon",
    "max_grad_norm": "max_grad_norm",
    "resume_from_checkpoint": f"{NOT} a stopped run goes on with --resume RUN",
    "mixed_precision": "mixed_precision",
    "use_8bit_adam": "optimizer",
    "enable_xformers_memory_efficient_attention": f"{NOT} PyTorch's own attention is used",
    "seed": "seed",
}
MINDONE: dict[str, str] = {
    "video_path": "video",
    "prompt": "prompt",
    "num_frames": "num_frames",
    "sample_start_idx": "start",
    "sample_interval": "stride",
    "image_size": "resolution",
    "train_batch_size": "train_batch_size",
    "version": "base",
    "output_path": "out",
    "ckpt_save_interval": "checkpointing_steps",
    "max_train_steps": "max_train_steps",
    "trainable_modules": "trainable_modules",
    "start_learning_rate": "learning_rate",
    "scheduler": "lr_scheduler",
    "optim": "optimizer",
    "betas": "betas",
    "weight_decay": "adam_weight_decay",
    "warmup_steps": "lr_warmup_steps",
    "use_ema": "use_ema",
    "clip_grad": "clip_grad",
    "max_grad_norm": "max_grad_norm",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "seed": "seed",
    "pretrained_model_path": f"{NOT} version names the base; --base takes a file",
    "pretrained_model_file": f"{NOT} version names the base; --base takes a file",
    "model_config": f"{NOT} the base says what model it is",
    "end_learning_rate": f"{NOT} schedules end at 0",
    "decay_steps": f"{NOT} schedules end with the tuning",
    "resume": f"{NOT} a stopped run goes on with --resume RUN",
    **dict.fromkeys(("init_loss_scale", "loss_scale_factor", "scale_window"), f"{NOT} bf16 needs no loss scale"),
    **dict.fromkeys(
        (
            "mode", "use_parallel", "enable_modelarts", "num_workers", "num_parallel_workers", "json_data_path",
            "train_config", "data_path", "image_filter_size", "image_filter", "random_crop", "filter_small_size",
            "patch_size", "dataset_sink_mode", "unet_initialize_random", "callback_size", "epochs", "start_epoch",
            "save_checkpoint_steps", "keep_checkpoint_max", "ckpt_max_keep", "log_level", "log_interval", "dropout",
            "device_target", "device_id", "max_device_memory", "enable_flash_attention", "use_recompute", "task",
            "train_data_path", "vae_slicing", "profile", "train_steps", "shuffle",
        ),
        f"{NOT} of MindSpore and its machines",
    ),
}  # fmt: skip
OFFICIAL_DEFAULTS = {
    "preset": "official",
    "learning_rate": 3e-5,
    "num_frames": 8,
    "width": 512,
    "height": 512,
    "num_inference_steps": 50,
}
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
    """Settings of a file in our names, the run folder it asks for, and what its reader should know."""

    settings: dict[str, Any]
    out: str | None = None
    notices: list[str] = field(default_factory=list)
    dry_run: bool = False

    def tell(self, whose: str) -> None:
        if self.notices:
            logger.warning("%s: %s", whose, "; ".join(self.notices))


def read_config(path: Path | str, kind: type[Settings]) -> Config:
    """Settings of a YAML file of ours, of the published code or of MindONE; what has no meaning here is told.

    Raises:
        SettingsError: It is no such file, or a key or value is not known.
    """
    values = parse_yaml(path)
    if "train_data" in values or "validation_data" in values:
        config = official(values, str(path))
    elif values.keys() & {"sample_interval", "start_learning_rate", "image_size", "version", "model_config"}:
        config = mindone(values, str(path))
    else:
        out = values.pop("out", None)
        return Config(stated_values(kind, values, str(path)), None if out is None else str(out))
    config.tell(str(path))
    return config


def official(values: Mapping[str, Any], where: str) -> Config:
    """The published code's settings in ours."""
    flat = dict(_flat(values))
    config = _renamed(flat, OFFICIAL, where)
    own = config.settings
    if "edit" in own:
        own["edit"] = _prompts(own["edit"], where)
    if own.pop("fresh_noise", True) is False:
        own["fresh_noise"] = 1.0
    if own.pop("optimizer", False):
        own["optimizer"] = "adamw8bit"
    scaled = own.pop("scale_lr", False)
    if "base" in own:
        own["base"] = _base(str(own["base"]), config)
    own = config.settings = stated_values(TuneSettings, {**OFFICIAL_DEFAULTS, **own}, where)
    if scaled:
        own["learning_rate"] *= own.get("train_batch_size", 1) * own.get("gradient_accumulation_steps", 1)
        config.notices.append(f"scale_lr: learning_rate is {own['learning_rate']:g}; several processes do not raise it")
    return config


def mindone(values: Mapping[str, Any], where: str, base: str | None = None) -> Config:
    """MindONE's settings in ours; `base` is taken instead of the version's."""
    config = _renamed(values, MINDONE, where)
    own = config.settings
    if "base" in own:
        own["base"] = _row(VERSIONS, str(own["base"]), "version", where)
    if base:
        own["base"] = base
    if own.get("lr_scheduler") == "multi_step_decay":
        config.notices.append("scheduler multi_step_decay: not offered, constant is taken")
        own["lr_scheduler"] = "constant"
    elif "lr_scheduler" in own:
        own["lr_scheduler"] = _row(SCHEDULES, own["lr_scheduler"], "scheduler", where)
    if own.get("lr_warmup_steps") and own.get("lr_scheduler", "constant") == "constant":
        own["lr_scheduler"] = "constant_with_warmup"
    own["optimizer"] = _row(OPTIMIZERS, own.get("optimizer", "adamw"), "optim", where)
    betas = own.pop("betas", (0.9, 0.98))
    if not isinstance(betas, list | tuple) or len(betas) != 2:
        raise SettingsError(f"{where}: betas: expected two numbers, found {str(betas)[:80]!r}")
    own["adam_beta1"], own["adam_beta2"] = betas
    if own.pop("clip_grad", None) is False:
        own["max_grad_norm"] = NO_CLIPPING
    config.settings = stated_values(TuneSettings, {**MINDONE_DEFAULTS, **own}, where)
    config.notices += frames_told(config.settings)
    return config


def frames_told(own: Mapping[str, Any]) -> list[str]:
    """What is different about the frames; MindONE reads `stride` frames for every one it keeps, and keeps the last."""
    start, stride = own.get("start", 0), own.get("stride", 1)
    here = ", ".join(str(start + n * stride) for n in range(3))
    there = ", ".join(str(stride - 1 + n * stride) for n in range(3))
    if here == there:
        return []
    return [
        f"frames: here {here}, ...; MindONE took {there}, ... whatever the start (--start {stride - 1} takes those)"
    ]


def as_command(command: str, settings: Mapping[str, Any], **more: str | None) -> str:
    """A command of ours as one would type it."""
    words = ["tuneavideo", command, shlex.quote(str(settings.get("video", "CLIP")))]
    for name, value in {**settings, **{name: value for name, value in more.items() if value}}.items():
        if name == "video":
            continue
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        elif name == "edit":
            words += [f"--edit {shlex.quote(prompt)}" for prompt in value]
        elif isinstance(value, list | tuple):
            words.append(f"{flag} {' '.join(shlex.quote(str(each)) for each in value)}")
        else:
            words.append(f"{flag} {shlex.quote(str(value))}")
    return " ".join(words)


def _renamed(values: Mapping[str, Any], table: Mapping[str, str], where: str) -> Config:
    config, idle = Config({}), {}
    for key, value in values.items():
        new = _row(table, key, "key", where)
        if new.startswith(NOT):
            idle.setdefault(new.removeprefix(NOT).strip(), []).append(key)
        elif new == "out":
            config.out = str(value)
        elif value is not None:
            config.settings[new] = value
    config.notices += [f"{', '.join(keys)}: {why}" for why, keys in idle.items()]
    return config


def _row(table: Mapping[str, str], key: Any, what: str, where: str) -> str:
    if not isinstance(key, str) or key not in table:
        near = difflib.get_close_matches(str(key), table, n=1)
        advice = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(list(table)[:8])}, ..."
        raise SettingsError(f"{where}: unknown {what} {str(key)[:80]!r}; {advice}")
    return table[key]


def _flat(values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Two levels as one, with dots; prompts by edit type stay as they are."""
    out: list[tuple[str, Any]] = []
    for key, value in values.items():
        if key in ("train_data", "validation_data") and isinstance(value, dict):
            out += [(f"{key}.{name}", inner) for name, inner in value.items()]
        else:
            out.append((key, value))
    return out


def _prompts(value: Any, where: str) -> list[str]:
    """Prompts as a list, or keyed by the type of edit (style, object, background, multiple), or lists of those."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [prompt for each in value.values() for prompt in _prompts(each, where)]
    if isinstance(value, list):
        return [prompt for each in value for prompt in _prompts(each, where)]
    raise SettingsError(f"{where}: validation_data.prompts: expected prompts, found {str(value)[:80]!r}")


def _base(named: str, config: Config) -> str:
    """The base a path or hub id means: the path if it is there, else the base of that name."""
    if os.path.exists(named):
        return named
    last = named.rstrip("/").split("/")[-1]
    for name, base in BASES.items():
        if base.source.split("/")[-1] == last:
            if named != base.source:
                config.notices.append(f"{named} is not there: {name} is taken")
            return name
    return named
