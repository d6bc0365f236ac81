"""Compare the compiled model with the plain one on a GPU, and time a step at every stage."""

from __future__ import annotations

import time

import torch
from evaluate import make_layout
from layout import block_training_rows
from optimizer import Optimizer
from torch_model import PackedModel, initial_weights
from train import HALF_ROW, STAGES

from sparse_dlm_attn_small_model.config import MASK_ID, TinyConfig


def main() -> None:
    """Print the differences and the times."""
    torch.manual_seed(0)
    config, device = TinyConfig(), torch.device("cuda")
    weights = {n: w.to(device).requires_grad_() for n, w in initial_weights(config, 0).items()}
    with torch.no_grad():
        for name, weight in weights.items():
            if name.endswith(("output", "down")):
                weight.normal_(std=0.03)
    packed = PackedModel(config, weights, compiled=True, dtype=torch.bfloat16)
    plain = PackedModel(config, weights, compiled=False)
    length, begin = 512, time.perf_counter()
    clean = torch.randint(256, (HALF_ROW,), device=device)
    noisy = torch.where(torch.rand(HALF_ROW, device=device) < 0.5, MASK_ID, clean)
    counted = torch.zeros(2 * HALF_ROW, device=device)
    counted[:length] = 1.0
    lengths = (length,) * (HALF_ROW // length)
    layout = make_layout(packed, block_training_rows(lengths, 16), device)
    loss, _ = packed.loss(torch.cat([noisy, clean]), torch.cat([clean, clean]), counted, layout)
    loss.backward()
    gradients = {n: w.grad.clone() for n, w in weights.items()}
    torch.cuda.synchronize()
    print(f"compilation {time.perf_counter() - begin:.1f} s", flush=True)
    for weight in weights.values():
        weight.grad = None
    row = slice(0, length)
    alone = make_layout(plain, block_training_rows((length,), 16), device)
    tokens = torch.cat([noisy[row], clean[row]])
    targets = torch.cat([clean[row], clean[row]])
    plain_loss, _ = plain.loss(tokens, targets, counted[: 2 * length], alone)
    plain_loss.backward()
    print(f"loss {loss.item():.5f} plain {plain_loss.item():.5f}")
    worst = max(((gradients[n] - w.grad).norm() / w.grad.norm()).item() for n, w in weights.items())
    print(f"largest relative difference of a gradient {worst:.4f}", flush=True)
    optimizer = Optimizer(weights, muon=False)
    for stage in STAGES:
        layout = make_layout(packed, block_training_rows(stage.mixture.lengths, 16), device)
        times = {"forward": [], "both": [], "step": []}
        for _ in range(6):
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
            marks[0].record()
            loss, _ = packed.loss(torch.cat([noisy, clean]), torch.cat([clean, clean]), counted, layout)
            marks[1].record()
            loss.backward()
            marks[2].record()
            optimizer.step(1e-4)
            marks[3].record()
            torch.cuda.synchronize()
            for name, a, b in (("forward", 0, 1), ("both", 0, 2), ("step", 2, 3)):
                times[name].append(marks[a].elapsed_time(marks[b]))
        middle = {name: sorted(values)[3] for name, values in times.items()}
        speed = HALF_ROW / 1e3 / (middle["both"] + middle["step"])
        print(stage.name, {n: round(v, 2) for n, v in middle.items()}, f"{speed:.2f} MB/s", flush=True)
    print(f"memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


if __name__ == "__main__":
    main()
