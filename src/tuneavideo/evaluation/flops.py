"""Floating-point operations of PyTorch code, counted while it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tuneavideo.method.deepcache import reusing
from tuneavideo.method.inflate import VideoUNet


def count_flops(run: Callable[[], Any]) -> int:
    """Count the floating-point operations of `run`; a multiplication and an addition are two.

    Only matrix products and convolutions are counted. Attention runs unfused, which has the same products.
    """
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops()


class CountingUNet:
    """A video UNet that adds up the operations of its calls in `total`.

    Calls of one shape have the same count, which is measured once. With feature reuse they differ, so
    each is measured.

    Args:
        video: The UNet.
        reuse: Interval of feature reuse in steps; 1 for none.
    """

    def __init__(self, video: VideoUNet, reuse: int = 1) -> None:
        self.video, self.clip, self.total, self.uniform = reusing(video, reuse), video.clip, 0, reuse == 1
        self.counts: dict[tuple, int] = {}

    def __call__(self, *args: Any) -> Tensor:
        if not self.uniform:
            results: list[Tensor] = []
            self.total += count_flops(lambda: results.append(self.video(*args)))
            return results[0]
        key = (tuple(args[0].shape), self.clip.inject)
        if key not in self.counts:
            self.counts[key] = count_flops(lambda: self.video(*args))
        self.total += self.counts[key]
        return self.video(*args)
