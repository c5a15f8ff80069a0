"""Flags of MindONE's two scripts as settings of this program. Does not import torch."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import yaml

from tuneavideo.config import parse_values, parse_yaml
from tuneavideo.errors import SettingsError
from tuneavideo.interop.foreign_configs import MINDONE, VERSIONS, Config, frame_notices, from_mindone, to_command
from tuneavideo.settings import TuneSettings

SAMPLERS = {"ddim": "ddim", "dpm_solver": "dpm++", "plms": "plms", "uni_pc": "unipc"}
# Default guidance scale by major version.
GUIDANCE = {"1": 7.5, "2": 9.0}
# Settings by flag of `inference_tuneavideo.py`.
INFER = {
    "video_path": "video", "num_frames": "num_frames", "sample_start_idx": "start", "sample_interval": "stride",
    "sampling_steps": "num_inference_steps", "inv_sampling_steps": "num_inv_steps", "scale": "guidance_scale",
    "negative_prompt": "negative_prompt", "fps": "fps", "H": "height", "W": "width",
}  # fmt: skip
_OTHERS = ("config", "version", "prompt", "ckpt_path", "output_path", "seed", "n_iter", "n_samples", "use_inv_latent")
_TEXTS = ("prompt", "negative_prompt", "version")


def train(argv: Sequence[str]) -> Config:
    """Parse flags of `train_tuneavideo.py`, which override its YAML file. Raises SettingsError."""
    parser = _parser("train", "MindONE's train_tuneavideo.py: its flags as settings of this program.")
    parser.add_argument("--train_config", help="its YAML file")
    for name in MINDONE:
        if name != "train_config":
            parser.add_argument(f"--{name}", type=_value, help=argparse.SUPPRESS)
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    given.pop("debug", None)
    dry_run, path, base = (given.pop(name, None) for name in ("dry_run", "train_config", "base"))
    config = from_mindone({**(parse_yaml(path) if path else {}), **given}, path or "mindone train", base)
    config.notices.insert(0, to_command("tune", config.settings, out=config.out))
    config.dry_run = bool(dry_run)
    return config


def infer(argv: Sequence[str]) -> tuple[Config, str]:
    """Parse flags of `inference_tuneavideo.py`. Returns the settings and the checkpoint. Raises SettingsError."""
    parser = _parser("infer", "MindONE's inference_tuneavideo.py: its flags as settings of this program.")
    for name in (*INFER, *_OTHERS):
        parser.add_argument(f"--{name}", type=str if name in _TEXTS else _value)
    for name in (*SAMPLERS, "fixed_code"):
        parser.add_argument(f"--{name}", action="store_true")
    given = parser.parse_args(argv)
    if not (given.video_path and given.prompt and given.ckpt_path):
        raise SettingsError("mindone infer: --video_path, --prompt and --ckpt_path are needed")
    version = given.version or "2.1"
    if version not in VERSIONS:
        raise SettingsError(f"mindone infer: --version {version}: known are {', '.join(VERSIONS)}")
    own: dict[str, Any] = {
        "prompt": "the source", "base": given.base or VERSIONS[version], "edit": (str(given.prompt),), "fit": "stretch",
        "num_frames": 12, "stride": 2, "num_inference_steps": 20, "num_inv_steps": 50, "fps": 8.0,
        "sampler": next((ours for name, ours in SAMPLERS.items() if getattr(given, name)), "dpm++"),
        "guidance_scale": GUIDANCE[version[0]], "formats": ("gif", "frames"),
    }  # fmt: skip
    own |= {ours: value for name, ours in INFER.items() if (value := getattr(given, name)) is not None}
    if given.use_inv_latent is False:
        own["fresh_noise"] = 1.0
    if given.seed is not None:
        own["seeds"] = (given.seed,)
    own = parse_values(TuneSettings, own, "mindone infer")
    command = to_command("adopt", own, out=given.output_path, checkpoint=given.ckpt_path)
    notices = [command, *frame_notices(own), *_infer_notices(given)]
    return Config(own, given.output_path, notices, bool(given.dry_run)), str(given.ckpt_path)


def _infer_notices(given: argparse.Namespace) -> list[str]:
    repeated = ", ".join(name for name in ("n_iter", "n_samples") if getattr(given, name) not in (None, 1))
    notices = [
        (repeated, f"{repeated}: edits from one inversion are equal; --fresh-noise varies them"),
        (given.dpm_solver, "dpm_solver: its successor dpm++ is used"),
        (given.config, "config: the config of the base is used"),
    ]
    return [text for applies, text in notices if applies]


def _parser(name: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(f"tuneavideo mindone {name}", description=description)
    parser.add_argument("--base", help="folder, file or name of the base, instead of the version's")
    parser.add_argument("--dry_run", action="store_true", default=None, help="only print the command of this program")
    parser.add_argument("--debug", action="store_true", default=None, help="show the traceback of an error")
    return parser


def _value(word: str) -> Any:
    """Parse a flag's value as YAML."""
    try:
        return yaml.safe_load(word)
    except yaml.YAMLError:
        return word
