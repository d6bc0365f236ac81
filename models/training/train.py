"""Train the small model from scratch, in stages of growing length, within a fixed time.

See README.md for the commands. One run writes to ``--out``: ``tiny.safetensors`` (float16 weights
with configuration and training facts), ``checkpoint.pt`` (for ``--resume``) and ``log.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from corruption import corrupt
from data import ANSWER, LAST_ANSWER, Batch, BatchStream, Mixture
from evaluate import english_bits_per_byte, make_layout, retrieval_score
from layout import Layout, block_training_rows, full_rows
from optimizer import Optimizer
from safetensors.torch import save_file
from torch_model import PackedModel, initial_weights

from sparse_dlm_attn_small_model import retrieval
from sparse_dlm_attn_small_model.config import TinyConfig, parameter_count

HALF_ROW = 49152
WARM_UP_STEPS = 200
LOG_EVERY = 25


@dataclass(frozen=True)
class Stage:
    """A part of the curriculum."""

    name: str  # for the log
    end: float  # share of the training time after which the stage ends at the latest
    mixture: Mixture  # what its documents are made of
    leave_below: float = 0.0  # leave earlier once the loss of answer bytes has fallen below this
    evaluate: tuple[int, ...] = (512,)  # prompt lengths of the scores during the stage


ONE_CODE, ALL_TASKS = (1.0, 0.0, 0.0, 0.0), (0.35, 0.15, 0.15, 0.35)
STAGES = (
    # Lookup forms quickly only if the same fact is asked for more than once.
    Stage("lookup-512", 0.10, Mixture((512,) * 96, 0.5, 0.4, ONE_CODE, (0.5, 0.7), distractors=2), leave_below=0.5),
    Stage("unique-512", 0.14, Mixture((512,) * 96, 0.0, 0.15, ALL_TASKS, (0.45, 0.65))),
    Stage(
        "2048",
        0.32,
        Mixture((2048,) * 20 + (512,) * 16, 0.0, 0.1, ALL_TASKS, (0.3, 0.5), max_episodes=2),
        evaluate=(512, 2048),
    ),
    Stage(
        "4096",
        0.58,
        Mixture((4096,) * 10 + (2048,) * 4, 0.0, 0.1, ALL_TASKS, (0.2, 0.45), max_episodes=2),
        evaluate=(4096,),
    ),
    Stage(
        "16384",
        1.0,
        Mixture((16384, 16384, 8192, 4096, 2048, 2048), 0.0, 0.1, ALL_TASKS, (0.1, 0.35), max_episodes=2),
        evaluate=(4096, 16384),
    ),
)


def parse_arguments() -> argparse.Namespace:
    """Return the command line's settings."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpus", type=Path, required=True, help="text from corpus.py")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=1225, help="training time in all")
    parser.add_argument("--stop-after", type=float, help="stop this run early, to resume it later")
    parser.add_argument("--resume", action="store_true", help="go on from OUT/checkpoint.pt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate of AdamW")
    parser.add_argument("--muon-rate", type=float, help="use Muon on the layers' matrices")
    parser.add_argument("--answer-weight", type=float, default=4.0)
    parser.add_argument("--evaluate-every", type=float, default=120, help="seconds")
    parser.add_argument("--prompts", type=int, default=24, help="per score during training")
    parser.add_argument("--final-prompts", type=int, default=200)
    parser.add_argument("--workers", type=int, default=10)
    parser.add_argument("--small", action="store_true", help="toy sizes, to try the script on a CPU")
    return parser.parse_args()


