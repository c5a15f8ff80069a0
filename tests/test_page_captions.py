"""Captions that the page suggests, by a tiny captioning model with random weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import (
    BertTokenizerFast,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipTextConfig,
    BlipVisionConfig,
)

from tests.shared.page import CLIP, client
from tuneavideo.web import captions

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[ENC]", "[DEC]", "a", "dog", "cat", "jumps", "runs"]
SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a BLIP model as on the hub."""
    folder = tmp_path_factory.mktemp("blip")
    torch.manual_seed(3)
    text = BlipTextConfig(
        **SIZES, vocab_size=len(WORDS), encoder_hidden_size=16, bos_token_id=6, eos_token_id=3, sep_token_id=3,
        pad_token_id=0, max_position_embeddings=40,
    )  # fmt: skip
    vision = BlipVisionConfig(**SIZES, image_size=16, patch_size=8)
    config = BlipConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), image_text_hidden_size=16)
    BlipForConditionalGeneration(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        '{"image_processor_type": "BlipImageProcessor", "size": {"height": 16, "width": 16}, "do_resize": true, '
        '"do_rescale": true, "do_normalize": true, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}'
    )
    return folder


@pytest.mark.long
def test_a_caption_is_suggested_by_the_model_of_a_folder(blip: Path, tmp_path: Path) -> None:
    blip = shutil.copytree(blip, tmp_path / "blip")
    with client(tmp_path / "runs", captions=str(blip)) as page:
        assert 'id="suggest"' in page.get(CLIP).text
        answer = page.post(f"{CLIP}/caption", data={"time": "0.5"})
        assert answer.status_code == 200, answer.text
        words = answer.json()["caption"].split()
        assert words and {*words} <= {*WORDS}
        assert page.post(f"{CLIP}/caption", data={"time": "x"}).status_code == 400
        (blip / "model.safetensors").write_bytes(b"damaged")
        answer = page.post(f"{CLIP}/caption", headers={"accept": "application/json"})
        assert answer.status_code == 400 and "the captioning model failed" in answer.json()["error"]


def test_captions_are_offered_only_with_a_model_on_this_computer(
    blip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with client(tmp_path / "runs") as page:
        assert 'id="suggest"' not in page.get(CLIP).text
        answer = page.post(f"{CLIP}/caption", headers={"accept": "application/json"})
        assert answer.status_code == 400 and "no captioning model" in answer.json()["error"]
    other = tmp_path / "hub/models--x--clip/snapshots/0"
    other.mkdir(parents=True)
    (other / "config.json").write_text('{"model_type": "clip"}')
    (other / "model.safetensors").write_bytes(b"")
    assert not captions.Captioner().is_available, "it describes nothing"
    shutil.copytree(blip, kept := tmp_path / "hub/models--me--blip/snapshots/1")
    assert captions.Captioner().folder == kept
    assert captions.Captioner("me/blip").folder == kept and not captions.Captioner("me/other").is_available
