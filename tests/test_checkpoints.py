"""Weights of other programs are read without them, renamed in both directions, and come back bit for bit."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from tests.conftest import adapter_on, image_unet
from tuneavideo import api
from tuneavideo.errors import CheckpointError
from tuneavideo.interop import lora, mindspore, model_configs, names
from tuneavideo.interop.reading import read_checkpoint
from tuneavideo.method.inflate import inflate
from tuneavideo.models.adapter import Adapter
from tuneavideo.storage import weight_files
from tuneavideo.storage.tensors import LazyTensor

GOLDENS = Path(__file__).parent / "goldens"
SMALL = GOLDENS / "mindone"


def tensors(seed: int = 0) -> dict[str, LazyTensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {
        "half": torch.randn(3, 4, generator=generator).half(),
        "brain": torch.randn(5, generator=generator).bfloat16(),
        "whole": torch.arange(6).reshape(2, 3),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "flags": torch.tensor([True, False]),
    }
    return {name: LazyTensor.of(tensor) for name, tensor in made.items()}


def same(ours: dict[str, LazyTensor], theirs: dict[str, LazyTensor]) -> bool:
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype and torch.equal(ours[name].read(), theirs[name].read()) for name in ours
    )


@pytest.fixture(scope="session")
def tuned(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapter_on(base, tmp_path_factory.mktemp("tuned") / "adapter")


# Bytes


@pytest.mark.parametrize("name", ["small", "small_crc", "small_append"])
def test_a_mindspore_file_is_read_and_written_again_byte_for_byte(name: str, tmp_path: Path) -> None:
    contents = mindspore.read(SMALL / f"{name}.ckpt")
    mindspore.write(tmp_path / "again.ckpt", contents, crc="crc" in name)
    assert (tmp_path / "again.ckpt").read_bytes() == (SMALL / f"{name}.ckpt").read_bytes()


def test_a_mindspore_file_keeps_every_type_and_texts(tmp_path: Path) -> None:
    mindspore.write(tmp_path / "all.ckpt", {**tensors(), "note": "grüß"}, crc=True)
    found = mindspore.read(tmp_path / "all.ckpt")
    assert found.pop("note") == "grüß"
    assert same(found, tensors())


def test_a_tensor_above_the_slice_is_cut_and_put_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mindspore, "SLICE", 16)
    mindspore.write(tmp_path / "cut.ckpt", tensors())
    assert {each.tag: len(each.pieces) for each in mindspore.entries(tmp_path / "cut.ckpt")}["whole"] == 3
    assert same(mindspore.read(tmp_path / "cut.ckpt"), tensors())


def test_a_scalar_of_an_old_release_is_a_scalar(tmp_path: Path) -> None:
    content = struct.pack("<f", 2.5)
    (tmp_path / "old.ckpt").write_bytes(mindspore.header("x", "Float32", (0,), len(content)) + content)
    assert mindspore.read(tmp_path / "old.ckpt")["x"].read().item() == 2.5


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("small_enc_AES-GCM", lambda data: data, "is encrypted"),
        ("small", lambda data: data[:-1], "cut short"),
        ("small", lambda data: data[: len(data) // 2], "cut short"),
        ("small_crc", lambda data: data[:900] + b"\0" + data[901:], "checksum"),
        ("small", lambda data: b"\x0a\xff\xff\xff\xff\xff\xff\xff\x7f" + data, "cut short"),
        ("small", lambda data: data.replace(b"Float16", b"Float99"), "Float99"),
        ("small", lambda data: data + data, "comes twice"),
    ],
)
def test_a_damaged_mindspore_file_is_refused(name: str, damage, words: str, tmp_path: Path) -> None:
    path = tmp_path / "damaged.ckpt"
    path.write_bytes(damage((SMALL / f"{name}.ckpt").read_bytes()))
    with pytest.raises(CheckpointError, match=words):
        read_checkpoint(path)


def test_safetensors_are_written_as_others_read_them(tmp_path: Path) -> None:
    weight_files.write_safetensors(tmp_path / "x.safetensors", tensors())
    assert same({name: LazyTensor.of(t) for name, t in load_file(tmp_path / "x.safetensors").items()}, tensors())
    assert same(weight_files.read_safetensors(tmp_path / "x.safetensors"), tensors())


def test_pytorch_files_are_written_as_torch_reads_them(tmp_path: Path) -> None:
    weight_files.write_torch(tmp_path / "x.bin", tensors())
    for mapped in (True, False):
        loaded = torch.load(tmp_path / "x.bin", weights_only=True, mmap=mapped)
        assert same({name: LazyTensor.of(tensor) for name, tensor in loaded.items()}, tensors())
    with zipfile.ZipFile(tmp_path / "x.bin") as archive:
        assert archive.testzip() is None  # checksums are those of the contents


# Security


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("suffix", [".bin", ".ckpt", ".pth"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_pickle_runs_nothing(suffix: str, zipped: bool, tmp_path: Path) -> None:
    path, mark = tmp_path / f"evil{suffix}", tmp_path / "ran"
    torch.save({"conv_in.weight": torch.ones(1), "x": Evil(mark)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="nothing of it was run") as refusal:
        read_checkpoint(path)
    assert not mark.exists()
    assert "\n" not in str(refusal.value)


def test_a_plain_pickle_runs_nothing(tmp_path: Path) -> None:
    path, mark = tmp_path / "evil.ckpt", tmp_path / "ran"
    path.write_bytes(pickle.dumps({"state_dict": Evil(mark)}))
    with pytest.raises(CheckpointError):
        read_checkpoint(path)
    assert not mark.exists()


def test_absurd_sizes_take_no_memory(tmp_path: Path) -> None:
    header = json.dumps({"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    (tmp_path / "b.safetensors").write_bytes(struct.pack("<Q", 2**50))
    (tmp_path / "c.ckpt").write_bytes(mindspore.header("x", "Float32", (2**40,), 2**42))
    (tmp_path / "d.ckpt").write_bytes(mindspore.header("x", "Float32", (2**40,), 4) + bytes(4))
    torch.save({"conv_in.weight": torch.ones(1).expand(2**40)}, tmp_path / "e.pth")
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(CheckpointError):
            read_checkpoint(path)


def test_a_packed_archive_is_not_unpacked(tmp_path: Path) -> None:
    torch.save({"conv_in.weight": torch.zeros(10_000)}, tmp_path / "plain.pth")
    with zipfile.ZipFile(tmp_path / "plain.pth") as old, zipfile.ZipFile(tmp_path / "bomb.pth", "w", 8) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(CheckpointError, match="packed"):
        read_checkpoint(tmp_path / "bomb.pth")


def test_names_never_leave_the_folder(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(base, folder)
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"conv_in.weight": "../../secret.safetensors"}})
    )
    with pytest.raises(CheckpointError, match="no file in its folder"):
        read_checkpoint(folder)
    path = tmp_path / "names.safetensors"
    save_file({"../../evil": torch.ones(1), "down_blocks/../../x": torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match="none of a Stable Diffusion"):
        api.convert(path, tmp_path / "out", to="diffusers")
    assert not (tmp_path / "out").exists()


# Names


def test_mindones_names_are_those_of_its_own_list() -> None:
    theirs = [line.split("\t")[1] for line in (SMALL / "names_v1.txt").read_text().splitlines()]
    ours = names.renamed(theirs, names.MINDONE, back=True)
    assert len(ours) == len(theirs) == 1006
    back = names.renamed(list(ours.values()), names.MINDONE)
    assert [back[ours[name]] for name in theirs] == theirs


def test_the_published_unet_has_798_names() -> None:
    """Those of the published code's own list for the layout of Stable Diffusion 1.5, with its shapes."""
    wanted = json.loads((GOLDENS / "sd15_names.json").read_text())
    config = {
        "block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768, "attention_head_dim": 8,
        "layers_per_block": 2, "sample_size": 64,
    }  # fmt: skip
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    image = {
        name.removeprefix("unet."): list(shape)
        for name, shape in model_configs.shapes("unet", dict(unet.config)).items()
    }
    assert len(image) == 686
    temporal = {}
    for name, shape in image.items():
        if name.endswith("norm1.weight") and "transformer_blocks" in name:
            block, width = name.removesuffix("norm1.weight"), shape[0]
            temporal |= {f"{block}norm_temp.{leaf}": [width] for leaf in ("weight", "bias")}
            temporal |= {
                f"{block}attn_temp.{layer}.weight": [width, width] for layer in ("to_q", "to_k", "to_v", "to_out.0")
            }
            temporal[f"{block}attn_temp.to_out.0.bias"] = [width]
    assert len(temporal) == 112
    assert {**image, **temporal} == wanted
    found = {f"unet.{name}": LazyTensor.of(torch.empty(shape, device="meta")) for name, shape in wanted.items()}
    folder = model_configs.family_folder(found)
    fit = model_configs.compare(found, {"unet": model_configs.read_json(folder / "unet/config.json")})
    assert (folder.name, fit.used, fit.missing, fit.different) == ("sd1", 798, [], [])


