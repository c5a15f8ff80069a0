"""What Triton kernels must compute, in torch's operations and double precision; for a GPU and for the interpreter."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Case = tuple[str, Callable[..., Any], Callable[..., Any], list[Tensor], int]
"""Name, kernel, reference, what both take, and of how many of these there are gradients."""


def error(found: Tensor, expected: Tensor) -> float:
    """Length of the difference as a part of what is expected."""
    return float((found.detach().double() - expected.detach()).norm() / expected.detach().norm().clamp_min(1e-9))


def worst(case: Case, dtype: torch.dtype, device: str) -> float:
    """The largest error of a case's results and gradients."""
    _, kernel, reference, drawn, learned = case
    given = [x.to(device, dtype if x.is_floating_point() else x.dtype) for x in drawn]
    exact = [x.double() if x.is_floating_point() else x for x in given]
    sides = []
    for run, inputs in ((kernel, given), (reference, exact)):
        inputs = [x.requires_grad_() if number < learned else x for number, x in enumerate(inputs)]
        made = run(*inputs)
        made = list(made) if isinstance(made, tuple) else [made]
        wave = [torch.arange(y.numel(), device=device).reshape(y.shape).mul(0.37).cos().to(y.dtype) for y in made]
        sides.append(made + list(torch.autograd.grad(made, inputs[:learned], wave) if learned else ()))
    return max(error(found, expected) for found, expected in zip(*sides, strict=True))


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(-2, -3)


def _attended(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    y = F.scaled_dot_product_attention(_heads(q, heads), _heads(k, heads), _heads(v, heads), scale=0.3)
    return y.transpose(-2, -3).flatten(-2)


def _injected(run: Callable[..., Tensor], frames: int, clips: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return run(q[:frames].repeat(clips, 1, 1), k[:frames].repeat(clips, 1, 1), v)


def group_norms() -> Iterator[Case]:
    """Odd sizes, one frame and several, with what comes before and after."""
    from tuneavideo.kernels.group_norm import group_norm

    for images, sites, channels, groups, frames, silu in (
        (4, 37, 24, 8, 2, True),
        (3, 70, 40, 4, 3, False),
        (2, 5, 64, 32, 1, True),
    ):

        def kernel(x: Tensor, shift: Tensor, w: Tensor, b: Tensor, groups=groups, frames=frames, silu=silu) -> Tensor:
            return group_norm(x, groups, w, b, 1e-5, frames=frames, silu=silu, shift_NC=shift)

        def reference(
            x: Tensor, shift: Tensor, w: Tensor, b: Tensor, groups=groups, frames=frames, silu=silu
        ) -> Tensor:
            clips = (x + shift[:, None]).unflatten(0, (-1, frames)).movedim(-1, 1).flatten(2)
            y = F.group_norm(clips, groups, w, b, 1e-5)
            return (F.silu(y) if silu else y).unflatten(2, (frames, -1)).movedim(1, -1).flatten(0, 1)

        drawn = [torch.randn(images, sites, channels) * 2 + 3, torch.randn(images, channels)]
        yield f"group norm {frames}", kernel, reference, [*drawn, torch.randn(channels), torch.randn(channels)], 4


def attentions(longest: int = 12) -> Iterator[Case]:
    """Along time, to a text, and to one clip's map."""
    from tuneavideo.kernels import along_time, few_keys, shared_map

    for clips, frames, sites, heads, width in ((2, 5, 7, 2, 8), (1, longest, 9, 2, 40), (1, 1, 3, 1, 16)):

        def kernel(q: Tensor, k: Tensor, v: Tensor, frames=frames, heads=heads) -> Tensor:
            return along_time.attend(q, k, v, frames=frames, heads=heads, scale=0.3)

        def reference(q: Tensor, k: Tensor, v: Tensor, frames=frames, heads=heads) -> Tensor:
            q, k, v = (x.unflatten(0, (-1, frames)).transpose(1, 2) for x in (q, k, v))
            return _attended(q, k, v, heads).transpose(1, 2).flatten(0, 1)

        drawn = [torch.randn(clips * frames, sites, heads * width) for _ in range(3)]
        yield f"along time {frames}", kernel, reference, drawn, 3
        if clips > 1:
            injected = partial(_injected, kernel, frames, 1)
            yield f"along time {frames}, injected", injected, partial(_injected, reference, frames, clips), drawn, 0
    q, k, v = torch.randn(2, 70, 48), torch.randn(2, 7, 48), torch.randn(2, 7, 48)
    few = partial(few_keys.attend, heads=2, scale=0.3)
    yield "few keys", few, lambda q, k, v: _attended(q, k, v, 2), [q, k, v], 1
    yield "few keys, injected", few, lambda q, k, v: _attended(q.expand(2, -1, -1), k, v, 2), [q[:1], k, v], 0
    index = torch.tensor([[0, 1], [0, 2], [0, 3]], dtype=torch.int32)
    drawn = [torch.randn(3, 50, 48), torch.randn(4, 50, 48), torch.randn(3, 4, 50, 48), index]
    yield (
        "shared map",
        lambda q, k, v, index: shared_map.attend(q, k, v, index, heads=2, scale=0.3),
        lambda q, k, v, index: _attended(
            q.expand(3, -1, -1, -1),
            k[index.long()].flatten(1, 2).expand(3, -1, -1, -1),
            v[:, index.long()].flatten(2, 3),
            2,
        ),
        drawn,
        0,
    )


def small_work() -> Iterator[Case]:
    """One pass over memory each."""
    from tuneavideo.kernels import pointwise

    yield "gate", pointwise.gate, lambda x: x.chunk(2, -1)[0] * F.gelu(x.chunk(2, -1)[1]), [torch.randn(5, 3, 50)], 1
    bias = torch.randn(24)
    pair = [torch.randn(3, 11, 24), torch.randn(3, 11, 24)]
    yield "sum", pointwise.add, lambda x, y, b: x + y + b, [*pair, bias], 3
    yield (
        "layer norm",
        lambda x, more, w, b: pointwise.layer_norm(x, more, w, b, 1e-5),
        lambda x, more, w, b: (x + more, F.layer_norm(x + more, (24,), w, b, 1e-5)),
        [*pair, torch.randn(24), bias],
        2,
    )
    index = torch.tensor([0, 1, 0, 2], dtype=torch.int32)
    frames = [torch.randn(2, 4, 6, 16), index]
    yield "gather", pointwise.gather, lambda x, index: (x[:, :1], x[:, index.long()]), frames, 1


if __name__ == "__main__":
    torch.manual_seed(0)
    cases = [*group_norms(), *attentions(), *small_work()]
    print(json.dumps({case[0]: worst(case, torch.float32, "cpu") for case in cases}))
