"""MindONE's two commands as ours. No torch here."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import yaml

from tuneavideo.config import parse_yaml, stated_values
from tuneavideo.errors import SettingsError
from tuneavideo.interop.yamls import MINDONE, VERSIONS, Config, as_command, frames_told, mindone
from tuneavideo.settings import TuneSettings

SAMPLERS = {"ddim": "ddim", "dpm_solver": "dpm++", "plms": "plms", "uni_pc": "unipc"}
GUIDANCE = {"1": 7.5, "2": 9.0}
# What its inference takes, as ours; those without a name here are dealt with below or mean nothing.
INFER = {
    "video_path": "video",
    "num_frames": "num_frames",
    "sample_start_idx": "start",
    "sample_interval": "stride",
    "sampling_steps": "num_inference_steps",
    "inv_sampling_steps": "num_inv_steps",
    "scale": "guidance_scale",
    "negative_prompt": "negative_prompt",
    "fps": "fps",
    "H": "height",
    "W": "width",
}
_SAID = ("config", "version", "prompt", "ckpt_path", "output_path", "seed", "n_iter", "n_samples", "use_inv_latent")


def train(argv: Sequence[str]) -> Config:
    """`train_tuneavideo.py` and its flags, over its YAML."""
    parser = _parser("train", "MindONE's train_tuneavideo.py: its flags, read as this program's settings.")
    parser.add_argument("--train_config", help="its YAML file")
    for name in MINDONE:
        if name != "train_config":
            parser.add_argument(f"--{name}", type=_value, help=argparse.SUPPRESS)
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    given.pop("debug", None)
    own = given.pop("dry_run", None)
    path, base = given.pop("train_config", None), given.pop("base", None)
    config = mindone({**(parse_yaml(path) if path else {}), **given}, path or "mindone train", base)
    config.notices.insert(0, as_command("tune", config.settings, out=config.out))
    return _marked(config, own)


def infer(argv: Sequence[str]) -> tuple[Config, str]:
    """`inference_tuneavideo.py` and its flags; also the checkpoint to edit with."""
    parser = _parser("infer", "MindONE's inference_tuneavideo.py: its flags, read as this program's settings.")
    for name in (*INFER, *_SAID):
        parser.add_argument(f"--{name}", type=_value if name not in ("prompt", "negative_prompt", "version") else str)
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
    own = stated_values(TuneSettings, own, "mindone infer")
    config = Config(own, given.output_path, frames_told(own))
    repeated = [name for name in ("n_iter", "n_samples") if getattr(given, name) not in (None, 1)]
    if repeated:
        config.notices.append(f"{', '.join(repeated)}: edits from one inversion are alike; --fresh-noise varies them")
    if given.dpm_solver:
        config.notices.append("dpm_solver: its successor dpm++ is taken")
    if given.config:
        config.notices.append("config: the base says what model it is")
    config.notices.insert(0, as_command("adopt", config.settings, out=config.out, checkpoint=given.ckpt_path))
    return _marked(config, given.dry_run), str(given.ckpt_path)


def _parser(name: str, about: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(f"tuneavideo mindone {name}", description=about)
    parser.add_argument("--base", help="the base to take instead of the version's: a folder, file or name")
    parser.add_argument("--dry_run", action="store_true", default=None, help="only say what to type here")
    parser.add_argument("--debug", action="store_true", default=None, help="show the traceback of an error")
    return parser


def _value(word: str) -> Any:
    """A flag's value as YAML would have it."""
    try:
        return yaml.safe_load(word)
    except yaml.YAMLError:
        return word


def _marked(config: Config, dry_run: bool | None) -> Config:
    config.dry_run = bool(dry_run)
    return config
