"""What the conformance suite cannot ask of a policy: other array libraries, and tensors without values."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
from plain_backends import StrictOperators, TorchOperators
from policy_cases import EVERY_POLICY, denoise, make_block, rows_read

from sparse_dlm_attn import PassInfo, PrefixAttention, get_policy, list_policies
from sparse_dlm_attn.capabilities import Capabilities

OURS = sorted(name for name, plugin in list_policies().items() if plugin.target.startswith("sparse_dlm_attn."))
every_policy = pytest.mark.parametrize("policy", EVERY_POLICY)


def test_the_cases_cover_every_registered_policy_of_this_project() -> None:
    assert set(OURS) == {case.partition(":")[0] for case in EVERY_POLICY}


@pytest.mark.parametrize("name", OURS)
def test_a_policy_is_registered_under_its_own_name_and_explains_every_parameter(name: str) -> None:
    policy = get_policy(name)
    assert policy.name == name
    for parameter in fields(policy):  # type: ignore[arg-type]
        assert len(parameter.metadata["help"]) > 20, parameter.name


@every_policy
def test_decisions_and_outputs_agree_where_nothing_but_the_array_api_is_there(policy: str) -> None:
    strict = StrictOperators()
    block = make_block(7, q_heads=7, kv_heads=1)
    other = block.converted(strict.asarray)
    for (out, memory), (other_out, elsewhere) in zip(
        denoise(policy, block), denoise(policy, other, strict), strict=True
    ):
        assert type(other_out) is type(other.k)
        np.testing.assert_array_equal(memory.active, np.asarray(elsewhere.active))
        np.testing.assert_array_equal(rows_read(memory, 7, 6), rows_read(elsewhere, 7, 6))
        np.testing.assert_allclose(out, np.asarray(other_out), atol=3e-6)
        np.testing.assert_allclose(memory.traffic.bytes_read, np.asarray(elsewhere.traffic.bytes_read))


class OnMeta(TorchOperators):
    """Tensors on PyTorch's meta device have shapes and no values: any look at one raises."""

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(devices=("meta",))


@pytest.mark.parametrize("uniform", [True, False], ids=["one index", "an index a sequence"])
@every_policy
def test_a_pass_never_looks_at_values(policy: str, uniform: bool) -> None:
    torch = pytest.importorskip("torch")
    block = make_block(8).converted(lambda array: torch.from_numpy(np.array(array)).to("meta"))
    attention, memory = PrefixAttention(policy, OnMeta()), None
    for step in range(block.passes):
        index = step if uniform else torch.empty(2, dtype=torch.int32, device="meta")
        info = PassInfo(index, newly_decoded=block.newly[step], layer=1, num_layers=4)
        out, memory = attention(block.q[step], block.k, block.v, block.context, memory, info)
    assert out.shape == block.q[0].shape
