"""What is profiled: every distinct block of a model and the model itself, or one block given in words."""

import re
from typing import NamedTuple

import torch

from ..bench import BenchError, shapes
from ..bench.subjects import Block
from ..models import MODELS
from ..models.common import make_divisible
from ..nn import FusedInvertedResidual, FusedSeparable

SYNTAX = """\
a block: IN-HIDDEN-OUT@SIZE, an inverted residual (without an expand layer where HIDDEN = IN), or IN-OUT@SIZE,
MobileNetV1's separable block; then, if not the defaults, ,k3|k5 ,s1|s2 ,relu|relu6|hardswish ,se or ,seWIDTH"""
EXAMPLE = "24-144-24@56,k3,s1"
_BLOCK = re.compile(r"(?:(\d+)-)?(\d+)-(\d+)@(\d+)(?:x(\d+))?((?:,\w+)*)")
_ACTIVATIONS = {"relu": torch.nn.ReLU, "relu6": torch.nn.ReLU6, "hardswish": torch.nn.Hardswish}


class Placed(NamedTuple):
    """Something to profile, and where in the model it stands (no path for a block given in words)."""

    subject: object
    paths: tuple = ()


def find(target, width=1.0, resolution=224, only=None):
    """What a target on the command line comes to: a list of :class:`Placed`, a model's blocks in order, then itself.

    Args:
        target: a name of ``MODELS``, or a block in the words of :data:`SYNTAX`.
        width, resolution: of a model.
        only: of a model's blocks, those whose name contains this text, and not the model itself.

    Raises:
        BenchError: neither a model nor a block; says what it could be.
    """
    if target not in MODELS:
        return [Placed(block(target))]
    (model,) = shapes.models([target], width, resolution)
    found = {}
    for path, one in shapes.placed(model):
        found.setdefault(one.name, (one, []))[1].append(path)
    chosen = [Placed(one, tuple(paths)) for name, (one, paths) in found.items() if only is None or only in name]
    if not chosen:
        raise BenchError(f"no block of {target} has {only!r} in its name; there are:\n  " + "\n  ".join(found))
    return chosen if only is not None else [*chosen, Placed(model)]


def block(text):
    """The block that ``text`` describes (:data:`SYNTAX`), with weights from torch's global generator.

    Raises:
        BenchError: the text is no block, or none that there is.
    """
    match = _BLOCK.fullmatch(text)
    if not match:
        raise BenchError(f"{text!r} is neither a model ({', '.join(MODELS)}) nor a block such as {EXAMPLE}\n{SYNTAX}")
    first, middle, out, height, across, words = match.groups()
    channels, hidden, out, height = int(first or middle), int(middle), int(out), int(height)
    shape = (channels, height, int(across or height))
    options = _options(text, words.split(",")[1:])
    if 0 in (*shape, hidden, out):
        raise BenchError(f"{text!r}: every number must be above 0")
    torch.manual_seed(0)
    if first is None:
        if options["se"] is not None:
            raise BenchError(f"{text!r}: squeeze-excite needs an inverted residual, IN-HIDDEN-OUT@SIZE")
        module = FusedSeparable(
            channels, out, options["s"], options["k"], activation_layer=_ACTIVATIONS[options["act"]]
        )
    else:
        width = options["se"]
        module = FusedInvertedResidual(
            channels, out, options["s"], hidden / channels, kernel_size=options["k"],
            activation_layer=_ACTIVATIONS[options["act"]],
            squeeze_channels=make_divisible(hidden // 4, 8) if width == 0 else width,
        )  # fmt: skip
    return Block(shapes.title(module, shape), module, shape)


def _options(text, words):
    found = {"k": 3, "s": 1, "act": "relu6", "se": None}
    for word in words:
        if word in ("k3", "k5", "s1", "s2"):
            found[word[0]] = int(word[1])
        elif word in _ACTIVATIONS:
            found["act"] = word
        elif re.fullmatch(r"se[1-9]\d*|se", word):
            found["se"] = int(word[2:] or 0)
        else:
            raise BenchError(f"{text!r}: unknown option {word!r}\n{SYNTAX}")
    return found
