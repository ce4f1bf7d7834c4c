"""What may be fused.

A fused module holds ordinary children (nn.Conv2d, nn.BatchNorm2d, an activation) and reads their parameters.  It may do
so only while calling the children would compute the same: plain types with their own forward, no hooks, no
parametrization, supported geometry.  These functions say why not, or None.

Geometry is read where torch's forward reads it: the kernel and the channels of a convolution from its weight, stride,
padding, dilation and groups from its attributes.
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
# Rows of layers without batch norm (folded into the convolutions) that the CPU kernels run as one, by their kinds.
FOLDED_ROWS = (
    ["dense"],
    ["depthwise"],
    ["pointwise"],
    ["depthwise", "pointwise"],
    ["pointwise", "depthwise", "pointwise"],
    ["dense", "depthwise", "pointwise"],
)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# torch's own forwards, as they were when this package was imported: a program may put others in their place
_LEAVES = (nn.Conv2d, nn.BatchNorm2d, nn.SyncBatchNorm, nn.AdaptiveAvgPool2d, *ACTIVATIONS, *GATES)
_FORWARDS = {cls: (cls.forward, getattr(cls, "_conv_forward", None)) for cls in _LEAVES}


def qualified_name(module):
    """The class by its full name: libraries that may not be installed are recognised without importing them."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def global_hooks():
    """Why hooks on all modules forbid fusing: they want to see every child called."""
    return "global module hooks are registered" if _torch_module._has_any_global_hook() else None


def untouched(module, name):
    """Whether calling the module runs its class's methods and nothing else."""
    state, cls = module.__dict__, type(module)
    for hooks in HOOKS:
        if state[hooks]:
            return f"{name} has hooks"
    if "forward" in state:
        return f"{name} has a replaced forward"
    if state.get("_compiled_call_impl") is not None:
        return f"{name} is compiled by itself"
    if torch.compiler.is_compiling():  # which follows no loop over a module's attributes; the one that torch calls:
        return f"{name} has a replaced _conv_forward" if "_conv_forward" in state else None
    for attribute in state:
        if callable(getattr(cls, attribute, None)):
            return f"{name} has a replaced {attribute}"
    return None


def _plain(module, cls, name):
    # subclasses (parametrized, quantised, LoRA, synchronised, frozen layers) may compute something else
    if type(module) is not cls:
        return f"{name} is {type(module).__name__}, not {cls.__name__}"
    return _class_untouched(cls, name) or untouched(module, name)


def _class_untouched(cls, name):
    if torch.compiler.is_compiling() or cls not in _FORWARDS:
        return None
    if (cls.forward, getattr(cls, "_conv_forward", None)) != _FORWARDS[cls]:
        return f"{name} is {cls.__name__}, whose forward was replaced"
    return None


def tensor(module, name):
    """A module's parameter, or the tensor that stands for it as a plain attribute (a replica's, a sharded one); None
    where there is none.  Past nn.Module's look-up: a parametrized weight may change by being asked for.
    """
    found = module._parameters.get(name)
    return module.__dict__.get(name) if found is None else found


def kind(module):
    """A convolution's kind by its weight and groups: depthwise, pointwise or dense."""
    weight = tensor(module, "weight")
    if not isinstance(weight, torch.Tensor) or isinstance(weight, nn.UninitializedParameter) or weight.dim() != 4:
        return "dense"
    out, depth, height, width = weight.shape
    if depth == 1 and module.groups == out and (out > 1 or (height, width) != (1, 1)):
        return "depthwise"
    return "pointwise" if (height, width) == (1, 1) and module.groups == 1 else "dense"


def is_stem(module):
    """Whether a dense convolution is a 3x3 one of an image."""
    weight = tensor(module, "weight")
    return tuple(weight.shape[2:]) == (STEM_KERNEL, STEM_KERNEL) and weight.shape[1] <= STEM_CHANNELS


def is_norm(module):
    """Whether it takes the place of a batch norm, whatever it computes."""
    return isinstance(module, nn.GroupNorm) or hasattr(module, "running_var")


def is_activation(module):
    """Whether it takes the place of an activation, whatever it computes."""
    return type(module).__module__ in ("torch.nn.modules.activation", "timm.layers.activations")


def activation_name(module):
    """The activation by its name in the functional API ("identity" for None), or None if it is not one of those."""
    if module is None:
        return "identity"
    if type(module) is nn.ReLU6 and (module.min_val, module.max_val) != (0.0, 6.0):
        return None
    return ACTIVATIONS.get(type(module))


