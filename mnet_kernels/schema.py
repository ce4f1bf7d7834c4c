"""Every stage op: its schema and its fake, in one list.

A *stage* is one kernel launch of a fused block.  The same list is defined in each backend's namespace (``mnet_ref``,
``mnet_cpu``, ``mnet_cuda``, ``mnet_triton``), because the dispatcher holds one kernel per op and key while several
backends serve the same device.  ``stages/reference.py`` defines what every stage must compute; here stands only what
goes in and out.  This module imports nothing of the package.

Conventions
-----------
Activations are logical N,C,H,W in channels_last memory, in the *storage* dtype (float32, bfloat16, float16; float64
on the reference).  Statistics and coefficients are in the *accumulate* dtype: float32, or float64 for float64
storage.  ``act`` is an index into :data:`ACTIVATIONS`.

========  =============  ==========================================================================================
tensor    shape          rows
========  =============  ==========================================================================================
moments   [2, C]         mean, biased variance of the stored y (empty [0] when not asked for)
bn        [5, C]         scale, shift, mean, rstd, unbiased variance; act(scale*y + shift) is the normalised value
sums      [2, C]         sum g, sum g*(y - mean)
coef      [2, C]         b, c of dy = scale*g + b*(y - mean) + c
squeeze   [3, N, C]      per image: mean of z = act(u), sum act'(u), sum act'(u)*(y - mean);  u = scale*y + shift
image     [3, N, C]      per image: sum dz*z, sum act'(u)*dz, sum act'(u)*dz*(y - mean)
gram      [C+2, C]       covariance (C rows), mean, shift k (k = 0 but for channels with |mean| > 4 std)
gramgrad  [E, C+1]       sum g1 (x - k)^T (C columns), sum g1
mix       [C+1, C]       M (C rows, row-major [out, in]), v: dx = dx' + M (x - k) + v
========  =============  ==========================================================================================
"""

import torch

ACTIVATIONS = ("identity", "relu", "relu6", "hardswish", "silu")
IDENTITY = 0
STEM_KERNEL = 3
STEM_CHANNELS = 8  # of an image at most

