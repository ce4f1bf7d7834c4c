"""The memory that the CPU kernels keep between steps.

glibc's malloc returns large blocks to the system at once, so that every step of training pays for fresh pages.  The
maps that the CPU kernels write come from a pool instead, which keeps its pages for the next step
(``csrc/cpu/map_pool.h``).
``MNET_CPU_POOL=0`` in the environment leaves all of them to malloc.
"""

from .backends import compiled


def cpu_memory():
    """Bytes of the CPU kernels' pool: ``in_use`` by maps that live, ``kept`` for the next ones.

    ``peak`` is the most that was in use since the start or since :func:`reset_peak_cpu_memory`.  Zeros where there is
    no pool.  torch's memory profiler is told of these maps as of torch's own memory.
    """
    extension = compiled.extension()
    use = extension.map_pool() if extension else {}
    return {name: use.get(name, 0) for name in ("in_use", "peak", "kept")}


def reset_peak_cpu_memory():
    """``cpu_memory()["peak"]`` starts anew at what is in use, as ``torch.cuda.reset_peak_memory_stats()`` has it."""
    extension = compiled.extension()
    if extension:
        extension.reset_map_pool_peak()


def empty_cache():
    """Returns to the system what the pool keeps for the next maps, as ``torch.cuda.empty_cache()`` does on a card.

    Maps that live stay where they are; the next step gets fresh pages again.  Returns the number of bytes returned.
    """
    extension = compiled.extension()
    return extension.trim_map_pool() if extension else 0