# From one program to another


TARGETS = {"diffusers": "there", "official": "there", "mindone": "there.ckpt", "ldm": "there.safetensors"}


@pytest.mark.parametrize("to", TARGETS)
def test_there_and_back_changes_no_bit(to: str, tuned: Path, base: Path, tmp_path: Path) -> None:
    there = api.convert(tuned, tmp_path / TARGETS[to], to=to)
    assert (there.missing, there.different, there.kind) == ([], [], "adapter")
    api.convert(tmp_path / TARGETS[to], tmp_path / "back", to="diffusers", like=str(base))
    before = read_checkpoint(tuned).over(read_checkpoint(base))
    assert same(read_checkpoint(tmp_path / "back").tensors, before.tensors)
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "back", safety_checker=None)
    weight = pipe.unet.state_dict()["mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"]
    assert torch.equal(
        weight,
        load_file(tuned / "adapter.safetensors")["mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"],
    )
    Adapter.load(tmp_path / "back" / "adapter").attach(pipe.unet)


def test_what_was_tuned_elsewhere_becomes_the_same_adapter(tuned: Path, base: Path, tmp_path: Path) -> None:
    api.convert(tuned, tmp_path / "official", to="official")
    api.convert(tmp_path / "official", tmp_path / "adapter", to="adapter", base=str(base))
    ours, theirs = Adapter.load(tmp_path / "adapter"), Adapter.load(tuned)
    assert ours.tensors.keys() == theirs.tensors.keys()
    assert all(torch.equal(ours.tensors[name], theirs.tensors[name]) for name in ours.tensors)
    assert ours.fingerprint == pytest.approx(theirs.fingerprint)