# The upstream of a backward stage is the gradient at the output of the batch norm (and activation) that follows the
# convolution, given by raw pieces and put together as it is read (gate, offset: per image and channel, or absent):
#   g  = (gate * grad + offset) * act'(y_bn.scale * y + y_bn.shift)
#   dy = y_bn.scale * g + coef.b * (y - y_bn.mean) + coef.c
SCHEMAS = (
    # y = W act(bn(x)) [* gate]; without bn the input is read as it is.
    "pointwise(Tensor x, Tensor weight, Tensor? bn, int act, Tensor? gate, bool moments) -> (Tensor y, Tensor moments)",
    # y = depthwise conv of act(bn(x)), k 3 or 5, zero padding k//2 (of the activated value), stride 1 or 2.
    "depthwise(Tensor x, Tensor weight, Tensor? bn, int act, int stride, bool moments) -> (Tensor y, Tensor moments)",
    # y = dense 3x3 convolution of an image x [N, C, H, W] of any strides, C up to 8; zero padding 1, stride 1 or 2.
    "stem(Tensor x, Tensor weight, int stride, bool moments) -> (Tensor y, Tensor moments)",
    # moments (of the batch, or running) -> bn.  count = positions the moments were taken over.
    "finalize(Tensor moments, Tensor? gamma, Tensor? beta, float eps, SymInt count) -> Tensor",
    # running = (1 - m) running + m (mean, unbiased var); m = momentum, or 1/num_batches_tracked when None.
    "update_running_stats(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor(c!)? num_batches_tracked, "
    "Tensor mean, Tensor var, float? momentum) -> ()",
    # out = act(bn(y)) [+ residual]
    "normalize(Tensor y, Tensor bn, int act, Tensor? residual) -> Tensor",
    # The same, and the gram of out: of a block whose output the next one reads in algebraic mode.
    "normalize_gram(Tensor y, Tensor bn, int act, Tensor? residual) -> (Tensor out, Tensor gram)",
    # squeeze table of z = act(bn(y))
    "squeeze(Tensor y, Tensor bn, int act) -> Tensor",
    # sums of g = grad * act'(bn(y))
    "normalize_backward(Tensor grad, Tensor y, Tensor bn, int act) -> Tensor",
    # sums -> coef, and gamma's and beta's gradients, [C] each and of their own storage, for they become their .grad.
    # batch_stats False: the statistics were constants (b = c = 0).
    "finalize_backward(Tensor sums, Tensor bn, SymInt count, bool batch_stats) "
    "-> (Tensor coef, Tensor dgamma, Tensor dbeta)",
    # gx: masked gradient at x's batch norm (or at x itself, + residual, when bn is absent), its sums, dW (accumulate
    # dtype).  What is not needed comes back empty ([0]).
    "depthwise_backward(Tensor grad, Tensor y, Tensor y_bn, Tensor coef, int y_act, Tensor? gate, Tensor? offset, "
    "Tensor x, Tensor weight, Tensor? bn, int act, int stride, Tensor? residual, bool needs_dx, bool needs_dw) "
    "-> (Tensor gx, Tensor sums, Tensor dw)",
    # The same, with either grad or offset: the gradient of a mean over H and W is one value an image and channel.  With
    # a gate gx is dz, neither gated nor masked, and the sums are the image table.  needs_sums without needs_dx is the
    # reducing pass of algebraic mode (B1).
    "pointwise_backward(Tensor? grad, Tensor y, Tensor y_bn, Tensor coef, int y_act, Tensor? offset, Tensor x, "
    "Tensor weight, Tensor? bn, int act, Tensor? gate, Tensor? residual, bool needs_dx, bool needs_sums, "
    "bool needs_dw) -> (Tensor gx, Tensor sums, Tensor dw)",
    # dy, of which the gradient of x is made in the rare case that it is wanted, and dW (accumulate dtype).  What is
    # not needed comes back empty ([0]).
    "stem_backward(Tensor grad, Tensor y, Tensor y_bn, Tensor coef, int y_act, Tensor x, int stride, bool needs_dy, "
    "bool needs_dw) -> (Tensor dy, Tensor dw)",
    # Algebraic mode: the expanded tensor never exists.
    "gram(Tensor x) -> Tensor",
    # bn of the expanded y1k = W (x - k) from gram; and the mean of y1 = W x itself, for the running statistics.
    "expand_finalize(Tensor gram, Tensor weight, Tensor? gamma, Tensor? beta, float eps, SymInt count) "
    "-> (Tensor bn, Tensor mean)",
    # F1: y = depthwise conv of act(bn(W (x - shift)))
    "expand_depthwise(Tensor x, Tensor shift, Tensor expand_weight, Tensor bn, int act, Tensor weight, int stride, "
    "bool moments) -> (Tensor y, Tensor moments)",
    # B2: g2 is rebuilt from grad, y3 (the project layer's upstream) and y (= y2); z1 from x.
    "expand_depthwise_backward(Tensor grad, Tensor y3, Tensor y3_bn, Tensor y3_coef, int y3_act, "
    "Tensor project_weight, Tensor? gate, Tensor? offset, Tensor y, Tensor y_bn, Tensor y_coef, int y_act, "
    "Tensor x, Tensor shift, Tensor expand_weight, Tensor bn, int act, Tensor weight, int stride, bool needs_dx, "
    "bool needs_dw) -> (Tensor dx_partial, Tensor gramgrad, Tensor dw)",
    # gram is absent when the expand batch norm used running statistics.
    "expand_finalize_backward(Tensor gramgrad, Tensor? gram, Tensor shift, Tensor bn, Tensor weight, SymInt count) "
    "-> (Tensor dw, Tensor dgamma, Tensor dbeta, Tensor mix)",
    # B3: dx = dx' + M (x - shift) + v [+ residual]
    "expand_mix(Tensor dx_partial, Tensor x, Tensor shift, Tensor mix, Tensor? residual) -> Tensor",
)  # fmt: skip

NAMES = tuple(s.split("(", 1)[0] for s in SCHEMAS)
NAMESPACES = {"reference": "mnet_ref", "cpu": "mnet_cpu", "triton": "mnet_triton", "cuda": "mnet_cuda"}


def accumulate_dtype(dtype):
    """Dtype of statistics, coefficients and weight gradients for a storage dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def depthwise_size(size, stride):
    """Output height or width of a convolution with padding k//2."""
    return (size - 1) // stride + 1


# ---- fakes: shapes, dtypes and strides exactly as the kernels allocate them --------------------------------------


def _acc(x, *shape):
    return x.new_empty(shape, dtype=accumulate_dtype(x.dtype))


def _map(x, *shape):
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _moments(x, channels, wanted):
    return _acc(x, 2, channels) if wanted else _acc(x, 0)


def _pointwise(x, weight, bn, act, gate, moments):
    e = weight.shape[0]
    return _map(x, x.shape[0], e, x.shape[2], x.shape[3]), _moments(x, e, moments)