class Trainer:
    """The training run: model, optimizer, clock, stage and log."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        gpu = self.device.type == "cuda"
        self.config, self.stages, self.half_row = TinyConfig(), STAGES, HALF_ROW
        if arguments.small:
            self.config = TinyConfig(layers=3, width=64, query_heads=2, kv_heads=1, head_dim=32, hidden=96)
            mixture = Mixture((512,) * 2, 0.5, 0.4, ONE_CODE, (0.5, 0.7), distractors=2)
            mixed = Mixture((1024,), max_episodes=2)
            self.stages = (Stage("a", 0.5, mixture, 0.5), Stage("b", 1.0, mixed))
            self.half_row = 1024
        weights = {
            name: weight.to(self.device).requires_grad_()
            for name, weight in initial_weights(self.config, arguments.seed).items()
        }
        dtype = torch.bfloat16 if gpu else torch.float32
        self.model = PackedModel(self.config, weights, compiled=gpu, dtype=dtype)
        self.optimizer = Optimizer(weights, muon=arguments.muon_rate is not None)
        self.layouts: dict[tuple[object, ...], Layout] = {}
        self.step, self.elapsed_before, self.stage, self.bytes_seen = 0, 0.0, 0, 0
        self.answer_loss = 10.0
        self.started = time.monotonic()
        self.log_path = arguments.out / "log.jsonl"
        torch.manual_seed(arguments.seed)

    @property
    def elapsed(self) -> float:
        """Seconds of training so far, earlier runs included."""
        return self.elapsed_before + time.monotonic() - self.started

    def record(self, **entry: object) -> None:
        """Write one line to the log and to the terminal."""
        line = json.dumps({"step": self.step, "seconds": round(self.elapsed, 1), **entry})
        print(line, flush=True)
        with self.log_path.open("a") as log:
            log.write(line + "\n")

    def layout_of(self, batch: Batch) -> Layout:
        """Return the (cached) layout of a batch."""
        lengths = self.stages[batch.stage].mixture.lengths
        key = (lengths, batch.full_sequence or batch.block_length)
        if key not in self.layouts:
            rows = full_rows(lengths * 2) if batch.full_sequence else block_training_rows(lengths, batch.block_length)
            self.layouts[key] = make_layout(self.model, rows, self.device)
        return self.layouts[key]

    def rate_factor(self) -> float:
        """Return the learning rate's factor: warm-up, constant, then linear to nearly zero."""
        progress = self.elapsed / self.arguments.seconds
        falling = min(1.0, 1.02 - (progress - 0.3) / 0.7)
        return max(0.02, min((self.step + 1) / WARM_UP_STEPS, falling))

    def train_step(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Do one optimizer step; return the loss and the mean loss of masked answer bytes."""
        tokens = batch.tokens.to(self.device, non_blocking=True)
        kinds = batch.kinds.to(self.device, non_blocking=True)
        layout = self.layout_of(batch)
        row = corrupt(batch, tokens, kinds, layout, self.arguments.answer_weight)
        loss, losses = self.model.loss(*row, layout)
        loss.backward()
        factor = self.rate_factor()
        self.optimizer.step(self.arguments.rate * factor, (self.arguments.muon_rate or 0.0) * factor)
        answers = (kinds % LAST_ANSWER == ANSWER) & (row[2][: len(kinds)] > 0)
        answer_loss = (losses[: len(kinds)] * answers).sum() / answers.sum().clamp_min(1)
        self.step += 1
        self.bytes_seen += len(tokens)
        return loss.detach(), answer_loss

    def advance_stage(self, shared: object) -> None:
        """Go to the next stage when this one's time is over or its goal is reached."""
        while self.stage < len(self.stages) - 1:
            stage = self.stages[self.stage]
            over = self.elapsed > stage.end * self.arguments.seconds
            if not over and self.answer_loss >= stage.leave_below:
                break
            self.record(event="stage ends", stage=stage.name, answer_loss=round(self.answer_loss, 3))
            self.stage += 1
            self.answer_loss = 10.0
        shared.value = self.stage

    def scores(self, count: int, lengths: tuple[int, ...], **options: object) -> dict[str, float]:
        """Return held-out scores by task and length; half as many prompts count beyond 4096 bytes."""
        return {
            f"{task}@{length}": retrieval_score(
                self.model,
                task,
                length,
                count=count if length <= 4096 else count // 2,
                row_tokens=2 * self.half_row,
                **options,
            )
            for length in lengths
            for task in retrieval.TASKS
        }

    def save(self) -> None:
        """Write the checkpoint and the float16 weights."""
        out = self.arguments.out
        weights = {name: weight.detach() for name, weight in self.model.weights.items()}
        state = {
            "weights": weights,
            "optimizer": self.optimizer.state(),
            "clock": (self.step, self.elapsed, self.stage, self.bytes_seen, self.answer_loss),
        }
        torch.save(state, out / "checkpoint.tmp")
        (out / "checkpoint.tmp").replace(out / "checkpoint.pt")
        facts = {
            "seed": self.arguments.seed,
            "steps": self.step,
            "bytes": self.bytes_seen,
            "seconds": round(self.elapsed),
            "stage": self.stages[self.stage].name,
            "optimizer": "AdamW" if self.arguments.muon_rate is None else "Muon and AdamW",
            "rate": self.arguments.rate,
            "parameters": parameter_count(self.config),
        }
        halves = {name: weight.half().cpu().contiguous() for name, weight in weights.items()}
        metadata = {"config": self.config.to_json(), "training": json.dumps(facts)}
        save_file(halves, out / "tiny.safetensors", metadata=metadata)

    def load(self) -> None:
        """Go on from the checkpoint."""
        path = self.arguments.out / "checkpoint.pt"
        state = torch.load(path, map_location=self.device, weights_only=False)
        with torch.no_grad():
            for name, weight in self.model.weights.items():
                weight.copy_(state["weights"][name])
        self.optimizer.load(state["optimizer"])
        self.step, self.elapsed_before, self.stage, self.bytes_seen, self.answer_loss = state["clock"]
        torch.manual_seed(self.arguments.seed + self.step)

    def run(self) -> None:
        """Train until the time is over, then print the final scores."""
        arguments = self.arguments
        if arguments.resume:
            self.load()
        stop = min(arguments.seconds, self.elapsed + (arguments.stop_after or arguments.seconds))
        shared = multiprocessing.Value("i", self.stage)
        mixtures = [stage.mixture for stage in self.stages]
        seed = arguments.seed * 1_000_003 + self.step
        stream = BatchStream(arguments.corpus.read_bytes(), seed, mixtures, shared)
        loader = torch.utils.data.DataLoader(
            stream, batch_size=None, num_workers=arguments.workers, prefetch_factor=4 if arguments.workers else None
        )
        next_evaluation = self.elapsed + arguments.evaluate_every
        mark, losses, answer_losses = time.monotonic(), [], []
        for batch in loader:
            loss, answer_loss = self.train_step(batch)
            if not batch.full_sequence:
                losses.append(loss)
                answer_losses.append(answer_loss)
            if self.step % LOG_EVERY == 0 and losses:
                current = float(torch.stack(answer_losses).mean())
                self.answer_loss = current if batch.stage == self.stage else 10.0
                pace = LOG_EVERY * self.half_row / (time.monotonic() - mark) / 1e6
                self.record(
                    stage=self.stages[batch.stage].name,
                    loss=round(float(torch.stack(losses).mean()), 4),
                    answer_loss=round(current, 4),
                    megabytes_per_second=round(pace, 3),
                )
                mark, losses, answer_losses = time.monotonic(), [], []
                self.advance_stage(shared)
            if self.elapsed > next_evaluation:
                lengths = self.stages[self.stage].evaluate
                self.record(event="scores", **self.scores(arguments.prompts, lengths))
                self.save()
                next_evaluation = self.elapsed + arguments.evaluate_every
                mark = time.monotonic()
            if self.elapsed > stop:
                break
        self.record(event="training stops", bytes_seen=self.bytes_seen)
        self.save()
        if self.elapsed >= arguments.seconds:
            self.final_scores()

    def final_scores(self) -> None:
        """Record the scores that the model card shows."""
        count, row = self.arguments.final_prompts, 2 * self.half_row
        lengths = (512,) if self.arguments.small else (512, 2048, 4096, 8192, 16384)
        self.record(event="final scores", **self.scores(count, lengths))
        middle = (512,) if self.arguments.small else (4096,)
        for options in ({"block_length": 8}, {"block_length": 32}, {"full_sequence": True}):
            self.record(event="final scores", **options, **self.scores(count, middle, **options))
        length = 512 if self.arguments.small else 4096
        bits = english_bits_per_byte(self.model, row_tokens=row, length=length)
        self.record(event="english", bits_per_byte_bound=round(bits, 3))


def main() -> None:
    """Run the command."""
    arguments = parse_arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("high")
    trainer = Trainer(arguments)
    trainer.record(event="start", device=str(trainer.device), torch=torch.__version__)
    trainer.run()


if __name__ == "__main__":
    main()
