"""The same tensor under the names of diffusers (ours), Stable Diffusion's first code (ldm) and MindONE.

A dialect is a table of layers for a given layout; reading it backwards is the way back. What is more than a name
(rows of three projections in one tensor, 1x1 convolutions that are linear layers here) is `opened` and `closed`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from tuneavideo.interop.lazy import Tensors, stacked

UNET, VAE, TEXT = PARTS = ("unet.", "vae.", "text_encoder.")
# What one dialect calls other than the other, below the same place.
LDM_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
MINDONE_RESNET = {
    "norm1": "in_layers_norm",
    "conv1": "in_layers_conv.conv",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers_norm",
    "conv2": "out_layers_conv.conv",
    "conv_shortcut": "skip_connection.conv",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
MINDONE_TEXT = {
    "embeddings.token_embedding.weight": "embedding_table",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final",
}
MINDONE_TEXT_LAYER = {
    "self_attn.in_proj": "attn.attn.in_proj",
    "self_attn.out_proj": "attn.attn.out_proj",
    "mlp.fc1": "c_fc",
    "mlp.fc2": "c_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
}
OPENCLIP_TEXT = {
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final",
}
OPENCLIP_TEXT_LAYER = {
    "self_attn.in_proj.weight": "attn.in_proj_weight",
    "self_attn.in_proj.bias": "attn.in_proj_bias",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
}


@dataclass(frozen=True)
class Dialect:
    """How one program names what makes up a Stable Diffusion.

    Attributes:
        resnet: Layers of a UNet's residual block.
        convolution: What follows the place of a single convolution.
        norm: What a norm's weight and bias are called.
        text: Where the text encoder's tensors begin.
        text_names: Its layers outside of the transformer; none: they are named as here.
        text_layer: Its layers inside.
        text_layers: Where those lie.
    """

    resnet: Mapping[str, str]
    convolution: str
    norm: Mapping[str, str]
    text: str
    text_names: Mapping[str, str] | None = None
    text_layer: Mapping[str, str] | None = None
    text_layers: str = ""


_PLAIN_NORM = {"weight": "weight", "bias": "bias"}
MINDONE = Dialect(
    MINDONE_RESNET,
    ".conv",
    {"weight": "gamma", "bias": "beta"},
    "cond_stage_model.transformer.",
    MINDONE_TEXT,
    MINDONE_TEXT_LAYER,
    "transformer_layer.resblocks",
)
LDM = Dialect(LDM_RESNET, "", _PLAIN_NORM, "cond_stage_model.transformer.")
LDM_V2 = Dialect(
    LDM_RESNET,
    "",
    _PLAIN_NORM,
    "cond_stage_model.model.",
    OPENCLIP_TEXT,
    OPENCLIP_TEXT_LAYER,
    "transformer.resblocks",
)


@dataclass(frozen=True)
class Layout:
    """How deep a model is: UNet levels, residual blocks per level, levels with attention; levels of the VAE."""

    levels: int
    blocks: int
    attention: frozenset[int]
    vae_levels: int

    @classmethod
    def of_ours(cls, names: Sequence[str]) -> Layout:
        places = [match for name in names if (match := re.match(r"unet\.down_blocks\.(\d+)\.(\w+)\.(\d+)\.", name))]
        resnets = [(int(at[1]), int(at[3])) for at in places if at[2] == "resnets"]
        attention = frozenset(int(at[1]) for at in places if at[2] == "attentions")
        deepest, most = (max(numbers, default=0) for numbers in (zip(*resnets, strict=True) if resnets else ((), ())))
        return cls(deepest + 1, most + 1, attention, _vae_levels(names, r"decoder\.up_blocks\.(\d+)\."))

    @classmethod
    def of_theirs(cls, names: Sequence[str]) -> Layout:
        places = [match for name in names if (match := re.search(r"input_blocks\.(\d+)\.(\d+)\.(\w+)", name))]
        downs = sorted({int(at[1]) for at in places if at[3] == "op"})
        last = max((int(at[1]) for at in places), default=1)
        blocks = downs[0] - 1 if downs else last
        attention = frozenset((int(at[1]) - 1) // (blocks + 1) for at in places if at[2] == "1")
        return cls(len(downs) + 1, max(blocks, 1), attention, _vae_levels(names, r"decoder\.up\.(\d+)\."))


def _vae_levels(names: Iterable[str], pattern: str) -> int:
    return max((int(match[1]) for name in names if (match := re.search(pattern, name))), default=0) + 1


def renamed(names: Iterable[str], dialect: Dialect, *, back: bool = False) -> dict[str, str]:
    """Their name of each of our names, or `back` ours of theirs; what has none is left out."""
    names = list(names)
    layout = (Layout.of_theirs if back else Layout.of_ours)(names)
    table = dict(_layers(dialect, layout))
    table = {theirs: ours for ours, theirs in table.items()} if back else table
    change = _from_their_norm if back else _to_their_norm
    return {name: change(new, name, dialect) for name in names if (new := _looked_up(name, table))}


def opened(tensors: Tensors) -> Tensors:
    """Three projections out of each `in_proj`, and linear layers out of the VAE's 1x1 convolutions."""
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


def closed(tensors: Tensors, *, in_proj: bool) -> Tensors:
    """The inverse of `opened`; `in_proj` says whether the text encoder's projections become one."""
    out: Tensors = {}
    for name, tensor in tensors.items():
        if in_proj and (match := re.search(r"\.self_attn\.([qkv])_proj\.", name)):
            parts = [name.replace(f".{match[1]}_proj.", f".{part}_proj.") for part in "qkv"]
            if all(part in tensors for part in parts):
                whole = name.replace(f".{match[1]}_proj.", ".in_proj.")
                out[whole] = stacked([tensors[part] for part in parts])
        elif _is_vae_projection(name) and len(tensor.shape) == 2:
            out[name] = tensor.reshaped(*tensor.shape, 1, 1)
        else:
            out[name] = tensor
    return out


