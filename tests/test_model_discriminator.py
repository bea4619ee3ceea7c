"""Laws of model_discriminator.py: what it sees, what a logit may depend on, and the losses by hand."""

import math

import pytest
import torch

from model_discriminator import LEVEL, PatchDiscriminator, gradient_penalty, relativistic_loss, smooth

# receptive field: 1, and 2 more for a 3x3 at an eighth of the side, three strided 4x4, and a 3x3 at full resolution
PATCH = 1 + 2 * 8 + 3 * (4 + 2 + 1) + 2


@pytest.fixture
def critic():
    return PatchDiscriminator(channels=(8, 8, 8, 8)).eval()


def test_a_logit_depends_on_one_patch(critic):
    """By gradient: on all of 40x40 pixels around its position, and on nothing else."""
    x = torch.randn(1, 3, 128, 128, requires_grad=True)
    logits = critic(x, torch.tensor([3]))
    assert logits.shape == (1, 1, 16, 16) and PATCH == 40
    for i, j in ((7, 7), (5, 9)):
        (gradient,) = torch.autograd.grad(logits[0, 0, i, j], x, retain_graph=True)
        seen = gradient[0].abs().amax(0) != 0
        rows, columns = (seen.any(axis).nonzero()[:, 0] for axis in (1, 0))
        assert rows.max() - rows.min() + 1 == PATCH == columns.max() - columns.min() + 1
        assert seen[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].float().mean() > 0.99
        for place, found in ((i, rows), (j, columns)):
            assert (found.min() + found.max()) / 2 == 8 * place + 3.5  # the middle of its 8x8 pixels


def test_slices_of_a_batch_do_not_see_each_other(critic):
    """Also in training mode: batch statistics would tell real from drawn by company."""
    for mode in (True, False):
        x = torch.randn(3, 3, 48, 48, requires_grad=True)
        logits = critic.train(mode)(x, torch.tensor([0, 5, 31]))
        (gradient,) = torch.autograd.grad(logits[1].sum(), x)
        assert gradient[1].any() and not gradient[[0, 2]].any()


def test_z_enters_every_layer_and_every_logit_by_the_projection(critic):
    """<E(z), phi(x)> counts alone where the layers are told nothing; each layer's shift counts alone too."""
    x, z = torch.randn(1, 3, 64, 64), (torch.tensor([3]), torch.tensor([28]))
    ways = [critic.project, *critic.shifts]
    weights = [way.weight.detach().clone() for way in ways]
    for alone in (None, *range(len(ways))):
        for place, (way, weight) in enumerate(zip(ways, weights, strict=True)):
            way.weight.data = weight if place == alone else torch.zeros_like(weight)
        a, b = (critic(x, at) for at in z)
        assert torch.equal(a, b) if alone is None else (a != b).float().mean() > 0.99, alone


def test_the_logit_is_its_formula(critic):
    """Head of phi(x), and the mean over channels of E(z) phi(x)."""
    features = []
    critic.head.register_forward_hook(lambda module, inputs, output: features.append((inputs[0], output)))
    x, z = torch.randn(2, 3, 32, 32), torch.tensor([3, 28])
    logits = critic(x, z)
    (phi, head), embedding = features[0], critic.project(torch.nn.functional.silu(critic.embed_z(z)))
    assert torch.allclose(logits, head + torch.einsum("bc,bchw->bhw", embedding, phi)[:, None] / 8, atol=1e-5)


def test_the_relativistic_loss_by_hand():
    better, worse = torch.tensor([2.0, 0.0, -1.0]), torch.tensor([-1.0, 0.0, 3.0])
    by_hand = sum(math.log(1 + math.exp(-d)) for d in (3, 0, -4)) / 3
    assert relativistic_loss(better, worse).item() == pytest.approx(by_hand)
    assert relativistic_loss(better + 7, worse + 7).item() == pytest.approx(by_hand, rel=1e-5)  # only differences
    assert relativistic_loss(better, better).item() == pytest.approx(math.log(2))
    assert relativistic_loss(torch.tensor([50.0]), torch.tensor([-50.0])) < 1e-6


def test_the_gradient_penalty_of_a_linear_critic_by_hand():
    """Mean over the slices of the squared norm of the gradient; the same however many logits a slice has."""
    weight, x = torch.randn(5, 7, requires_grad=True), torch.randn(4, 1, 5, 7, requires_grad=True)
    logit = (weight * x).sum((1, 2, 3), keepdim=True)
    penalty = gradient_penalty(logit, x)
    assert penalty.item() == pytest.approx(weight.square().sum().item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(penalty, weight, retain_graph=True)
    assert torch.allclose(gradient, 2 * weight, rtol=1e-4)  # it teaches the critic
    eight = torch.stack([(weight[:4, :2] * patch).sum((1, 2)) for patch in
                         (x[:, 0, :4, :2], x[:, 0, :4, 2:4], x[:, 0, :4, 4:6])], 1)  # fmt: skip
    assert gradient_penalty(eight, x).item() == pytest.approx(weight[:4, :2].square().sum().item(), rel=1e-5)


def test_smooth_is_a_gaussian_that_keeps_the_mean_and_has_black_around_it():
    black = torch.full((1, 1, 20, 24), -1.0)
    assert torch.allclose(smooth(black, 2.0), black, atol=1e-5)
    dot = black.clone()
    dot[0, 0, 10, 12] = 0
    spread = smooth(dot, 1.2)[0, 0] + 1
    profile, place = spread.sum(0), torch.arange(24.0)
    assert spread.sum().item() == pytest.approx(1, abs=1e-3)
    assert (profile * place).sum().item() == pytest.approx(12, abs=1e-2)
    assert (profile * (place - 12).square()).sum().sqrt().item() == pytest.approx(1.2, rel=0.03)
    assert torch.allclose(spread, torch.outer(spread.sum(1), profile), atol=1e-5)  # alike in all rows
    assert (smooth(-black, 2.0)[0, 0, 0] < 0.99).all()  # light at the border mixes with the black around


def test_the_planes_are_picture_difference_and_detail():
    """A constant shift of all pixels is seen by the first two, and by the third only near the black around."""
    x, faithful = torch.rand(2, 1, 24, 28) * 2 - 1, torch.rand(2, 1, 24, 28) * 2 - 1

    def planes(x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(1)  # the same noise
        return PatchDiscriminator.planes(x, faithful)

    seen, moved = planes(x), planes(x + 0.25)
    change = (moved - seen)[..., 3:-3, 3:-3].mean((0, 2, 3))
    assert seen.shape == (2, 3, 24, 28)
    assert torch.allclose((moved - seen)[:, 2, 3:-3, 3:-3], torch.zeros(()), atol=1e-4)
    assert change[0].item() == pytest.approx(0.25, abs=1e-5) and change[1] > 4 * change[0]
    noise = seen[:, :1] - x
    assert 0.95 < noise.abs().max() / (LEVEL / 2) <= 1.001 and noise.mean().abs() < 0.05 * LEVEL  # half a grey level
    ratio = seen[:, 1:2] / (seen[:, :1] - faithful)
    assert torch.allclose(ratio, ratio[0, 0, 0, 0].expand_as(ratio), rtol=1e-3)
