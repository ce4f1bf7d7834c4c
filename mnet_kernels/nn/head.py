"""The end of a network's features: its last 1x1 layer and the pool after it as one op."""

from torch import nn

from . import fusable
from .conv_bn_act import FusedPointwiseConvBNAct
from .inverted_residual import run_blocks


def run_pooled(features, x, pool=None):
    """Mean over H and W of ``features(x)``, [N, C, H, W] -> [N, O].

    Where ``features`` ends with a :class:`FusedPointwiseConvBNAct`, the map that this layer gives is not written,
    unless somebody may want to see it (hooks, torch.fx) or something else would be computed (other modules, a
    replaced forward).  What stands before it is run by :func:`run_blocks`.

    Args:
        features: a module, as a rule an nn.Sequential.
        x: [N, C, H, W].
        pool: the module that pools, called where the op is not; None is torch's function.
    """
    last = None if fusable.is_traced(x) else _last_layer(features, pool)
    if last is None:
        x = features(x)
        return (nn.functional.adaptive_avg_pool2d(x, 1) if pool is None else pool(x)).flatten(1)
    return last.run_pooled(run_blocks(list(features._modules.values())[:-1], x))


def _last_layer(features, pool):
    """The layer to be pooled within its op, or None where features and pool must be called as they are."""
    if type(features) is not nn.Sequential or fusable.untouched(features, "features") or fusable.global_hooks():
        return None
    if pool is not None and not _is_mean(pool):
        return None
    last = next(reversed(features._modules.values()), None)
    if type(last) is not FusedPointwiseConvBNAct or fusable.untouched(last, "the last layer") or last.why_native():
        return None
    return last


def _is_mean(pool):
    plain = type(pool) is nn.AdaptiveAvgPool2d and not fusable.untouched(pool, "the pool")
    return plain and pool.output_size in (1, (1, 1), [1, 1])
