"""Add-ons of an edit: LoRAs, textual inversions, a ControlNet, a reference picture.

diffusers' loaders put them into the stock pipeline *before* its UNet is inflated, since they count attention layers and
find them by name.
"""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from tuneavideo.bases import is_hub_id
from tuneavideo.config import weighted
from tuneavideo.errors import AdapterError
from tuneavideo.method.conditioning import Conditions
from tuneavideo.method.inflate import VideoUNet
from tuneavideo.models.adapter import fingerprint
from tuneavideo.models.controlnet import Control, maps
from tuneavideo.models.loading import FAULTS, Pipeline, dangerous
from tuneavideo.models.quiet import local_only, quiet, unreachable
from tuneavideo.settings import EditSettings
from tuneavideo.storage import cache
from tuneavideo.video import AnyVideo

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AddOns:
    """Add-ons that are loaded into a base.

    Attributes:
        control: ControlNet, if there is one.
        images: Embeddings `1 I D` of no picture and of the reference picture, if there is an IP-Adapter.
        fingerprint: Digest of all that was loaded, part of the inversion's file name; empty without add-ons.
    """

    control: Control | None = None
    images: tuple[Tensor, Tensor] | None = None
    fingerprint: list[str] = field(default_factory=list)

    def with_controlnet(self, video: VideoUNet) -> VideoUNet:
        """Return the UNet with the ControlNet."""
        return replace(video, control=self.control)

    def with_reference(self, conditions: Conditions) -> Conditions:
        """Add the reference picture to all conditions but the first, which are those of the negative prompt."""
        if self.images is None:
            return conditions
        without, shown = self.images
        return replace(conditions, images_BID=torch.cat([without, *[shown] * (len(conditions) - 1)]))


def load(pipe: Pipeline, settings: EditSettings, source: AnyVideo) -> AddOns:
    """Load what `settings` ask for into a pipeline whose UNet is not inflated yet.

    Args:
        pipe: The stock pipeline of the base that edits.
        settings: Settings of the edits.
        source: The clip that was tuned on, of which control maps are computed.

    Raises:
        TuneAVideoError: A file is missing, damaged or of another kind of base.
    """
    modules = {"unet": pipe.unet, "text": pipe.text_encoder, "text_2": getattr(pipe, "text_encoder_2", None)}
    before = {(part, name) for part, module in modules.items() if module for name, _ in module.named_parameters()}
    tokens = [token for file in settings.embedding for token in _embedding(pipe, file)]
    for token in tokens:
        if not any(token in prompt for prompt in (*settings.prompt, settings.negative_prompt)):
            logger.warning("no prompt names %s, so its embedding changes nothing", token)
    weights = _loras(pipe, settings.lora)
    images = _reference(pipe, settings) if settings.ip_adapter else None
    control = _control(pipe, settings, source) if settings.controlnet else None
    parts: list[Any] = [
        value.detach()
        for part, module in modules.items() if module
        for name, value in module.named_parameters()
        if (part, name.replace(".base_layer.", ".")) not in before
    ]  # fmt: skip
    parts += [weights] if weights else []
    parts += [settings.ip_scale] if images else []
    parts += [control.net, control.maps_TCHW, control.scale] if control else []
    parts += [fingerprint(pipe.unet)] if settings.edit_model else []
    return AddOns(control, images, [cache.key(*parts)] if parts else [])


def _loras(pipe: Any, wanted: tuple[str, ...]) -> list[float]:
    """Load LoRAs of the diffusers or the kohya format, and return their weights."""
    weights = []
    for number, each in enumerate(wanted):
        place, weight = weighted(each)
        name = f"style_{number}"
        with _one_line_errors("LoRA", place):
            pipe.load_lora_weights(place, adapter_name=name, **local_only(place))
        if not any(name in names for names in pipe.get_list_adapters().values()):
            raise AdapterError(f"LoRA {place}: no layer of it is in this base; take one made for this kind of base")
        weights.append(weight)
    if weights:
        pipe.set_adapters([f"style_{number}" for number in range(len(weights))], weights)
    return weights


