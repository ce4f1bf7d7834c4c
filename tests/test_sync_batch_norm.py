"""Several processes: nn.SyncBatchNorm is one batch norm over all their batches; FSDP2 may shard the parameters."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from networks import assert_equal, randomise
from torch import nn
from torchvision.models import mobilenet_v2

import mnet_kernels as mk

timm = pytest.importorskip("timm")
pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without distributed")

SHARES = (5, 3)  # images of the two processes: a last batch need not be even
CHANNELS, SIZE = 8, 20

# What each of the two processes does; process 0 writes down what it has.
PROGRAM = """
import sys
import torch
import torch.distributed as dist
import test_sync_batch_norm

dist.init_process_group("gloo")
found = test_sync_batch_norm.in_one_of_two(*torch.load(sys.argv[1]))
found["sharded"] = [test_sync_batch_norm.sharded(accelerate) for accelerate in (False, True)]
if dist.get_rank() == 0:
    torch.save(found, sys.argv[2])
dist.barrier()
dist.destroy_process_group()
"""


def v2(convert):
    return convert(mk.FusedMobileNetV2(width_mult=0.1).features[1:8])


def v1(convert):
    return convert(mk.FusedMobileNetV1(width_mult=0.25).blocks[:3])


def v3(convert):
    return convert(mk.fused_mobilenet_v3_small(width_mult=0.5).features[1:7])


def converted_then_accelerated(convert):
    model = nn.Sequential(convert(mobilenet_v2(width_mult=0.1).features[1:6]))
    mk.accelerate(model)
    return model


def accelerated_then_converted(convert):
    model = mobilenet_v2(width_mult=0.1)
    mk.accelerate(model)
    return convert(model.features[1:6])


def timms(convert):
    if convert is not plain:
        convert = timm.layers.convert_sync_batchnorm
    model = nn.Sequential(convert(timm.create_model("mobilenetv3_small_050").blocks[:3]))
    mk.accelerate(model)
    return model


def plain(model):
    return model


MODELS = {f.__name__: f for f in (v2, v1, v3, converted_then_accelerated, accelerated_then_converted, timms)}


def channels_in(model):
    return next(m for m in model.modules() if isinstance(m, nn.Conv2d)).in_channels


def loss_of(model, x, target):
    """A sum over images, so that the loss of two batches together is the sum of their losses."""
    return (model(x[:, : channels_in(model)]).mean((2, 3)).sum(1) * target).sum()


def outcome(model, loss):
    model.zero_grad()
    loss.backward()
    found = {f"d_{n}": p.grad for n, p in model.named_parameters()}
    return found | {n: b.clone() for n, b in model.named_buffers()}


def in_one_of_two(x, target, states):
    """A step of every model on this process's share, in float64 and in float32 by the device's own backend."""
    rank = torch.distributed.get_rank()
    first = sum(SHARES[:rank])
    x, target = (t[first : first + SHARES[rank]] for t in (x, target))
    found = {}
    for dtype in (torch.float64, torch.float32):
        for name, make in MODELS.items():
            model = make(nn.SyncBatchNorm.convert_sync_batchnorm)
            model.load_state_dict(states[name])
            assert any(isinstance(m, nn.SyncBatchNorm) for m in model.modules())
            assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
            with mk.backend("reference" if dtype == torch.float64 else None), mk.count_stages() as counts:
                loss = loss_of(model.to(dtype), x.to(dtype), target.to(dtype))
            assert not any(op.startswith("native") for op in counts), counts
            found[name, dtype] = outcome(model, loss)
            # By hand what DistributedDataParallel does, which on the CPU refuses any nn.SyncBatchNorm.
            for key, grad in found[name, dtype].items():
                if key.startswith("d_"):
                    torch.distributed.all_reduce(grad)
    return found


def sharded(accelerate):
    """Every gradient of a model that FSDP2 shards, and the mean of the processes' own: (name, got, want)."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = (mobilenet_v2 if accelerate else mk.FusedMobileNetV2)(width_mult=0.1, num_classes=5, dropout=0.0)
    if accelerate:
        mk.accelerate(model)
    whole, mesh = copy.deepcopy(model), init_device_mesh("cpu", (2,))
    for module in (*model.features, model):
        fully_shard(module, mesh=mesh)
    # With a hook the last layer is called, as it is when sharded: within the op of the pool (nn/head.py) it rounds
    # differently, and many gradients here are zero but for rounding.
    whole.features[-1].register_forward_hook(lambda *_: None)
    torch.manual_seed(1 + torch.distributed.get_rank())
    x, labels = torch.randn(4, 3, 48, 48), torch.randint(5, (4,))
    for net in (model, whole):
        nn.functional.cross_entropy(net(x), labels).backward()
    found = []
    for (name, p), q in zip(model.named_parameters(), whole.parameters(), strict=True):
        torch.distributed.all_reduce(q.grad)
        found.append((name, p.grad.full_tensor(), q.grad / 2))
    return found


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sync")
    x, target = torch.randn(sum(SHARES), 64, SIZE, SIZE - 3).double(), torch.randn(sum(SHARES)).double()
    models = {name: make(plain) for name, make in MODELS.items()}
    for model in models.values():
        randomise(model)
    torch.save((x, target, {name: model.state_dict() for name, model in models.items()}), folder / "case")
    (folder / "program.py").write_text(PROGRAM)
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    env["GLOO_SOCKET_IFNAME"] = "lo"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(folder / name) for name in ("program.py", "case", "found")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return x, target, models, torch.load(folder / "found")


@pytest.mark.parametrize("name", MODELS)
def test_two_processes_are_one_with_both_batches(case, name):
    x, target, models, found = case
    model = models[name].double()
    with mk.backend("reference"):
        want = outcome(model, loss_of(model, x, target))
    assert_equal(found[name, torch.float64], want, 1e-9)
    assert_equal(found[name, torch.float32], want, 1e-3)


def test_sharded_parameters(case):
    for gradients in case[3]["sharded"]:
        assert len(gradients) == 158
        for name, got, want in gradients:
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * want.abs().max().item(), msg=name)


def test_native_ops_have_no_statistics_of_several_processes_on_the_cpu():
    bn = mk.BatchNormParams.of(nn.BatchNorm2d(4))._replace(group=object())
    with mk.backend("native"), pytest.raises(ValueError, match="nn.SyncBatchNorm needs CUDA: choose a fused backend"):
        mk.functional.depthwise_conv_bn_act(torch.randn(2, 4, 5, 5), torch.randn(4, 1, 3, 3), bn)


def test_alone_it_is_an_ordinary_batch_norm():
    """Without a process group, and in eval mode."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(mk.FusedMobileNetV2(width_mult=0.1)).double().features[1:]
    same = mk.FusedMobileNetV2(width_mult=0.1).double().features[1:]
    same.load_state_dict(model.state_dict())
    x = torch.randn(4, 8, 16, 16, dtype=torch.float64)
    for training in (True, False):
        with mk.backend("reference"), mk.count_stages() as counts:
            torch.testing.assert_close(model.train(training)(x), same.train(training)(x))
        assert not any(op.startswith("native") for op in counts)
