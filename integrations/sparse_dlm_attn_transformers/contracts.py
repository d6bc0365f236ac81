"""What we rely on in attention modules that call their kernels themselves, and how they are patched.

Code that comes with a checkpoint (SDAR, LLaDA, Dream, Fast-dLLM v2) does not ask transformers for an
attention function. Its modules are patched instead: within a block our function stands in for theirs, outside
of one theirs runs untouched. That is only right if a module is what we think it is, hence this table, and a
refusal otherwise.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from sparse_dlm_attn import InvalidArgumentError
from sparse_dlm_attn_transformers.caches import cache_argument

if TYPE_CHECKING:
    from sparse_dlm_attn_transformers.session import SparseAttention

__all__ = ["CONTRACTS", "ModuleContract", "contract_of"]

Forward = Callable[..., Any]


@dataclass(frozen=True)
class ModuleContract:
    """What a kind of attention module must be for its patch to be right.

    Parameters
    ----------
    classes : tuple of str
        Names of the module's class.
    models : str
        Who has such modules.
    scope : {"prefix", "sequence"}
        Whether a block reads a cache of what stands before it, or is the whole sequence.
    attributes : tuple of str
        What the module must have.
    method : str
        What is patched.
    norms : bool
        Whether queries and keys are normalised by head before they are rotated.
    returns : int
        Values that the method returns; all but the first are None.
    save_flag : str
        Argument by which the model's own loop says that this pass writes the cache; "" if there is none.
    refused : tuple of str
        Arguments that must be None or False.
    tested : str
        On what the patch is tested.
    """

    classes: tuple[str, ...]
    models: str
    scope: Literal["prefix", "sequence"]
    attributes: tuple[str, ...]
    method: str = "forward"
    norms: bool = False
    returns: int = 2
    save_flag: str = ""
    refused: tuple[str, ...] = ()
    tested: str = ""

    def check(self, name: str, module: torch.nn.Module) -> None:
        """Raise `InvalidArgumentError` unless a module keeps this contract."""
        missing = [attribute for attribute in self.attributes if not hasattr(module, attribute)]
        if missing:
            raise InvalidArgumentError(
                "model", f"must have {', '.join(self.attributes)} in {name}, as a {type(module).__name__} "
                "of the contract does", f"one without {', '.join(missing)}",
                "This version of the model's code is not known; see CONTRACTS.",
            )
        if getattr(module, "sliding_window", None) is not None:
            raise InvalidArgumentError(
                "model", f"must read its whole context in {name}",
                f"a sliding window of {module.sliding_window} tokens",
                "Set use_sliding_window=False in its configuration.",
            )

    def patched(self, session: SparseAttention, module: torch.nn.Module, original: Forward) -> Forward:
        """Return what stands in for the module's method while ``session`` is attached."""
        within = _llada_attention if self.method == "attention" else _projected_attention
        signature = inspect.signature(getattr(type(module), self.method))

        def method(*args: Any, **kwargs: Any) -> Any:
            if not session.running:
                return original(*args, **kwargs)
            # By name, lest a cache that is given by position be overlooked.
            given = dict(signature.bind_partial(module, *args).arguments)
            given.pop(next(iter(signature.parameters)))  # self
            if twice := given.keys() & kwargs.keys():
                raise InvalidArgumentError(
                    min(twice), f"must be given to {type(module).__name__} once",
                    "one by position and one by name",
                )
            given |= kwargs
            for name in self.refused:
                if given.get(name) is not None and given[name] is not False:
                    raise InvalidArgumentError(
                        name, f"must be None within a block of {type(module).__name__}",
                        type(given[name]).__name__,
                        "Run the model without its own caching scheme; a policy takes its place.",
                    )
            return within(self, session, module, **given)

        return method


PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "head_dim", "layer_idx")

