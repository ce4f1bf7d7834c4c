"""What a block may fuse.

A fused module holds ordinary children (nn.Conv2d, nn.BatchNorm2d, an activation) under torchvision's names and reads
their parameters.  It may do so only while calling the children would compute the same: plain types, no hooks, no
parametrization, no replaced forward, supported geometry.  These functions say why not, or None.
"""

import torch
from torch import nn
from torch.nn.modules import module as _torch_module

from ..params import BatchNormParams, ConvBNAct, SqueezeExciteParams

ACTIVATIONS = {nn.Identity: "identity", nn.ReLU: "relu", nn.ReLU6: "relu6", nn.Hardswish: "hardswish"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def global_hooks():
    """Why hooks on all modules forbid fusing: they want to see every child called."""
    return "global module hooks are registered" if _torch_module._has_any_global_hook() else None


def untouched(module, name):
    """Whether calling the module runs its class's forward and nothing else."""
    state = module.__dict__
    for hooks in _HOOKS:
        if state[hooks]:
            return f"{name} has hooks"
    if "forward" in state:
        return f"{name} has a replaced forward"
    return None


def _plain(module, cls, name):
    # subclasses (parametrized, quantised, LoRA, synchronised, frozen layers) may compute something else
    if type(module) is not cls:
        return f"{name} is {type(module).__name__}, not {cls.__name__}"
    return untouched(module, name)


def container(module, name, forward):
    """A Sequential (or a subclass that keeps its forward, or has the given one) without hooks."""
    if not isinstance(module, nn.Sequential) or type(module).forward not in (nn.Sequential.forward, forward):
        return f"{name} is {type(module).__name__}, not a Sequential"
    return untouched(module, name)


def conv(module, kind, name):
    """A bias-free 1x1 convolution, or a depthwise one of 3x3 or 5x5 with padding k // 2."""
    why = _plain(module, nn.Conv2d, name)
    if why:
        return why
    if module.bias is not None:
        return f"{name} has a bias"
    if module.dilation != (1, 1):
        return f"{name} is dilated"
    if module.padding_mode != "zeros":
        return f"{name} pads with {module.padding_mode}"
    k = module.kernel_size[0]
    if module.padding not in ((k // 2, k // 2), "same" if module.stride == (1, 1) else None):
        return f"{name} has padding {module.padding}"
    if kind == "pointwise":
        if module.kernel_size != (1, 1) or module.groups != 1 or module.stride != (1, 1):
            return f"{name} is not a plain 1x1 convolution"
        return None
    if module.groups != module.in_channels or module.in_channels != module.out_channels:
        return f"{name} is not depthwise"
    if module.kernel_size not in ((3, 3), (5, 5)):
        return f"{name} has kernel {module.kernel_size}"
    if module.stride not in ((1, 1), (2, 2)):
        return f"{name} has stride {module.stride}"
    return None


def conv_bn_act(conv_, bn, act, kind, name):
    """A whole layer; ``act`` None is no activation."""
    why = conv(conv_, kind, f"{name} convolution") or _plain(bn, nn.BatchNorm2d, f"{name} batch norm")
    if why or act is None:
        return why
    if type(act) not in ACTIVATIONS:
        return f"{name} activation is {type(act).__name__}"
    return untouched(act, f"{name} activation")


def layer(conv_, bn, act, kind):
    """The layer's parameters, for the functional API."""
    activation = "identity" if act is None else ACTIVATIONS[type(act)]
    return ConvBNAct(kind, conv_.weight, BatchNormParams.of(bn), activation, conv_.stride[0])


def squeeze_excite(module):
    """torchvision's structure: fc1, activation ReLU, fc2, scale_activation Hardsigmoid."""
    name = "squeeze-excite"
    children = dict(module.named_children())
    if set(children) != {"avgpool", "fc1", "fc2", "activation", "scale_activation"}:
        return f"{name} is {type(module).__name__}, not torchvision's structure"
    expected = {"fc1": nn.Conv2d, "fc2": nn.Conv2d, "activation": nn.ReLU, "scale_activation": nn.Hardsigmoid}
    why = untouched(module, name)
    for child, cls in expected.items():
        why = why or _plain(children[child], cls, f"{name} {child}")
    why = why or untouched(children["avgpool"], f"{name} avgpool")
    for child in ("fc1", "fc2"):
        fc = children[child]
        if not why and (fc.kernel_size != (1, 1) or fc.groups != 1 or fc.stride != (1, 1) or fc.padding != (0, 0)):
            why = f"{name} {child} is not a plain 1x1 convolution"
    return why


def squeeze_excite_params(module):
    """The four tensors, for the functional API."""
    return SqueezeExciteParams(module.fc1.weight, module.fc1.bias, module.fc2.weight, module.fc2.bias)


def as_leaf(module, x):
    """Under torch.fx tracing a fused module stays one node, so that the traced graph runs it fused."""
    tracer = x.tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(module), (x,), {})


def is_traced(x):
    return isinstance(x, torch.fx.Proxy)