def conv(module, kind, name, biased=False):
    """A 1x1 convolution, a depthwise one of 3x3 or 5x5, or a dense 3x3 one of an image; padding k // 2, and a bias only
    if ``biased``."""
    why = _plain(module, nn.Conv2d, name)
    if why:
        return why
    if (tensor(module, "bias") is not None) is not biased:
        return f"{name} has {'no' if biased else 'a'} bias"
    if not isinstance(tensor(module, "weight"), torch.Tensor):
        return f"{name} has no weight"
    if module.dilation != (1, 1):
        return f"{name} is dilated"
    if module.padding_mode != "zeros":
        return f"{name} pads with {module.padding_mode}"
    height, width = tensor(module, "weight").shape[2:]
    if kind == "dense":
        if module.groups != 1:
            return f"{name} has {module.groups} groups"
        if not is_stem(module):
            channels = tensor(module, "weight").shape[1]
            return f"a dense {height}x{width} convolution of {channels} channels has no fused stage"
    elif kind == "depthwise" and (height, width) not in ((3, 3), (5, 5)):
        return f"{name} has kernel {(height, width)}"
    if module.padding not in ((height // 2, width // 2), "same" if module.stride == (1, 1) else None):
        return f"{name} has padding {module.padding}"
    if module.stride not in (((1, 1),) if kind == "pointwise" else ((1, 1), (2, 2))):
        return f"{name} has stride {module.stride}"
    return None


def batch_norm(module, name):
    """nn.BatchNorm2d or nn.SyncBatchNorm, or timm's subclasses of them that hold the activation too."""
    if qualified_name(module) not in NORM_ACT:
        return _plain(module, nn.SyncBatchNorm if type(module) is nn.SyncBatchNorm else nn.BatchNorm2d, name)
    if type(module.drop) is not nn.Identity:
        return f"{name} drops values ({type(module.drop).__name__})"
    return untouched(module, name) or untouched(module.drop, name)


def conv_bn_act(conv_, bn, act, kind, name):
    """A whole layer; ``bn`` None: folded into the convolution; ``act`` None is no activation."""
    why = conv(conv_, kind, f"{name} convolution", biased=bn is None)
    if not why and bn is not None:
        why = batch_norm(bn, f"{name} batch norm")
    if why or act is None:
        return why
    if activation_name(act) is None:
        limits = f" from {act.min_val} to {act.max_val}" if type(act) is nn.ReLU6 else ""
        return f"{name} activation is {type(act).__name__}{limits}"
    return _class_untouched(type(act), f"{name} activation") or untouched(act, f"{name} activation")


def layer(conv_, bn, act, kind):
    """The layer's parameters, for the functional API."""
    return ConvBNAct(kind, tensor(conv_, "weight"), BatchNormParams.of(bn), activation_name(act), conv_.stride[0])


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
    forward, cls = type(module).forward, type(module)
    if not why and (forward.__module__, forward.__qualname__) != (cls.__module__, f"{cls.__qualname__}.forward"):
        why = f"{name} is {cls.__name__}, whose forward was replaced"
    for child in (reduce, expand):
        fc = children[child]
        why = why or _plain(fc, nn.Conv2d, f"{name} {child}")
        plain = not why and (kind(fc), fc.stride, fc.padding, fc.dilation) == ("pointwise", (1, 1), (0, 0), (1, 1))
        if not why and not plain:
            why = f"{name} {child} is not a plain 1x1 convolution"
    for child, known in ((activation, SE_ACTIVATIONS), (gate, GATES)):
        act = children[child]
        if not why and (type(act) not in known or (type(act) is nn.ReLU6 and activation_name(act) is None)):
            why = f"{name} {child} is {type(act).__name__}"
        why = why or _class_untouched(type(act), f"{name} {child}") or untouched(act, f"{name} {child}")
    for child in others:
        why = why or _mean(children[child], f"{name} {child}")
    return why


def squeeze_excite_params(module):
    """The four tensors and the two functions, for the functional API."""
    (reduce, activation, expand, gate), _ = _excite_children(module)
    reduce, activation, expand, gate = (module._modules[name] for name in (reduce, activation, expand, gate))
    return SqueezeExciteParams(
        reduce.weight, reduce.bias, expand.weight, expand.bias, SE_ACTIVATIONS[type(activation)], GATES[type(gate)]
    )


def _mean(module, name):
    why = _plain(module, nn.AdaptiveAvgPool2d, name)
    if not why and module.output_size not in (1, (1, 1)):
        why = f"{name} has an output of {module.output_size}"
    return why


_SELECT = "timm.layers.adaptive_avgmax_pool.SelectAdaptivePool2d"
_FAST = "timm.layers.adaptive_avgmax_pool.FastAdaptiveAvgPool"


def mean_pool(module):
    """How a module that takes the mean over H and W and nothing else shapes it: "map" [N, C, 1, 1] or "flat" [N, C];
    None for any other module."""
    if qualified_name(module) == _SELECT and not untouched(module, "pool"):
        pool, flatten = module._modules.get("pool"), module._modules.get("flatten")
        inner = mean_pool(pool)
        if inner is None or untouched(flatten, "flatten"):
            return None
        if type(flatten) is nn.Identity:
            return inner
        return "flat" if type(flatten) is nn.Flatten and (flatten.start_dim, flatten.end_dim) == (1, -1) else None
    if qualified_name(module) == _FAST and not untouched(module, "pool"):
        if module.dim != (2, 3) or type(module.flatten) is not bool:
            return None
        return "flat" if module.flatten else "map"
    return "map" if _mean(module, "pool") is None else None
