"""Sparse attention for diffusion language models: one specification, interchangeable backends.

>>> from sparse_dlm_attn import get_policy
>>> get_policy("losa").active
5
"""

from sparse_dlm_attn.array_backend import ArrayBackend as ArrayBackend
from sparse_dlm_attn.arrays import Array as Array
from sparse_dlm_attn.backend import Backend as Backend
from sparse_dlm_attn.context import Context as Context
from sparse_dlm_attn.decoder import Decoder as Decoder
from sparse_dlm_attn.driver import PrefixAttention as PrefixAttention
from sparse_dlm_attn.errors import CallOrderError as CallOrderError
from sparse_dlm_attn.errors import InvalidArgumentError as InvalidArgumentError
from sparse_dlm_attn.errors import InvalidTypeError as InvalidTypeError
from sparse_dlm_attn.errors import SparseAttentionError as SparseAttentionError
from sparse_dlm_attn.errors import StaleMemoryError as StaleMemoryError
from sparse_dlm_attn.errors import UnavailableError as UnavailableError
from sparse_dlm_attn.errors import UnknownNameError as UnknownNameError
from sparse_dlm_attn.errors import UnsupportedError as UnsupportedError
from sparse_dlm_attn.pass_info import PassInfo as PassInfo
from sparse_dlm_attn.policy import PassInputs as PassInputs
from sparse_dlm_attn.policy import PrefixAttentionPolicy as PrefixAttentionPolicy
from sparse_dlm_attn.registry import get_backend as get_backend
from sparse_dlm_attn.registry import get_policy as get_policy
from sparse_dlm_attn.registry import list_backends as list_backends
from sparse_dlm_attn.registry import list_policies as list_policies
from sparse_dlm_attn.rules import Rule as Rule
from sparse_dlm_attn.rules import RulePolicy as RulePolicy
from sparse_dlm_attn.selection import Selection as Selection
from sparse_dlm_attn.values import AttentionState as AttentionState
from sparse_dlm_attn.values import PageBounds as PageBounds

__version__ = "0.1.0"
SPEC_VERSION = "2026.11"
"""Version of the written specification (docs/spec), apart from the package's version."""

__all__ = [
    "SPEC_VERSION",
    "Array",
    "ArrayBackend",
    "AttentionState",
    "Backend",
    "CallOrderError",
    "Context",
    "Decoder",
    "InvalidArgumentError",
    "InvalidTypeError",
    "PageBounds",
    "PassInfo",
    "PassInputs",
    "PrefixAttention",
    "PrefixAttentionPolicy",
    "Rule",
    "RulePolicy",
    "Selection",
    "SparseAttentionError",
    "StaleMemoryError",
    "UnavailableError",
    "UnknownNameError",
    "UnsupportedError",
    "__version__",
    "get_backend",
    "get_policy",
    "list_backends",
    "list_policies",
]
