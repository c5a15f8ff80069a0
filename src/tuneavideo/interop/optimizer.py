"""MindONE's AdamW, for the setting `optimizer: tuneavideo.interop.optimizer.UncorrectedAdamW`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


class UncorrectedAdamW(torch.optim.Optimizer):
    """AdamW without bias correction and without weight decay of biases and norms, as in MindONE.

    Moments are float32 whatever the parameters' precision.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 3e-5,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update the parameters. Returns the loss that `closure` returns, if there is one."""
        with torch.enable_grad():
            loss = closure() if closure else None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: Any, group: dict[str, Any]) -> None:
        state, gradient, value = self.state[parameter], parameter.grad.float(), parameter.float()
        if not state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(value), torch.zeros_like(value)
        first, second = group["betas"]
        state["exp_avg"].lerp_(gradient, 1 - first)
        state["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
        decay = group["weight_decay"] if value.ndim > 1 else 0.0
        update = state["exp_avg"] / (state["exp_avg_sq"].sqrt() + group["eps"]) + decay * value
        parameter.copy_(value - group["lr"] * update)
