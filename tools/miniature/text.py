"""CLIP tokenizer of the world's words, and a small CLIP text encoder."""

from __future__ import annotations

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

POSITIONS = 16
START, END = "<|startoftext|>", "<|endoftext|>"


def new_tokenizer(words: tuple[str, ...]) -> CLIPTokenizer:
    """A tokenizer for which every given word is one token; any other is spelled from pieces and bytes."""
    letters = sorted(ByteLevel.alphabet())
    vocabulary = letters + [f"{letter}</w>" for letter in letters]
    merges: list[tuple[str, str]] = []
    for word in words:
        head, *rest = _pieces(word, merges)
        for piece in rest:
            merges.append((head, piece))
            head += piece
    vocabulary += dict.fromkeys(head + tail for head, tail in merges)
    vocabulary += [START, END]
    return CLIPTokenizer(
        vocab={token: number for number, token in enumerate(vocabulary)}, merges=merges, model_max_length=POSITIONS
    )


def _pieces(word: str, merges: list[tuple[str, str]]) -> list[str]:
    """The word as the merges so far spell it; later merges come after these, so what is whole stays whole."""
    pieces = [*word[:-1], f"{word[-1]}</w>"]
    for pair in merges:
        place = 0
        while place + 1 < len(pieces):
            if (pieces[place], pieces[place + 1]) == pair:
                pieces[place : place + 2] = ["".join(pair)]
            place += 1
    return pieces


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Two layers of width 128, as the UNet's cross-attention expects."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=512, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=POSITIONS, projection_dim=128,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
