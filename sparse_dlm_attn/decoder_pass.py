"""One pass of a decoder over its block, layer after layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from sparse_dlm_attn.arrays import Array, namespace
from sparse_dlm_attn.context import Context
from sparse_dlm_attn.errors import CallOrderError
from sparse_dlm_attn.memory import LayerMemory
from sparse_dlm_attn.pass_info import PassInfo
from sparse_dlm_attn.traffic import Traffic

if TYPE_CHECKING:
    from sparse_dlm_attn.decoder import Decoder

__all__ = ["DecoderPass"]


class DecoderPass:
    """One pass of a `Decoder` over its block; made by `Decoder.next_pass`.

    Parameters
    ----------
    decoder : Decoder
        Whose pass it is.
    info : PassInfo
        Place in the denoising, but for the layer.

    Attributes
    ----------
    decoder, info
        As given.
    """

    def __init__(self, decoder: Decoder, info: PassInfo) -> None:
        self.decoder = decoder
        self._ran: set[int] = set()
        self._read: Callable[[], tuple[Traffic, ...]] | None = None
        self.info = info

    def __repr__(self) -> str:
        return f"DecoderPass(index={self.info.index}, layers_run={len(self._ran)})"

    def __call__(
        self,
        layer: int,
        q: Array,
        k: Array | None,
        v: Array | None,
        context: Context | None = None,
        *,
        scale: float | None = None,
    ) -> Array:
        """Return the attention output of one layer.

        Parameters
        ----------
        layer : int
            Layer, counted from 0.
        q, k, v : array
            As in :class:`PrefixAttention`.
        context : Context, optional
            What the layer reads; default: the one given to `Decoder.start_block`.
        scale : float, optional
            Softmax scale; default ``1 / sqrt(head_dim)``.

        Returns
        -------
        array
            ``(batch, q_heads, tokens, head_dim)`` in the dtype of ``q``.

        Raises
        ------
        CallOrderError
            If this pass is over, or the layer ran already.
        InvalidArgumentError, InvalidTypeError, UnsupportedError, StaleMemoryError
            As :class:`PrefixAttention` does; the decoder is unchanged then.
        """
        out = self.decoder._attend(self, layer, q, k, v, context, scale)
        self._ran.add(layer)
        return out

    @property
    def missing(self) -> tuple[int, ...]:
        """Layers that have not run in this pass."""
        return tuple(layer for layer in range(self.decoder.layers) if layer not in self._ran)

    @property
    def traffic(self) -> tuple[Traffic, ...]:
        """What each layer read, once all have run and while the block lasts."""
        if self.decoder.current is not self or self.missing:
            raise CallOrderError(
                "traffic",
                "is known when all layers of the pass have run, until the next pass starts",
                f"layers {list(self.missing)} missing" if self.missing else "the pass is over",
                "Look at it before next_pass() and finish_block().",
            )
        if self._read is not None:
            return self._read()
        return tuple(memory.traffic for memory in self.decoder.memories if memory is not None)

    def replayed(self, memories: Sequence[LayerMemory | None], traffic: Callable[[], tuple[Traffic, ...]]) -> None:
        """Take note that all layers have run without a call: a graph was replayed that had recorded them.

        Parameters
        ----------
        memories : sequence of LayerMemory or None
            What each layer carries to its next pass.
        traffic : callable
            Returns what each layer read.

        Raises
        ------
        CallOrderError
            If this pass is over, or some layer has run.
        """
        if self.decoder.current is not self or self._ran:
            raise CallOrderError(
                "replayed()", "must be called once for the pass under way", repr(self), "Call next_pass()."
            )
        self.decoder.memories = tuple(memories)
        self._ran, self._read = set(range(self.decoder.layers)), traffic

    def computed_tokens(self, batch: int, tokens: int, like: Array) -> Array:
        """Return the rows that the model computes at all, bool ``(batch, tokens)``, beside ``like``."""
        xp = namespace(like)
        rows = xp.ones((batch, tokens), dtype=xp.bool, device=like.device)
        return self.decoder.attention.policy.computed_tokens(self.info, rows)
