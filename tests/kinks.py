"""Inputs clear of the activations' kinks: there, rounding decides about a mask, and one mask turned round is an error
of one value's whole gradient.  (What holds exactly at kinks: test_kinks.py.)"""

import itertools

import torch

KINKS = (-3.0, 0.0, 3.0, 6.0)  # of relu, relu6 and hardswish


def clear_of_kinks(u, margin=1e-4):
    """What to add to each channel of the pre-activations u [N, C, H, W] (float64), float32 [C], so that no value is
    within ``margin`` of a kink."""
    values = u.transpose(0, 1).flatten(1)
    offsets, pending = torch.zeros(len(values)), torch.arange(len(values))
    for step in sorted(range(-150, 151), key=abs):
        offset = 0.75 * step / 150
        rest = values[pending] + offset
        far = torch.stack([(rest - kink).abs() for kink in KINKS]).amin((0, 2)) > 2 * margin  # offsets are rounded
        offsets[pending[far]] = offset
        pending = pending[~far]
        if not len(pending):
            return offsets
    raise AssertionError("redraw: a channel's values lie everywhere around the kinks")


def clear_table(bn, x, margin=1e-4):
    """A table bn [5, C] whose shift is moved so that act(scale x + shift) has no value near a kink."""
    if not x.numel():
        return bn
    scale, shift = bn[:2].double().view(2, -1, 1, 1)
    bn = bn.clone()
    bn[1] += clear_of_kinks(x.double() * scale + shift, margin)
    return bn


def clear_model(model, x, margin=5e-4):
    """Moves the biases of the batch norms before a ReLU6 in ``model`` (float64, of Sequentials) so that in training on
    ``x`` no pre-activation is within ``margin`` of a kink; the running statistics are left as they were."""

    def move(bn, _, u):
        offsets = clear_of_kinks(u, margin).double()
        bn.bias.data += offsets
        return u + offsets.view(-1, 1, 1)

    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    chains = (m for m in model.modules() if isinstance(m, torch.nn.Sequential))
    pairs = (pair for chain in chains for pair in itertools.pairwise(chain))
    norms = [bn for bn, act in pairs if isinstance(act, torch.nn.ReLU6)]
    assert norms and all(isinstance(bn, torch.nn.BatchNorm2d) for bn in norms)
    handles = [bn.register_forward_hook(move) for bn in norms]
    with torch.no_grad():
        model.train()(x)
    for handle in handles:
        handle.remove()
    model.load_state_dict(buffers, strict=False)
