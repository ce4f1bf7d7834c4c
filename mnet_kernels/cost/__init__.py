"""What a model costs: parameters, multiply-adds, bytes moved and lower bounds on time, per layer and per scheme.

    python -m mnet_kernels.cost v2 --width 0.75 --res 160

Nothing here is a table of layers.  The model itself runs one training step on the meta device, where tensors have
shapes and no data, and every op that it calls is written down: torch's own ops for ``eager``, the stage ops for
``chain`` and ``algebraic``, and for ``auto``, which mixes them block by block as automatic mode does on the CPU.
``compile`` is ``eager`` with the element-wise ops fused as torch.compile fuses them.

Counting: a kernel reads each of its inputs and writes each of its outputs once (batch norm reads its input twice: for
the statistics, then to normalise; a convolution's backward is two kernels).  What is read again because of a tile's
halo counts as arithmetic, not as bytes.  A kernel's floor is the largest of its bytes, tensor-core and vector times at
the peaks of :class:`Device`: no kernel can be faster, and the sum says what a scheme can reach at best.
"""

import dataclasses

import torch

from .kernels import Device, Kernel, compiled, kernels
from .trace import Layer, layers, trace

__all__ = ["SCHEMES", "Cost", "Device", "Kernel", "Layer", "cost", "layers"]

SCHEMES = ("eager", "compile", "chain", "algebraic")  # auto is one of the last two in every block


@dataclasses.dataclass
class Cost:
    """A model's layers, and the kernels of one training step of ``batch`` images in every scheme."""

    layers: list
    kernels: dict  # scheme -> list of Kernel
    saved: dict  # scheme -> bytes kept for backward (traced schemes)
    batch: int

    @property
    def parameters(self):
        return sum(layer.parameters for layer in self.layers)

    @property
    def madds(self):
        return sum(layer.madds for layer in self.layers)

    def bytes(self, scheme, layer=None):
        """Bytes moved in a step, by one layer or by all."""
        return sum(k.bytes for k in self.kernels[scheme] if layer in (None, k.layer))

    def floor(self, scheme, device=None, layer=None):
        """Seconds that the kernels of a step take at least, of one layer or of all."""
        device = device or Device()
        return sum(k.floor(device) for k in self.kernels[scheme] if layer in (None, k.layer))


def cost(model, input_shape=(3, 224, 224), batch=256, dtype=torch.bfloat16, schemes=SCHEMES, training=True):
    """What one training step costs, or a forward pass in eval mode.

    Args:
        model: an nn.Module of convolutions, batch norms, activations and linear layers, called in the order in which
            they are registered; it is copied, not run.
        input_shape: (C, H, W).
        batch: images a step.
        dtype: of activations and weights (batch-norm parameters and statistics stay as they are).
        schemes: of :data:`SCHEMES`, and ``auto``.
        training: False for the forward pass in eval mode, without autograd.

    Returns:
        :class:`Cost`.

    Raises:
        ValueError: an unknown scheme; a batch, image or model that cannot be traced.
    """
    known = (*SCHEMES, "auto")
    unknown = set(schemes) - set(known)
    if unknown:
        raise ValueError(f"schemes must be of {', '.join(known)}, got {', '.join(sorted(unknown))}")
    result = Cost(layers(model, input_shape), {}, {}, batch)
    eager = None
    for scheme in schemes:
        if scheme in ("eager", "compile"):
            eager = eager or trace(model, input_shape, batch, dtype, "eager", training)
            calls, saved = eager
            result.kernels[scheme] = kernels(calls) if scheme == "eager" else compiled(calls)
        else:
            calls, saved = trace(model, input_shape, batch, dtype, scheme, training)
            result.kernels[scheme] = kernels(calls)
        if scheme != "compile":
            result.saved[scheme] = saved
    return result
