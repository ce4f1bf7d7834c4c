"""Profiling: what ``python -m mnet_kernels.profile`` measures and shows, fused against unfused, block by block.

==========  ==========================================================================================================
subject     what is profiled: a model's blocks, or one block given in words
collect     measures: times interleaved (mnet_kernels.bench), counted work (mnet_kernels.cost), this machine's rates
steps       one step under torch.profiler: its ops, the parts its time goes to, what lives when
data        what was collected, as plain dataclasses and as JSON
terminal    as a table (rich)
page        as one HTML file; charts and svg draw its pictures
png         as one picture (matplotlib)
trace       a timeline for Perfetto with a named range per stage
==========  ==========================================================================================================

Nothing here is imported by ``import mnet_kernels``; rich and matplotlib are imported where they are used.
"""

import importlib

from ..bench import BenchError

EXTRA = "pip install 'mnet-kernels[profile]'"


def require(module, purpose):
    """Import an optional dependency, or say in one line what needs it and how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as exc:
        name = module.partition(".")[0]
        raise BenchError(f"{purpose} needs {name}, which cannot be imported ({exc}): {EXTRA}") from exc
