"""Which ranks hold pages and which hold heads, read off a `DeviceMesh` and agreed on by all of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from sparse_dlm_attn import Backend, InvalidArgumentError, InvalidTypeError, UnavailableError
from sparse_dlm_attn_distributed.exchange import Exchange, Way
from sparse_dlm_attn_distributed.watch import RankError, Watch

__all__ = ["Ranks", "join"]

REMEDY = "Make it from one init_device_mesh(...) call that every rank runs alike."


@dataclass(frozen=True, eq=False)
class Ranks:
    """The ranks that work together.

    Parameters
    ----------
    pages : Exchange
        Ranks that hold pages of the same heads.
    heads : Exchange or None
        Ranks that hold other KV heads of the same pages (tensor parallelism).
    watch : Watch
        Notices failures of any of them.
    """

    pages: Exchange
    heads: Exchange | None
    watch: Watch


def join(
    mesh: Any, backend: Backend, *, context_dim: str | None, heads_dim: str | None, timeout: float,
    check: bool | None, way: Way, told: str,
) -> Ranks:
    """Check a mesh, wait for its other ranks and compare with them what was asked for.

    Parameters
    ----------
    mesh : DeviceMesh
        One dimension, or two with names.
    backend : Backend
        Computes on each rank.
    context_dim, heads_dim : str, optional
        Names of the dimensions; see :class:`DistributedBackend`.
    timeout : float
        Seconds to wait for any rank.
    check : bool, optional
        Compare each collective first; default: on the host.
    way : {"auto", "collective", "symmetric"}
        What exchanges go through.
    told : str
        What else must be the same on all ranks.

    Raises
    ------
    InvalidTypeError, InvalidArgumentError, UnavailableError, RankError
        If the mesh does not serve, or another rank's is a different one.
    """
    _check_timeout(timeout)
    if way not in get_args(Way):
        raise InvalidArgumentError("exchange", f"must be one of {', '.join(get_args(Way))}", repr(way))
    _check_mesh(mesh, backend)
    context_dim, heads_dim = _dimensions(mesh, context_dim, heads_dim)
    ranks = [int(rank) for rank in mesh.mesh.flatten().tolist()]
    watch = Watch(_store(), dist.get_rank(), ranks, float(timeout))
    described = f"mesh {mesh.mesh.tolist()} with pages over {context_dim!r}, heads over {heads_dim!r}"
    try:
        watch.agree("mesh", f"{described} on {mesh.device_type}", REMEDY)
        watch.agree(
            "backend", f"{backend.name} with {told}", "Give every rank the same backend and options."
        )
    except RankError:
        watch.withdraw()
        raise
    on_host = mesh.device_type == "cpu"
    if check is None:
        check = on_host

    def exchange(name: str | None) -> Exchange:
        # Groups of its own: what a failure leaves behind in them cannot meet anybody else's collectives.
        members = dist.get_process_group_ranks(mesh.get_group(name))
        group = dist.new_group(members, use_local_synchronization=True)
        made = Exchange(group, watch, on_host=on_host, check=check)
        made.open_mailboxes(way)
        return made

    return Ranks(exchange(context_dim), None if heads_dim is None else exchange(heads_dim), watch)


def _check_timeout(timeout: object) -> None:
    if isinstance(timeout, bool) or not isinstance(timeout, int | float):
        raise InvalidTypeError("timeout", "must be a number of seconds", repr(timeout))
    if not (math.isfinite(timeout) and timeout > 0):
        raise InvalidArgumentError("timeout", "must be a finite number of seconds above 0", timeout)


def _check_mesh(mesh: Any, backend: Backend) -> None:
    if not dist.is_available() or not dist.is_initialized():
        raise UnavailableError(
            "the distributed backend", ["torch.distributed is not set up in this process"],
            "Start with torchrun and call init_device_mesh() or init_process_group().",
        )
    if not isinstance(mesh, DeviceMesh):
        raise InvalidTypeError("mesh", "must be a torch DeviceMesh", type(mesh).__name__, REMEDY)
    if mesh.get_coordinate() is None:
        raise InvalidArgumentError(
            "mesh", "must hold the rank that uses it",
            f"ranks {mesh.mesh.flatten().tolist()} on rank {dist.get_rank()}",
        )
    devices = backend.capabilities.devices
    if mesh.device_type not in devices:
        raise InvalidArgumentError(
            "mesh", f"must be of a device that backend {backend.name!r} serves, {' or '.join(devices)}",
            mesh.device_type, "Make the mesh, or the backend, for the other device.",
        )


def _dimensions(mesh: DeviceMesh, context: str | None, heads: str | None) -> tuple[str | None, str | None]:
    """Return the names of the dimensions over pages and over heads; None for the only, nameless one."""
    names = mesh.mesh_dim_names
    for argument, name in (("context_dim", context), ("heads_dim", heads)):
        if name is not None and name not in (names or ()):
            raise InvalidArgumentError(argument, f"must name one of {names}", repr(name))
    if mesh.ndim == 1 and heads is None:
        return (names[0] if names else None), None
    context = context or "context"
    if names is None or context not in names or mesh.ndim > 2:
        raise InvalidArgumentError(
            "mesh", "must have one dimension, or two of which one is named 'context' or as context_dim says",
            f"{mesh.ndim} dimensions named {names}",
            "Pass mesh[\"context\", \"heads\"], or init_device_mesh(..., mesh_dim_names=(...)).",
        )
    others = [name for name in names if name != context]
    if heads is not None and heads not in others:
        raise InvalidArgumentError("heads_dim", f"must name a dimension besides {context!r}", repr(heads))
    return context, others[0] if others else None


def _store() -> Any:
    """Return the store that the job was set up with; it has no public name."""
    return torch.distributed.distributed_c10d._get_default_store()
