"""Weights of the small model: read from the package or from a file; nothing is downloaded."""

from __future__ import annotations

import importlib.resources
import math
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from sparse_dlm_attn.errors import DataFileError
from sparse_dlm_attn_small_model.config import TinyConfig, weight_shapes

Weights = dict[str, np.ndarray[Any, Any]]

SHIPPED = importlib.resources.files("sparse_dlm_attn_small_model").joinpath("data/tiny.safetensors")
TENSORS_A_LAYER, TENSORS_ELSEWHERE = 11, 3


def load_weights(path: str | Path | None = None) -> tuple[TinyConfig, Weights]:
    """Read architecture and weights from a safetensors file.

    Parameters
    ----------
    path : str or Path, optional
        The file; default: the weights that ship with the package.

    Returns
    -------
    config : TinyConfig
        From the file's metadata.
    weights : dict of str to numpy.ndarray
        float32, with the names and shapes of `weight_shapes`.

    Raises
    ------
    DataFileError
        If the file is missing, unreadable, truncated or no safetensors file, or if its tensors are not
        those of the architecture that it names. The message names the file, the reason and the remedy.
    """
    remedy = "Give a file that models/training/train.py wrote, or leave the path out."
    with ExitStack() as stack:
        if path is None:
            path = stack.enter_context(importlib.resources.as_file(SHIPPED))
            remedy = "Reinstall sparse_dlm_attn: the weights are a part of it."
        try:
            return _read(Path(path))
        except SafetensorError as error:
            reason = f"it is truncated, corrupt or no safetensors file ({error})"
            raise DataFileError(f"cannot read the model weights {path}: {reason}. {remedy}") from error
        except (OSError, TypeError, ValueError) as error:
            raise DataFileError(f"cannot read the model weights {path}: {error}. {remedy}") from error


def _read(path: Path) -> tuple[TinyConfig, Weights]:
    """Read a file; OSError, TypeError or ValueError with the reason if it is of no use."""
    if not path.is_file():
        raise OSError("it is a directory" if path.is_dir() else "no such file")
    with safe_open(str(path), framework="numpy") as file:
        config = _config(file.metadata() or {})
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        _check_shapes(config, shapes)
        weights = {name: np.asarray(file.get_tensor(name), dtype=np.float32) for name in shapes}
    for name, values in weights.items():
        if not np.isfinite(values).all():
            raise ValueError(f"tensor {name!r} holds NaN or inf")
    return config, weights


def _config(metadata: dict[str, str]) -> TinyConfig:
    """Read the architecture; ValueError or TypeError with the reason if it makes no sense."""
    if "config" not in metadata:
        raise ValueError("its metadata names no architecture (key 'config')")
    config = TinyConfig.from_json(metadata["config"])
    for field in fields(config):
        value = getattr(config, field.name)
        kinds, rule = ((int,), "int") if isinstance(field.default, int) else ((int, float), "number")
        if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < math.inf:
            raise ValueError(f"its architecture has {field.name} = {value!r}, not a positive {rule}")
    if config.query_heads % config.kv_heads or config.head_dim % 2:
        raise ValueError(
            f"its architecture has {config.query_heads} query heads, {config.kv_heads} KV heads of "
            f"{config.head_dim} channels; groups must be equal and channels even"
        )
    return config


def _check_shapes(config: TinyConfig, found: dict[str, tuple[int, ...]]) -> None:
    """Raise ValueError unless the file holds exactly the tensors of its architecture."""
    expected = TENSORS_A_LAYER * config.layers + TENSORS_ELSEWHERE
    if len(found) != expected:  # also keeps an absurd number of layers from being enumerated
        raise ValueError(f"it holds {len(found)} tensors, {config.layers} layers need {expected}")
    for name, shape in weight_shapes(config).items():
        if found.get(name) != shape:
            got = f"has shape {found[name]}" if name in found else "is missing"
            raise ValueError(f"tensor {name!r} {got}; its architecture needs shape {shape}")
