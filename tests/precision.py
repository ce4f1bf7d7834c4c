"""The pass rule of low precision: our error against float64 is at most twice torch's own in the same dtype, plus ulps.

Three errors are judged: relative L2, the largest absolute one, and (for gradients) one minus the cosine.  One value
whose activation's mask flips under rounding moves a whole gradient, and rounding errors of few values scatter, so that
one draw of the inputs measures neither path: the rule is applied to geometric means over several independent draws.
"""

import math

import torch

SMALLEST = 1e-30
KINDS = ("relative L2", "max", "1 - cosine")


def ulp(dtype, scale):
    """One unit in the last place of a dtype at a magnitude."""
    _, exponent = torch.frexp(torch.as_tensor(scale, dtype=torch.float64).clamp(min=SMALLEST))
    return torch.finfo(dtype).eps * 2.0 ** (exponent.item() - 1)


def errors(got, ref):
    """The error of a tensor by each of KINDS."""
    got, ref = got.double().flatten(), ref.double().flatten()
    relative = ((got - ref).norm() / ref.norm().clamp(min=SMALLEST)).item()
    cosine = torch.nn.functional.cosine_similarity(got, ref, 0).item()
    return relative, (got - ref).abs().max().item(), max(0.0, 1 - cosine)


def geometric_mean(values):
    """Geometric mean of floats; zeros count as SMALLEST."""
    return math.exp(sum(math.log(max(v, SMALLEST)) for v in values) / len(values))


class Judge:
    """Collects (ours, torch's, reference) of every result over the draws; ``verdict`` applies the rule."""

    def __init__(self, dtype, ulps=1):
        self.dtype, self.ulps, self.rows = dtype, ulps, {}

    def add(self, name, ours, torchs, ref):
        eps = torch.finfo(self.dtype).eps
        units = (eps / 2, ulp(self.dtype, ref.double().abs().max()), eps)
        self.rows.setdefault(name, []).append((errors(ours, ref), errors(torchs, ref), units))

    def limits(self):
        """{(name, kind): (ours, torch's, limit)}."""
        found = {}
        for name, draws in self.rows.items():
            for i, kind in enumerate(KINDS):
                ours, torchs, unit = (geometric_mean([draw[j][i] for draw in draws]) for j in range(3))
                found[name, kind] = ours, torchs, 2 * torchs + self.ulps * unit
        return found

    def verdict(self):
        """Fail with the result that misses its limit by most."""
        (name, kind), (ours, torchs, limit) = max(self.limits().items(), key=lambda row: row[1][0] / row[1][2])
        assert ours <= limit, f"{name}: {kind} error {ours:.2e}, torch's {torchs:.2e}, limit {limit:.2e}"
