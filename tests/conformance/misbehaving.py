"""Backends that are broken in every way, as the module `broken` in a folder of its own."""

import os
import sys
import time

import numpy as np

from sparse_dlm_attn import AttentionState, Backend
from sparse_dlm_attn.capabilities import Capabilities
from sparse_dlm_attn_reference import ReferenceBackend


class NoOperators(Backend):
    name = "no-operators"
    capabilities = Capabilities()


class NotABackend:
    pass


class RaisesWhenMade(ReferenceBackend):
    def __init__(self):
        raise RuntimeError("no such device")


class LeavesWhenMade(ReferenceBackend):
    def __init__(self):
        sys.exit(7)


class BadCapabilities(ReferenceBackend):
    capabilities = "everything"


class DeclaresNothing(ReferenceBackend):
    def why_not(self, problem):
        return ["not today"]


class Unknown(ReferenceBackend):
    capabilities = Capabilities(dtypes=("float8",))


class ReturnsNone(ReferenceBackend):
    def merge(self, *states):
        return None


class ReturnsLists(ReferenceBackend):
    def merge(self, *states):
        return [state.out.tolist() for state in states]


class ReturnsViews(ReferenceBackend):
    def reuse(self, active, fresh, cached):
        if not active.any():
            return AttentionState(cached.out, cached.lse)
        return super().reuse(active, fresh, cached)


class Raises(ReferenceBackend):
    def merge(self, *states):
        raise ZeroDivisionError("the kernel did not compile")


class Leaves(ReferenceBackend):
    def merge(self, *states):
        sys.exit(3)


class Prints(ReferenceBackend):
    def merge(self, *states):
        print("merging" * 1000)
        sys.stderr.write("really")
        return super().merge(*states)


class Hangs(ReferenceBackend):
    def merge(self, *states):
        while True:
            time.sleep(0.01)


class HangsWhenMade(ReferenceBackend):
    def __init__(self):
        time.sleep(1000)


class OwnBaseException(ReferenceBackend):
    def merge(self, *states):
        raise type("Odd", (BaseException,), {})("not even an Exception")


class RaisesOnErrors(ReferenceBackend):
    def merge(self, *states):
        np.seterr(all="raise")
        return super().merge(*states)


class Exits(ReferenceBackend):
    def merge(self, *states):
        os._exit(0)


class WrongBlock(ReferenceBackend):
    def attend_block(self, q, k, v, *, scale=None):
        state = super().attend_block(q, k, v, scale=scale)
        return AttentionState(state.out + np.asarray(1, state.out.dtype), state.lse)


class Overwrites(ReferenceBackend):
    def top_pages(self, scores, count, *, eligible):
        scores.flags.writeable = True
        scores += 1
        return super().top_pages(scores, count, eligible=eligible)


class ForgetsPages(ReferenceBackend):
    def attend_pages(self, q, context, selection, active, *, scale=None):
        return super().attend_pages(q, context, selection, np.zeros_like(active), scale=scale)


class Dies(ReferenceBackend):
    def merge(self, *states):
        os.abort()


class Fine(ReferenceBackend):
    name = "fine"
