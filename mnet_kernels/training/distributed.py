"""One process of several, as torchrun starts them; alone, everything here is what one process does anyway.

Each process trains on its own part of every batch and keeps its own batch statistics; gradients are averaged by
DistributedDataParallel.  Process 0 alone writes files.
"""

import contextlib
import os

import torch
import torch.distributed as dist

from . import TrainingError


def launched():
    """Whether torchrun started this process."""
    return dist.is_available() and dist.is_torchelastic_launched()


def planned():
    """The number of processes of this run, before they have joined."""
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


def count():
    """The number of processes that have joined."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank():
    """This process's number, from 0."""
    return dist.get_rank() if count() > 1 else 0


@contextlib.contextmanager
def joined(device):
    """Join the processes that torchrun started: by gloo on the CPU, by nccl on CUDA, one card each.

    A process group that is there already is used and left as it is.
    """
    if not launched() or dist.is_initialized():
        yield
        return
    if device == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise TrainingError(f"process {local} has no CUDA device: there are {torch.cuda.device_count()}")
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def barrier():
    """Wait until every process is here."""
    if count() > 1:
        dist.barrier()


def total(tensor):
    """Add the tensor up over the processes, in place."""
    if count() > 1:
        dist.all_reduce(tensor)
    return tensor


def gather(value):
    """A plain value of every process, by rank."""
    if count() == 1:
        return [value]
    found = [None] * count()
    dist.all_gather_object(found, value)
    return found


def share(tensors):
    """Overwrite the tensors by those of process 0."""
    if count() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def parts(order, batches, size):
    """This process's ``size`` elements of each of the first ``batches`` batches of ``order``."""
    for start in range(rank() * size, batches * count() * size, count() * size):
        yield order[start : start + size]
