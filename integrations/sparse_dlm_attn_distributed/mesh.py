"""Which ranks hold pages and which hold heads, read off a `DeviceMesh`, and whether all ranks agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from sparse_dlm_attn import Backend, InvalidArgumentError, InvalidTypeError, UnavailableError

__all__ = ["agree", "ask", "dimensions", "same"]


def dimensions(mesh: Any, backend: Backend, context: str | None, heads: str | None) -> tuple[str | int, str | None]:
    """Return the dimension of a mesh over pages, and that over heads.

    Parameters
    ----------
    mesh : DeviceMesh
        One dimension, or two with names.
    backend : Backend
        Computes on each rank.
    context, heads : str, optional
        Names of the dimensions; see :class:`DistributedBackend`.

    Raises
    ------
    InvalidTypeError, InvalidArgumentError, UnavailableError
        If the mesh does not serve.
    """
    _check_mesh(mesh, backend)
    names = mesh.mesh_dim_names
    for argument, name in (("context_dim", context), ("heads_dim", heads)):
        if name is not None and name not in (names or ()):
            raise InvalidArgumentError(argument, f"must name one of {names}", repr(name))
    if mesh.ndim == 1 and heads is None:
        return 0, None
    context = context or "context"
    if names is None or context not in names or mesh.ndim > 2:
        raise InvalidArgumentError(
            "mesh",
            "must have one dimension, or two of which one is named 'context' or as context_dim says",
            f"{mesh.ndim} dimensions named {names}",
            'Pass mesh["context", "heads"], or init_device_mesh(..., mesh_dim_names=(...)).',
        )
    others = [name for name in names if name != context]
    if heads is not None and heads not in others:
        raise InvalidArgumentError("heads_dim", f"must name a dimension besides {context!r}", repr(heads))
    return context, others[0] if others else None


def ask(groups: Sequence[dist.ProcessGroup], mine: Any) -> list[Any]:
    """Return what every rank of a mesh says, the same list on each of them; waits for all on the host.

    Parameters
    ----------
    groups : sequence of torch.distributed.ProcessGroup
        One for each dimension of the mesh, in its order.
    mine : object
        What this rank says.
    """
    said = [mine]
    for group in groups:
        lists: list[Any] = [None] * group.size()
        dist.all_gather_object(lists, said, group=group)
        said = [value for values in lists for value in values]
    return said


def same(said: Sequence[Any], mine: Any, argument: str, hint: str) -> None:
    """Raise, on every rank, unless all say the same about an argument."""
    others = [value for value in said if value != mine]
    if others:
        raise InvalidArgumentError(
            argument, "must be the same on every rank", f"{mine} here, {others[0]} on another", hint
        )


def agree(groups: Sequence[dist.ProcessGroup], argument: str, mine: Any, hint: str) -> None:
    """Raise, on every rank, unless all were given the same."""
    same(ask(groups, mine), mine, argument, hint)


def _check_mesh(mesh: Any, backend: Backend) -> None:
    remedy = "Make it from one init_device_mesh(...) call that every rank runs alike."
    if not dist.is_available() or not dist.is_initialized():
        raise UnavailableError(
            "the distributed backend",
            ["torch.distributed is not set up in this process"],
            "Start with torchrun and call init_device_mesh() or init_process_group().",
        )
    if not isinstance(mesh, DeviceMesh):
        raise InvalidTypeError("mesh", "must be a torch DeviceMesh", type(mesh).__name__, remedy)
    if mesh.get_coordinate() is None:
        raise InvalidArgumentError(
            "mesh", "must hold the rank that uses it", f"ranks {mesh.mesh.flatten().tolist()} on rank {dist.get_rank()}"
        )
    devices = backend.capabilities.devices
    if mesh.device_type not in devices:
        raise InvalidArgumentError(
            "mesh",
            f"must be of a device that backend {backend.name!r} serves, {' or '.join(devices)}",
            mesh.device_type,
            "Make the mesh, or the backend, for the other device.",
        )
