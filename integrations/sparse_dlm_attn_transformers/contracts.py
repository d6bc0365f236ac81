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
from sparse_dlm_attn_transformers.compilation import eager

if TYPE_CHECKING:
    from sparse_dlm_attn_transformers.session import SparseAttention

__all__ = ["CONTRACTS", "ModuleContract", "arguments_by_name", "check_plain_softmax", "contract_of"]

Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

CHANGES_SCORES = (
    "is_causal",
    "sliding_window",
    "softcap",
    "s_aux",
    "position_bias",
    "head_mask",
    "layer_head_mask",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "output_attentions",
)
"""Arguments by which some caller asks for more, or less, than one softmax over all keys."""


def check_plain_softmax(arguments: dict[str, Any], names: tuple[str, ...], module: torch.nn.Module) -> None:
    """Raise `InvalidArgumentError` if one of the named arguments is given and is not False."""
    for name in names:
        value = arguments.get(name)
        if value is not None and value is not False:
            raise InvalidArgumentError(
                name,
                f"must be None or False within a block of {type(module).__name__}: it attends by one "
                "softmax over the context and the whole block",
                _shown(value),
                "Leave it out, or run this pass outside of a block, where the model's own attention runs.",
            )


def _shown(value: object) -> str:
    return repr(value) if isinstance(value, bool | int | float | str) else type(value).__name__


def split_projections(module: Any, arguments: dict[str, Any]) -> Heads:
    """Return rotated queries and keys, and values, of modules with ``q_proj``, ``k_proj`` and ``v_proj``."""
    hidden = arguments["hidden_states"]
    q, k, v = (
        projection(hidden).view(*hidden.shape[:2], -1, module.head_dim)
        for projection in (module.q_proj, module.k_proj, module.v_proj)
    )
    if getattr(module, "q_norm", None) is not None:
        q, k = module.q_norm(q), module.k_norm(k)
    q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
    return (*_rotated(module, arguments, q, k, v), v)


