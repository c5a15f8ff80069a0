"""Style and control of an edit: each changes the edit and has no effect on the next one."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionPipeline
from safetensors.torch import save_file
from transformers import (
    DPTConfig,
    DPTForDepthEstimation,
    DPTImageProcessorPil,
)

from tests.conftest import base_folder, image_unet, moving_square
from tests.shared.bases import Malicious
from tests.shared.job import BRIEF
from tests.shared.style import PROMPT, Files, controlnet, lora, style_files
from tuneavideo import api
from tuneavideo.cli import main
from tuneavideo.config import checked, weighted
from tuneavideo.errors import AdapterError, SettingsError, TuneAVideoError, VideoError
from tuneavideo.method.attention import SparseCausalAttention
from tuneavideo.method.inflate import inflate, video_unet
from tuneavideo.models import addons, codec, pipelines, quiet
from tuneavideo.models import controlnet as control
from tuneavideo.models.adapter import Adapter
from tuneavideo.settings import EditSettings
from tuneavideo.video import Video, read, write


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    clip = moving_square(tmp_path_factory.mktemp("clip") / "square.mp4")
    settings = BRIEF | {"mixed_precision": "no"}
    return api.tune(clip, "a square", base=str(base), out=tmp_path_factory.mktemp("runs") / "square", **settings)


def edited(run: Path, **settings: Any) -> np.ndarray:
    (folder,) = api.edit(run, PROMPT, formats=("frames",), **settings)
    return read(folder / "frames").frames_THWC.astype(int)


@pytest.fixture(scope="module")
def plain(run: Path) -> np.ndarray:
    return edited(run)


@pytest.fixture(scope="module")
def styles(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return style_files(tmp_path_factory.mktemp("styles"))


@pytest.mark.parametrize("kind", ["lora", "kohya", "embedding", "embedding of another tool", "controlnet", "picture"])
def test_each_style_changes_the_edit_and_leaves_no_trace(
    kind: str, run: Path, plain: np.ndarray, styles: Files
) -> None:
    assert abs(edited(run, **styles[kind]) - plain).max() > 0
    assert (edited(run) == plain).all()


def test_a_lora_of_either_format_and_any_weight(run: Path, plain: np.ndarray, styles: Files) -> None:
    (ours,), (theirs,) = styles["lora"]["lora"], styles["kohya"]["lora"]
    assert (edited(run, lora=(ours,)) == edited(run, lora=(theirs,))).all()
    assert (edited(run, lora=(f"{ours}:0",)) == plain).all()
    half, both = edited(run, lora=(f"{ours}:0.5",)), edited(run, lora=(f"{ours}:0.25", f"{theirs}:0.25"))
    assert (half != edited(run, lora=(ours,))).any() and abs(half - both).max() <= 1


def test_an_inversion_is_shared_by_edits_whose_weights_are_the_same(run: Path, styles: Files) -> None:
    def kept() -> int:
        return len(list((run / "inversion").iterdir()))

    edited(run)
    before = kept()
    edited(run, **styles["embedding"])
    assert kept() == before
    edited(run, lora=(f"{styles['lora']['lora'][0]}:0.7",))
    assert kept() == before + 1


def test_attention_still_refers_to_other_frames_beside_an_ip_adapter(run: Path, base: Path, styles: Files) -> None:
    pipe = pipelines.load_image_pipeline(str(base))
    settings = EditSettings(run=str(run), prompt=(PROMPT,), **styles["picture"])
    loaded = addons.load(pipe, settings, read(run / "source.mp4"))
    video = Adapter.load(run / "adapter").attach(pipe.unet).video
    assert sum(isinstance(layer, SparseCausalAttention) for layer in pipe.unet.modules()) == 4
    x, conditions = torch.randn(1, 4, 3, 8, 8), loaded.with_reference(codec.embed(pipe, [""]))
    with torch.no_grad():
        before = video(x, torch.tensor(500), conditions)
        x[:, :, 0] += 1
        assert not torch.allclose(before[:, :, 2], video(x, torch.tensor(500), conditions)[:, :, 2], atol=1e-4)


def test_another_base_of_the_same_shape_edits_when_it_is_named(run: Path, plain: np.ndarray, tmp_path: Path) -> None:
    bases = [base_folder(tmp_path / name) for name in ("other", "wider")]
    for base, unet in zip(bases, (image_unet(7), image_unet(block_out_channels=(32, 32))), strict=True):
        unet.save_pretrained(base / "unet")
    assert (edited(run, edit_model=str(bases[0])) != plain).any()
    assert (edited(run) == plain).all()
    with pytest.raises(AdapterError, match="does not fit this UNet"):
        edited(run, edit_model=str(bases[1]))


@pytest.mark.parametrize(
    ("settings", "conditions"),
    [
        ({"ip_image": "a.png"}, "ip_adapter and ip_image need"),
        ({"control": "depth"}, "control 'depth' has no effect without controlnet"),
        ({"lora": ("no.safetensors:0.5",)}, r"LoRA no.safetensors: no such file or folder"),
        ({"embedding": ("no.safetensors",)}, "embedding no.safetensors: no such file or folder"),
        ({"controlnet": "no/where"}, "ControlNet no/where is not on this machine, and HF_HUB_OFFLINE is set; 'hf "),
        ({"ip_adapter": "no/where", "ip_image": __file__}, "IP-Adapter no/where is not on this machine, and HF_HUB_"),
        ({"ip_adapter": "no/where", "ip_image": "a.png"}, "ip_image a.png: no such file"),
        ({"edit_model": "./no.safetensors"}, "base './no.safetensors' does not exist; give a folder"),
    ],
)
def test_what_is_missing_is_said_in_one_line(settings: dict[str, Any], conditions: str, run: Path) -> None:
    with pytest.raises(TuneAVideoError, match=conditions) as refused:
        edited(run, **settings)
    assert "\n" not in str(refused.value)


def test_what_is_of_another_base_is_refused(run: Path, styles: Files, tmp_path: Path, caplog, capfd) -> None:
    elsewhere = {"lora_down.weight": torch.zeros(2, 4), "lora_up.weight": torch.zeros(4, 2), "alpha": torch.tensor(1.0)}
    save_file({f"lora_unet_nowhere.{name}": value for name, value in elsewhere.items()}, tmp_path / "x.safetensors")
    save_file({"<mine>": torch.randn(32)}, tmp_path / "wide.safetensors")
    other = controlnet(tmp_path / "wide", cross_attention_dim=32)
    wide = {name: torch.zeros(2 * value.shape[0], 2 * value.shape[1]) for name, value in lora(tmp_path / "l").items()}
    StableDiffusionPipeline.save_lora_weights(tmp_path / "wide-lora", unet_lora_layers=wide)
    capfd.readouterr()
    caplog.clear()
    for settings, conditions in (
        ({"lora": (str(tmp_path / "x.safetensors"),)}, "LoRA .*x.safetensors: "),
        ({"lora": (str(tmp_path / "wide-lora"),)}, "LoRA .*wide-lora: .* its shapes are others; take one made for"),
        ({"embedding": (str(tmp_path / "wide.safetensors"),)}, "its vectors have 32 numbers, the base's .* takes 24;"),
        ({"controlnet": str(other)}, "its cross_attention_dim is 32, the base's is 24"),
    ):
        with pytest.raises(AdapterError, match=conditions):
            edited(run, **settings)
    assert "unsuccessful" not in caplog.text + capfd.readouterr().err


def test_libraries_say_nothing_of_a_lora_that_fits(run: Path, styles: Files, capfd) -> None:
    capfd.readouterr()
    main.main(["edit", str(run), "--prompt", "a circle", "--lora", styles["lora"]["lora"][0]])
    said = capfd.readouterr().err
    assert "LoRA" not in said and "float32" not in said and "Loading" not in said


def test_a_network_that_is_gone_is_asked_once_and_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quiet, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(quiet, "ENDPOINT", "http://127.0.0.1:9")
    quiet.unreachable.cache_clear()
    try:
        with pytest.raises(AdapterError, match="ControlNet no/where is not on this machine, and the hub cannot be rea"):
            edited(run, controlnet="no/where")
    finally:
        quiet.unreachable.cache_clear()


def test_a_malicious_embedding_runs_nothing(run: Path, tmp_path: Path) -> None:
    torch.save({"<mine>": Malicious(tmp_path / "ran")}, tmp_path / "mine.pt")
    (tmp_path / "bare.bin").write_bytes(pickle.dumps(Malicious(tmp_path / "ran")))
    for name, conditions in {"mine.pt": "refused, and nothing of it was run", "bare.bin": "cannot be used"}.items():
        with pytest.raises(AdapterError, match=conditions):
            edited(run, embedding=(str(tmp_path / name),))
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def square(tmp_path: Path) -> Video:
    return read(moving_square(tmp_path / "square.mp4"), count=3)


def test_edges_are_where_the_square_ends(square: Video) -> None:
    found = control.maps("canny", square)
    assert found.shape == (3, 3, 32, 32) and set(found.unique().tolist()) == {0.0, 1.0}
    assert found[0, 0, 8:20, 0:13].sum() == found[0, 0].sum() > 20


def test_maps_may_be_a_clip_of_the_user(square: Video, tmp_path: Path) -> None:
    write(Video(np.full((4, 64, 64, 3), 255, np.uint8), 8.0), tmp_path / "maps")
    assert control.maps(str(tmp_path / "maps"), square).shape == (3, 3, 32, 32)
    write(Video(np.full((2, 64, 64, 3), 255, np.uint8), 8.0), tmp_path / "short")
    with pytest.raises(VideoError, match="2 frames"):
        control.maps(str(tmp_path / "short"), square)
    with pytest.raises(SettingsError, match="neither canny, depth nor the path"):
        control.maps("pose", square)


def test_depth_comes_from_a_model_of_transformers(
    square: Video, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    config = DPTConfig(hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=16, image_size=32,
                       patch_size=16, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 8, 8],
                       fusion_hidden_size=8, reassemble_factors=[4, 2, 1, 0.5])  # fmt: skip
    model = DPTForDepthEstimation(config)
    for weight in model.parameters():  # an untrained one sees nothing
        torch.nn.init.normal_(weight, std=0.3)
    torch.nn.init.constant_(model.head.head[-2].bias, 50.0)
    model.save_pretrained(tmp_path / "dpt")
    DPTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "dpt")
    monkeypatch.setattr(control, "DEPTH_MODEL", str(tmp_path / "dpt"))
    found = control.maps("depth", square)
    assert found.shape == (3, 3, 32, 32) and found.min() == 0 and found.max() == 1
    monkeypatch.setattr(control, "DEPTH_MODEL", "no/where")
    with pytest.raises(SettingsError, match="'hf download no/where', or give maps of your own"):
        control.maps("depth", square)


def test_a_control_is_given_to_every_clip_of_a_batch(base: Path, tmp_path: Path) -> None:
    net = ControlNetModel.from_pretrained(controlnet(tmp_path / "net"))
    maps = torch.rand(3, 3, 16, 16)
    video = inflate(image_unet())
    helped = addons.AddOns(control=control.Control(net, maps, 1.0)).with_controlnet(video_unet(video.unet))
    x, text = torch.randn(1, 4, 3, 8, 8), torch.randn(1, 5, 24)
    with torch.no_grad():
        one, both = (helped(x.expand(n, -1, -1, -1, -1), torch.tensor(9), text.expand(n, -1, -1)) for n in (1, 2))
        assert torch.allclose(both[0], one[0], atol=1e-5) and torch.allclose(both[1], one[0], atol=1e-5)
        assert not torch.allclose(one, video(x, torch.tensor(9), text), atol=1e-3)


def test_settings_of_style_are_part_of_an_edits_settings() -> None:
    made = checked(EditSettings, {"run": "r", "prompt": ("a",), "lora": ("a.safetensors:0.8",)})
    assert weighted(made.lora[0]) == ("a.safetensors", 0.8)
    assert weighted("C:\\a.safetensors") == ("C:\\a.safetensors", 1.0)
