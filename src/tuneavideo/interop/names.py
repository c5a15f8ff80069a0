"""Names of a Stable Diffusion's tensors in each program, and their conversion from and to diffusers' names.

diffusers' names with a prefix (`unet.`, `vae.`, `text_encoder.`) are the common form, here called "ours". A
`NamingScheme` and the layout of a model give a table of layer names, which is read in both directions. What is more
than a name (three projections in one tensor, 1x1 convolutions for linear layers) is `split` and `merged`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from tuneavideo.storage.tensors import Tensors, concatenated

UNET, VAE, TEXT = PARTS = ("unet.", "vae.", "text_encoder.")
TEMPORAL = (".attn_temp.", ".norm_temp.")
# Tensors that models compute when they are made.
BUFFERS = ("position_ids",)
# The temporal layers in a fork of the published code.
_FORK = {"attn_temporal": "attn_temp", "norm_temporal": "norm_temp"}
# The VAE's attention in the original code, and in diffusers 0.11, which the published code pins.
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OLD_VAE_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
# More blocks and layers than any VAE or text encoder of Stable Diffusion has.
_VAE_BLOCKS, _TEXT_LAYERS = 8, 64


@dataclass(frozen=True)
class NamingScheme:
    """Names of a program, by ours.

    Attributes:
        resnet: Layers of a UNet's residual block.
        convolution: Suffix of a single convolution.
        norm: Weight and bias of a norm.
        text: Prefix of the text encoder.
        text_ends: Layers of the text encoder outside of the transformer; empty if all are named as ours.
        text_layer: Layers of a transformer layer.
        text_layers: Prefix of the transformer layers.
    """

    resnet: Mapping[str, str]
    convolution: str = ""
    norm: Mapping[str, str] = field(default_factory=dict)
    text: str = "cond_stage_model.transformer."
    text_ends: Mapping[str, str] = field(default_factory=dict)
    text_layer: Mapping[str, str] = field(default_factory=dict)
    text_layers: str = ""


LDM = NamingScheme(
    resnet={
        "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
        "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
    },
)  # fmt: skip
# Stable Diffusion 2, whose text encoder is OpenCLIP.
LDM_V2 = NamingScheme(
    resnet=LDM.resnet,
    text="cond_stage_model.model.",
    text_ends={
        "embeddings.token_embedding": "token_embedding", "embeddings.position_embedding.weight": "positional_embedding",
        "final_layer_norm": "ln_final",
    },
    text_layer={
        "self_attn.in_proj.weight": "attn.in_proj_weight", "self_attn.in_proj.bias": "attn.in_proj_bias",
        "self_attn.out_proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
    },
    text_layers="transformer.resblocks",
)  # fmt: skip
MINDONE = NamingScheme(
    resnet={
        "norm1": "in_layers_norm", "conv1": "in_layers_conv.conv", "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers_norm", "conv2": "out_layers_conv.conv", "conv_shortcut": "skip_connection.conv",
    },
    convolution=".conv",
    norm={"weight": "gamma", "bias": "beta"},
    text_ends={
        "embeddings.token_embedding.weight": "embedding_table",
        "embeddings.position_embedding.weight": "positional_embedding", "final_layer_norm": "ln_final",
    },
    text_layer={
        "self_attn.in_proj": "attn.attn.in_proj", "self_attn.out_proj": "attn.attn.out_proj", "mlp.fc1": "c_fc",
        "mlp.fc2": "c_proj", "layer_norm1": "ln_1", "layer_norm2": "ln_2",
    },
    text_layers="transformer_layer.resblocks",
)  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """Depth of a model: UNet stages, residual blocks per stage, stages with attention; stages of the VAE."""

    stages: int
    blocks: int
    attention: frozenset[int]
    vae_stages: int

    @classmethod
    def of_ours(cls, names: Sequence[str]) -> Layout:
        found = [match for name in names if (match := re.match(r"unet\.down_blocks\.(\d+)\.(\w+)\.(\d+)\.", name))]
        resnets = [(int(at[1]), int(at[3])) for at in found if at[2] == "resnets"]
        stages, blocks = (1 + max((place[axis] for place in resnets), default=0) for axis in range(2))
        attention = frozenset(int(at[1]) for at in found if at[2] == "attentions")
        return cls(stages, blocks, attention, _vae_stages(names, r"decoder\.up_blocks\.(\d+)\."))

    @classmethod
    def of_theirs(cls, names: Sequence[str]) -> Layout:
        found = [match for name in names if (match := re.search(r"input_blocks\.(\d+)\.(\d+)\.(\w+)", name))]
        downs = sorted({int(at[1]) for at in found if at[3] == "op"})
        blocks = downs[0] - 1 if downs else max((int(at[1]) for at in found), default=1)
        attention = frozenset((int(at[1]) - 1) // (blocks + 1) for at in found if at[2] == "1")
        return cls(len(downs) + 1, max(blocks, 1), attention, _vae_stages(names, r"decoder\.up\.(\d+)\."))


def renamed(names: Iterable[str], scheme: NamingScheme, *, back: bool = False) -> dict[str, str]:
    """Map our names to a scheme's, or `back` from them to ours. Names the scheme does not have are left out."""
    names = list(names)
    table = dict(_layers(scheme, Layout.of_theirs(names) if back else Layout.of_ours(names)))
    norm = scheme.norm
    if back:
        table, norm = {theirs: ours for ours, theirs in table.items()}, {new: old for old, new in norm.items()}
    out = {}
    for name in names:
        if new := _lookup(name, table):
            stem, _, leaf = new.rpartition(".")
            out[name] = f"{stem}.{norm[leaf]}" if leaf in norm and (back or _is_norm(name)) else new
    return out


