"""Lower bound on the floating-point operations of a step; `count_flops` counts those that run.

Both take a multiplication and an addition as two operations; only matrix products and convolutions are counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn


class Least:
    """Least operations of one step: those of every layer's output, once, and of the necessary gradients.

    A layer's output is needed once. The gradient of its input is needed if anything before it learns, that of its
    weight if it learns itself. Attention needs, for every query, each *different* token it looks at, once.
    """

    def __init__(self, tuned: set[nn.Parameter]) -> None:
        self.tuned, self.forward, self.backward = tuned, 0.0, 0.0

    def layer(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Add a linear layer or a convolution (a forward hook)."""
        weight: Any = module.weight
        work = 2.0 * output.numel() * weight[0].numel()
        self.forward += work
        self.backward += work * (inputs[0].requires_grad + any(weight is each for each in self.tuned))

    def attention(self, queries: Tensor, key_tokens: int, learns: tuple[bool, bool]) -> None:
        """Add an attention of `queries` to `key_tokens` tokens; `learns`: gradients of queries, of keys and values."""
        product = 2.0 * queries.numel() * key_tokens
        query, keys = learns
        self.forward += 2 * product
        # Of scores: gradients of query and key; of the sum: of weights and value.
        self.backward += product * (query + keys + (query or keys) + keys)


def least(run: Callable[[], Tensor], unet: nn.Module, tuned: list[nn.Parameter], clip: Any, words: int) -> Least:
    """Add up the least operations of the layers of one forward pass `run` (on the meta device)."""
    total = Least(set(tuned))
    with _watched(unet, total, clip, words):
        run()
    return total


@contextmanager
def _watched(unet: nn.Module, total: Least, clip: Any, words: int) -> Iterator[None]:
    handles = []
    key_layers = {"to_k", "to_v"}
    for name, module in unet.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and not (
            name.split(".")[-1] in key_layers and ("attn1" in name or "attn2" in name)
        ):
            handles.append(module.register_forward_hook(total.layer))
        if isinstance(module, BasicTransformerBlock):
            handles.append(module.register_forward_hook(_Block(total, clip, words)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Block:
    """Least operations of a transformer block besides its layers: keys, values, and three attentions."""

    def __init__(self, total: Least, clip: Any, words: int) -> None:
        self.total, self.clip, self.words = total, clip, words

    def __call__(self, block: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x_NLC, frames = inputs[0], self.clip.frames
        clips, tokens, width = len(x_NLC) // frames, x_NLC.shape[1], x_NLC.shape[2]
        before = x_NLC.requires_grad
        inner = block.attn1.to_q.out_features
        # Keys and values: of all frames but the last, and of the text, once per clip.
        key_tokens = max(frames - 1, 1) * clips * tokens
        keys = 2 * 2.0 * key_tokens * width * inner
        self.total.forward += keys + 2 * 2.0 * clips * self.words * block.attn2.to_k.in_features * inner
        self.total.backward += keys * before
        learns = (before or self._learns(block.attn1.to_q), before)
        first = x_NLC.new_empty(clips, min(2, frames), tokens, inner)
        later = x_NLC.new_empty(clips, frames - first.shape[1], tokens, inner)
        self.total.attention(first, tokens, learns)
        self.total.attention(later, 2 * tokens, learns)
        self.total.attention(x_NLC.new_empty(*x_NLC.shape[:2], inner), self.words, (True, False))
        self.total.attention(x_NLC.new_empty(*x_NLC.shape[:2], inner), frames, (True, True))

    def _learns(self, layer: nn.Linear) -> bool:
        return any(layer.weight is each for each in self.total.tuned)
