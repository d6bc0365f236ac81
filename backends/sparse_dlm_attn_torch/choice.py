"""Which device, and which way of computing: checked once, when the backend is made."""

from __future__ import annotations

from typing import Literal, cast, get_args

import torch

from sparse_dlm_attn import InvalidArgumentError, UnavailableError, UnsupportedError
from sparse_dlm_attn_torch import block_sparse
from sparse_dlm_attn_torch import dense as dense_part

__all__ = ["Attention", "Dense", "check_attention", "check_dense", "check_device", "check_version"]

Attention = Literal["auto", "gather", "masked", "flex", "block-sparse"]
Dense = Literal["auto", "matmul", "flash"]

OLDEST = (2, 5)


def check_version() -> None:
    """Raise `UnavailableError` if PyTorch is too old."""
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < OLDEST:
        raise UnavailableError(
            "backend 'torch'", [f"PyTorch {torch.__version__} is older than 2.5"], "Upgrade it: pip install -U torch."
        )


def check_device(device: object) -> torch.device:
    """Return the device, if it can be computed on.

    Raises
    ------
    InvalidArgumentError
        If it is no device that this backend serves, or a GPU that is not there.
    UnavailableError
        If there is no GPU, or PyTorch cannot use one.
    """
    rule, hint = "must be 'cpu', 'cuda' or 'cuda:<number>'", ""
    try:
        chosen = torch.device(cast("str", device))
    except (RuntimeError, TypeError) as error:
        raise InvalidArgumentError("device", rule, repr(device)) from error
    if chosen.type not in ("cpu", "cuda"):
        raise InvalidArgumentError("device", rule, repr(device), hint)
    if chosen.type == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        built = torch.version.cuda is not None
        reason = "no usable GPU was found" if built else f"PyTorch {torch.__version__} is built without CUDA"
        raise UnavailableError(
            f"backend 'torch' on device {str(device)!r}",
            [reason],
            ("Check the driver with nvidia-smi" if built else "Install a CUDA build from pytorch.org")
            + ", or use device='cpu'.",
        )
    count = torch.cuda.device_count()
    if chosen.index is not None and chosen.index >= count:
        raise InvalidArgumentError("device", f"must name one of {count} GPUs, from cuda:0", repr(device))
    return chosen


def check_attention(attention: object, device: torch.device) -> Attention:
    """Return the attention path, if the device can take it.

    Raises
    ------
    InvalidArgumentError
        If there is no such path.
    UnsupportedError, UnavailableError
        If it cannot be taken on this device, or its library is not installed.
    """
    if attention not in get_args(Attention):
        names = ", ".join(get_args(Attention))
        raise InvalidArgumentError("attention", f"must be one of {names}", repr(attention))
    if attention == "gather" and device.type != "cpu":
        raise UnsupportedError(
            "torch",
            [
                f"attention='gather' reads page indices on the host, so that on {device} every pass would wait "
                "for the device; use attention='flex' or 'masked' there"
            ],
        )
    if attention == "flex" and device.type == "cpu":
        raise UnsupportedError(
            "torch",
            [
                "attention='flex' needs a GPU, because compiled FlexAttention returns no log-sum-exp on a CPU; "
                "use attention='gather' or 'masked', or device='cuda'"
            ],
        )
    if attention == "block-sparse":
        if device.type == "cpu":
            raise UnsupportedError(
                "torch", ["attention='block-sparse' needs a GPU, and device is cpu; use attention='gather' or 'masked'"]
            )
        block_sparse.check_installed()
    return cast("Attention", attention)


def check_dense(dense: object, device: torch.device) -> Dense:
    """Return how dense parts are computed, if it can be done here.

    Raises
    ------
    InvalidArgumentError
        If there is no such way.
    UnsupportedError, UnavailableError
        If flash-attn cannot serve the device, or is not installed.
    """
    if dense not in get_args(Dense):
        raise InvalidArgumentError("dense", f"must be one of {', '.join(get_args(Dense))}", repr(dense))
    if dense == "flash":
        if device.type != "cuda":
            raise UnsupportedError(
                "torch", [f"dense='flash' needs a GPU, and device is {device}; use dense='matmul' or device='cuda'"]
            )
        dense_part.flash_attention()
    return cast("Dense", dense)
