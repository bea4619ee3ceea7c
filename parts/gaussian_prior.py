"""The Gaussian prior of brains: mean latents at each z, correlation along z, and the modes in which heads differ.

Where x_t is nearly all noise, the best denoiser is the linear one of the Gaussian with the data's mean and covariance
(Wang and Vastola 2024, "The unreasonable effectiveness of Gaussian score approximation"). It weighs every number of a
brain at once, which convolutions learn slowly: a network that has to find out by itself how large a head is, or its
ventricles, guesses too near to the mean, and its samples are too much alike.
"""

import torch
from torch import Tensor, nn

from module import cosines

# Heads differ in size or in their ventricles, and such differences change slowly along z: so many cosines over the
# slices hold them. One more cosine would add more noise, of 200 people, than differences that they have in common.
COSINES = 4


def mean_at_each_z(latents: Tensor, z: Tensor, slices_per_brain: int) -> Tensor:
    """Mean [slices_per_brain, C, h, w] of the latents [N, C, h, w] at every z int64 [N], 0 where there is none."""
    total = latents.new_zeros(slices_per_brain, *latents.shape[1:]).index_add_(0, z, latents)
    return total / z.bincount(minlength=slices_per_brain).clamp(min=1).view(-1, 1, 1, 1)


def slice_correlation(latents: Tensor) -> Tensor:
    """Correlation [C, Z, Z] between the Z slices of a brain, of latents [n, Z, C, h, w] of n >= 2 brains.

    Correlated are the differences between a brain and the mean of all brains at the same place, over brains and places.
    """
    difference = latents - latents.mean(0)
    difference = difference / difference.square().mean((0, 3, 4), keepdim=True).sqrt().clamp(min=1e-6)
    correlation = torch.einsum("nachw,nbchw->cab", difference, difference) / difference[:, 0, 0].numel()
    correlation.diagonal(dim1=1, dim2=2).fill_(1)  # also where nothing differs
    return correlation


def _powers(covariance: Tensor, *exponents: float) -> list[Tensor]:
    """Powers [C, q, q] of symmetric matrices; eigenvalues below a thousandth of the largest count as that."""
    value, vector = torch.linalg.eigh(covariance.double())
    value = value.clamp(min=1e-3 * value[:, -1:])
    return [((vector * value[:, None] ** power) @ vector.mT).to(covariance.dtype) for power in exponents]


def principal_modes(latents: Tensor, correlation: Tensor, count: int) -> tuple[Tensor, float]:
    """(modes [count, q, C, h, w], rest): n brains [n, Z, C, h, w] as the mean of all + sum_k c_k modes_k + noise.

    The c_k are N(0, 1) and independent. The noise has variance `rest` and the given correlation along z [C, Z, Z]. Both
    are described by their first q = COSINES cosines over z.

    The modes are the principal components of the brains, found after a transform that makes the noise white. Even
    brains without anything in common would have principal components: by chance each contains 1 / n of the variance of
    all noise. So that much is subtracted from the variance of every component.

    Raises ValueError unless count < n.
    """
    if count >= len(latents):
        raise ValueError(f"{len(latents)} brains have fewer than {count} modes")
    P = cosines(COSINES, latents.shape[1]).to(latents)
    whiten, colour = _powers(P @ correlation @ P.T, -0.5, 0.5)
    difference = torch.einsum("qa,nachw->nqchw", P, latents - latents.mean(0))
    white = torch.einsum("cpq,nqchw->npchw", whiten, difference).flatten(1)
    n, dim = white.shape
    variance, vector = torch.linalg.eigh((white @ white.T / n).double())
    variance, vector = variance.flip(0)[:count].to(white), vector.flip(1)[:, :count].to(white)
    noise = (white.square().sum() / n - variance.sum()).clamp(min=0)  # variance of all numbers, outside the components
    excess = (variance - noise / n).clamp(min=0)
    axes = (white.T @ vector).T / (variance * n).clamp(min=1e-12).sqrt()[:, None] * excess.sqrt()[:, None]
    modes = torch.einsum("cpq,kqchw->kpchw", colour, axes.view(count, *difference.shape[1:]))
    return modes, float(noise / dim)