def test_a_fork_and_a_file_of_tuned_layers_alone_are_read(tuned: Path, base: Path, tmp_path: Path) -> None:
    layers = load_file(tuned / "adapter.safetensors")
    forked = {
        f"module.{n.replace('attn_temp', 'attn_temporal').replace('norm_temp', 'norm_temporal')}": t
        for n, t in layers.items()
    }
    torch.save({**forked, "conv_in.conv_temporal.weight": torch.ones(1), "global_step": 500}, tmp_path / "tuned.pth")
    report = api.convert(tmp_path / "tuned.pth", tmp_path / "adapter", to="adapter", base=str(base))
    assert Adapter.load(tmp_path / "adapter").tensors.keys() == layers.keys()
    assert "temporal convolution" in report.unused["conv_in.conv_temporal.weight"]
    assert report.unused["global_step"] == "no tensor"


def test_the_published_layout_is_what_its_code_needs(tuned: Path, tmp_path: Path) -> None:
    api.convert(tuned, tmp_path / "official", to="official")
    config = json.loads((tmp_path / "official/unet/config.json").read_text())
    assert config["_class_name"] == "UNet3DConditionModel"
    assert config["mid_block_type"] == "UNetMidBlock3DCrossAttn"
    assert config["down_block_types"] == ["CrossAttnDownBlock3D", "DownBlock3D"]
    weights = torch.load(tmp_path / "official/unet/diffusion_pytorch_model.bin", weights_only=True)
    unet = image_unet()
    inflate(unet)
    assert {name: t.shape for name, t in weights.items()} == {name: t.shape for name, t in unet.state_dict().items()}
    vae = torch.load(tmp_path / "official/vae/diffusion_pytorch_model.bin", weights_only=True)
    assert "decoder.mid_block.attentions.0.proj_attn.weight" in vae


