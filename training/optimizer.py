"""The optimisers: Adam, and for the matrices of a network, if asked, Muon."""

import math
from collections import defaultdict

import torch
from torch import Tensor, nn

# p(s) = a s + b s^3 + c s^5, five times over, brings every s from .002 to 1 between .68 and 1.21.
NEWTON_SCHULZ, TIMES = (3.4445, -4.7750, 2.0315), 5


def orthogonalize(matrices: Tensor) -> Tensor:
    """U V^T, about, of matrices U S V^T [k, m, n], by a polynomial of singular values (Jordan et al. 2024, "Muon").

    p(s) = s q(s^2), so all five polynomials act on the small Gram matrix X X^T, and their product meets the matrix
    once: for the matrices of convolutions, several times as wide as high, a third of the work. In float32, since
    processors without bfloat16 take many times longer for it.
    """
    a, b, c = NEWTON_SCHULZ
    high = matrices.shape[1] > matrices.shape[2]
    X = matrices.mT if high else matrices
    squared = X @ X.mT  # has the squares of the singular values; its trace is their sum
    size = squared.diagonal(dim1=1, dim2=2).sum(1).clamp(min=1e-20)[:, None, None]
    squared, product = squared / size, None
    for n in range(TIMES):
        q = torch.baddbmm(squared, squared, squared, beta=b, alpha=c)
        q.diagonal(dim1=1, dim2=2).add_(a)
        product = q if product is None else q @ product
        if n < TIMES - 1:
            squared = q @ squared @ q
    X = product @ X / size.sqrt()
    return X.mT if high else X


class Muon(torch.optim.Optimizer):
    """Steps of equal size in all directions of a matrix (Jordan et al. 2024, "Muon: an optimizer for hidden layers").

    The momentum of a weight [out, in, ...], as a matrix [out, in ...], is orthogonalised, and scaled so that the root
    mean square of a step is the learning rate, about as with Adam: both take the same one. The gradient is mixed in
    once more (Nesterov).

    Args:
        weights: parameters of two or more dimensions.
        lr: the learning rate.
        momentum: decay of the average gradient.
    """

    def __init__(self, weights: list[nn.Parameter], lr: float, momentum: float = 0.95):
        super().__init__(weights, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step down the gradients there are."""
        for group in self.param_groups:
            alike = defaultdict(list)  # matrices of one shape are stepped together: a GPU would wait for each of many
            for weight in group["params"]:
                if weight.grad is not None:
                    alike[weight.flatten(1).shape].append(weight)
            for shape, weights in alike.items():
                ahead = torch.stack([self._ahead(weight, group["momentum"]).flatten(1) for weight in weights])
                for weight, step in zip(weights, orthogonalize(ahead)):
                    weight.add_(step.reshape(weight.shape), alpha=-group["lr"] * math.sqrt(max(shape)))

    def _ahead(self, weight: Tensor, momentum: float) -> Tensor:
        state = self.state[weight]
        if not state:
            state["momentum"] = torch.zeros_like(weight)
        average = state["momentum"].lerp_(weight.grad, 1 - momentum)
        return weight.grad.lerp(average, momentum)


def new_optimizers(
    network: nn.Module, rate: float, betas: tuple[float, float] = (0.9, 0.99), matrices: list[nn.Parameter] = ()
) -> list[torch.optim.Optimizer]:
    """Adam over what may change of a network; but Muon over those of its weights that are `matrices`."""
    chosen = {id(weight) for weight in matrices}
    rest = [p for p in network.parameters() if p.requires_grad and id(p) not in chosen]
    adam = torch.optim.Adam(rest, lr=rate, betas=betas, fused=True)
    return [adam, Muon(list(matrices), rate)] if chosen else [adam]
