"""The memory that the CPU kernels keep between steps.

glibc's malloc returns large blocks to the system at once, so that every step of training pays for fresh pages.  The
maps that the CPU kernels write come from a pool instead, which keeps its pages for the next step
(``csrc/cpu/map_pool.h``).
``MNET_CPU_POOL=0`` in the environment leaves all of them to malloc.
"""

from .backends import compiled


def cpu_memory():
    """Bytes of the CPU kernels' pool: ``in_use`` by maps that live, ``kept`` for the next ones.

    Zeros where there is no pool.
    """
    extension = compiled.extension()
    use = extension.map_pool() if extension else {}
    return {name: use.get(name, 0) for name in ("in_use", "kept")}


def empty_cache():
    """Returns to the system what the pool keeps for the next maps, as ``torch.cuda.empty_cache()`` does on a card.

    Maps that live stay where they are; the next step gets fresh pages again.  Returns the number of bytes returned.
    """
    extension = compiled.extension()
    return extension.trim_map_pool() if extension else 0
