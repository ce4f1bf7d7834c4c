"""What a block may fuse.

A fused module holds ordinary children (nn.Conv2d, nn.BatchNorm2d, an activation) under torchvision's names and reads
their parameters.  It may do so only while calling the children would compute the same: plain types, no hooks, no
parametrization, no replaced forward, supported geometry.  These functions say why not, or None.
"""

import torch
from torch import nn
from torch.nn.modules import module as _torch_module

from ..params import BatchNormParams, ConvBNAct, SqueezeExciteParams
from ..schema import STEM_CHANNELS, STEM_KERNEL

ACTIVATIONS = {
    nn.Identity: "identity",
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.Hardswish: "hardswish",
    nn.SiLU: "silu",
}
SE_ACTIVATIONS = {cls: ACTIVATIONS[cls] for cls in (nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU)}
GATES = {nn.Hardsigmoid: "hardsigmoid", nn.Sigmoid: "sigmoid"}
# Squeeze-excite's children: (reduce, activation, expand, gate), and those that are what they always are.
SQUEEZE_EXCITE = (
    (("fc1", "activation", "fc2", "scale_activation"), ("avgpool",)),
    (("conv_reduce", "act1", "conv_expand", "gate"), ()),
)
NORM_ACT = ("timm.layers.norm_act.BatchNormAct2d", "timm.layers.norm_act.SyncBatchNormAct")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def qualified_name(module):
    """The class by its full name: libraries that may not be installed are recognised without importing them."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


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


def conv(module, kind, name, biased=False):
    """A 1x1 convolution, a depthwise one of 3x3 or 5x5, or a dense 3x3 one of an image; padding k // 2, and a bias only
    if ``biased``."""
    why = _plain(module, nn.Conv2d, name)
    if why:
        return why
    if (module.bias is not None) is not biased:
        return f"{name} has {'no' if biased else 'a'} bias"
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
    if kind == "dense":
        size = (STEM_KERNEL, STEM_KERNEL)
        if module.kernel_size != size or module.groups != 1 or module.in_channels > STEM_CHANNELS:
            return f"{name} is not a 3x3 convolution of an image"
        return None if module.stride in ((1, 1), (2, 2)) else f"{name} has stride {module.stride}"
    if module.groups != module.in_channels or module.in_channels != module.out_channels:
        return f"{name} is not depthwise"
    if module.kernel_size not in ((3, 3), (5, 5)):
        return f"{name} has kernel {module.kernel_size}"
    if module.stride not in ((1, 1), (2, 2)):
        return f"{name} has stride {module.stride}"
    return None


def batch_norm(module, name):
    """nn.BatchNorm2d or nn.SyncBatchNorm, or timm's subclasses of them that hold the activation too."""
    if qualified_name(module) not in NORM_ACT:
        return untouched(module, name) if type(module) is nn.SyncBatchNorm else _plain(module, nn.BatchNorm2d, name)
    if type(module.drop) is not nn.Identity:
        return f"{name} drops values ({type(module.drop).__name__})"
    return untouched(module, name) or untouched(module.drop, name)


def conv_bn_act(conv_, bn, act, kind, name):
    """A whole layer; ``act`` None is no activation."""
    why = conv(conv_, kind, f"{name} convolution") or batch_norm(bn, f"{name} batch norm")
    if why or act is None:
        return why
    if type(act) not in ACTIVATIONS:
        return f"{name} activation is {type(act).__name__}"
    return untouched(act, f"{name} activation")


def layer(conv_, bn, act, kind):
    """The layer's parameters, for the functional API."""
    activation = "identity" if act is None else ACTIVATIONS[type(act)]
    return ConvBNAct(kind, conv_.weight, BatchNormParams.of(bn), activation, conv_.stride[0])


def _excite_children(module):
    """Names of the first convolution, the activation, the second and the gate; other children allowed."""
    for names, others in SQUEEZE_EXCITE:
        if set(module._modules) == {*names, *others}:
            return names, others
    return None


def squeeze_excite(module):
    """torchvision's SqueezeExcitation or timm's SqueezeExcite, by their structure."""
    name = "squeeze-excite"
    found = _excite_children(module)
    if found is None:
        return f"{name} is {type(module).__name__}, not torchvision's or timm's structure"
    (reduce, activation, expand, gate), others = found
    children = module._modules
    why = untouched(module, name)
    for child in (reduce, expand):
        fc = children[child]
        why = why or _plain(fc, nn.Conv2d, f"{name} {child}")
        if not why and (fc.kernel_size != (1, 1) or fc.groups != 1 or fc.stride != (1, 1) or fc.padding != (0, 0)):
            why = f"{name} {child} is not a plain 1x1 convolution"
    for child, known in ((activation, SE_ACTIVATIONS), (gate, GATES)):
        if not why and type(children[child]) not in known:
            why = f"{name} {child} is {type(children[child]).__name__}"
        why = why or untouched(children[child], f"{name} {child}")
    for child in others:
        why = why or untouched(children[child], f"{name} {child}")
    return why


def squeeze_excite_params(module):
    """The four tensors and the two functions, for the functional API."""
    (reduce, activation, expand, gate), _ = _excite_children(module)
    reduce, activation, expand, gate = (module._modules[name] for name in (reduce, activation, expand, gate))
    return SqueezeExciteParams(
        reduce.weight, reduce.bias, expand.weight, expand.bias, SE_ACTIVATIONS[type(activation)], GATES[type(gate)]
    )


def as_leaf(module, x):
    """Under torch.fx tracing a fused module stays one node, so that the traced graph runs it fused."""
    tracer = x.tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(module), (x,), {})


def is_traced(x):
    return isinstance(x, torch.fx.Proxy)
