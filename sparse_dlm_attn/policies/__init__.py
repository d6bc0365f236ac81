"""The published methods, one file each: the paper, the rule, the defaults, and every deviation.

The package is callable: ``sparse_dlm_attn.policies()`` lists what is registered, as
``sparse_dlm_attn.backends()`` does. A plain function of that name would hide this package.
"""

from __future__ import annotations

import sys
from types import ModuleType

from sparse_dlm_attn import registry

__all__: list[str] = []


class _CallablePackage(ModuleType):
    def __call__(self) -> dict[str, registry.Plugin]:
        """Return the registered policies by name, read from metadata; imports none of them."""
        return registry.policies()


sys.modules[__name__].__class__ = _CallablePackage
