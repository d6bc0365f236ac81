from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from sparse_dlm_attn.errors import DataFileError
from sparse_dlm_attn_small_model.config import weight_shapes
from sparse_dlm_attn_small_model.model import TinyModel
from sparse_dlm_attn_small_model.weights import load_weights

Weights = dict[str, np.ndarray]
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, model: TinyModel, small_weights: Weights) -> Write:
    def write_file(changed: Weights | None = None, without: str = "", metadata: dict[str, str] | None = None) -> Path:
        tensors = {**small_weights, **(changed or {})}
        tensors.pop(without, None)
        path = tmp_path / "model.safetensors"
        save_file(tensors, path, {"config": model.config.to_json()} if metadata is None else metadata)
        return path

    return write_file


def test_the_shipped_weights_have_the_shapes_of_their_architecture() -> None:
    config, weights = load_weights()
    assert {name: array.shape for name, array in weights.items()} == weight_shapes(config)
    assert {array.dtype for array in weights.values()} == {np.dtype(np.float32)}


def test_a_file_gives_back_what_was_written_as_float32(write: Write, model: TinyModel, small_weights: Weights) -> None:
    half = small_weights["head"].astype(np.float16)
    config, weights = load_weights(str(write({"head": half})))
    assert config == model.config and weights["head"].dtype == np.float32
    for name, values in {**small_weights, "head": half}.items():
        np.testing.assert_array_equal(weights[name], values)


def refused(path: Path) -> str:
    with pytest.raises(DataFileError) as caught:
        load_weights(path)
    message = str(caught.value)
    assert str(path) in message
    assert "leave the path out" in message  # the remedy
    return message


@pytest.mark.clause("ERROR-1")
@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file_is_refused(write: Write, keep: int) -> None:
    path = write()
    path.write_bytes(path.read_bytes()[:keep])
    assert "truncated" in refused(path)


@pytest.mark.clause("ERROR-1")
def test_a_wrong_shape_names_the_tensor_and_both_shapes(write: Write) -> None:
    message = refused(write({"layers.1.down": np.zeros((32, 47), np.float32)}))
    assert "'layers.1.down'" in message
    assert "(32, 47)" in message
    assert "(32, 48)" in message


@pytest.mark.clause("ERROR-1")
def test_a_missing_or_renamed_tensor_is_refused(write: Write) -> None:
    assert "tensors" in refused(write(without="head"))
    renamed = write({"Head": np.zeros((256, 32), np.float32)}, without="head")
    assert "'head' is missing" in refused(renamed)


@pytest.mark.clause("ERROR-1")
@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({}, "names no architecture"),
        ({"config": "{"}, ""),
        ({"config": "[1]"}, ""),
        ({"config": '{"colour": 3}'}, "colour"),
        ({"config": json.dumps({"layers": 10**12})}, "layers need"),
        ({"config": json.dumps({"layers": "8"})}, "layers = '8'"),
        ({"config": json.dumps({"query_heads": 3})}, "groups"),
        ({"config": json.dumps({"norm_eps": -1.0})}, "norm_eps"),
    ],
)
def test_metadata_without_a_sound_architecture_is_refused(write: Write, metadata: dict[str, str], reason: str) -> None:
    assert reason in refused(write(metadata=metadata))


@pytest.mark.clause("ERROR-1")
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_weights_that_are_no_numbers_are_refused(write: Write, small_weights: Weights, poison: float) -> None:
    head = small_weights["head"].copy()
    head[3, 4] = poison
    assert "'head' holds NaN or inf" in refused(write({"head": head}))
