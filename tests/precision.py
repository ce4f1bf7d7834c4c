"""The pass rule of low precision: our error against float64 is at most twice torch's own in the same dtype, plus ulps.

Both errors are medians over several independent draws of the inputs: one value whose activation's mask flips under
rounding moves a whole gradient, so that single draws of the two errors are no measure of either path.
"""

import torch

SMALLEST = 1e-30


def ulp(dtype, scale):
    """One unit in the last place of a dtype at a magnitude."""
    _, exponent = torch.frexp(torch.as_tensor(scale, dtype=torch.float64).clamp(min=SMALLEST))
    return torch.finfo(dtype).eps * 2.0 ** (exponent - 1)


def errors(got, ref):
    """(relative L2, largest absolute) error of a tensor."""
    got, ref = got.double(), ref.double()
    return ((got - ref).norm() / ref.norm().clamp(min=SMALLEST)).item(), (got - ref).abs().max().item()


def median(values):
    """Median of a list of floats."""
    return sorted(values)[len(values) // 2]


class Judge:
    """Collects (ours, torch's, reference) of every result over the draws; ``verdict`` applies the rule."""

    def __init__(self, dtype, ulps=1):
        self.dtype, self.ulps, self.rows = dtype, ulps, {}

    def add(self, name, ours, torchs, ref):
        units = (ulp(self.dtype, 1.0).item(), ulp(self.dtype, ref.double().abs().max()).item())
        self.rows.setdefault(name, []).append((errors(ours, ref), errors(torchs, ref), units))

    def ratios(self):
        """{(name, kind): (ours, torch's, limit)} with medians over the draws."""
        found = {}
        for name, draws in self.rows.items():
            for i, kind in enumerate(("relative L2", "max")):
                ours, torchs, unit = (median([draw[j][i] for draw in draws]) for j in range(3))
                found[name, kind] = ours, torchs, 2 * torchs + self.ulps * unit
        return found

    def verdict(self):
        for (name, kind), (ours, torchs, limit) in self.ratios().items():
            assert ours <= limit, f"{name}: {kind} error {ours:.2e}, torch's {torchs:.2e}, limit {limit:.2e}"


def cosine(a, b):
    """Cosine of the angle between two tensors."""
    return torch.nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), 0).item()
