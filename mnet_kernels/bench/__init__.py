"""Measuring: what ``python -m mnet_kernels.bench`` and the scripts in ``bench/`` share.

==============  ===================================================================================================
timing          times callables one after another in rounds: CUDA events on a card, a monotonic clock on the CPU
statistics      quantiles, bootstrap intervals of a ratio, the noise floor, the verdict
subjects        what is measured: blocks and whole models
stage_subjects  what is measured: single stages against the layers they stand for
shapes          the list of them: the shapes of this package's models
providers       who runs it: plain torch (NCHW, channels_last, torch.compile) and the fused backends that are whole
host            what is measured: the least a call can cost, on tiny maps
compare         one subject under several providers, interleaved in one process
table           results as text
report          saved results as a Markdown table and a chart
card            what the device itself can do: copy bandwidth, matrix products
memory          bytes saved for backward, peak memory
environment     machine, card, versions, commit: the header of every result
tiles           the CUDA kernels' tile table: shown, and (with the Triton kernels') overridden
tuning          the search for Triton configurations (python -m mnet_kernels.tune)
tune_problems   what it runs, and whether the results are right
==============  ===================================================================================================

Nothing here is imported by ``import mnet_kernels``.
"""


class BenchError(Exception):
    """A failure that the user can act on: shown as one line, without a traceback."""