def is_norm(name: str) -> bool:
    """Whether one of our names is a norm's."""
    return "norm" in name.split(".")[-2]


def _is_vae_projection(name: str) -> bool:
    return name.startswith(VAE) and bool(re.search(r"\.mid_block\.attentions\.0\.to_(q|k|v|out\.0)\.weight$", name))


def _looked_up(name: str, table: Mapping[str, str]) -> str | None:
    """The entry of the longest place that a name lies in, with the rest of the name."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        if (new := table.get(".".join(parts[:count]))) is not None:
            return ".".join([new, *parts[count:]])
    return None


def _to_their_norm(new: str, ours: str, dialect: Dialect) -> str:
    stem, _, leaf = new.rpartition(".")
    return f"{stem}.{dialect.norm[leaf]}" if leaf in dialect.norm and is_norm(ours) else new


def _from_their_norm(new: str, _: str, dialect: Dialect) -> str:
    stem, _, leaf = new.rpartition(".")
    return f"{stem}.{next((ours for ours, theirs in dialect.norm.items() if theirs == leaf), leaf)}"


def _layers(dialect: Dialect, layout: Layout) -> Iterator[tuple[str, str]]:
    """(our layer, their layer), the whole table of a layout."""
    for ours, theirs in _unet(dialect, layout):
        yield UNET + ours, f"model.diffusion_model.{theirs}"
    for ours, theirs in _vae(layout.vae_levels):
        yield VAE + ours, f"first_stage_model.{theirs}"
    for ours, theirs in _text(dialect):
        yield f"{TEXT}text_model{ours}", f"{dialect.text}{theirs}".rstrip(".")


def _unet(dialect: Dialect, layout: Layout) -> Iterator[tuple[str, str]]:
    conv, blocks = dialect.convolution, layout.blocks
    yield from {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_in": f"input_blocks.0.0{conv}",
        "conv_norm_out": "out.0",
        "conv_out": f"out.2{conv}",
        "mid_block.attentions.0": "middle_block.1",
    }.items()
    yield from _resnet(dialect, "mid_block.resnets.0", "middle_block.0")
    yield from _resnet(dialect, "mid_block.resnets.1", "middle_block.2")
    for level in range(layout.levels):
        for block in range(blocks):
            place = f"input_blocks.{1 + level * (blocks + 1) + block}"
            yield from _resnet(dialect, f"down_blocks.{level}.resnets.{block}", f"{place}.0")
            yield f"down_blocks.{level}.attentions.{block}", f"{place}.1"
        down = f"input_blocks.{(level + 1) * (blocks + 1)}.0.op{conv}"
        yield f"down_blocks.{level}.downsamplers.0.conv", down
        for block in range(blocks + 1):
            place = f"output_blocks.{level * (blocks + 1) + block}"
            yield from _resnet(dialect, f"up_blocks.{level}.resnets.{block}", f"{place}.0")
            if layout.levels - 1 - level in layout.attention:
                yield f"up_blocks.{level}.attentions.{block}", f"{place}.1"
        behind = 2 if layout.levels - 1 - level in layout.attention else 1
        up = f"output_blocks.{level * (blocks + 1) + blocks}.{behind}.conv{conv}"
        yield f"up_blocks.{level}.upsamplers.0.conv", up


def _resnet(dialect: Dialect, ours: str, theirs: str) -> Iterator[tuple[str, str]]:
    for layer, name in dialect.resnet.items():
        yield f"{ours}.{layer}", f"{theirs}.{name}"


# No VAE of Stable Diffusion has more than three blocks in a level.
_VAE_BLOCKS = 8


def _vae(levels: int) -> Iterator[tuple[str, str]]:
    for layer in ("quant_conv", "post_quant_conv"):
        yield layer, layer
    for side, ours, theirs in (("encoder", "down", "down"), ("decoder", "up", "up")):
        for layer in ("conv_in", "conv_out"):
            yield f"{side}.{layer}", f"{side}.{layer}"
        yield f"{side}.conv_norm_out", f"{side}.norm_out"
        for layer, name in VAE_ATTENTION.items():
            yield f"{side}.mid_block.attentions.0.{layer}", f"{side}.mid.attn_1.{name}"
        for block in range(2):
            yield f"{side}.mid_block.resnets.{block}", f"{side}.mid.block_{block + 1}"
        for level in range(levels):
            place = f"{side}.{ours}_blocks.{level}"
            where = f"{side}.{theirs}.{level if side == 'encoder' else levels - 1 - level}"
            yield f"{place}.{ours}samplers.0", f"{where}.{theirs}sample"
            for block in range(_VAE_BLOCKS):
                yield f"{place}.resnets.{block}", f"{where}.block.{block}"
                yield f"{place}.resnets.{block}.conv_shortcut", f"{where}.block.{block}.nin_shortcut"


def _text(dialect: Dialect, layers: int = 64) -> Iterator[tuple[str, str]]:
    if dialect.text_names is None:
        yield "", "text_model"
        return
    for ours, theirs in dialect.text_names.items():
        yield f".{ours}", theirs
    for layer in range(layers):
        for ours, theirs in (dialect.text_layer or {}).items():
            yield f".encoder.layers.{layer}.{ours}", f"{dialect.text_layers}.{layer}.{theirs}"
