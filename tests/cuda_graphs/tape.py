"""A graph for tests on a processor: operators as they ran, on the tensors they ran on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)


class Tape:
    """Runs work once and repeats its operators on the same memory when it is replayed.

    Whatever the host decided meanwhile is kept, as in a CUDA graph. Recording leaves no trace: what was written into
    tensors is undone.
    """

    def __init__(self, work: Callable[[], None], pool: Any) -> None:
        recorder = _Recorder()
        with recorder:
            work()
        self._calls = recorder.calls
        for tensor, before in reversed(recorder.written):
            tensor.copy_(before)

    def replay(self) -> None:
        for function, args, kwargs, results in self._calls:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(results), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.written: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in READS:
            raise RuntimeError(f"{function} reads a tensor on the host, which no graph can record")
        kwargs = kwargs or {}
        for argument, value in zip(function._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.written += [(tensor, tensor.clone()) for tensor in tree_leaves(value)]
        results = function(*args, **kwargs)
        self.calls.append((function, args, kwargs, results))
        return results
