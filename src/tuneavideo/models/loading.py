"""Loading of base models: hub ids, folders and single files."""

from __future__ import annotations

import pickle
import re
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE
from safetensors import SafetensorError
from torch.nn.functional import cosine_similarity
from torch.serialization import get_unsafe_globals_in_checkpoint
from transformers import CLIPTokenizer

from tuneavideo.bases import BASES, check_base
from tuneavideo.errors import CheckpointError, ModelError
from tuneavideo.models.quiet import local_only, unreachable
from tuneavideo.storage.weight_files import read_safetensors, read_torch

Pipeline = StableDiffusionPipeline | StableDiffusionXLPipeline

CONFIGS = Path(__file__).parent / "configs"
# Family by the width of the text embeddings that the UNet attends to: a single file does not name it.
FAMILIES = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
# All of them were trained with CLIP's own vocabulary; they differ in what they pad with.
VOCABULARY = "openai/clip-vit-large-patch14"


PADDING = {"sd1": ("<|endoftext|>",), "sd2": ("!",), "sdxl": ("<|endoftext|>", "!")}

_UNET = re.compile(r"diffusion_pytorch_model(?:\.(?P<variant>\w+))?(?:-\d+-of-\d+)?\.(?:safetensors|bin)")
FAULTS = (
    OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError, SafetensorError, pickle.PickleError,
    CheckpointError,
)  # fmt: skip


def load_stock_pipeline(base: str, kind: Any = None, **options: Any) -> Any:
    """The stock pipeline of a base, or one of class `kind`.

    Args:
        base: See `source`.
        kind: Class of the pipeline; by default the one the base names.
        **options: Of `DiffusionPipeline.from_pretrained` or `from_single_file`, such as `dtype`.

    Raises:
        ModelError: The base is missing, damaged, holds more than tensors, or is of another family.
    """
    place = source(base)
    try:
        if Path(place).is_file():
            return from_file(Path(place), kind, **options)
        chosen = {"variant": variant(folder(place)), **without_checker(place), **local_only(place)}
        return (kind or DiffusionPipeline).from_pretrained(place, **chosen | options)
    except FAULTS as error:
        if "memory" in str(error) or "variant" in options:  # one that is not there is told as diffusers does
            raise
        raise ModelError(dangerous(place) or missing(base, error)) from error


def source(base: str) -> str:
    """Hub id, folder or file that a base is opened from."""
    return BASES[base].source if base in BASES else base


def folder(place: str) -> Path:
    """A diffusers folder, or where the hub's cache keeps the one of that id."""
    index = None if Path(place).is_dir() else _cached(place, "model_index.json")
    return index.parent if index else Path(place)


def variant(folder: Path) -> str | None:
    """The variant (such as `fp16`) of the weights in a diffusers folder; None if they are there without one."""
    named = [found["variant"] for file in (folder / "unet").glob("*") if (found := _UNET.fullmatch(file.name))]
    return None if None in named else next(iter(sorted(named)), None)


def from_file(file: Path, kind: Any = None, **options: Any) -> Any:
    """Open a `.safetensors` or `.ckpt` file that holds UNet, VAE and text encoders under their original names.

    Configs are those of the diffusers folder the file lies in, as on the hub, or our own of its family. Whether a
    Stable Diffusion 2.x predicts the velocity is found by asking it.
    """
    tensors = read_safetensors(file) if file.suffix == ".safetensors" else read_torch(file)[0]
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    if (file.parent / "model_index.json").is_file():
        config, family, words = file.parent, None, {}
    else:
        family = _family(file, shapes)
        config, words = CONFIGS / family, _tokenizers(file, family)
    about: Any = DiffusionPipeline.load_config(config)
    is_xl = "XL" in about["_class_name"]
    kind = kind or (StableDiffusionXLPipeline if is_xl else StableDiffusionPipeline)
    plain = {} if is_xl else {"requires_safety_checker": False}
    pipe = kind.from_single_file(str(file), config=str(config), **words, **plain, **options)
    if lacking := _lacking(pipe):
        raise ModelError(f"{file} is not a whole Stable Diffusion model: {lacking} is missing; get the full file")
    if family == "sd2" and _predicts_velocity(pipe):
        pipe.unet.register_to_config(sample_size=96)
        _reschedule(pipe, prediction_type="v_prediction")
    if family == "sdxl" and "v_pred" in shapes:  # a mark that community models carry
        _reschedule(pipe, prediction_type="v_prediction", rescale_betas_zero_snr="ztsnr" in shapes)
    return pipe


def without_checker(place: str) -> dict[str, Any]:
    """What keeps diffusers from loading the safety checker, which sees single images only, where there is one."""
    index = folder(place) / "model_index.json"
    has_checker = not index.is_file() or "safety_checker" in index.read_text(encoding="utf-8")
    return {"safety_checker": None, "requires_safety_checker": False} if has_checker else {}


