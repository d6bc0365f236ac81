"""Muon for the layers' matrices and AdamW for everything else, batched to few GPU launches."""

from __future__ import annotations

from collections.abc import Mapping

import torch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic Newton-Schulz iteration (Jordan et al., 2024)."""


def orthogonalize(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Return nearly orthogonal matrices with the singular vectors of `matrices` ``(count, rows, columns)``."""
    a, b, c = COEFFICIENTS
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).float()


class Muon:
    """Momentum with orthogonalised updates (Nesterov, decoupled weight decay).

    Updates are scaled by ``0.2 * sqrt(max(rows, columns))`` so that their root mean square is that
    of AdamW's and AdamW's learning rates carry over (as ``match_rms_adamw`` in `torch.optim.Muon`;
    that one runs the iteration matrix by matrix, which costs many small launches here).
    """

    def __init__(self, matrices: list[torch.Tensor], momentum: float = 0.95, weight_decay: float = 0.1) -> None:
        self.momentum, self.weight_decay = momentum, weight_decay
        self.groups: dict[tuple[int, ...], list[torch.Tensor]] = {}
        for matrix in matrices:
            self.groups.setdefault(tuple(matrix.shape), []).append(matrix)
        self.buffers = {
            shape: torch.zeros(len(group), *shape, device=group[0].device) for shape, group in self.groups.items()
        }

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Update every matrix."""
        for shape, group in self.groups.items():
            gradient = torch.stack([matrix.grad for matrix in group])
            buffer = self.buffers[shape]
            buffer.lerp_(gradient, 1 - self.momentum)
            update = orthogonalize(gradient.lerp(buffer, self.momentum))
            scale = -rate * 0.2 * max(shape) ** 0.5
            torch._foreach_mul_(group, 1 - rate * self.weight_decay)
            torch._foreach_add_(group, list(update.unbind()), alpha=scale)


class Optimizer:
    """Muon on the layers' matrices (or AdamW on all), AdamW on the rest."""

    def __init__(self, weights: Mapping[str, torch.Tensor], *, muon: bool) -> None:
        matrices = {n: w for n, w in weights.items() if n.startswith("layers.") and w.ndim == 2}
        others = [w for n, w in weights.items() if n not in matrices]
        self.muon = Muon(list(matrices.values())) if muon else None
        groups = [{"params": others, "weight_decay": 0.0}]
        if not muon:
            groups.append({"params": list(matrices.values()), "weight_decay": 0.1})
        fused = others[0].is_cuda
        self.adam = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=fused)
        self.parameters = list(weights.values())

    def step(self, rate: float, muon_rate: float = 0.0) -> None:
        """Update all weights and clear their gradients."""
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for group in self.adam.param_groups:
            group["lr"] = rate
        if self.muon:
            self.muon.step(muon_rate)
        self.adam.step()
        for parameter in self.parameters:
            parameter.grad = None

    def state(self) -> dict[str, object]:
        """Return what a checkpoint needs; moments in bfloat16, to keep it small."""
        adam = self.adam.state_dict()
        adam["state"] = {
            index: {n: v.bfloat16() if n.startswith("exp_avg") else v for n, v in moments.items()}
            for index, moments in adam["state"].items()
        }
        return {"adam": adam, "muon": self.muon.buffers if self.muon else {}}

    def load(self, state: dict[str, object]) -> None:
        """Take over what `state` returned."""
        self.adam.load_state_dict(state["adam"])
        if self.muon:
            for shape, buffer in state["muon"].items():
                self.muon.buffers[shape].copy_(buffer)
