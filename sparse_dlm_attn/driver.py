"""The driver: one call runs one pass of one layer, for any policy on any backend."""

from __future__ import annotations

import math
from typing import Any

from sparse_dlm_attn.arrays import Array, copy_of, is_host, is_readable, namespace, shape_of, without_autocast
from sparse_dlm_attn.backend import Backend
from sparse_dlm_attn.capabilities import Problem
from sparse_dlm_attn.checks import check_block, check_rows, check_rows_are_tokens, check_whole_sequence
from sparse_dlm_attn.context import Context
from sparse_dlm_attn.errors import InvalidArgumentError, InvalidTypeError, UnsupportedError
from sparse_dlm_attn.forms import Forms
from sparse_dlm_attn.memory import LayerMemory, check_memory
from sparse_dlm_attn.pass_info import PassInfo
from sparse_dlm_attn.policy import PassInputs, PrefixAttentionPolicy, certain
from sparse_dlm_attn.registry import get_backend, get_policy
from sparse_dlm_attn.rules import RulePolicy
from sparse_dlm_attn.selection import Selection
from sparse_dlm_attn.traffic import RecordingOperators, Traffic
from sparse_dlm_attn.values import AttentionState, changed, softmax_scale

__all__ = ["PrefixAttention"]


class PrefixAttention:
    """Sparse attention of a block over its context and itself.

    Parameters
    ----------
    policy : str or PrefixAttentionPolicy
        A registered name, ``"name:key=value,..."``, ``"module:attr"``, or an instance.
    backend : str or Backend
        A registered name, ``"module:attr"``, or an instance. Never replaced by another one.
    check_contents : bool, optional
        Whether to read page tables and lengths to check them. Default: only where they lie in host
        memory, since reading them from a device would synchronise.

    Examples
    --------
    >>> import numpy as np
    >>> from sparse_dlm_attn import Context, PassInfo, PrefixAttention
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = (rng.standard_normal((1, heads, 16, 64), dtype=np.float32) for heads in (4, 2, 2))
    >>> cache = rng.standard_normal((2, 1, 2, 1024, 64), dtype=np.float32)
    >>> context = Context.from_dense(cache[0], cache[1], page_size=16)
    >>> attention = PrefixAttention(policy="losa", backend="reference")
    >>> memory = None
    >>> for index in range(3):
    ...     out, memory = attention(q, k, v, context, memory, PassInfo(index))
    >>> out.shape
    (1, 4, 16, 64)
    """

    def __init__(
        self,
        policy: str | PrefixAttentionPolicy[Any] = "dense",
        backend: str | Backend = "reference",
        *,
        check_contents: bool | None = None,
    ) -> None:
        self.policy = get_policy(policy)
        self.backend = get_backend(backend)
        if not isinstance(check_contents, bool | None):
            raise InvalidTypeError("check_contents", "must be a bool or None", repr(check_contents))
        self.check_contents = check_contents
        self._forms = Forms()
        kind = type(self.policy)
        self._computes_all = kind.computed_tokens is PrefixAttentionPolicy.computed_tokens
        self._fused = kind.reuse is PrefixAttentionPolicy.reuse and kind.merge is PrefixAttentionPolicy.merge
        overridden = type(self.backend).attend_ranked is not Backend.attend_ranked
        self._ranks = isinstance(self.policy, RulePolicy) and self.policy.states_rules and overridden

    def __repr__(self) -> str:
        return f"PrefixAttention(policy={self.policy!r}, backend={self.backend.name!r})"

    @without_autocast
    def __call__(
        self,
        q: Array,
        k: Array | None,
        v: Array | None,
        context: Context,
        memory: LayerMemory | None = None,
        info: PassInfo | None = None,
        *,
        scale: float | None = None,
    ) -> tuple[Array, LayerMemory]:
        """Run one pass of one layer.

        Parameters
        ----------
        q : array
            ``(batch, q_heads, tokens, head_dim)``: queries of the block.
        k, v : array or None
            ``(batch, kv_heads, tokens, head_dim)``: keys and values of the block. None for both: the
            block is the whole sequence, and row ``r`` is the ``r``-th token of ``context``.
        context : Context
            Pages outside the block, or those of the whole sequence.
        memory : LayerMemory, optional
            What this layer's previous pass returned; None in pass 0. Memory of an earlier block may
            be handed in at pass 0 and is dropped unless the policy's memory spans the sequence.
        info : PassInfo, optional
            Place in the denoising; may be left out only together with ``memory``.
        scale : float, optional
            Softmax scale; default ``1 / sqrt(head_dim)``.

        Returns
        -------
        out : array
            ``(batch, q_heads, tokens, head_dim)`` in the dtype of ``q``.
        memory : LayerMemory
            For the next pass; ``memory.traffic`` tells what was read.

        Raises
        ------
        InvalidArgumentError, InvalidTypeError
            If an argument breaks a rule, such as that none may require a gradient where PyTorch records them;
            nothing has been computed then.
        UnsupportedError
            If the backend does not support this problem.
        StaleMemoryError
            If ``memory`` belongs to another policy, layer, batch, block shape or context; or, where it spans
            a sequence, if this context does not continue that of the block before.
        """
        info = self._checked(q, k, v, context, memory, info, scale)
        inputs, operators = self._inputs(q, context, memory, info, scale, k is None)
        if k is not None and v is not None and self._ranks:
            result = self._ranked(inputs, operators, k, v)
            if result is not None:
                return result
        active = self._active(inputs)
        selection = self.policy.select_pages(inputs, active)
        if not isinstance(selection, Selection):
            raise InvalidTypeError(
                f"{self.policy.name}.select_pages()", "must be a Selection", type(selection).__name__
            )
        selection.check_fits(shape_of(q), context)
        if k is None or v is None:
            fresh = self.backend.attend_pages(q, context, selection, active, scale=scale)
            state = self.policy.reuse(inputs, active, fresh)
            out = self.policy.merge(inputs, state, AttentionState.empty_like(q))
        elif self._fused:
            out, state = self.backend.attend(q, k, v, context, selection, active, inputs.cached, scale=scale)
        else:
            fresh = self.backend.attend_pages(q, context, selection, active, scale=scale)
            state = self.policy.reuse(inputs, active, fresh)
            out = self.policy.merge(inputs, state, self.backend.attend_block(q, k, v, scale=scale))
        return out, self._memory(changed(inputs, state=state), operators, active, selection)

    def _ranked(
        self, inputs: PassInputs[Any], operators: RecordingOperators, k: Array, v: Array
    ) -> tuple[Array, LayerMemory] | None:
        """Run the pass as one operator, if its rule can be said as one."""
        assert isinstance(self.policy, RulePolicy)
        ranked = self.policy.rule(inputs).ranked
        if ranked is None:
            return None
        result = operators.attend_ranked(
            inputs.q,
            k,
            v,
            inputs.context,
            operators.page_bounds(inputs.context),
            ranked,
            inputs.cached,
            scale=inputs.scale,
        )
        inputs = changed(inputs, state=result.state, kept=result.kept)
        return result.out, self._memory(inputs, operators, result.active, result.selection)

    def _memory(
        self, inputs: PassInputs[Any], operators: RecordingOperators, active: Array, selection: Selection
    ) -> LayerMemory:
        """Return what the next pass gets; ``inputs`` hold this pass's context part."""
        context, info = inputs.context, inputs.info
        assert inputs.state is not None
        # Before the traffic is counted: a policy that freezes a selection scores pages here.
        remembered = self.policy.remember(inputs, active, selection)
        traffic = Traffic(
            selection,
            active,
            int(inputs.q.shape[1]),
            context.kv_heads,
            context.page_lengths,
            context.token_bytes,
            operators.metadata_reads,
            operators.key_reads,
        )
        segments = context.page_segments
        return LayerMemory(
            self.policy,
            info.layer,
            context.version,
            context.page_size,
            _kept(context.page_table),
            _kept(context.page_lengths),
            None if segments is None else _kept(segments),
            inputs.state,
            remembered,
            operators.bounds,
            selection,
            active,
            traffic,
        )

    def _active(self, inputs: PassInputs[Any]) -> Array:
        """Return the active rows: the policy's, among those that the model computes (clause DRIVER-3)."""
        q = inputs.q
        active = self.policy.active_set(inputs)
        check_rows("active_set()", active, q)
        if self._computes_all:
            return active
        computed = self.policy.computed_tokens(inputs.info, inputs.all_rows())
        check_rows("computed_tokens()", computed, q)
        return active & computed

    def _checked(
        self,
        q: Array,
        k: Array | None,
        v: Array | None,
        context: Context,
        memory: LayerMemory | None,
        info: PassInfo | None,
        scale: float | None,
    ) -> PassInfo:
        """Check everything that can be checked before a kernel is launched."""
        if info is None:
            if memory is not None:
                raise InvalidArgumentError(
                    "info", "must be given together with memory", "None", "Pass PassInfo(index=...)."
                )
            info = PassInfo(0)
        self._forms.check(self._check_problem, q, k, v, context, scale)
        if not isinstance(info, PassInfo):
            raise InvalidTypeError("info", "must be a PassInfo", type(info).__name__)
        info.check_fits(q)
        read = is_readable(context.page_table) if self.check_contents is None else self.check_contents
        if read:
            context.check_contents()
            if k is None:
                check_rows_are_tokens(q, context)
        if memory is not None:
            check_memory(self.policy, q, context, memory, info, read)
        return info

    def _check_problem(self, q: Array, k: Array | None, v: Array | None, context: Context, scale: float | None) -> None:
        """Check what depends on forms alone, and ask the backend whether it computes them."""
        if k is None and v is None:
            check_whole_sequence(q, context)
        else:
            check_block(q, k, v, context)
        softmax_scale(int(q.shape[3]), scale)
        if reasons := self.backend.why_not(Problem.of(q, context)):
            raise UnsupportedError(self.backend.name, reasons)

    def _inputs(
        self, q: Array, context: Context, memory: LayerMemory | None, info: PassInfo, scale: float | None, whole: bool
    ) -> tuple[PassInputs[Any], RecordingOperators]:
        """Assemble what the policy sees, without anything that a restart must not see."""
        if memory is None:
            operators = RecordingOperators(self.backend, None)
            inputs: PassInputs[Any] = PassInputs(
                operators.as_backend(), q, context, None, None, info, True, scale, whole
            )
            return inputs, operators
        if isinstance(info.index, int):
            restarts: bool | Array = certain(info.index == 0)
        else:
            restarts = info.of_sequences("index", q) == 0
        # A whole sequence's keys are written anew in every pass, so bounds of the previous one are stale.
        same_context = memory.version in (None, context.version) and restarts is False and not whole
        operators = RecordingOperators(self.backend, memory.bounds if same_context else None)
        policy_memory = memory.policy_memory
        cached: AttentionState | None = memory.state
        if restarts is True:
            cached = None
            if self.policy.memory_scope == "block":
                policy_memory = None
        elif restarts is not False:
            xp = namespace(q)
            rows = restarts[:, None, None]
            cached = AttentionState(
                xp.where(rows[..., None], xp.zeros_like(memory.state.out), memory.state.out),
                xp.where(rows, -math.inf, memory.state.lse),
            )
        inputs = PassInputs(operators.as_backend(), q, context, policy_memory, cached, info, restarts, scale, whole)
        return inputs, operators


def _kept(array: Array) -> Array:
    """Return what a later pass compares with: a copy on the host, where the owner may write into it."""
    return copy_of(array) if is_host(array) else array
