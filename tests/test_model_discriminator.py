"""Laws of model_discriminator.py: what a logit may depend on, and the losses by hand."""

import pytest
import torch

import model_discriminator
from model_discriminator import PatchDiscriminator, adaptive_weight, discriminator_loss, generator_loss

PATCH = 46  # receptive field of three strided 4x4 convolutions and the head: 1 + 3 (8 + 4 + 2 + 1)


@pytest.fixture
def critic():
    return PatchDiscriminator(channels=8).eval()


def test_a_logit_depends_on_one_patch(critic):
    """By gradient: on all of 46x46 pixels around its position, and on nothing else."""
    x = torch.randn(1, 1, 128, 128, requires_grad=True)
    logits = critic(x, torch.tensor([3]))[0]
    assert logits.shape[-2:] == (15, 15)
    for i, j in ((7, 7), (5, 9)):
        (gradient,) = torch.autograd.grad(logits[0, 0, i, j], x, retain_graph=True)
        seen = gradient[0, 0] != 0
        rows, columns = (seen.any(axis).nonzero()[:, 0] for axis in (1, 0))
        assert rows.max() - rows.min() + 1 == PATCH == columns.max() - columns.min() + 1
        assert seen[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].float().mean() > 0.99
        assert abs((rows.min() + rows.max()) / 2 - 8 * i - 7.5) <= 8  # near the position it stands for


def test_slices_of_a_batch_do_not_see_each_other(critic):
    """Also in training mode: batch statistics would tell real from fake by company."""
    for network in (critic, PatchDiscriminator(channels=8).train()):
        x = torch.randn(3, 1, 48, 48, requires_grad=True)
        logits, features = network(x, torch.tensor([0, 5, 31]))
        for out in (logits, *features):
            (gradient,) = torch.autograd.grad(out[1].sum(), x, retain_graph=True)
            assert gradient[1].any() and not gradient[[0, 2]].any()


def test_z_enters_every_layer_and_every_logit_by_the_projection(critic):
    """<E(z), phi(x)>, on top of what z does inside the layers."""
    x, z = torch.randn(1, 1, 64, 64), torch.tensor([3])
    (a, features_a), (b, features_b) = critic(x, z), critic(x, torch.tensor([28]))
    assert (a != b).all() and all((f != g).float().mean() > 0.99 for f, g in zip(features_a, features_b))
    with torch.no_grad():
        critic.project.weight.zero_()
    without = critic(x, z)[0]
    assert torch.allclose(without, critic.head(features_a[-1]), atol=1e-6) and len(features_a) == 3
    assert not torch.allclose(a, without, atol=1e-4)


def test_convolutions_are_spectrally_normalised():
    network = PatchDiscriminator(channels=8)
    layers = [*network.convs, network.head]
    with torch.no_grad():
        for layer in layers:
            layer.parametrizations.weight.original.mul_(50)
    for _ in range(50):
        network(torch.zeros(1, 1, 48, 48), torch.tensor([0]))
    assert all(abs(torch.linalg.matrix_norm(layer.weight.flatten(1), 2) - 1) < 0.05 for layer in layers)


def test_hinge_losses_and_feature_matching_by_hand():
    """The latter is zero on equal features and moves the fake only; every layer counts the same, whatever its size."""
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-2.0, 0.0, 3.0])
    assert discriminator_loss(real, fake) == pytest.approx((0 + 0.5 + 2) / 3 + (0 + 1 + 4) / 3)
    assert discriminator_loss(torch.tensor([1.0, 9.0]), torch.tensor([-1.0, -9.0])) == 0
    assert generator_loss(fake) == pytest.approx(-1 / 3)
    real = [torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 5, 2, 2, requires_grad=True)]
    assert model_discriminator.feature_matching_loss(real, [r.detach().clone() for r in real]) == 0
    fake = [(r + shift).detach().requires_grad_() for r, shift in zip(real, (1.0, -3.0))]
    loss = model_discriminator.feature_matching_loss(real, fake)
    loss.backward()
    assert loss.item() == pytest.approx((1 + 3) / 2)
    assert all(r.grad is None for r in real) and all(f.grad.any() for f in fake)


def test_the_adaptive_weight_is_the_ratio_of_gradient_norms_and_is_clipped():
    w, x = torch.randn(4, 3, requires_grad=True), torch.randn(3, 7)
    ours, theirs = (w @ x).square().mean(), -(w @ x).mean()
    norm = [torch.autograd.grad(loss, w, retain_graph=True)[0].norm() for loss in (ours, theirs)]
    weight = adaptive_weight(ours, theirs, w, limit=1e6)
    assert weight.item() == pytest.approx((norm[0] / (norm[1] + 1e-4)).item(), rel=1e-5) and not weight.requires_grad
    assert adaptive_weight(7 * ours, theirs, w, limit=1e6).item() == pytest.approx(7 * weight.item(), rel=1e-5)
    assert adaptive_weight(1e6 * ours, theirs, w) == 10 and adaptive_weight(1e6 * ours, theirs, w, limit=3.0) == 3
    assert adaptive_weight(ours, 0 * theirs, w) == 10  # a silent critic divides by nothing
    (ours + weight * theirs).backward()  # both graphs are whole afterwards
    assert w.grad.any()


def test_the_adaptive_weight_is_the_same_in_float16(critic):
    """Of losses averaged over many pixels, the gradient of one pixel is below the least number of float16."""
    w, z = torch.randn(1, 4, requires_grad=True), torch.zeros(1, dtype=torch.long)
    features, weights = torch.randn(4, 512 * 512), []
    for half in (False, True):
        with torch.autocast("cpu", torch.float16, enabled=half):
            picture = (w @ features).float()
            logits, _ = critic(picture[:, : 256 * 256].view(1, 1, 256, 256), z)
        weights.append(adaptive_weight((picture - 1).abs().mean() / 256, generator_loss(logits), w, limit=1e6).item())
    assert weights[1] == pytest.approx(weights[0], rel=0.02)
