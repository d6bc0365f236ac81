"""Measuring on a GPU: the commands ``break-even`` and ``tune``, and what this project's benchmarks share.

Nothing is imported here, so that the command line stays light: `timing` measures by CUDA-graph replays,
`layer` makes the problem, `peers` and `sparse_peers` are other people's kernels on it, `gate` checks results
before anything is timed, `break_even` and `tuning` are the two commands' work, `command` the commands.
"""
