"""The numbered clauses of the specification, in one line each (docs/spec has the full wording)."""

from __future__ import annotations

from collections.abc import Iterable

from sparse_dlm_attn import UnknownNameError

CLAUSES: dict[str, str] = {
    "STATE-1": "(out, lse) of a softmax over a key set: out normalised, lse natural log, scale included",
    "STATE-2": "empty key set: out = 0, lse = -inf, and no NaN",
    "STATE-3": "the default scale is 1/sqrt(head_dim), applied once, to q.k",
    "STATE-4": "out has the dtype of the inputs, lse is float32",
    "CONTEXT-1": "pages behind a page table, logical order, free strides, read-only arrays accepted",
    "CONTEXT-2": "absent pages and tokens past a page's length do not exist",
    "CONTEXT-3": "any permutation of the physical pages gives the same bits",
    "CONTEXT-4": "Context.from_dense shares memory with the cache",
    "CONTEXT-5": "the result does not depend on how the tokens are cut into pages",
    "SELECTION-1": "row r of query head h reads span r // span of selection head h // (q_heads / heads)",
    "SELECTION-2": "page_lists: ascending, unique, padded with -1, counts; to_csr with physical ids",
    "GQA-1": "query head h reads KV head h // group",
    "GQA-2": "a selection per query head is honoured per query head",
    "BOUNDS-1": "page_bounds: exact minimum and maximum of the valid keys, 0 for absent pages, NaN for NaN",
    "BOUNDS-2": "extend_bounds: what page_bounds returns, reading no page before the first that changed",
    "SCORES-1": "page_scores = sum_c max(q_c lower_c, q_c upper_c), unscaled, float32",
    "SCORES-2": "a page's score is at least q.k of each of its valid keys",
    "POOLED-1": "pooled_scores: mean over the span's rows of each page's softmax mass, float32",
    "POOLED-2": "each span sums to 1 over pages, 0 for an empty context; absent pages get 0",
    "POOLED-3": "pooled_scores(lse): the same masses from a known LSE; shares of it if it covers more keys",
    "TOP-1": "top_pages: min(max(count, 0), eligible) pages, none better left out",
    "TOP-2": "ties: lowest page index",
    "TOP-3": "pages not eligible are never chosen",
    "TOP-4": "NaN scores rank as +inf",
    "CHANGE-1": "query_change: mean over heads and channels of the squared difference, float32",
    "CHANGE-2": "largest_changes(count): the count largest, clamped, ties to the lowest row, NaN as +inf",
    "CHANGE-3": "largest_changes(mass): smallest set of largest changes that reaches mass x total",
    "ATTEND-1": "attend_pages: softmax state over the valid tokens of each active row's pages",
    "ATTEND-2": "inactive rows: out 0, lse -inf, queries not read",
    "ATTEND-3": "pages a row did not select do not reach it; pages nobody selected are not read",
    "ATTEND-4": "attend = merge(reuse(active, attend_pages, cached), attend_block)",
    "ATTEND-5": "a superset of pages never lowers the lse",
    "RANKED-1": "attend_ranked decides and computes what the operators do, one after the other",
    "BLOCK-1": "attend_block: dense unmasked softmax over the block's keys",
    "MERGE-1": "merge: state of the union of disjoint key sets, whatever the partition",
    "MERGE-2": "merge is commutative and associative",
    "MERGE-3": "the empty state is the identity; all empty gives empty",
    "MERGE-4": "a state of weight 0 is dropped by selection; NaN that has weight shows",
    "REUSE-1": "reuse: row-wise choice, bits copied",
    "PURE-1": "no operator changes its arguments",
    "PURE-2": "results share no memory with arguments",
    "PURE-3": "same input, same bits (where declared deterministic)",
    "PURE-4": "a sequence's bits do not depend on the rest of the batch (where declared batch_invariant)",
    "PURE-5": "no operator changes a setting of its process, nor draws random numbers from it",
    "PURE-6": "no setting of the process changes a result: default dtype and device, automatic precision",
    "ACCURACY-1": "half precision computes in float32; float64 computes in float64",
    "ACCURACY-2": "error <= 2 x (error of the low-precision simulation + rounding band)",
    "ACCURACY-3": "decisions are equal bit for bit on the dyadic grid",
    "DENSITY-1": "loaded pages = union over active rows and group, per KV head",
    "DENSITY-2": "bytes read = pages + metadata",
    "MEMORY-1": "memory of a block is dropped at pass 0 unless its scope is the sequence",
    "MEMORY-2": "memory of another policy, layer, batch, block shape or context is refused",
    "MEMORY-3": "memory=None in the middle of a block restarts",
    "MEMORY-4": "reordered memory goes on as that of each of its sequences would",
    "POLICY-1": "a policy is a function of its inputs; same decisions on every backend",
    "POLICY-2": "a sequence's decisions do not depend on the others in its batch",
    "POLICY-3": "rows of a sequence that restarts are all active, or their context part is empty",
    "POLICY-4": "decisions do not depend on inactive rows' queries, nor on what does not exist",
    "POLICY-5": "reuse with all rows active returns fresh",
    "POLICY-6": "a policy keeps the budget its page states",
    "POLICY-7": "computed_tokens: all rows in pass 0; always those to be decoded and newly decoded",
    "POLICY-8": "unless it declares mixes_heads, a KV head's pages are those that it gets alone",
    "DRIVER-1": "everything is checked before a kernel is launched; an error changes nothing",
    "DRIVER-2": "nothing is read that was not selected",
    "DRIVER-3": "rows that are not computed are not active: their queries are not read, their state stays",
    "DRIVER-4": "k and v None: row r is the r-th token of the context, the output its context part",
    "ERROR-1": "bad input raises a typed error naming argument, rule and value",
    "ERROR-2": "an explicit backend or policy request never falls back to another",
    "CAPS-1": "an undeclared problem raises UnsupportedError with every reason; why_not runs no kernel",
    "REGISTRY-1": "entry points and 'module:attr' register first and third parties alike",
    "SYNC-1": "no host synchronisation and no data-dependent shapes in a pass on a device",
}


def matches(clause: str, wanted: tuple[str, ...]) -> bool:
    """Return whether ``clause`` is one of ``wanted``: an id, or a group such as ``"MERGE"``.

    Examples
    --------
    >>> matches("MERGE-1", ("MERGE",)), matches("MERGE-1", ("MERGE-2",)), matches("TOP-1", ())
    (True, False, True)
    """
    return not wanted or any(clause == item or clause.split("-")[0] == item for item in wanted)


def check_clauses(wanted: Iterable[str], argument: str) -> None:
    """Raise `UnknownNameError` for what is neither a clause nor a group of clauses.

    Parameters
    ----------
    wanted : iterable of str
        What was asked for.
    argument : str
        Name of the option or argument, for messages.
    """
    groups = {clause.split("-")[0] for clause in CLAUSES}
    for name in wanted:
        if name not in CLAUSES and name not in groups:
            group = [clause for clause in CLAUSES if clause.split("-")[0] == name.split("-")[0].upper()]
            raise UnknownNameError(f"clause or group in {argument}", name, group or groups)