def scheme_of(names: Iterable[str]) -> tuple[str, NamingScheme]:
    """Return kind (`mindone` or `ldm`) and scheme of a whole model whose names are not ours."""
    names = list(names)
    if any(name.endswith(".gamma") or ".in_layers_norm." in name for name in names):
        return "mindone", MINDONE
    return "ldm", LDM_V2 if any(name.startswith(LDM_V2.text) for name in names) else LDM


def split(tensors: Tensors) -> Tensors:
    """Split each `in_proj` into three projections, and make linear layers of the VAE's 1x1 convolutions."""
    out: Tensors = {}
    for name, tensor in tensors.items():
        if ".self_attn.in_proj." in name:
            count = tensor.shape[0] // 3
            for row, part in enumerate("qkv"):
                out[name.replace(".in_proj.", f".{part}_proj.")] = tensor.rows(row * count, count)
        elif _is_vae_projection(name) and tensor.shape[2:] == (1, 1):
            out[name] = tensor.reshaped(*tensor.shape[:2])
        else:
            out[name] = tensor
    return out


def merged(tensors: Tensors, *, in_proj: bool) -> Tensors:
    """Invert `split`; the text encoder's projections are merged only if `in_proj`."""
    out: Tensors = {}
    for name, tensor in tensors.items():
        if in_proj and (match := re.search(r"\.self_attn\.([qkv])_proj\.", name)):
            parts = [name.replace(f".{match[1]}_proj.", f".{part}_proj.") for part in "qkv"]
            if all(part in tensors for part in parts):
                whole = name.replace(f".{match[1]}_proj.", ".in_proj.")
                out[whole] = concatenated([tensors[part] for part in parts])
        elif _is_vae_projection(name) and len(tensor.shape) == 2:
            out[name] = tensor.reshaped(*tensor.shape, 1, 1)
        else:
            out[name] = tensor
    return out


def is_temporal(name: str) -> bool:
    """Whether one of our names is a temporal layer's."""
    return name.startswith(UNET) and any(part in name for part in TEMPORAL)


def from_fork(name: str) -> str:
    """Return our name of a fork's temporal layer."""
    return ".".join(_FORK.get(part, part) for part in name.split("."))


def with_text_model(name: str) -> str:
    """Add `text_model` to a text encoder's name, which transformers 5 leaves out."""
    rest = name.removeprefix(TEXT)
    return f"{TEXT}text_model.{rest}" if rest != name and not rest.startswith(("text_model.", "text_proj")) else name


def old_vae(name: str, *, back: bool = False) -> str:
    """Convert our name of the VAE's attention to that of diffusers 0.11, or `back`."""
    match = re.fullmatch(r"(vae\..*\.mid_block\.attentions\.0)\.(.+)\.(weight|bias)", name)
    if not match:
        return name
    table = {old: new for new, old in _OLD_VAE_ATTENTION.items()} if back else _OLD_VAE_ATTENTION
    return f"{match[1]}.{table.get(match[2], match[2])}.{match[3]}"


def _vae_stages(names: Iterable[str], pattern: str) -> int:
    return max((int(match[1]) for name in names if (match := re.search(pattern, name))), default=0) + 1


