"""Whole models as CUDA graphs: the bits of plain passes, on the GPU that captures them."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="CUDA graphs are PyTorch's")
transformers = pytest.importorskip("transformers", minversion="5.0", reason="graphs need transformers 5")

from sparse_dlm_attn import get_policy  # noqa: E402
from sparse_dlm_attn_cuda_graphs import why_not  # noqa: E402
from sparse_dlm_attn_transformers import PagedCache, SparseAttention  # noqa: E402

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

BLOCK, PROMPT, ROOM, LAYERS = 16, 1500, 2048, 3
POLICIES = (
    "dense",
    "quest:budget=256",
    "losa:budget=256",
    "losa:budget=256,drift=refresh,save_pass=dense",
    "mage:budget=256,dense_layers=1",
    "flashblock",
    "snapkv:capacity=512",
    "sparsed:warmup=1",
    "streaming-llm",
)
BACKENDS = ("triton", "torch:device=cuda")


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model("bfloat16")


def make_model(dtype: str) -> Any:
    """Return a model of Qwen3's kind with random weights."""
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=128,
        max_position_embeddings=4096,
        dtype=dtype,
    )
    return transformers.Qwen3ForCausalLM(config).to("cuda", getattr(torch, dtype)).eval()


def decode(
    model: Any, policy: str, backend: str, cuda_graph: bool, blocks: int = 3, passes: int = 6, forward: Any = None
) -> Any:
    """Return the logits of all passes over several blocks, and the captures."""
    forward = model if forward is None else forward
    generator = torch.Generator().manual_seed(1)
    cache = PagedCache(model.config, 2, ROOM, page_size=64)
    found = []
    with torch.no_grad(), SparseAttention(model, policy, backend, page_size=64, cuda_graph=cuda_graph) as sparse:
        text = torch.randint(3, 512, (2, PROMPT), generator=generator).cuda()
        forward(text, past_key_values=cache)
        for number in range(blocks):
            with sparse.block():
                start = PROMPT + number * BLOCK
                places = torch.arange(start, start + BLOCK, device="cuda")[None].expand(2, -1)
                for index in range(passes):
                    decoded = (torch.arange(BLOCK) < 2 * index)[None].expand(2, -1).cuda()
                    sparse.next_pass(decoded, is_save=index == passes - 1)
                    block = torch.randint(3, 512, (2, BLOCK), generator=generator).cuda()
                    found.append(forward(block, past_key_values=cache, position_ids=places).logits.clone())
        captures = sparse.graphs.captures if sparse.graphs else 0
    assert cache.get_seq_length() == PROMPT + blocks * BLOCK
    return found, captures


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("policy", POLICIES)
def test_captured_passes_have_the_bits_of_plain_ones(model: Any, policy: str, backend: str) -> None:
    with SparseAttention(model, policy, backend) as sparse:
        reasons = why_not(sparse.decoder)
    assert not reasons and not get_policy(policy).counts_passes
    plain, _ = decode(model, policy, backend, False)
    graphed, captures = decode(model, policy, backend, True)
    assert captures >= 2
    for number, (one, other) in enumerate(zip(plain, graphed, strict=True)):
        assert torch.equal(one, other), number


@pytest.mark.parametrize("policy", ["dense", "losa:budget=256", "quest:budget=256", "mage:budget=256,dense_layers=0"])
def test_four_captures_serve_three_blocks(model: Any, policy: str) -> None:
    assert decode(model, policy, "triton", True)[1] <= 4


@pytest.mark.parametrize(("mode", "cuda_graph"), [("default", False), ("reduce-overhead", False), ("default", True)])
@pytest.mark.parametrize("policy", ["dense", "losa:budget=256"])
def test_a_compiled_model_computes_the_same(policy: str, mode: str, cuda_graph: bool) -> None:
    model = make_model("float32")
    plain, _ = decode(model, policy, "triton", False)
    torch._dynamo.reset()
    found, captures = decode(model, policy, "triton", cuda_graph, forward=torch.compile(model, mode=mode))
    assert bool(captures) == cuda_graph
    for number, (one, other) in enumerate(zip(plain, found, strict=True)):
        assert float((one - other).abs().max() / one.abs().max()) < 5e-3, number
