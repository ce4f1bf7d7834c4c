"""The fallback: the same blocks in plain torch ops with torch's own autograd, on any device and dtype."""

import torch
import torch.nn.functional as F

ACTIVATIONS = {
    "identity": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "silu": F.silu,
}
GATES = {"hardsigmoid": F.hardsigmoid, "sigmoid": torch.sigmoid}


def batch_norm(x, bn):
    """``nn.BatchNorm2d.forward`` over a :class:`~mnet_kernels.params.BatchNormParams`."""
    momentum = bn.momentum
    if bn.training and bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
        if momentum is None:
            momentum = 1.0 / float(bn.num_batches_tracked)
    if bn.group is not None:
        return _synchronised(x, bn, momentum)
    # torch reads momentum only where running statistics are updated
    momentum = 0.0 if momentum is None else momentum
    return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.batch_stats, momentum, bn.eps)


def _synchronised(x, bn, momentum):
    if x.device.type != "cuda":
        raise ValueError(
            f"batch norm over several processes is on {x.device.type} in the fused backends only, and this call runs "
            "native torch ops, whose nn.SyncBatchNorm needs CUDA: choose a fused backend, or use nn.BatchNorm2d"
        )
    from torch.nn.modules._functions import SyncBatchNorm

    size = torch.distributed.get_world_size(bn.group)
    tensors = (x, bn.weight, bn.bias, bn.running_mean, bn.running_var)
    return SyncBatchNorm.apply(*tensors, bn.eps, 0.0 if momentum is None else momentum, bn.group, size)


def squeeze_excite(x, se):
    """torchvision's SqueezeExcitation: x * gate(expand(act(reduce(mean(x)))))."""
    q = F.adaptive_avg_pool2d(x, 1)
    q = ACTIVATIONS[se.activation](F.conv2d(q, se.reduce_weight, se.reduce_bias))
    return GATES[se.gate](F.conv2d(q, se.expand_weight, se.expand_bias)) * x


def pool(x):
    """Mean over H and W, [N, C, H, W] -> [N, C]."""
    return F.adaptive_avg_pool2d(x, 1).flatten(1)


def block(x, layers, residual, se):
    """Run the layers one after another; ``se`` sits before the last, the input is added at the end."""
    out = x
    for i, layer in enumerate(layers):
        if se is not None and i == len(layers) - 1:
            out = squeeze_excite(out, se)
        groups = layer.weight.shape[0] if layer.kind == "depthwise" else 1
        out = F.conv2d(out, layer.weight, None, layer.stride, layer.weight.shape[-1] // 2, 1, groups)
        out = ACTIVATIONS[layer.activation](batch_norm(out, layer.bn))
    return out + x if residual else out
