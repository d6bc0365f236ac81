"""Many GPUs on `torch.distributed`: pages spread over ranks, decisions and outputs as on one.

`DistributedAttention` is the driver, `ShardedContext` what each rank gives it. See docs/how-to/two-gpus.md.
"""

from sparse_dlm_attn import UnavailableError

try:
    import torch  # noqa: F401
except ImportError as error:
    raise UnavailableError(
        "sparse_dlm_attn_distributed", [str(error)], "Install it: pip install 'sparse_dlm_attn[torch]'."
    ) from error

from sparse_dlm_attn_distributed.attention import DistributedAttention
from sparse_dlm_attn_distributed.backend import DistributedBackend
from sparse_dlm_attn_distributed.context import ShardedBounds, ShardedContext

__all__ = ["DistributedAttention", "DistributedBackend", "ShardedBounds", "ShardedContext"]
