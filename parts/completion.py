"""Completion: some slices of a brain are known, and a sampler draws the others so that all make one brain.

Let K be the known slices. A sampler that is given E[x_0 | x_t, x_K] in place of E[x_0 | x_t] draws from p(x_0 | x_K).
The denoiser's guess errs at every slice, and its errors are correlated along z. So its error at K, which is known,
tells of its errors at the other slices:

    E[x_0 | x_t, x_K] = E[x_0 | x_t] + R_K (R_KK)^-1 (x_K - E[x_0 | x_t]_K)                                   (1)

R [Z, Z] is the correlation of the errors at one place, R_K its columns at K. This is the conditional mean of a
Gaussian. R is taken to be the correlation of brains along z, which the noise has too: for the Gaussian prior with one
variance along z then (1) is exact, since x_0 given x_t has that correlation at every level of noise. For a network it
is an approximation. Song et al. 2023, "Pseudoinverse-guided diffusion models for inverse problems", find the covariance
of the errors by a backward pass through the network instead.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from parts.gaussian_prior import GaussianPrior


def weights_of_known(correlation: Tensor, z: Tensor) -> Tensor:
    """R_K (R_KK)^-1, [kinds, Z, k], of correlations [kinds, Z, Z] and the k known slices z int64 [k].

    Each row weighs the errors of the known slices; that of a known slice takes its own alone.
    """
    R = correlation.double()
    within = R[:, z[:, None], z] + 1e-6 * torch.eye(len(z), dtype=R.dtype, device=R.device)
    weights = torch.linalg.solve(within, R[:, z]).mT
    weights[:, z] = torch.eye(len(z), dtype=R.dtype, device=R.device)
    return weights.to(correlation)


def complete(
    denoise: Callable, gaussian: GaussianPrior, alpha: Tensor, sigma: Tensor, known: Tensor, z: Tensor
) -> Callable:
    """`denoise`, (x_t, t) -> (x_0, noise) of one whole brain [Z, C, h, w] each, corrected by (1).

    Args:
        gaussian: has the correlation along z, in each kind of place.
        alpha, sigma: [T].
        known: x_K [k, C, h, w].
        z: int64 [k], their slice indices, all different.
    """
    weights = weights_of_known(gaussian.correlation, z)[gaussian.kind]  # [C, h, w, Z, k]

    def completed(x: Tensor, t: int) -> tuple[Tensor, Tensor]:
        x0, noise = denoise(x, t)
        more = torch.einsum("chwak,kchw->achw", weights, known - x0[z])
        return x0 + more, noise - (alpha[t] / sigma[t]).float() * more

    return completed
