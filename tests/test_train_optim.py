"""Optimisers, schedules, averaged weights, mixing, accumulation of ``python -m mnet_kernels.train``."""

import copy

import pytest
import torch
from train_runs import history, last, make_config, run

pytest.importorskip("sklearn")

from mnet_kernels.training import augment, data, engine, optim
from mnet_kernels.training.progress import Progress


def trainer(**changes):
    config = make_config(**changes)
    return engine.Trainer(config, data.load("digits", config.limit_train))


def test_optimizers_are_torchvisions():
    model = torch.nn.Linear(2, 2)

    def build(**changes):
        return optim.build_optimizer(model, make_config(**changes))

    rmsprop = build(optimizer="rmsprop", momentum=0.9, lr=0.064)
    assert isinstance(rmsprop, torch.optim.RMSprop)
    wanted = {"alpha": 0.9, "momentum": 0.9, "eps": 0.0316, "lr": 0.064}
    assert {name: rmsprop.defaults[name] for name in wanted} == wanted
    assert build(optimizer="sgd_nesterov").defaults["nesterov"] and not build(optimizer="sgd").defaults["nesterov"]
    assert not build(optimizer="sgd_nesterov", momentum=0.0).defaults["nesterov"]


def test_step_schedule_is_torchs():
    config = make_config(schedule="step", epochs=9, lr=0.5, lr_step=2.0, lr_gamma=0.7, warmup_epochs=1.0)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    torchs = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.7)
    for epoch in range(1, 9):  # torch's starts after the warm-up
        for step in range(5):
            rate = optim.learning_rate(config, 5 * epoch + step, 5)
            assert rate == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        torchs.step()
    assert 0 < optim.learning_rate(config, 0, 5) < optim.learning_rate(config, 4, 5) < 0.5


def test_ema_is_the_running_mean_it_says():
    model = torch.nn.BatchNorm1d(3)
    average = optim.build_ema(model, 0.8)
    wanted = None
    for n in range(60):
        with torch.no_grad():
            model.weight.uniform_()
            model.running_mean.uniform_()
        average.update_parameters(model)
        now = torch.stack([model.weight.detach(), model.running_mean]).double()
        decay = min(0.8, (1 + n) / (10 + n))
        wanted = now if wanted is None else decay * wanted + (1 - decay) * now
        found = torch.stack([average.module.weight, average.module.running_mean]).double()
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    assert optim.build_ema(model, 0.0) is None


def test_ema_is_tested_and_saved(tmp_path):
    assert run(tmp_path, "--ema", "0.9") == 0
    state = last(tmp_path)
    best = torch.load(tmp_path / "best.pt", weights_only=True)
    for record in history(tmp_path):
        assert record["raw_test_loss"] != record["test_loss"]
    assert best["epoch"] in (1, 2)
    if best["epoch"] == 2:
        assert all(torch.equal(best["model"][k], state["ema"]["module." + k]) for k in best["model"])
    tested = trainer(ema=0.9, epochs=2)
    tested.restore(state)
    tested.model.load_state_dict({k.removeprefix("module."): v for k, v in state["ema"].items() if k != "n_averaged"})
    assert tested.score(tested.model)[0] == pytest.approx(history(tmp_path)[1]["test_loss"], rel=1e-5)


class Counted(Progress):
    def line(self, text):
        pass


def test_accumulation_is_the_mean_gradient_of_its_batches(monkeypatch):
    """Two batches of 16 with one step, against the gradients of the two, averaged by hand."""
    whole = trainer(batch_size=16, accumulate=2, limit_train=32, clip_grad=0.0, momentum=0.0, warmup_epochs=0.0)
    byhand = copy.deepcopy(whole.model)
    generator = torch.Generator()
    generator.set_state(whole.generator.get_state())
    rng = torch.get_rng_state()
    whole.train_epoch(Counted(enabled=False))
    assert whole.step == 1 and whole.batches.steps == 1
    torch.set_rng_state(rng)
    byhand.train()
    again = data.Batches(whole.batches.data, 32, 16, torch.device("cpu"), True, generator)
    for images, labels in again.train():
        loss = torch.nn.functional.cross_entropy(byhand(images), labels, label_smoothing=0.1)
        (loss / 2).backward()
    found, wanted = (dict(model.named_parameters()) for model in (whole.model, byhand))
    for name, parameter in wanted.items():
        torch.testing.assert_close(found[name].grad, parameter.grad, rtol=1e-4, atol=1e-6)


def test_mixing_keeps_images_and_weights_together():
    images = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(8)
    outside = torch.get_rng_state()
    for mixup, cutmix in ((0.5, 0.0), (0.0, 1.0), (0.5, 1.0)):
        generator = torch.Generator().manual_seed(1)
        mix = augment.mixer(mixup, cutmix, 8, generator)
        for _ in range(10):
            mixed, weights = mix(images, labels)
            assert weights.shape == (8, 8) and mixed.is_contiguous(memory_format=torch.channels_last)
            # The value of an image is its label: the mean pixel is the mean label under the weights.
            torch.testing.assert_close(mixed.mean((1, 2, 3)), weights @ torch.arange(8.0), rtol=1e-4, atol=1e-4)
        assert not torch.equal(mixed, images)
    assert torch.equal(torch.get_rng_state(), outside)
    assert augment.mixer(0.0, 0.0, 8, generator)(images, labels)[1] is labels


def test_random_erase_and_flip():
    images = torch.ones(200, 3, 16, 16)
    augment.random_erase(images, 0.5, torch.Generator().manual_seed(2))
    erased = (images == 0).flatten(1).any(1).sum().item()
    assert 70 < erased < 130
    ramp = torch.arange(16.0).expand(100, 1, 16, 16).contiguous()
    flipped = augment.random_affine(ramp, augment.Augment(flip=True), torch.Generator().manual_seed(2))
    same = (flipped - ramp).abs().amax((1, 2, 3)) < 1e-3
    mirrored = (flipped - ramp.flip(-1)).abs().amax((1, 2, 3)) < 1e-3
    assert torch.equal(same, ~mirrored) and 30 < same.sum() < 70


def test_too_few_images_for_a_step(tmp_path, capsys):
    assert run(tmp_path, "--accumulate", "4") == 1
    assert "96 training images are too few for one step of 32 (--batch-size) x 4" in capsys.readouterr().err


def test_unknown_compiler(tmp_path, capsys):
    assert run(tmp_path, "--compile", "gcc") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: --compile gcc: torch.compile has no such backend; it has ") and "inductor" in error


def test_compiled_is_the_same_run(tmp_path):
    assert (
        run(tmp_path / "plain", epochs=1) == 0 and run(tmp_path / "compiled", "--compile", "aot_eager", epochs=1) == 0
    )
    a, b = (history(tmp_path / name)[0]["train_loss"] for name in ("plain", "compiled"))
    assert a == pytest.approx(b, rel=1e-3)
    assert last(tmp_path / "plain")["model"].keys() == last(tmp_path / "compiled")["model"].keys()