def _is_norm(name: str) -> bool:
    return "norm" in name.split(".")[-2]


def _is_vae_projection(name: str) -> bool:
    return name.startswith(VAE) and bool(re.search(r"\.mid_block\.attentions\.0\.to_(q|k|v|out\.0)\.weight$", name))


def _lookup(name: str, table: Mapping[str, str]) -> str | None:
    """Replace the longest prefix of a name that the table has."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        if (new := table.get(".".join(parts[:count]))) is not None:
            return ".".join([new, *parts[count:]])
    return None


def _layers(scheme: NamingScheme, layout: Layout) -> Iterator[tuple[str, str]]:
    """Yield our and their name of every layer of a layout."""
    for ours, theirs in _unet(scheme, layout):
        yield UNET + ours, f"model.diffusion_model.{theirs}"
    for ours, theirs in _vae(layout.vae_stages):
        yield VAE + ours, f"first_stage_model.{theirs}"
    for ours, theirs in _text(scheme):
        yield f"{TEXT}text_model{ours}", f"{scheme.text}{theirs}"


def _unet(scheme: NamingScheme, layout: Layout) -> Iterator[tuple[str, str]]:
    conv, blocks = scheme.convolution, layout.blocks
    yield from {
        "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
        "conv_in": f"input_blocks.0.0{conv}", "conv_norm_out": "out.0", "conv_out": f"out.2{conv}",
        "mid_block.attentions.0": "middle_block.1",
    }.items()  # fmt: skip
    resnets = {"mid_block.resnets.0": "middle_block.0", "mid_block.resnets.1": "middle_block.2"}
    for stage in range(layout.stages):
        first = stage * (blocks + 1)
        for block in range(blocks):
            place = f"input_blocks.{first + 1 + block}"
            resnets[f"down_blocks.{stage}.resnets.{block}"] = f"{place}.0"
            yield f"down_blocks.{stage}.attentions.{block}", f"{place}.1"
        yield f"down_blocks.{stage}.downsamplers.0.conv", f"input_blocks.{first + blocks + 1}.0.op{conv}"
        attends = layout.stages - 1 - stage in layout.attention
        for block in range(blocks + 1):
            place = f"output_blocks.{first + block}"
            resnets[f"up_blocks.{stage}.resnets.{block}"] = f"{place}.0"
            if attends:
                yield f"up_blocks.{stage}.attentions.{block}", f"{place}.1"
        yield f"up_blocks.{stage}.upsamplers.0.conv", f"output_blocks.{first + blocks}.{1 + attends}.conv{conv}"
    for ours, theirs in resnets.items():
        for layer, name in scheme.resnet.items():
            yield f"{ours}.{layer}", f"{theirs}.{name}"


def _vae(stages: int) -> Iterator[tuple[str, str]]:
    for layer in ("quant_conv", "post_quant_conv"):
        yield layer, layer
    for side, direction in (("encoder", "down"), ("decoder", "up")):
        for ours, theirs in (("conv_in", "conv_in"), ("conv_out", "conv_out"), ("conv_norm_out", "norm_out")):
            yield f"{side}.{ours}", f"{side}.{theirs}"
        for layer, name in _VAE_ATTENTION.items():
            yield f"{side}.mid_block.attentions.0.{layer}", f"{side}.mid.attn_1.{name}"
        for block in range(2):
            yield f"{side}.mid_block.resnets.{block}", f"{side}.mid.block_{block + 1}"
        for stage in range(stages):
            ours = f"{side}.{direction}_blocks.{stage}"
            theirs = f"{side}.{direction}.{stage if side == 'encoder' else stages - 1 - stage}"
            yield f"{ours}.{direction}samplers.0", f"{theirs}.{direction}sample"
            for block in range(_VAE_BLOCKS):
                yield f"{ours}.resnets.{block}", f"{theirs}.block.{block}"
                yield f"{ours}.resnets.{block}.conv_shortcut", f"{theirs}.block.{block}.nin_shortcut"


def _text(scheme: NamingScheme) -> Iterator[tuple[str, str]]:
    if not scheme.text_ends:
        yield "", "text_model"
    for ours, theirs in scheme.text_ends.items():
        yield f".{ours}", theirs
    for layer in range(_TEXT_LAYERS):
        for ours, theirs in scheme.text_layer.items():
            yield f".encoder.layers.{layer}.{ours}", f"{scheme.text_layers}.{layer}.{theirs}"