def _depthwise(x, weight, bn, act, stride, moments):
    n, c, h, w = x.shape
    return _map(x, n, c, depthwise_size(h, stride), depthwise_size(w, stride)), _moments(x, c, moments)


def _stem(x, weight, stride, moments):
    e, (height, width) = weight.shape[0], (depthwise_size(size, stride) for size in x.shape[2:])
    return _map(x, x.shape[0], e, height, width), _moments(x, e, moments)


def _finalize(moments, gamma, beta, eps, count):
    return moments.new_empty(5, moments.shape[1])


def _update_running_stats(running_mean, running_var, num_batches_tracked, mean, var, momentum):
    return None


def _normalize(y, bn, act, residual):
    return _map(y, *y.shape)


def _normalize_gram(y, bn, act, residual):
    return _map(y, *y.shape), _gram(y)


def _squeeze(y, bn, act):
    return _acc(y, 3, y.shape[0], y.shape[1])


def _normalize_backward(grad, y, bn, act):
    return _acc(y, 2, y.shape[1])


def _finalize_backward(sums, bn, count, batch_stats):
    channels = bn.shape[1]
    return sums.new_empty(2, channels), sums.new_empty(channels), sums.new_empty(channels)


def _empty_map(x):
    return x.new_empty(0)


def _depthwise_backward(
    grad, y, y_bn, coef, y_act, gate, offset, x, weight, bn, act, stride, residual, needs_dx, needs_dw
):
    gx = _map(x, *x.shape) if needs_dx else _empty_map(x)
    sums = _acc(x, 2, x.shape[1]) if needs_dx and bn is not None else _acc(x, 0)
    return gx, sums, _acc(x, *weight.shape) if needs_dw else _acc(x, 0)


def _pointwise_backward(
    grad, y, y_bn, coef, y_act, offset, x, weight, bn, act, gate, residual, needs_dx, needs_sums, needs_dw
):
    gx = _map(x, *x.shape) if needs_dx else _empty_map(x)
    sums = _acc(x, 0)
    if needs_sums and bn is not None:
        sums = _acc(x, 2, x.shape[1]) if gate is None else _acc(x, 3, x.shape[0], x.shape[1])
    return gx, sums, _acc(x, *weight.shape) if needs_dw else _acc(x, 0)


def _stem_backward(grad, y, y_bn, coef, y_act, x, stride, needs_dy, needs_dw):
    dy = _map(y, *y.shape) if needs_dy else _empty_map(x)
    return dy, _acc(x, y.shape[1], x.shape[1], STEM_KERNEL, STEM_KERNEL) if needs_dw else _acc(x, 0)


def _gram(x):
    return _acc(x, x.shape[1] + 2, x.shape[1])


def _expand_finalize(gram, weight, gamma, beta, eps, count):
    return gram.new_empty(5, weight.shape[0]), gram.new_empty(weight.shape[0])


def _expand_depthwise(x, shift, expand_weight, bn, act, weight, stride, moments):
    n, _, h, w = x.shape
    e = weight.shape[0]
    return _map(x, n, e, depthwise_size(h, stride), depthwise_size(w, stride)), _moments(x, e, moments)


def _expand_depthwise_backward(
    grad, y3, y3_bn, y3_coef, y3_act, project_weight, gate, offset, y, y_bn, y_coef, y_act,
    x, shift, expand_weight, bn, act, weight, stride, needs_dx, needs_dw,
):  # fmt: skip
    e, c = expand_weight.shape[0], expand_weight.shape[1]
    dx = _map(x, *x.shape) if needs_dx else _empty_map(x)
    return dx, _acc(x, e, c + 1), _acc(x, *weight.shape) if needs_dw else _acc(x, 0)


def _expand_finalize_backward(gramgrad, gram, shift, bn, weight, count):
    e, c = weight.shape[0], weight.shape[1]
    new = gramgrad.new_empty
    return new(weight.shape), new(e), new(e), new(c + 1, c)


def _expand_mix(dx_partial, x, shift, mix, residual):
    return _map(x, *x.shape)


FAKES = {name: globals()["_" + name] for name in NAMES}


def define(namespace):
    """Define every stage op and its fake in one namespace; returns the library, which must be kept alive."""
    library = torch.library.Library(namespace, "DEF")
    for schema, name in zip(SCHEMAS, NAMES, strict=True):
        library.define(schema)
        torch.library.register_fake(f"{namespace}::{name}", FAKES[name], lib=library)
    return library