def dangerous(place: str) -> str | None:
    """A line about the first pickle of a file or folder that holds more than tensors; None if there is none."""
    root = folder(place)
    for file in [root] if root.is_file() else _pickles(root):
        try:
            called = get_unsafe_globals_in_checkpoint(file)
        except (OSError, ValueError, RuntimeError, pickle.PickleError, EOFError):
            continue  # no pickle in a zip file: torch.load refuses what is not plain in others
        if called:
            return (
                f"{file}: refused, and nothing of it was run: besides tensors it names {', '.join(called[:3])}; "
                "take the .safetensors files of this model"
            )
    return None


def missing(base: str, error: Exception) -> str:
    """What to do about a base that cannot be opened, in one line."""
    place, first = source(base), textwrap.shorten(str(error), 300, placeholder=" ...")
    if Path(place).exists():
        return f"{place}: cannot be opened as a Stable Diffusion model: {first}"
    check_base(base)
    return (
        f"base {base!r} is not there: no such folder, and not in the hub's cache ({HF_HUB_CACHE}). Download it with "
        f"'hf download {place}', or give a folder or a .safetensors file; 'tuneavideo models' lists known bases"
        + ("" if HF_HUB_OFFLINE else f". ({unreachable() or first})")
    )


def _pickles(root: Path) -> Iterable[Path]:
    return (file for file in sorted(root.rglob("*")) if file.suffix in (".bin", ".ckpt", ".pt", ".pth"))


def _family(file: Path, shapes: dict[str, tuple[int, ...]]) -> str:
    prefix = "model.diffusion_model."
    channels = shapes.get(f"{prefix}input_blocks.0.0.weight", (0, 0))[1]
    looked_at = [s[-1] for name, s in shapes.items() if name.startswith(prefix) and name.endswith("attn2.to_k.weight")]
    if channels != 4 or not looked_at or looked_at[0] not in FAMILIES:
        raise ModelError(
            f"{file}: no whole text-to-image model of Stable Diffusion 1.x, 2.x or XL: its UNet takes {channels} "
            f"channels and text of width {looked_at[0] if looked_at else 'unknown'}; expected 4, and one of "
            f"{', '.join(map(str, FAMILIES))}. LoRAs and ControlNets go with 'tuneavideo edit --lora, --controlnet'"
        )
    return FAMILIES[looked_at[0]]


def _tokenizers(file: Path, family: str) -> dict[str, CLIPTokenizer]:
    """CLIP's tokenizer from the hub's cache, where any base has one, or from the hub."""
    places = [(VOCABULARY, ""), *((base.source, "tokenizer/") for base in BASES.values())]
    kept = (_cached(repository, f"{inside}vocab.json") for repository, inside in places)
    try:
        words = next(filter(None, kept), None) or hf_hub_download(VOCABULARY, "vocab.json")
        if not (Path(words).parent / "merges.txt").is_file():
            hf_hub_download(VOCABULARY, "merges.txt")
        return {
            name: CLIPTokenizer.from_pretrained(Path(words).parent, pad_token=pad, model_max_length=77)
            for name, pad in zip(("tokenizer", "tokenizer_2"), PADDING[family], strict=False)
        }
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{file} holds no tokenizer, and the hub's cache ({HF_HUB_CACHE}) has none that fits. Download it with "
            f"'hf download {VOCABULARY} vocab.json merges.txt'"
        ) from error


def _lacking(pipe: Any) -> str | None:
    """A tensor that diffusers found nothing for; it leaves such tensors without memory and does not say so."""
    models = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    return next((name for part in models for name, value in part.state_dict().items() if value.is_meta), None)


@torch.no_grad()
def _predicts_velocity(pipe: Any) -> bool:
    """Whether a UNet that sees almost nothing but noise answers with something else than that noise."""
    shape = (1, pipe.unet.config.in_channels, 32, 32)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(pipe.unet.dtype)
    text = pipe.encode_prompt("", "cpu", 1, False)[0]
    answer = pipe.unet(x, pipe.scheduler.config.num_train_timesteps - 1, text.to(x)).sample
    return float(cosine_similarity(answer.flatten().float(), x.flatten().float(), dim=0)) < 0.5


def _reschedule(pipe: Any, **changes: Any) -> None:
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **changes)


def _cached(repository: str, file: str) -> Path | None:
    """Where the hub's cache keeps a file; None if it does not, or if `repository` is no hub id."""
    try:
        found = try_to_load_from_cache(repository, file)
    except ValueError:
        return None
    return Path(found) if isinstance(found, str) else None
