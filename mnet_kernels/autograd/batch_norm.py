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


def coefficients(stage, layer, tensors, moments, y):
    """bn [5, C] of a layer: from the batch's moments of its raw output y, or from the running statistics."""
    _, gamma, beta, mean, var = tensors
    dtype = accumulate_dtype(y.dtype)
    if not layer.batch_stats:
        moments = torch.stack([mean.to(dtype), var.to(dtype)])
    return stage.finalize(moments, _vector(gamma, dtype), _vector(beta, dtype), layer.eps, positions(y))


def expand_coefficients(stage, layer, tensors, weight, x):
    """The same for the expand layer of algebraic mode, whose raw output never exists.

    Returns (gram or None, shift [C], bn [5, E] of W (x - shift), mean [E] and variance [E] of W x).
    """
    dtype = accumulate_dtype(x.dtype)
    if not layer.batch_stats:
        bn = coefficients(stage, layer, tensors, None, x)
        return None, x.new_zeros(x.shape[1], dtype=dtype), bn, bn[2], bn[4]
    gram = stage.gram(x)
    gamma, beta = _vector(tensors[1], dtype), _vector(tensors[2], dtype)
    bn, mean = stage.expand_finalize(gram, weight, gamma, beta, layer.eps, positions(x))
    return gram, gram[-1], bn, mean, bn[4]


def backward_coefficients(stage, layer, sums, bn, y):
    """coef [4, C] of a layer's batch norm from the sums over its upstream gradient."""
    return stage.finalize_backward(sums, bn, positions(y), layer.batch_stats)
