"""A layer's batch norm between stages: moments to coefficients, sums to gradients.

This is the one place where statistics are final: a distributed batch norm reduces moments and sums over ranks here.
"""

import torch

from ..schema import accumulate_dtype

PER_LAYER = 5  # tensors of a layer: weight, gamma, beta, running_mean, running_var


def positions(y):
    """N*H*W, over which a channel's statistics are taken."""
    return y.shape[0] * y.shape[2] * y.shape[3]


def _vector(t, dtype):
    return None if t is None else t.to(dtype)


def _moments_of_all(moments, count, group):
    """Moments over the batches of every process of a group (their sizes may differ), and the number of positions.

    The number stays on the device, as the processes' own do: nothing waits for it.
    """
    own = torch.cat([moments.double().flatten(), moments.new_tensor([count], dtype=torch.float64)])
    parts = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(parts, own, group=group)
    parts = torch.stack(parts)
    counts = parts[:, -1:]
    means, variances = parts[:, :-1].view(len(parts), *moments.shape).unbind(1)
    total = counts.sum()
    mean = (counts * means).sum(0) / total
    var = (counts * (variances + (means - mean).square())).sum(0) / total
    return torch.stack([mean, var]).to(moments.dtype), total.to(moments.dtype)


def coefficients(stage, layer, tensors, moments, y):
    """bn [5, C] of a layer: from the batch's moments of its raw output y, or from the running statistics."""
    _, gamma, beta, mean, var = tensors
    dtype = accumulate_dtype(y.dtype)
    if not layer.batch_stats:
        moments = torch.stack([mean.to(dtype), var.to(dtype)])
    total = None
    if layer.group is not None:
        moments, total = _moments_of_all(moments, positions(y), layer.group)
    bn = stage.finalize(moments, _vector(gamma, dtype), _vector(beta, dtype), layer.eps, positions(y))
    if total is not None:
        bn[4] = moments[1] * (total / (total - 1))
    return bn


def output(stage, block, y, bn, act, x):
    """A block's output from the raw one of its last layer, or (output, its gram)."""
    write = stage.normalize_gram if block.gives_gram else stage.normalize
    return write(y, bn, act, x if block.residual else None)


def expand_coefficients(stage, layer, tensors, weight, x, gram):
    """The same as :func:`coefficients` for the expand layer of algebraic mode, whose raw output never exists.

    ``gram``: of x, or None if it is still to be gathered.

    Returns (gram or None, shift [C], bn [5, E] of W (x - shift), mean [E] and variance [E] of W x).
    """
    dtype = accumulate_dtype(x.dtype)
    if not layer.batch_stats:
        bn = coefficients(stage, layer, tensors, None, x)
        return None, x.new_zeros(x.shape[1], dtype=dtype), bn, bn[2], bn[4]
    gram = stage.gram(x) if gram is None else gram
    gamma, beta = _vector(tensors[1], dtype), _vector(tensors[2], dtype)
    bn, mean = stage.expand_finalize(gram, weight, gamma, beta, layer.eps, positions(x))
    return gram, gram[-1], bn, mean, bn[4]


def backward_coefficients(stage, layer, sums, bn, y):
    """coef [2, C] of a layer's batch norm, and the gradients of gamma and beta [C], from the sums over its upstream
    gradient."""
    if layer.group is None:
        return stage.finalize_backward(sums, bn, positions(y), layer.batch_stats)
    # The affine is of everyone's sums; gamma's and beta's gradients are of one's own, as every other parameter's.
    own = torch.cat([sums.double().flatten(), sums.new_tensor([positions(y)], dtype=torch.float64)])
    torch.distributed.all_reduce(own, group=layer.group)
    shared, total = own[:-1].view(sums.shape).to(sums.dtype), own[-1].to(sums.dtype)
    _, dgamma, dbeta = stage.finalize_backward(sums, bn, 1, True)
    coef, _, _ = stage.finalize_backward(shared, bn, 1, True)
    return coef / total, dgamma, dbeta
