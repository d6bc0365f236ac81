"""Where a model is held: hooks and patches, and their undoing."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch

from sparse_dlm_attn import CallOrderError, InvalidArgumentError
from sparse_dlm_attn_transformers.caches import CachedLayer, cache_argument, cached_layer, check_viewable
from sparse_dlm_attn_transformers.compilation import eager
from sparse_dlm_attn_transformers.contracts import CONTRACTS, ModuleContract, arguments_by_name, contract_of
from sparse_dlm_attn_transformers.interface import NAME, register, sessions

if TYPE_CHECKING:
    from sparse_dlm_attn_transformers.session import SparseAttention

__all__ = ["Attachment", "Scope", "attachment_for", "first_input"]

Scope = Literal["prefix", "sequence"]


class Attachment:
    """Functions put in the place of methods of a model, on its own objects.

    Not hooks: outer classes that call ``self.model.forward(...)`` pass them by.

    Parameters
    ----------
    model : torch.nn.Module
        The whole model.
    stack : torch.nn.Module
        The module whose forward pass runs all the layers.
    layers : list of torch.nn.Module
        The attention modules, in order.
    """

    scope: Scope = "prefix"
    starts_blocks = False
    ends_with_save = False

    def __init__(self, model: torch.nn.Module, stack: torch.nn.Module, layers: list[torch.nn.Module]) -> None:
        self.model, self.stack, self.layers = model, stack, layers
        self._undo: list[Callable[[], None]] = []
        self._check_mode()
        if any(module in sessions for module in layers):
            raise CallOrderError(
                "SparseAttention(model)",
                "must be the only one attached",
                "another one",
                "Call its detach(); SparseAttention.of(model) returns it.",
            )

    @property
    def description(self) -> str:
        """What is attached to, in words."""
        return f"{type(self.model).__name__}, {len(self.layers)} layers"

    @property
    def attached(self) -> bool:
        """Whether the model is held."""
        return bool(self._undo)

    def attach(self, session: SparseAttention) -> None:
        """Take hold of the model."""
        try:
            for module in self.model.modules():
                sessions[module] = weakref.ref(session)  # the hooks keep it alive, as long as the model
            self._undo.append(self._release_modules)
            self._install(session)
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Undo everything, last first."""
        while self._undo:
            self._undo.pop()()

    def layer_idx(self, module: torch.nn.Module) -> int:
        """Return a layer's number in the cache."""
        at = getattr(module, "layer_idx", None)
        return int(getattr(module, "layer_id", 0) if at is None else at)

    def cached(self, module: torch.nn.Module) -> CachedLayer | None:
        """Return a layer's cache where the module's call does not bring it."""
        return None

    def mask(self, arguments: dict[str, Any]) -> Any:
        """Return what a forward pass hides, where that is known before the layers run."""
        return None

    def is_save(self, arguments: dict[str, Any]) -> bool:
        """Return whether the model's own loop says that a pass writes the cache."""
        return False

    def why_no_graphs(self) -> list[str]:
        """Return every reason against running whole forward passes as CUDA graphs."""
        return [f"passes of {type(self.model).__name__} are not run as graphs yet"]

    def without_mask(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of a pass that a graph records; asked where `why_no_graphs` is empty."""
        return arguments

    def begins_block(self, arguments: dict[str, Any]) -> bool:
        """Return whether a pass outside of a block shows that the model's own loop begins one."""
        return self.starts_blocks

    def check_still_ours(self) -> None:
        """Raise `InvalidArgumentError` if the model was changed meanwhile in a way that we cannot follow."""
        self._check_mode()

    def _check_mode(self) -> None:
        # Layers too: train() of a part, as of adapters, leaves the flag of the whole as it was.
        if self.model.training or any(module.training for module in self.layers):
            raise InvalidArgumentError(
                "model",
                "must be in eval mode: sparse attention has no dropout and no gradient",
                "one in training mode",
                "Call model.eval().",
            )

    def _install(self, session: SparseAttention) -> None:
        """Put functions in the place of methods."""
        forward, signature = self.stack.forward, inspect.signature(type(self.stack).forward)

        def within_a_pass(*args: Any, **kwargs: Any) -> Any:
            with session.model_pass(arguments_by_name(signature, self.stack, args, kwargs)):
                return forward(*args, **kwargs)

        self._replace(self.stack, "forward", eager(within_a_pass))

    def _release_modules(self) -> None:
        for module in self.model.modules():
            sessions.pop(module, None)

    def _replace(self, owner: torch.nn.Module, name: str, function: Callable[..., Any]) -> None:
        """Put a function in the place of a method, on this one object."""
        before = owner.__dict__.get(name)
        # Not setattr: modules would look a function up among their parameters first.
        owner.__dict__[name] = functools.wraps(getattr(owner, name))(_OfOneModel(function))

        def undo() -> None:
            if before is None:
                owner.__dict__.pop(name, None)
            else:
                owner.__dict__[name] = before

        self._undo.append(undo)


class _OfOneModel:
    """A function that must not go along into a copy of its model.

    Functions are shared, not copied: a copy's attention would run on the first model's weights, in silence.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse to be copied or pickled."""
        raise CallOrderError(
            "copying or pickling a model",
            "must wait until nothing is attached to it",
            "one that SparseAttention is attached to",
            "Leave the `with` or call detach() first; state_dict() and save_pretrained() work as ever.",
        )


class DiffusionGemmaAttachment(Attachment):
    """DiffusionGemma: its attention interface, its read-only prefix, its own loop."""

    starts_blocks = True

    def __init__(self, model: torch.nn.Module, root: Any) -> None:
        super().__init__(model, root.decoder, [layer.self_attn for layer in root.decoder.layers])
        self.root = root
        # The outermost module around it that transformers made: ``model`` may only hold it, and others.
        self.owner: Any = next(
            held
            for held in model.modules()
            if hasattr(held, "set_attn_implementation") and any(part is root for part in held.modules())
        )
        self._cached: dict[int, CachedLayer | None] = {}
        self._configs: list[Any] = [self.owner.config, root.config, root.config.text_config]

    def cached(self, module: torch.nn.Module) -> CachedLayer | None:
        """Return what the encoder wrote for this layer; known from the call just before."""
        return self._cached.pop(id(module), None)

    def check_still_ours(self) -> None:
        """Raise `InvalidArgumentError` if another attention implementation was set meanwhile, too."""
        super().check_still_ours()
        found = {config._attn_implementation for config in self._configs} - {NAME}
        if found:
            raise InvalidArgumentError(
                "attn_implementation",
                f"must be {NAME!r} while attached",
                ", ".join(map(repr, sorted(found))),
                "Detach before you set another one.",
            )

    def _install(self, session: SparseAttention) -> None:
        register()
        model = self.owner
        before = {"": model.config._attn_implementation}
        before["text_config"] = self.root.config.text_config._attn_implementation
        model.set_attn_implementation({"": NAME, "text_config": NAME})  # not the vision tower
        self._undo.append(lambda: model.set_attn_implementation(before))
        super()._install(session)
        for module in self.layers:
            self._replace(module, "append_to_cache", functools.partial(self._keep_apart, module))
        encoder = self.root.encoder
        encode, signature = encoder.forward, inspect.signature(type(encoder).forward)

        def between_blocks(*args: Any, **kwargs: Any) -> Any:
            session.finish_block()
            cache = cache_argument(arguments_by_name(signature, encoder, args, kwargs))
            # Here, because what the decoder runs is compiled by transformers for caches that allow it,
            # and a compiler reports no error of ours as it is.
            check_viewable(cache)
            session.prefill(cache)
            return encode(*args, **kwargs)

        self._replace(encoder, "forward", between_blocks)
        if hasattr(model, "generate"):
            self._replace(model, "generate", _finishing(model.generate, session))

    def _keep_apart(
        self, module: Any, cache: Any, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stand in for a method that copies the whole cache in every pass, to put the block behind it."""
        self._cached[id(module)] = cached_layer(cache, module.layer_idx)
        return keys, values


def first_input(arguments: dict[str, Any]) -> torch.Tensor:
    """Return what a forward pass is called with: numbers of tokens or their embeddings, ``(batch, tokens, ...)``."""
    for name in ("input_ids", "inputs_embeds", "x"):
        if isinstance(arguments.get(name), torch.Tensor):
            found: torch.Tensor = arguments[name]
            return found
    raise InvalidArgumentError(
        "cuda_graph", "must be False for a model that is called with neither input_ids nor inputs_embeds", True
    )


def _finishing(generate: Callable[..., Any], session: SparseAttention) -> Callable[..., Any]:
    """Wrap a generation loop, so that its last block ends with it."""

    @functools.wraps(generate)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return generate(*args, **kwargs)
        finally:
            session.finish_block()

    return wrapper


class PatchedAttachment(Attachment):
    """Models whose attention modules are patched, by their contract."""

    def __init__(
        self,
        model: torch.nn.Module,
        stack: torch.nn.Module,
        layers: list[torch.nn.Module],
        contract: ModuleContract,
        scope: Scope | None,
    ) -> None:
        super().__init__(model, stack, layers)
        self.contract = contract
        self._no_mask: torch.Tensor | None = None
        self.scope = contract.scope if scope is None else scope
        self.starts_blocks = self.ends_with_save = bool(contract.save_flag) and self.scope == "prefix"

    def mask(self, arguments: dict[str, Any]) -> Any:
        """Return the mask that the model was called with, one for all layers."""
        mask = arguments.get("attention_mask")
        if mask is None:
            mask = arguments.get("attention_bias")
        return mask.get("full_attention") if isinstance(mask, dict) else mask

    def is_save(self, arguments: dict[str, Any]) -> bool:
        """Return the model's own flag."""
        return bool(self.contract.save_flag and arguments.get(self.contract.save_flag))

    def begins_block(self, arguments: dict[str, Any]) -> bool:
        """Return whether a pass reads a cache and does not write it, which only passes over a block do."""
        return self.starts_blocks and not self.is_save(arguments) and cache_argument(arguments) is not None

    def why_no_graphs(self) -> list[str]:
        """Return reasons of models that bring more than a cache, or none."""
        reasons = []
        if self.scope == "sequence":
            reasons.append("blocks that are the whole sequence read which tokens exist on the host in every pass")
        if self.contract.block_cache or self.contract.own_mask:
            reasons.append(f"modules of {self.contract.models} read masks and a block cache on the host in every pass")
        return reasons

    def without_mask(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of a pass whose layers read no mask, so that the model makes none.

        A mask is as long as the context, and a graph would keep that length.
        """
        tokens = first_input(arguments)
        mask, stock = arguments.get("attention_mask"), type(self.model).__module__.startswith("transformers.models.")
        if stock:  # takes a mask of four axes as it is
            if self._no_mask is None:
                self._no_mask = tokens.new_ones((1, 1, 1, 1), dtype=torch.bool)
            mask = self._no_mask
        elif isinstance(mask, torch.Tensor) and mask.ndim > 2:
            mask = mask[..., :1]
        else:
            mask = None
        return arguments | {"attention_mask": mask}

    def _install(self, session: SparseAttention) -> None:
        super()._install(session)
        for module in self.layers:
            name = self.contract.method
            self._replace(module, name, self.contract.patched(session, module, getattr(module, name)))
        if session.graphs is not None:
            forward, signature = self.model.forward, inspect.signature(type(self.model).forward)

            def as_graph(*args: Any, **kwargs: Any) -> Any:
                return session.graphed_pass(forward, arguments_by_name(signature, self.model, args, kwargs))

            self._replace(self.model, "forward", eager(as_graph))


def attachment_for(
    model: torch.nn.Module, contract: ModuleContract | None = None, scope: Scope | None = None
) -> Attachment:
    """Find out how a model is attached to: by ``contract``, or by what we know.

    Raises
    ------
    InvalidArgumentError
        If it is none that we know.
    """
    for module in model.modules():
        if type(module).__name__ == "DiffusionGemmaModel":
            if contract is not None or scope == "sequence":
                raise InvalidArgumentError(
                    "contract" if contract is not None else "scope",
                    "must be None for DiffusionGemma, whose decoder reads what its encoder has cached",
                    repr(contract or scope),
                )
            return DiffusionGemmaAttachment(model, module)
    contracts = CONTRACTS if contract is None else (contract,)
    found = [(name, module, contract_of(module, contracts)) for name, module in model.named_modules()]
    known = [(name, module, contract) for name, module, contract in found if contract is not None]
    kinds = {id(contract): contract for _, _, contract in known}
    if len(kinds) != 1:
        names = ", ".join(sorted(name for contract in contracts for name in contract.classes))
        raise InvalidArgumentError(
            "model",
            f"must be DiffusionGemma or have attention modules of one of these classes: {names}",
            f"a {type(model).__name__} with {_attention_classes(model)}",
            "Pass contract=ModuleContract(...) that says how your class projects, or call "
            "sparse_dlm_attn.Decoder in its attention module; see 'Use it in your own loop'.",
        )
    contract = next(iter(kinds.values()))
    for name, module, _ in known:
        contract.check(name, module)
    stack = _common_parent(model, [name for name, _, _ in known])
    return PatchedAttachment(model, stack, [module for _, module, _ in known], contract, scope)


def _attention_classes(model: torch.nn.Module) -> str:
    classes = {type(module).__name__ for module in model.modules()}
    return ", ".join(sorted(name for name in classes if "ttention" in name)) or "no module named attention"


def _common_parent(model: torch.nn.Module, names: list[str]) -> torch.nn.Module:
    """Return the innermost module whose forward pass runs all the named ones."""
    paths = [name.split(".")[:-1] for name in names]
    shared: list[str] = []
    for steps in zip(*paths, strict=False):
        if len(set(steps)) > 1:
            break
        module = model.get_submodule(".".join([*shared, steps[0]]))
        if isinstance(module, torch.nn.ModuleList | torch.nn.ModuleDict):
            break  # the layers themselves, or what holds them: neither has a forward pass
        shared.append(steps[0])
    return model.get_submodule(".".join(shared))
