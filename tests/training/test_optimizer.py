"""Laws of training/optimizer.py: what an orthogonal step is, and which weights take one."""

import copy

import pytest
import torch
from torch import nn

from training.optimizer import Muon, new_optimizers, orthogonalize


@pytest.mark.parametrize("shape", [(20, 90), (90, 20), (30, 30), (1, 50)])
def test_all_singular_values_come_near_1_and_the_directions_stay(shape):
    """Of matrices of any size whose singular values differ by a thousand times; as U diag(.68 .. 1.21) V^T."""
    generator = torch.Generator().manual_seed(0)
    U, _, Vh = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
    values = torch.logspace(0, -3, min(shape))
    for size in (1e-6, 1, 1e6):
        found = U.T @ orthogonalize((size * (U * values) @ Vh)[None])[0] @ Vh.T
        strong = values > 0.02 * values.norm()
        assert ((found.diagonal()[strong] > 0.67) & (found.diagonal()[strong] < 1.21)).all()
        assert (found - found.diagonal().diag()).abs().max() < 0.02 and (found.diagonal() > 0).all()
    nothing = torch.zeros(3, *shape)
    assert torch.equal(orthogonalize(nothing), nothing)


def test_a_step_has_the_size_of_the_learning_rate_whatever_the_gradient():
    """As root mean square, for weights of linear layers and of convolutions; averaged gradients give its direction."""
    for weight in (nn.Linear(64, 64).weight, nn.Conv2d(8, 64, 3).weight, nn.Linear(300, 20).weight):
        start, optimizer = weight.detach().clone(), Muon([weight], lr=0.01)
        weight.grad = 1e-4 * torch.randn_like(weight)
        optimizer.step()
        step = weight.detach() - start
        assert 0.006 < step.square().mean().sqrt() < 0.0115
        assert (step * weight.grad).sum() < 0
        for _ in range(60):  # the first gradient is forgotten
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        start = weight.detach().clone()
        optimizer.step()
        alone = 0.01 / min(weight.flatten(1).shape) ** 0.5  # where a gradient has one direction, so has the step
        assert -1.21 * alone < (weight.detach() - start).mean() < -0.67 * alone


def test_matrices_of_one_shape_are_stepped_as_if_each_were_alone():
    """Whatever stands beside them, and in whatever order."""
    torch.manual_seed(0)
    shapes = [(8, 6, 3, 3), (8, 54), (8, 6, 3, 3), (54, 8)]
    together = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    alone = copy.deepcopy(together)
    optimizers = [Muon([weight], lr=0.1) for weight in alone] + [Muon(together, lr=0.1)]
    for _ in range(3):
        for weight, other in zip(together, alone):
            weight.grad = other.grad = torch.randn_like(weight)
        for optimizer in optimizers:
            optimizer.step()
    for weight, other in zip(together, alone):
        assert torch.allclose(weight, other, atol=1e-5)


def test_a_network_learns_and_goes_on_exactly_from_its_state():
    """Muon trains the matrices alone, Adam the rest; a weight without a gradient stays as it is."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 32), nn.SiLU(), nn.Linear(32, 6))
    idle = nn.Linear(4, 4)
    adam, muon = new_optimizers(net, 0.02, matrices=[net[0].weight, net[2].weight, idle.weight])
    assert len(muon.param_groups[0]["params"]) == 3 and len(adam.param_groups[0]["params"]) == 2
    x, before = torch.randn(64, 6), idle.weight.detach().clone()
    target = torch.sin(x @ torch.randn(6, 6))

    def train(net, optimizers, steps):
        for _ in range(steps):
            loss = (net(x) - target).square().mean()
            net.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
        return loss.item()

    first = train(net, (adam, muon), 1)
    train(net, (adam, muon), 20)
    other = copy.deepcopy(net)
    others = new_optimizers(other, 0.5, matrices=[other[0].weight, other[2].weight, copy.deepcopy(idle.weight)])
    for optimizer, known in zip(others, (adam, muon), strict=True):
        optimizer.load_state_dict(copy.deepcopy(known.state_dict()))
    assert train(net, (adam, muon), 60) == train(other, others, 60) < 0.4 * first
    assert torch.equal(idle.weight, before) and len(new_optimizers(net, 0.1)) == 1