def _embedding(pipe: Any, file: str) -> list[str]:
    """Load a textual inversion, and return its token."""
    with _one_line_errors("embedding", file):
        is_safe = file.endswith(".safetensors")
        contents: Any = load_file(file) if is_safe else torch.load(file, map_location="cpu", weights_only=True)
        token, parts = _embedded(contents, Path(file).stem)
        for name, vectors in parts.items():
            words = getattr(pipe, name.replace("text_encoder", "tokenizer"))
            width = getattr(pipe, name).get_input_embeddings().weight.shape[-1]
            if vectors.shape[-1] != width:
                raise AdapterError(
                    f"embedding {file}: its vectors have {vectors.shape[-1]} numbers, the base's text encoder takes "
                    f"{width}; take one made for this kind of base"
                )
            pipe.load_textual_inversion(vectors, token=token, text_encoder=getattr(pipe, name), tokenizer=words)
    return [token]


def _embedded(contents: Any, stem: str) -> tuple[str, dict[str, Tensor]]:
    """Return the token and the vectors for each text encoder; files of other tools have the file name as token."""
    if "clip_l" in contents and "clip_g" in contents:
        return stem, {"text_encoder": contents["clip_l"], "text_encoder_2": contents["clip_g"]}
    if "string_to_param" in contents:
        return stem, {"text_encoder": contents["string_to_param"]["*"]}
    if len(contents) != 1:
        raise ValueError(f"expected one embedding, found {', '.join(map(str, contents))}")
    ((name, vectors),) = contents.items()
    return (stem if name == "emb_params" else name), {"text_encoder": vectors}


def _control(pipe: Any, settings: EditSettings, source: AnyVideo) -> Control:
    place = str(settings.controlnet)
    with _one_line_errors("ControlNet", place):
        load = ControlNetModel.from_single_file if Path(place).is_file() else ControlNetModel.from_pretrained
        net: Any = load(place, torch_dtype=pipe.unet.dtype, **local_only(place))
    for name in ("block_out_channels", "cross_attention_dim"):
        theirs, ours = str(net.config[name]).strip("[()]"), str(pipe.unet.config[name]).strip("[()]")
        if theirs != ours:
            raise AdapterError(
                f"ControlNet {place}: its {name} is {theirs}, the base's is {ours}; take one made for this kind of base"
            )
    seen = maps(settings.control, source).to(pipe._execution_device, net.dtype)
    return Control(net.to(pipe._execution_device).eval(), seen, settings.control_scale)


def _reference(pipe: Any, settings: EditSettings) -> tuple[Tensor, Tensor]:
    """Load an IP-Adapter, and return the embeddings of no picture and of the reference picture."""
    place = Path(str(settings.ip_adapter))
    if place.is_file():
        root, inside = str(place.parent), ""
    else:
        owner, name, *folders = place.parts[:-1] if len(place.parts) > 3 else (*place.parts[:2], "models")
        root, inside = f"{owner}/{name}", "/".join(folders)
    with _one_line_errors("IP-Adapter", str(place) if place.is_file() else root):
        weights = place.name if len(place.parts) > 2 else "ip-adapter_sd15.safetensors"
        pipe.load_ip_adapter(root, subfolder=inside, weight_name=weights, **local_only(root))
        pipe.set_ip_adapter_scale(settings.ip_scale)
    with _one_line_errors("ip_image", str(settings.ip_image)):
        picture = Image.open(str(settings.ip_image)).convert("RGB")
    with torch.no_grad():
        both = pipe.prepare_ip_adapter_image_embeds(picture, None, pipe._execution_device, 1, True)[0]
    without, shown = both.to(pipe.unet.dtype).chunk(2)
    return without, shown


@contextmanager
def _one_line_errors(what: str, place: str) -> Iterator[None]:
    """Turn a library's error about a file into an `AdapterError` of one line."""
    try:
        with quiet():
            yield
    except FAULTS as error:
        if "out of memory" in str(error):
            raise
        if is_hub_id(place) and (network := unreachable()):
            how = f"'hf download {place}' where there is a network, or give a file or folder"
            raise AdapterError(f"{what} {place} is not on this machine, and {network}; {how}") from error
        reason = "its shapes are others; take one made for this kind of base"
        if "size mismatch" not in str(error):
            reason = textwrap.shorten(str(error), 300, placeholder=" ...")
        raise AdapterError(dangerous(place) or f"{what} {place}: cannot be used with this base: {reason}") from error
