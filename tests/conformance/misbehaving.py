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


def hang(*states):
    while True:
        time.sleep(0.01)


def leave(*states):
    sys.exit(3)


def fail(error):
    raise error


def shout(*states):
    print("merging" * 1000)
    sys.stderr.write("really")
    return ReferenceBackend().merge(*states)


def raise_on_errors(*states):
    np.seterr(all="raise")
    return ReferenceBackend().merge(*states)


MERGES = {
    "ReturnsNone": lambda *states: None,
    "ReturnsLists": lambda *states: [state.out.tolist() for state in states],
    "Raises": lambda *states: fail(ZeroDivisionError("the kernel did not compile")),
    "OwnBaseException": lambda *states: fail(type("Odd", (BaseException,), {})("not even an Exception")),
    "Leaves": leave,
    "Prints": shout,
    "Hangs": hang,
    "RaisesOnErrors": raise_on_errors,
    "Exits": lambda *states: os._exit(0),
    "Dies": lambda *states: os.abort(),
}
for kind, merge in MERGES.items():
    globals()[kind] = type(kind, (ReferenceBackend,), {"merge": staticmethod(merge)})


class ReturnsViews(ReferenceBackend):
    def reuse(self, active, fresh, cached):
        if not active.any():
            return AttentionState(cached.out, cached.lse)
        return super().reuse(active, fresh, cached)


class HangsWhenMade(ReferenceBackend):
    def __init__(self):
        time.sleep(1000)


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


class Fine(ReferenceBackend):
    name = "fine"
