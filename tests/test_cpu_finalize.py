"""The compiled CPU stages of batch norm's tables: finalize and its backward, running statistics."""

import pytest
import test_cpu_stages as elementwise
import torch

from mnet_kernels.stages import reference

pytestmark = elementwise.pytestmark


@pytest.mark.parametrize("affine", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("count", [0, 1, 2, 1000])
def test_finalize(affine, count):
    """Within one unit of the last place of float64's result."""
    moments = torch.stack([torch.randn(37), torch.rand(37)])
    moments[1, ::5] = 0
    gamma, beta = (torch.randn(37) if wanted else None for wanted in affine)
    args = (moments, gamma, beta, 1e-5, count)
    got, want = elementwise.ours("finalize")(*args), reference.finalize(*elementwise.widened(args))
    scale = want.clone()
    scale[1] = want[1].abs() + (want[2] * want[0]).abs()  # shift is a difference
    assert ((got - want).abs() <= scale.abs() * 2**-23).all()
    assert torch.equal(got[2], moments[0])
    elementwise.same_as_reference("finalize", args, torch.float32)


@pytest.mark.parametrize("batch_stats", [True, False])
def test_finalize_backward(batch_stats):
    args = (torch.randn(2, 37), elementwise.bn_table(37), 4711, batch_stats)
    got, want = elementwise.ours("finalize_backward")(*args), reference.finalize_backward(*elementwise.widened(args))
    for ours, exact in zip(got, want, strict=True):
        assert ours.shape == exact.shape and ((ours - exact).abs() <= exact.abs() * 2**-24 + 1e-38).all()
    assert batch_stats or (got[0] == 0).all()
    storages = {t.untyped_storage().data_ptr() for t in got}
    assert len(storages) == 3 and all(t.untyped_storage().nbytes() == t.nbytes for t in got)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, None])
@pytest.mark.parametrize("strided", [False, True])
def test_update_running_stats(dtype, momentum, strided):
    def buffers():
        torch.manual_seed(0)
        made = [torch.rand(26).to(dtype)[:: 2 if strided else 1][:13] for _ in range(2)]
        return (*made, torch.tensor(6), torch.rand(13), torch.rand(13), momentum)

    got, want = buffers(), buffers()
    versions = [t._version for t in got[:3]]
    assert elementwise.ours("update_running_stats")(*got) is None
    reference.update_running_stats(*want)
    assert got[2] == want[2] == 7
    for a, b in zip(got[:2], want[:2], strict=True):
        torch.testing.assert_close(
            a, b, rtol=torch.finfo(torch.float32 if dtype == torch.float64 else dtype).eps, atol=0
        )
    assert all(t._version > before for t, before in zip(got[:3], versions, strict=True))


def test_update_running_stats_in_inference_mode():
    with torch.inference_mode():
        args = (torch.zeros(3), torch.ones(3), None, torch.ones(3), torch.ones(3), 0.5)
        elementwise.ours("update_running_stats")(*args)
        assert (args[0] == 0.5).all()
