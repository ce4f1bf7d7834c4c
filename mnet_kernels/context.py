"""Who is looking at a call: when torch's own ops must run although a fused backend could.

A tracer, a function transform or a tensor subclass sees the ops of a call, not what is meant by them, and knows torch's
own only.  Both the public ops and the modules ask here, so that one rule holds for all ways in.
"""

import torch
from torch._C import _are_functorch_transforms_active, _is_tracing, _len_torch_dispatch_stack
from torch._C._functorch import is_legacy_batchedtensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling  # False in one step, and True to Dynamo
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

# What torch.compile, torch.export and shape propagation call the ops with is no subclass of the user's; None is for a
# parameter that is absent.
PLAIN = frozenset({torch.Tensor, torch.nn.Parameter, FakeTensor, FunctionalTensor, type(None)})


def why_native(x):
    """Why torch's own ops must run for a call with x although a fused backend exists, as a clause; None if they need
    not.

    On every call's path, and traceable by Dynamo, whose own tracing is no reason.

    Args:
        x: tensor of any shape, the input of the call (or a gradient, in a backward).
    """
    if type(x) not in PLAIN:
        return why_native_type(x)
    if _are_functorch_transforms_active():
        return "a torch.func transform is active, and the fused ops have no rules for those"
    if is_dynamo_compiling():
        return None
    if _is_tracing():
        return "torch.jit is tracing, and a traced program holds torch's own ops only"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is on, and the fused ops have no forward derivative"
    if is_legacy_batchedtensor(x):
        return "the input is batched by torch's vmap, and the fused ops have no batching rule"
    return None


def why_native_type(t):
    """The same of a parameter's type alone; None is no tensor, and no reason."""
    if type(t) in PLAIN:
        return None
    return f"a tensor is a {type(t).__name__}, and the fused ops take plain tensors"


def watched():
    """Why a module must call its children, as a clause, or None: somebody's dispatch mode looks at the ops of the call
    (a counter of FLOPs or bytes, selective checkpointing, make_fx), and knows torch's own.

    A mode that has the attribute ``sees_stages`` asks for the ops that run.  This is of modules, which stand for plain
    ones; a public op that is called by its name runs as ever.
    """
    if is_dynamo_compiling() or not _len_torch_dispatch_stack():
        return None
    for mode in _get_current_dispatch_mode_stack():
        if not getattr(mode, "sees_stages", False):
            return f"{type(mode).__name__} looks at the ops of the call"
    return None


def why_native_parameters(layers, se=None):
    """The same of a block's parameters by their types, which is all that is looked at of them.

    Args:
        layers: the block's :class:`~mnet_kernels.params.ConvBNAct`.
        se: its :class:`~mnet_kernels.params.SqueezeExciteParams`, or None.
    """
    for layer in layers:
        if type(layer.weight) not in PLAIN or type(layer.bn.weight) not in PLAIN:
            return why_native_type(layer.weight) or why_native_type(layer.bn.weight)
    if se is not None:
        return why_native_type(se.reduce_weight) or why_native_type(se.expand_weight)
    return None
