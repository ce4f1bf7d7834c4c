"""Which neighbours run as one op: one plan for models, accelerate and fold.

A plan is a row of steps, each called with what the one before gave.  Neighbouring inverted residuals run as one op, so
that a block in algebraic mode has the statistics of its input from the block that wrote it; a row of separable blocks
leaves no batch norm and activation between them; a first block without an expand layer reads the stem's raw output; the
last pointwise layer of a network is pooled within its op.
"""

from typing import NamedTuple

from .. import functional
from ..params import InvertedResidualParams
from . import eligibility, folded
from .read import Block

_SEQUENCES = ("inverted_residual", "separable_conv")


class Call(NamedTuple):
    """A module that is called as it is."""

    module: object

    blocks, stem = (), None

    def run(self, x):
        return self.module(x)


class Fused(NamedTuple):
    """Neighbouring blocks of one op, and the stem before them, whose output is not written."""

    op: str
    blocks: tuple[Block, ...]
    stem: Block | None = None
    pooled: bool = False  # the mean over H and W, [N, C], of a pointwise layer

    def run(self, x):
        first, stem = self.blocks[0], None
        options = dict(zip(("backend", "mode"), first.pins, strict=True))
        if self.stem is not None:
            stem = _params(self.stem)[0]
        if self.op == "inverted_residual":
            blocks = [InvertedResidualParams(_params(b), b.residual, _excite(b)) for b in self.blocks]
            return functional.inverted_residual_sequence(x, blocks, stem=stem, **options)
        if self.op == "separable_conv":
            return functional.separable_sequence(x, [_params(b) for b in self.blocks], stem=stem, **options)
        (layer,) = _params(first)
        options["activation"] = layer.activation
        if layer.kind == "pointwise":
            op = functional.pointwise_conv_bn_act_pool if self.pooled else functional.pointwise_conv_bn_act
            return op(x, layer.weight, layer.bn, **options)
        op = functional.stem_conv_bn_act if layer.kind == "dense" else functional.depthwise_conv_bn_act
        return op(x, layer.weight, layer.bn, stride=layer.stride, **options)


class Added(NamedTuple):
    """A step whose input is added to what it gives, perhaps dropped for some images (stochastic depth)."""

    step: object
    drop: object

    stem = None

    @property
    def blocks(self):
        return self.step.blocks

    def run(self, x):
        out = self.step.run(x)
        return (out if self.drop is None else self.drop(out)) + x


def _params(block):
    return tuple(eligibility.layer(layer.conv, layer.bn, layer.act, layer.kind) for layer in block.layers)


def _excite(block):
    return None if block.excite is None else eligibility.squeeze_excite_params(block.excite)


def _drops(module):
    """Whether stochastic depth (torchvision's StochasticDepth, timm's DropPath) may drop a branch now."""
    if module is None or not module.training:
        return False
    return getattr(module, "p", getattr(module, "drop_prob", None)) != 0


def steps(units, pooled=False):
    """The plan of units, :class:`Block` or modules, called one after another.

    Returns (steps, whether the last of them pools); ``pooled``: what comes out is pooled, which a last pointwise layer
    does within its op.
    """
    found, waiting, stem = [], [], None

    def flush():
        if waiting:
            found.append(Fused(waiting[0].op, tuple(waiting), stem))
            waiting.clear()

    for unit, follower in zip(units, (*units[1:], None), strict=True):
        joins = isinstance(unit, Block) and unit.op in _SEQUENCES and not _is_added_outside(unit)
        if waiting and not (joins and _joins(waiting[0], unit)):
            flush()
            stem = None
        if joins:
            waiting.append(unit)
        elif not isinstance(unit, Block):
            found.append(Call(unit))
        elif _gives_raw(unit, follower):
            stem = unit
        else:
            found.append(_one(unit))
    flush()
    last = found[-1] if found else None
    if pooled and isinstance(last, Fused) and last.op == "pointwise_conv_bn_act":
        found[-1] = last._replace(pooled=True)
        return tuple(found), True
    return tuple(found), False


def _joins(first, unit):
    """Whether a block may run in one op with those before it, of which ``first`` is the first."""
    if first.pins != unit.pins:
        return False
    return first.op == unit.op or (first.op == "separable_conv" and unit.is_separable)


def _is_added_outside(block):
    if not block.residual:
        return False
    # what does not fit is for torch to say: it may be broadcast
    within = block.op in ("inverted_residual", "folded_row") and block.fits_residual
    return not within or _drops(block.drop)


def _one(block):
    if _is_added_outside(block):
        return Added(_one(block._replace(residual=False)), block.drop if _drops(block.drop) else None)
    return folded.FoldedRow(block) if block.op == "folded_row" else Fused(block.op, (block,))


def _gives_raw(stem, block):
    """Whether the block after a stem may read its raw output."""
    if stem.op != "stem_conv_bn_act" or stem.residual or not isinstance(block, Block) or _is_added_outside(block):
        return False
    if block.op not in _SEQUENCES or block.residual or block.layers[0].kind != "depthwise":
        return False
    return stem.pins == block.pins
