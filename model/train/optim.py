"""AdamW, its parameter groups and the learning-rate schedule, all exactly as UNITER publishes them.

What a reader would get wrong: this is not `torch.optim.AdamW`. epsilon is added before the bias correction, the decay is
applied after the step and to the already stepped parameter, and the step count belongs to each parameter.

Source: github.com/ChenRocks/UNITER, optim/adamw.py, optim/misc.py, optim/sched.py.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

GradientConvention = Literal["none", "zero"]


NO_DECAY = ("bias", "LayerNorm.bias", "LayerNorm.weight")


LEAST_RATE = 1e-8


def parameter_groups(
    model: nn.Module, *, weight_decay: float, head: str | None = None, head_rate_multiplier: float = 1.0
) -> list[dict[str, Any]]:
    """Decayed and undecayed parameters, by name; norms that are not called LayerNorm are decayed, as published.

    Args:
        head: name prefix of a task's head (`vqa_output`, ...) that gets groups and a learning rate of its own.
        head_rate_multiplier: how many times the schedule's rate that head learns with.

    Returns:
        Groups with `params`, `names`, `weight_decay` and `rate_multiplier`; empty ones are left out. Tied tensors stand once.
    """
    groups: dict[tuple[bool, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        of_head = head is not None and name.startswith(head)
        decayed = not any(part in name for part in NO_DECAY)
        group = groups.setdefault(
            (of_head, decayed),
            {
                "params": [],
                "names": [],
                "weight_decay": weight_decay if decayed else 0.0,
                "rate_multiplier": head_rate_multiplier if of_head else 1.0,
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return [groups[key] for key in sorted(groups, reverse=True)]


def learning_rate(step: int, *, base: float, warmup_steps: int, total_steps: int) -> float:
    """Linear warm-up and linear decay; `step` counts updates from 1 and the rate is set before the update. Never below 1e-8."""
    if step < warmup_steps:
        rate = base * step / warmup_steps
    else:
        rate = base * max(0.0, (total_steps - step) / max(1, total_steps - warmup_steps))
    return rate if rate > 0 else LEAST_RATE


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group its rate: the schedule's times the group's `rate_multiplier`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("rate_multiplier", 1.0)


def clear_gradients(optimizer: torch.optim.Optimizer, convention: GradientConvention) -> None:
    """After an update: "none" lets parameters without gradient rest (today's way); "zero" zeroes gradients (torch 1.x), so that
    a head once used keeps moving by momentum and decay while other tasks are trained."""
    optimizer.zero_grad(set_to_none=convention == "none")


def begin_with_zero_gradients(optimizer: torch.optim.Optimizer) -> None:
    """What `clear_gradients` "zero" had left when a run was interrupted: gradients that are zero, of all that was ever updated."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if optimizer.state.get(parameter):
                parameter.grad = torch.zeros_like(parameter)


def clip_gradients(parameters: Iterable[Tensor], limit: float) -> Tensor:
    """Scale all gradients so that their global norm is at most `limit` (no limit if <= 0); returns the norm before, a 0-d tensor."""
    return torch.nn.utils.clip_grad_norm_(list(parameters), limit if limit > 0 else math.inf)


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay in the published form.

    m and v are updated; p -= lr * sqrt(1 - b2^t) / (1 - b1^t) * m / (sqrt(v) + eps); then p -= lr * wd * p with the new p.
    t counts a parameter's own updates; a parameter without gradient is left alone, undecayed.

    It is computed by PyTorch's fused kernel, whose form is another: with lr' = lr (1 - lr wd), wd' = wd / (1 - lr wd) and
    eps' = eps / sqrt(1 - b2^t) the two are the same.

    Args:
        parameters: tensors or groups, as every torch optimizer takes them.
        lr: learning rate; betas, eps, weight_decay: as published 0.9 and 0.98, 1e-6, 0.01.

    Attributes:
        unusable: a 0-d float32 tensor on the device, by which it is decided there whether to step: not where it is 1.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 5e-5,
        *,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.unusable: Tensor | None = None

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of the parameters that have a gradient, without waiting for the device; the closure's loss, None without one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            # Heads that rested have made fewer updates.
            by_step: dict[tuple[int, torch.device], list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = 0
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
                state["step"] += 1
                by_step.setdefault((state["step"], parameter.device), []).append(parameter)
            for (step, device), parameters in by_step.items():
                self._update(group, parameters, step, device)
        return loss

    def _update(self, group: dict[str, Any], parameters: list[Tensor], step: int, device: torch.device) -> None:
        first, second = group["betas"]
        kept = (1 - group["lr"] * group["weight_decay"]) or 1e-12  # of a weight; where nothing is, so little of the step
        torch._fused_adamw_(
            parameters,
            [parameter.grad for parameter in parameters if parameter.grad is not None],
            [self.state[parameter]["exp_avg"] for parameter in parameters],
            [self.state[parameter]["exp_avg_sq"] for parameter in parameters],
            [],
            [torch.full((), float(step), device=device)] * len(parameters),  # filled there: nothing is copied
            lr=group["lr"] * kept,
            beta1=first,
            beta2=second,
            weight_decay=group["weight_decay"] / kept,
            eps=group["eps"] / math.sqrt(1 - second**step),
            amsgrad=False,
            maximize=False,
            found_inf=self.unusable,
        )
