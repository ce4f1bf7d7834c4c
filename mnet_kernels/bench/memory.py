"""What a training step keeps in memory (bytes saved for backward, the peak) and the pages it makes the system map."""

import statistics

import torch

try:
    import resource
except ImportError:  # not on Windows
    resource = None

from ..training.metrics import peak_memory


def saved_bytes(forward, parameters=()):
    """Bytes that a forward pass saves for its backward: distinct storages, parameters left out.

    Args:
        forward: runs the forward pass and returns its output.
        parameters: tensors that exist anyway.
    """
    known = {t.untyped_storage().data_ptr() for t in parameters}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()
    del out  # alive until here: a freed storage's address could have been counted for another
    return sum(found.values())


def peak_bytes(step, device):
    """Peak bytes allocated on a card during one step, what was there before left out; None on the CPU.

    On the CPU torch keeps no peak: ``mnet_kernels.profile.steps`` has that of what was allocated, by torch's profiler,
    and ``bench/peak_memory.py`` what a fresh process needs.
    """
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return peak_memory(device) - before


def page_faults(calls, rounds=3):
    """Minor page faults of one call of each of ``calls`` (name -> callable), in turns: the medians; {} where the system
    does not tell.

    An allocator that gives large tensors back to the system after each step pays one for every 4 KiB of the next.
    """
    if resource is None:
        return {}
    found = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            call()
            found[name].append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return {name: int(statistics.median(values)) for name, values in found.items()}