def fused_projections(module: Any, arguments: dict[str, Any]) -> Heads:
    """Return rotated queries and keys, and values, of modules with one ``query_key_value``."""
    hidden = arguments["hidden_states"]
    heads = module.query_key_value(hidden).view(*hidden.shape[:2], -1, module.head_dim).transpose(1, 2)
    kv_heads = module.num_key_value_heads
    q, k, v = heads.split([heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
    if getattr(module, "query_layernorm", None) is not None:
        q, k = module.query_layernorm(q), module.key_layernorm(k)
    return (*_rotated(module, arguments, q, k, v), v)


def given_projections(module: Any, arguments: dict[str, Any]) -> Heads:
    """Return heads of LLaDA's ``attention(q, k, v, ...)``, whose arguments are projected already."""
    q, k, v = arguments["q"], arguments["k"], arguments["v"]
    if getattr(module, "q_norm", None) is not None and getattr(module, "k_norm", None) is not None:
        q, k = module.q_norm(q).to(dtype=k.dtype), module.k_norm(k).to(dtype=k.dtype)
    head_dim = q.shape[-1] // module.config.n_heads
    q, k, v = (x.view(*x.shape[:2], -1, head_dim).transpose(1, 2) for x in (q, k, v))
    if module.config.rope:
        q, k = module.rotary_emb(q, k)
    return q, k, v


def _rotated(
    module: Any, arguments: dict[str, Any], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate by the call's angles, which may cover the first channels alone."""
    angles = arguments.get("position_embeddings")
    if not isinstance(angles, tuple):  # Dream's may be left out
        angles = module.rotary_emb(v, arguments.get("position_ids"))
    cosine, sine = (part.unsqueeze(1) for part in angles)
    channels = cosine.shape[-1]

    def turned(x: torch.Tensor) -> torch.Tensor:
        first, second = x[..., :channels].chunk(2, dim=-1)
        whole = x[..., :channels] * cosine + torch.cat((-second, first), dim=-1) * sine
        return whole if x.shape[-1] == channels else torch.cat((whole, x[..., channels:]), dim=-1)

    return turned(q), turned(k)


@dataclass(frozen=True)
class ModuleContract:
    """What a kind of attention module must be for its patch to be right.

    Parameters
    ----------
    classes : tuple of str
        Names of the module's class. A subclass of one that inherits ``method`` unchanged counts too.
    models : str
        Who has such modules.
    scope : {"prefix", "sequence"}
        Whether a block reads a cache of what stands before it, or is the whole sequence.
    attributes : tuple of str
        What the module must have.
    project : callable
        ``project(module, arguments)`` returns queries, keys and values, ``(batch, heads, tokens, head_dim)``,
        normalised and rotated, from the arguments of the call by name.
    output : str
        Attribute that projects ``(batch, tokens, heads * head_dim)`` back.
    method : str
        What is patched.
    returns : int
        Values that the method returns; all but the first are None.
    save_flag : str
        Argument by which the model's own loop says that this pass writes the cache; "" if there is none.
    block_cache : str
        Argument that holds keys and values of the block's rows which this pass does not compute; "" if there
        is none. ``replace_position`` then says where the computed rows stand in the block.
    own_mask : bool
        Whether the mask that the model makes for its modules tells what a row may see. Otherwise it is that
        which the model was called with: causal models make causal masks, which a block does not have.
    refused : tuple of str
        Arguments that must be None or False, beside those that change scores.
    tested : str
        On what the patch is tested.

    Examples
    --------
    A class of one's own that is built like Llama's:

    >>> from sparse_dlm_attn_transformers import ModuleContract
    >>> mine = ModuleContract(classes=("MyAttention",), models="mine", scope="prefix")
    >>> mine.attributes
    ('q_proj', 'k_proj', 'v_proj', 'o_proj', 'head_dim', 'layer_idx')
    """

    classes: tuple[str, ...]
    models: str
    scope: Literal["prefix", "sequence"]
    attributes: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "head_dim", "layer_idx")
    project: Callable[[Any, dict[str, Any]], Heads] = split_projections
    output: str = "o_proj"
    method: str = "forward"
    returns: int = 2
    save_flag: str = ""
    block_cache: str = ""
    own_mask: bool = False
    refused: tuple[str, ...] = ()
    tested: str = ""

    def covers(self, kind: type) -> bool:
        """Return whether a module's class is one of this contract, by name or by what it inherits."""
        return any(
            base.__name__ in self.classes and getattr(kind, self.method, None) is getattr(base, self.method, None)
            for base in kind.__mro__
        )

    def check(self, name: str, module: torch.nn.Module) -> None:
        """Raise `InvalidArgumentError` unless a module keeps this contract."""
        needed = (*self.attributes, self.method, self.output)
        missing = [attribute for attribute in dict.fromkeys(needed) if not hasattr(module, attribute)]
        if missing:
            raise InvalidArgumentError(
                "model",
                f"must have {', '.join(self.attributes)} in {name}, as a {type(module).__name__} of the contract does",
                f"one without {', '.join(missing)}",
                "This version of the model's code is not known; see CONTRACTS.",
            )
        if (window := sliding_window(module)) is not None:
            raise InvalidArgumentError(
                "model",
                f"must read its whole context in {name}",
                f"a sliding window of {window} tokens",
                "Set use_sliding_window=False, or sliding_window=None, in its configuration.",
            )
        if (clip := getattr(getattr(module, "config", None), "clip_qkv", None)) is not None:
            raise InvalidArgumentError("model", f"must not clip what {name} projects", f"clip_qkv={clip}")

    def patched(
        self, session: SparseAttention, module: torch.nn.Module, original: Callable[..., Any]
    ) -> Callable[..., Any]:
        """Return what stands in for the module's method while ``session`` is attached."""
        signature = inspect.signature(getattr(type(module), self.method))

        def method(*args: Any, **kwargs: Any) -> Any:
            if not session.running:
                return original(*args, **kwargs)
            arguments = arguments_by_name(signature, module, args, kwargs)
            check_plain_softmax(arguments, (*CHANGES_SCORES, *self.refused), module)
            q, k, v = self.project(module, arguments)
            out = session.attend(
                module,
                q,
                k,
                v,
                cache=cache_argument(arguments),
                mask=arguments.get("attention_mask") if self.own_mask else None,
                scale=getattr(module, "scaling", None),
                block_cache=arguments.get(self.block_cache),
                block_start=arguments.get("replace_position"),
            )
            result = getattr(module, self.output)(out.transpose(1, 2).flatten(2))
            return result if self.returns == 1 else (result, *(None,) * (self.returns - 1))

        return eager(method)


def sliding_window(module: Any) -> int | None:
    """Return the window of a module in tokens, None if it reads everything."""
    if hasattr(module, "sliding_window"):
        window = module.sliding_window
    else:  # Mistral's ask their configuration; others leave a number there that is switched off
        config = getattr(module, "config", None)
        used = getattr(config, "use_sliding_window", True)
        window = getattr(config, "sliding_window", None) if used else None
    return window if isinstance(window, int) else None


def arguments_by_name(
    signature: inspect.Signature, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Return a call's arguments by name, lest a cache that is given by position be overlooked."""
    if not args:  # as most callers do, in every layer
        return kwargs
    given = dict(signature.bind_partial(module, *args).arguments)
    given.pop(next(iter(signature.parameters)))  # self
    if twice := given.keys() & kwargs.keys():
        raise InvalidArgumentError(
            min(twice), f"must be given to {type(module).__name__} once", "one by position and one by name"
        )
    return given | kwargs


SPLIT = ("q_proj", "k_proj", "v_proj", "o_proj", "head_dim", "layer_idx")
NORMED = (*SPLIT, "q_norm", "k_norm")

CONTRACTS: tuple[ModuleContract, ...] = (
    ModuleContract(
        classes=("Qwen3Attention", "Qwen3MoeAttention"),
        models="Qwen3 and Qwen3-MoE of transformers",
        scope="prefix",
        attributes=NORMED,
        tested="the modules themselves",
    ),
    ModuleContract(
        classes=("Qwen2Attention",),
        models="Qwen2 of transformers; Open-dCoder, A2D",
        scope="prefix",
        tested="the module itself",
    ),
    ModuleContract(
        classes=("LlamaAttention", "MistralAttention", "MinistralAttention"),
        models="Llama, Mistral, Ministral of transformers",
        scope="prefix",
        tested="the modules themselves",
    ),
    ModuleContract(
        classes=("SDARAttention", "SDARMoeAttention"),
        models="SDAR, SDAR-MoE, TraDo",
        scope="prefix",
        attributes=NORMED,
        save_flag="store_kv",
        tested="a stand-in",
    ),
    ModuleContract(
        classes=("Fast_dLLM_QwenAttention",),
        models="Fast-dLLM v2",
        scope="prefix",
        returns=1,
        save_flag="update_past_key_values",
        block_cache="block_past_key_values",
        own_mask=True,
        tested="a stand-in",
    ),
    ModuleContract(
        classes=("LLaDA2MoeAttention", "LLaDA2MoeSdpaAttention", "LLaDA2MoeFlashAttention2"),
        models="LLaDA2.x",
        scope="prefix",
        returns=3,
        project=fused_projections,
        output="dense",
        attributes=("query_key_value", "dense", "num_key_value_heads", "head_dim", "layer_idx"),
        tested="a stand-in",
    ),
    ModuleContract(
        classes=("LLaDAMoEAttention", "LLaDAMoESdpaAttention", "LLaDAMoEFlashAttention2"),
        models="LLaDA-MoE",
        scope="sequence",
        returns=3,
        refused=("past_key_value",),
        tested="a stand-in",
    ),
    ModuleContract(
        classes=("DreamAttention", "DreamSdpaAttention"),
        models="Dream",
        scope="sequence",
        returns=3,
        attributes=(*SPLIT, "rotary_emb"),
        refused=("past_key_value", "dual_cache"),
        tested="a stand-in",
    ),
    ModuleContract(
        classes=("LLaDALlamaBlock",),
        models="LLaDA, LLaDA 1.5",
        scope="sequence",
        method="attention",
        attributes=("q_proj", "k_proj", "v_proj", "attn_out", "rotary_emb", "config", "layer_id"),
        project=given_projections,
        output="attn_out",
        refused=("layer_past", "use_cache", "replace_position"),
        tested="a stand-in",
    ),
)
"""Attention modules that can be patched."""


def contract_of(module: torch.nn.Module, contracts: tuple[ModuleContract, ...] = CONTRACTS) -> ModuleContract | None:
    """Return the first contract that covers a module's class, None if there is none."""
    return next((contract for contract in contracts if contract.covers(type(module))), None)
