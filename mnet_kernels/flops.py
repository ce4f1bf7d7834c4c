"""What the fused ops count in torch.utils.flop_counter: as much as the torch ops in whose place they stand.

A convolution counts what torch's own formulas count for it, forward and backward (theirs is the count that models are
compared by, whatever it leaves out); everything between convolutions counts nothing, as in torch.  What a fused
backward computes again or on top of that is not counted either.  One thing is counted that torch would not do: the
gradients that algebraic mode's expand layer has in any case, where its weight is frozen.

The counter imports Triton, which takes longer than this whole package, and reads its registry as a count begins: the
formulas are entered right after whoever counts has imported it.
"""

import importlib.abc
import importlib.machinery
import sys

import torch

from . import schema

_COUNTER = "torch.utils.flop_counter"
_FOLDED = ("folded_pack", "folded_pointwise", "folded_expand_depthwise")  # defined by the compiled extension


class _Formulas:
    """A method for every op that counts: its arguments with shapes for tensors, its result's shapes as ``out``."""

    def __init__(self, registry):
        self._convolution = registry[torch.ops.aten.convolution]
        self._backward = registry[torch.ops.aten.convolution_backward]

    def _forward_flops(self, x, weight, y):
        return self._convolution(list(x), list(weight), None, 1, 0, 1, False, [0], 1, out_val=list(y))

    def _backward_flops(self, y, x, weight, needs_dx, needs_dw):
        y, x, weight = list(y), list(x), list(weight)
        groups, mask = x[1] // weight[1], [needs_dx, needs_dw, False]
        return self._backward(y, x, weight, None, 1, 0, 1, False, [0], groups, mask, out_val=[x, weight, None])

    def pointwise(self, x, weight, *_, out):
        return self._forward_flops(x, weight, out[0])

    depthwise = stem = pointwise

    def folded_pointwise(self, x, weight, *_, out):
        return self._forward_flops(x, weight, out)

    def expand_depthwise(self, x, shift, expand_weight, bn, act, weight, *_, out):
        y1 = _expanded(x, expand_weight)
        return self._forward_flops(x, expand_weight, y1) + self._forward_flops(y1, weight, out[0])

    def folded_expand_depthwise(self, x, shift, expand_weight, packed, bn, act, weight, *_, out):
        return self.expand_depthwise(x, shift, expand_weight, bn, act, weight, out=[out])

    def pointwise_backward(
        self, grad, y, y_bn, coef, y_act, offset, x, weight, bn, act, gate, residual, needs_dx, needs_sums, needs_dw,
        *, out,
    ):  # fmt: skip
        return self._backward_flops(y, x, weight, needs_dx or needs_sums, needs_dw)

    def depthwise_backward(
        self, grad, y, y_bn, coef, y_act, gate, offset, x, weight, bn, act, stride, residual, needs_dx, needs_dw, *, out
    ):
        return self._backward_flops(y, x, weight, needs_dx, needs_dw)

    def stem_backward(self, grad, y, y_bn, coef, y_act, x, stride, needs_dy, needs_dw, *, out):
        weight = [y[1], x[1], schema.STEM_KERNEL, schema.STEM_KERNEL]
        return self._backward_flops(y, x, weight, False, needs_dw)  # dx is of a torch op

    def expand_depthwise_backward(
        self, grad, y3, y3_bn, y3_coef, y3_act, project_weight, gate, offset, y, y_bn, y_coef, y_act,
        x, shift, expand_weight, bn, act, weight, stride, needs_dx, needs_dw, *, out,
    ):  # fmt: skip
        y1 = _expanded(x, expand_weight)  # the project layer's are counted where its sums are made
        return self._backward_flops(y, y1, weight, True, needs_dw) + self._backward_flops(
            y1, x, expand_weight, needs_dx, False
        )

    def expand_finalize_backward(self, gramgrad, gram, shift, bn, weight, count, *, out):
        # the expand layer's weight gradient, over all positions
        return self._backward_flops([1, weight[0], count, 1], [1, weight[1], count, 1], weight, False, True)


def _expanded(x, weight):
    return [x[0], weight[0], *x[2:]]


def _nothing(*_, **__):
    return 0


def _formula(function):
    return lambda *args, out_shape=None, **kwargs: function(*args, out=out_shape, **kwargs)


def register(counter):
    """Enter the formula of every op of every namespace; ``counter``: the module torch.utils.flop_counter."""
    formulas = _Formulas(counter.flop_registry)
    for namespace in schema.NAMESPACES.values():
        ops = getattr(torch.ops, namespace)
        for name in (*schema.NAMES, *_FOLDED):
            if name in schema.NAMES or hasattr(ops, name):
                function = getattr(formulas, name, None)
                formula = _nothing if function is None else _formula(function)
                counter.register_flop_formula(getattr(ops, name))(formula)


class _AfterImport(importlib.abc.MetaPathFinder):
    """Calls :func:`register` once, right after the counter was imported."""

    def find_spec(self, name, path, target=None):
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None:
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                register(module)

            spec.loader.exec_module = exec_module
        return spec


def setup():
    """Register now if the counter is imported already, else when it is; the package does this once, at import."""
    if _COUNTER in sys.modules:
        register(sys.modules[_COUNTER])
    else:
        sys.meta_path.insert(0, _AfterImport())
