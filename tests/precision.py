"""The pass rule of low precision: our error against float64 is at most twice torch's own in the same dtype, plus ulps."""

import torch

SMALLEST = 1e-30


def ulp(dtype, scale):
    """One unit in the last place of a dtype at a magnitude."""
    return torch.finfo(dtype).eps * 2.0 ** torch.frexp(torch.as_tensor(scale, dtype=torch.float64).clamp(min=SMALLEST))[1] / 2


def errors(got, ref):
    """(relative L2, largest absolute) error of a tensor."""
    got, ref = got.double(), ref.double()
    return ((got - ref).norm() / ref.norm().clamp(min=SMALLEST)).item(), (got - ref).abs().max().item()


def assert_close(name, ours, torchs, ref, dtype, ulps=1):
    """Both errors of ours within twice torch's + ``ulps`` units of the storage dtype at max |ref|."""
    scale = ref.double().abs().max()
    for kind, mine, theirs, unit in zip(
        ("relative L2", "max"),
        errors(ours, ref),
        errors(torchs, ref),
        (ulp(dtype, 1.0), ulp(dtype, scale)),
        strict=True,
    ):
        limit = 2 * theirs + ulps * unit.item()
        assert mine <= limit, f"{name}: {kind} error {mine:.2e}, torch's {theirs:.2e}, limit {limit:.2e}"


def cosine(a, b):
    """Cosine of the angle between two tensors."""
    return torch.nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), 0).item()
