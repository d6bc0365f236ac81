"""Starts one process for each rank."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

TIME_LIMIT = {"cpu": 240, "cuda": 200}  # seconds; a scenario that hangs is a failure


class Ranks:
    """Runs scenarios of `worker.py`, each once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run = cache(self._run)

    def _run(self, scenarios: str, device: str, world: int, limit: int = 0) -> list[dict[str, Any]]:
        torch = pytest.importorskip("torch")
        limit = limit or TIME_LIMIT[device]
        if device == "cuda" and torch.cuda.device_count() < world:
            pytest.skip(f"needs {world} GPUs, there are {torch.cuda.device_count()}")
        folder = self.folder / f"{scenarios.replace(',', '-')}-{device}-{world}"
        folder.mkdir()
        logs = [(folder / f"{rank}.log").open("w", encoding="utf-8") for rank in range(world)]
        command = [sys.executable, str(Path(__file__).with_name("worker.py")), scenarios, device]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        started = [
            subprocess.Popen(
                [*command, str(rank), str(world), str(folder), str(limit)],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
            )
            for rank, log in enumerate(logs)
        ]
        try:
            codes = [process.wait(limit + 10) for process in started]
        finally:
            for process in started:
                process.kill()
            for log in logs:
                log.close()
        said = [Path(log.name).read_text(encoding="utf-8") for log in logs]
        assert codes == [0] * world, "\n".join(text[-3000:] for text in said)
        seen: list[dict[str, Any]] = [{} for _ in range(world)]
        for path in folder.glob("*.pt"):
            name, _, rank = path.stem.rpartition("-")
            seen[int(rank)][name] = torch.load(path, weights_only=False)
        return seen


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    with TemporaryDirectory() as folder:
        yield Ranks(Path(folder))