class GaussianPrior(nn.Module):
    """E[x_0 | x_t] for brains as `principal_modes` describes them, where x_t = alpha x_0 + sigma noise.

    The noise of x_t has the same correlation along z as that of the brains. With q_k the modes after whitening, which
    are orthogonal,

        E[c_k | x_t] = (n m_k + alpha v_k <q_k, whitened (x_t - alpha mean)>) / (n + alpha^2 v_k |q_k|^2)

    where n = alpha^2 rest + sigma^2, and c_k is N(m_k, v_k) before x_t is known: N(0, 1), or a closer guess from the
    age, sex and CDR of the person. The guess at x_0 is mean + sum_k E[c_k | x_t] modes_k; all else in which a brain
    differs from the mean is left to the network.

    Args:
        latent_shape: (C, h, w).
        modes: how many; 0 for the mean alone, as for models of single slices.
        slices_per_brain: Z.
        conditions: how many numbers are known of a person.
    """

    def __init__(self, latent_shape: tuple[int, int, int], modes: int, slices_per_brain: int, conditions: int = 0):
        super().__init__()
        self.register_buffer("mean", torch.zeros(slices_per_brain, *latent_shape))
        C, h, w = latent_shape
        self.register_buffer("modes", torch.zeros(modes, COSINES * C, h, w))  # flat: networks go to channels_last
        self.register_buffer("rest", torch.ones(()))  # variance of the noise
        self.register_buffer("people_mean", torch.zeros(conditions))
        self.register_buffer("people_sd", torch.ones(conditions))
        self.register_buffer("effect", torch.zeros(modes, 2 * conditions))
        self.register_buffer("left", torch.ones(modes))  # variance of c_k that people do not explain
        self.register_buffer("cosines", cosines(COSINES, slices_per_brain), persistent=False)

    def fit(self, latents: Tensor, people: Tensor, correlation: Tensor) -> None:
        """Learns mean, modes and the effect of people [n, conditions] from latents [n, Z, C, h, w] of n brains."""
        self.mean.copy_(latents.mean(0))
        if len(self.modes):
            self.set_modes(*principal_modes(latents, correlation, len(self.modes)))
            self.set_people(latents, people, correlation)

    def set_modes(self, modes: Tensor, rest: float) -> None:
        """Takes the modes and the variance that principal_modes found."""
        self.modes.copy_(modes.flatten(1, 2))
        self.rest.fill_(rest)

    def set_people(self, latents: Tensor, people: Tensor, correlation: Tensor) -> None:
        """Learns how people [n, conditions], NaN where not known, move the modes of their latents [n, Z, C, h, w].

        By ridge regression of c_k on each number and its square; a number that is not known has no effect.
        """
        known = people[~people.isnan().all(1)]
        if not len(self.modes) or not len(known):
            return
        self.people_mean.copy_(known.nanmean(0).nan_to_num())
        self.people_sd.copy_((known - self.people_mean).square().nanmean(0).sqrt().nan_to_num(nan=1).clamp(min=1e-6))
        _, dual, power = self._modes(correlation)
        products = torch.einsum("qa,nachw,kqchw->nk", self.cosines, latents - self.mean, dual)
        features = self._features(people)
        gram = features.T @ features + 0.01 * len(features) * torch.eye(features.shape[1]).to(features)
        self.effect.copy_(torch.linalg.solve(gram, features.T @ (products / power)).T)
        self.left.copy_((1 - (features @ self.effect.T).square().mean(0)).clamp(min=0.1))

    def _features(self, people: Tensor) -> Tensor:
        """[n, 2 conditions]: each number of people [n, conditions] in sd, and its square - 1; 0 if not known."""
        number = (people - self.people_mean) / self.people_sd
        return torch.cat([number, number.square() - 1], dim=1).nan_to_num()

    def _modes(self, correlation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(modes, duals) [K, q, C, h, w], where <dual_k, x> = <q_k, whitened x>, and |q_k|^2 [K]."""
        modes = self.modes.unflatten(1, (COSINES, -1))
        (precision,) = _powers(self.cosines @ correlation @ self.cosines.T, -1)
        dual = torch.einsum("cpq,kqchw->kpchw", precision, modes)
        return modes, dual, (dual * modes).flatten(1).sum(1)

    def mean_at(self, z: Tensor) -> Tensor:
        """Mean training latents [B, C, h, w] at z [B]; where z is NaN, the mean over all z."""
        mean = torch.cat([self.mean, self.mean.mean(0, keepdim=True)])
        return mean[z.nan_to_num(nan=len(self.mean)).long()]

    def forward(
        self,
        x: Tensor,
        alpha: Tensor,
        sigma: Tensor,
        z: Tensor,
        slices: int,
        correlation: Tensor,
        people: Tensor | None = None,
    ) -> Tensor:
        """The guess [B, C, h, w] at x_0, from x_t [B, C, h, w], alpha and sigma [B, 1, 1, 1], and z [B].

        Every `slices` of the batch are of one brain. Where these are not all its Z slices, from 0 on, or where z is
        NaN, the guess is the mean.

        Args:
            correlation: [C, Z, Z], of the noise.
            people: [B, conditions], the same for all slices of a brain, NaN where a number is not known; None if
                nothing is known.
        """
        guess, Z = self.mean_at(z), len(self.mean)
        if not len(self.modes) or slices != Z:
            return guess
        with torch.autocast(x.device.type, enabled=False):
            modes, dual, power = self._modes(correlation)
            difference = (x.float() - alpha * guess).unflatten(0, (-1, Z))
            products = torch.einsum("qa,nachw,kqchw->nk", self.cosines, difference, dual)
            alpha, sigma = (level[::Z].flatten(1) for level in (alpha, sigma))
            expected, variance = torch.zeros_like(products), torch.ones_like(products)
            if people is not None:
                someone = ~people[::Z].isnan().all(1, keepdim=True)
                expected = self._features(people[::Z]) @ self.effect.T
                variance = torch.where(someone, self.left, variance)
            noise = alpha**2 * self.rest + sigma**2
            c = (noise * expected + alpha * variance * products) / (noise + alpha**2 * variance * power)
            c = c.masked_fill(z[::Z, None].isnan(), 0)
            return guess + torch.einsum("qa,nk,kqchw->nachw", self.cosines, c, modes).flatten(0, 1)