CONTRACTS: tuple[ModuleContract, ...] = (
    ModuleContract(
        classes=("Qwen3Attention",), models="Qwen3 of transformers", scope="prefix", norms=True,
        attributes=(*PROJECTIONS, "q_norm", "k_norm", "scaling"), tested="the module itself",
    ),
    ModuleContract(
        classes=("SDARAttention",), models="SDAR, TraDo", scope="prefix", norms=True,
        attributes=(*PROJECTIONS, "q_norm", "k_norm", "scaling"), save_flag="store_kv",
        tested="a Qwen3 module of that name",
    ),
    ModuleContract(
        classes=("LlamaAttention",), models="Llama of transformers", scope="prefix",
        attributes=(*PROJECTIONS, "scaling"), tested="the module itself",
    ),
    ModuleContract(
        classes=("Fast_dLLM_QwenAttention",), models="Fast-dLLM v2", scope="prefix", returns=1,
        attributes=(*PROJECTIONS, "scaling"), save_flag="update_past_key_values",
        refused=("block_past_key_values",), tested="a Llama module of that name",
    ),
    ModuleContract(
        classes=("DreamAttention", "DreamSdpaAttention"), models="Dream", scope="sequence", returns=3,
        attributes=(*PROJECTIONS, "rotary_emb"), refused=("past_key_value", "dual_cache"),
        tested="a Llama module of that name",
    ),
    ModuleContract(
        classes=("LLaDALlamaBlock",), models="LLaDA, LLaDA 1.5", scope="sequence", method="attention",
        attributes=("q_proj", "k_proj", "v_proj", "attn_out", "rotary_emb", "config", "layer_id"),
        refused=("layer_past", "use_cache", "replace_position"), tested="a block written for the test",
    ),
)
"""Attention modules that can be patched."""


def contract_of(module: torch.nn.Module) -> ModuleContract | None:
    """Return the contract of a module's class, None if there is none."""
    name = type(module).__name__
    return next((contract for contract in CONTRACTS if name in contract.classes), None)


def _projected_attention(
    contract: ModuleContract,
    session: SparseAttention,
    module: Any,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
    **kwargs: Any,
) -> Any:
    """Project, rotate, attend, project back: what the Llama family has in common."""
    batch, tokens, _channels = hidden_states.shape
    q, k, v = (
        projection(hidden_states).view(batch, tokens, -1, module.head_dim)
        for projection in (module.q_proj, module.k_proj, module.v_proj)
    )
    if contract.norms:
        q, k = module.q_norm(q), module.k_norm(k)
    q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
    if not isinstance(position_embeddings, tuple):  # Dream's come by keyword, or not at all
        position_embeddings = module.rotary_emb(v, kwargs.get("position_ids"))
    cosine, sine = (angles.unsqueeze(1) for angles in position_embeddings)
    q, k = (x * cosine + _turned(x) * sine for x in (q, k))
    out = session.attend(
        module, q, k, v, cache=cache_argument(kwargs), scale=getattr(module, "scaling", None)
    )
    result = module.o_proj(out.transpose(1, 2).reshape(batch, tokens, -1))
    return result if contract.returns == 1 else (result, *(None,) * (contract.returns - 1))


def _turned(x: torch.Tensor) -> torch.Tensor:
    """Return channels turned by a quarter: the halves swapped, the first of them negated."""
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def _llada_attention(
    contract: ModuleContract,
    session: SparseAttention,
    module: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    **_: Any,
) -> Any:
    """Stand in for LLaDA's ``attention(q, k, v, ...)``, whose arguments are projected already."""
    batch, tokens, channels = q.shape
    if getattr(module, "q_norm", None) is not None and getattr(module, "k_norm", None) is not None:
        q, k = module.q_norm(q).to(dtype=k.dtype), module.k_norm(k).to(dtype=k.dtype)
    head_dim = channels // module.config.n_heads
    q, k, v = (x.view(batch, tokens, -1, head_dim).transpose(1, 2) for x in (q, k, v))
    if module.config.rope:
        q, k = module.rotary_emb(q, k)
    out = session.attend(module, q, k, v)
    return module.attn_out(out.transpose(1, 2).reshape(batch, tokens, channels)), None