def test_training_state_is_dropped_and_reported(tuned: Path, base: Path, tmp_path: Path) -> None:
    api.convert(tuned, tmp_path / "plain.ckpt", to="mindone")
    plain = mindspore.read(tmp_path / "plain.ckpt")
    state = {f"{kind}{name}": tensor for kind in ("adam_m.", "ema.") for name, tensor in list(plain.items())[:3]}
    mindspore.write(tmp_path / "resume.ckpt", {**plain, **state, "global_step": LazyTensor.of(torch.tensor(9))})
    report = api.convert(tmp_path / "resume.ckpt", tmp_path / "again", to="diffusers", like=str(base))
    assert set(report.unused) == {*state, "global_step"}
    assert {*report.unused.values()} == {"state of the optimiser or a moving average"}
    assert "left over: 7, state of the optimiser" in "\n".join(report.lines())


def test_version_2_behaves_like_version_1(tmp_path: Path) -> None:
    """Linear projections and 64 channels a head, as its checkpoints have."""
    unet = image_unet(
        block_out_channels=(64, 128), attention_head_dim=(1, 2), use_linear_projection=True, norm_num_groups=32
    )
    unet.save_pretrained(tmp_path / "unet")
    found = read_checkpoint(tmp_path / "unet")
    found.tensors |= {f"unet.{n}": LazyTensor.of(p) for n, p in _temporal(unet).items()}
    theirs = names.renamed(names.merged(found.tensors, in_proj=True), names.MINDONE)
    mindspore.write(tmp_path / "v2.ckpt", {theirs[name]: tensor for name, tensor in found.tensors.items()})
    back = read_checkpoint(tmp_path / "v2.ckpt")
    assert same(back.tensors, found.tensors)
    with pytest.raises(CheckpointError, match="--like"):
        api.convert(tmp_path / "v2.ckpt", tmp_path / "out", to="diffusers")
    api.convert(tmp_path / "v2.ckpt", tmp_path / "out", to="diffusers", like=str(tmp_path / "unet"))
    again = UNet2DConditionModel.from_pretrained(tmp_path / "out/unet").eval()
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 24)
    with torch.no_grad():
        assert torch.allclose(again(x, 7, text).sample, unet(x, 7, text).sample, atol=1e-5)


def _temporal(unet: UNet2DConditionModel) -> dict[str, torch.Tensor]:
    copy = UNet2DConditionModel.from_config(unet.config)
    inflate(copy)
    return {name: p.detach() for name, p in copy.named_parameters() if any(part in name for part in names.TEMPORAL)}


def test_a_model_that_lacks_a_tensor_is_no_model(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(base, folder)
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    del weights["conv_out.bias"]
    save_file({**weights, "stray": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match=r"unet\.conv_out\.bias is missing"):
        api.convert(folder, tmp_path / "out.ckpt", to="mindone")
    assert not (tmp_path / "out.ckpt").exists()


def test_nothing_is_written_over(base: Path, tmp_path: Path) -> None:
    (tmp_path / "x.ckpt").write_text("mine")
    with pytest.raises(CheckpointError, match="exists"):
        api.convert(base, tmp_path / "x.ckpt", to="mindone")
    with pytest.raises(CheckpointError, match=r"ends with \.ckpt"):
        api.convert(base, tmp_path / "x", to="mindone")


# LoRA


@pytest.mark.parametrize("style", ["diffusers", "kohya"])
def test_a_stock_pipeline_loads_the_lora(style: str, tuned: Path, base: Path, tmp_path: Path) -> None:
    path = tmp_path / "tuned.safetensors"
    report = api.convert(tuned, path, to="lora", rank=32, style=style)
    assert report.error is not None
    assert report.error < 1e-4, "of full rank"
    pipe = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    pipe.load_lora_weights(path)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    moved = pipe.unet.state_dict()
    for name, tensor in load_file(tuned / "adapter.safetensors").items():
        if "attn1.to_q" in name or "attn2.to_q" in name:
            assert torch.allclose(moved[name], tensor, atol=1e-5), name


def test_a_lora_of_lower_rank_reports_its_error() -> None:
    name = "unet.x.attn1.to_q.weight"
    change = torch.diag(torch.tensor([4.0, 3.0]))
    made = lora.factorize({name: LazyTensor.of(change)}, {name: LazyTensor.of(torch.zeros(2, 2))}, rank=1)
    assert made.error == pytest.approx(3 / 5)
