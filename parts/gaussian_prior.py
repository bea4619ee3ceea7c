"""The Gaussian prior of brains: mean and variance of every latent number, correlation along z, and the modes in which
heads differ.

Where x_t is nearly all noise, the best denoiser is the linear one of the Gaussian with the data's mean and covariance
(Wang and Vastola 2024, "The unreasonable effectiveness of Gaussian score approximation"). The network begins there, and
learns what is left. The modes weigh every number of a brain at once, which convolutions learn slowly: a network that
has to find out by itself how large a head is, or its ventricles, guesses too near to the mean, and its samples are too
much alike. The variances say where heads differ at all: background, which is the same in all, needs no learning.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import util
from module import cosines

# Heads differ in size or in their ventricles, and such differences change slowly along z: so many cosines over the
# slices hold them. One more cosine would add more noise, of 200 people, than differences that they have in common.
COSINES = 4
KINDS = 8  # of place, between those where heads differ for a slice or two and those where they differ for twenty


def moments_at_each_z(latents: Tensor, z: Tensor, slices_per_brain: int) -> tuple[Tensor, Tensor]:
    """Mean and variance [slices_per_brain, C, h, w] of the latents [N, C, h, w] at every z int64 [N].

    Where there is no slice the mean is 0; where there are fewer than two the variance is 1.
    """

    def total(values: Tensor) -> Tensor:
        return values.new_zeros(slices_per_brain, *values.shape[1:]).index_add_(0, z, values)

    count = z.bincount(minlength=slices_per_brain).view(-1, 1, 1, 1)
    mean = total(latents) / count.clamp(min=1)
    variance = total((latents - mean[z]).square()) / (count - 1).clamp(min=1)
    return mean, torch.where(count > 1, variance, 1.0)


def kinds_of_place(latents: Tensor, count: int) -> Tensor:
    """Sorts places of n brains [n, Z, C, h, w] into `count` kinds, int64 [C, h, w], by how slowly heads change there.

    Differences between heads go on for many slices at skull and scalp, and for few in the cortex. How slowly is the
    share of a place's variance that the first COSINES cosines along z hold. All kinds have the same share of all
    variance.
    """
    difference = latents - latents.mean(0)
    variance = difference.square().sum((0, 1)).flatten()
    slow = torch.einsum("qa,nachw->nqchw", cosines(COSINES, latents.shape[1]).to(latents), difference)
    order = (slow.square().sum((0, 1)).flatten() / variance.clamp(min=1e-12)).argsort()
    before = variance[order].double().cpu().cumsum(0).to(variance.device) - variance[order]  # a GPU sums in any order
    kind = torch.empty_like(order)
    kind[order] = (before / variance.double().sum().clamp(min=1e-12) * count).long().clamp(max=count - 1)
    return kind.view(latents.shape[2:])


def slice_correlation(latents: Tensor, kind: Tensor, count: int) -> Tensor:
    """Correlation [count, Z, Z] between the Z slices of a brain in each kind of place [C, h, w].

    Correlated are the differences between a brain and the mean of all brains at the same place, over the n >= 2 brains
    and the places, of latents [n, Z, C, h, w].
    """
    difference = (latents - latents.mean(0)).flatten(2)
    products = torch.einsum("nam,nbm->mab", difference, difference)
    total = products.new_zeros(count, *products.shape[1:]).index_add_(0, kind.flatten(), products)
    sd = total.diagonal(dim1=1, dim2=2).sqrt().clamp(min=1e-6)
    correlation = total / (sd[:, :, None] * sd[:, None, :])
    correlation.diagonal(dim1=1, dim2=2).fill_(1)  # also where nothing differs
    return correlation


def _powers(covariance: Tensor, *exponents: float) -> list[Tensor]:
    """Powers [kinds, q, q] of symmetric matrices; eigenvalues below a thousandth of the largest count as that."""
    value, vector = torch.linalg.eigh(covariance.double())
    value = value.clamp(min=1e-3 * value[:, -1:])
    return [((vector * value[:, None] ** power) @ vector.mT).to(covariance.dtype) for power in exponents]


def principal_modes(latents: Tensor, correlation: Tensor, kind: Tensor, count: int) -> tuple[Tensor, float]:
    """(modes [count, q, C, h, w], rest): n brains [n, Z, C, h, w] as the mean of all + sum_k c_k modes_k + noise.

    The c_k are N(0, 1) and independent. The noise has variance `rest` and, in each kind of
    place [C, h, w], its correlation along z [kinds, Z, Z]. Both are described by their first q = COSINES cosines along
    z.

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
    white = torch.einsum("chwpq,nqchw->npchw", whiten[kind], difference).flatten(1)
    n, dim = white.shape
    variance, vector = torch.linalg.eigh((white @ white.T / n).double())
    variance, vector = variance.flip(0)[:count].to(white), vector.flip(1)[:, :count].to(white)
    noise = (white.square().sum() / n - variance.sum()).clamp(min=0)  # variance of all numbers, outside the components
    excess = (variance - noise / n).clamp(min=0)
    axes = (white.T @ vector).T / (variance * n).clamp(min=1e-12).sqrt()[:, None] * excess.sqrt()[:, None]
    modes = torch.einsum("chwpq,kqchw->kpchw", colour[kind], axes.view(count, *difference.shape[1:]))
    return modes, float(noise / dim)


class Noisy(NamedTuple):
    """x_t = alpha x_0 + sigma noise of slices, and what is known of these.

    Every `slices` of the batch are of one brain. Where these are not all its Z slices, from 0 on, the prior's g is the
    mean unless `products` are given; so it is where z is NaN.

    x: [B, C, h, w].
    alpha, sigma: [B, 1, 1, 1].
    z: [B], NaN where it is not known.
    people: [B, conditions], the same for all slices of a brain, NaN where a number is not known; None: nothing is.
    products: [n, K], <q_k, whitened (x_t - alpha mean)> of the n whole brains.
    """

    x: Tensor
    alpha: Tensor
    sigma: Tensor
    z: Tensor
    slices: int
    people: Tensor | None = None
    products: Tensor | None = None


class GaussianPrior(nn.Module):
    """What is known of x_0 given x_t = alpha x_0 + sigma noise, for brains as `principal_modes` describes them.

    The noise of x_t has the same correlation along z as that of the brains. With q_k the modes after whitening, which
    are orthogonal,

        E[c_k | x_t] = (n m_k + alpha v_k <q_k, whitened (x_t - alpha mean)>) / (n + alpha^2 v_k |q_k|^2)         (1)

    where n = alpha^2 rest + sigma^2, and c_k is N(m_k, v_k) before x_t is known: N(0, 1), or a closer guess from the
    age, sex and CDR of the person. All else in which a brain differs from g = mean + sum_k E[c_k | x_t] modes_k is
    taken as independent from place to place, with variance v at each:

        Var[x_t | g] = alpha^2 v + sigma^2
        E[x_0 | x_t] = g + alpha v / Var[x_t | g] (x_t - alpha g)                                                 (2)
        Var[x_0 | x_t] = sigma^2 v / Var[x_t | g]

    Args:
        latent_shape: (C, h, w).
        modes: how many; 0 for mean and variance alone.
        slices_per_brain: Z.
        conditions: how many numbers are known of a person.
        kinds: of place, which differ in their correlation along z.
    """

    def __init__(
        self,
        latent_shape: tuple[int, int, int],
        modes: int,
        slices_per_brain: int,
        conditions: int = 0,
        kinds: int = KINDS,
    ):
        super().__init__()
        C, h, w = latent_shape
        self.register_buffer("mean", torch.zeros(slices_per_brain, *latent_shape))
        self.register_buffer("variance", torch.ones(slices_per_brain, *latent_shape))  # of what the modes leave
        self.register_buffer("modes", torch.zeros(modes, COSINES * C, h, w))  # flat: networks go to channels_last
        self.register_buffer("rest", torch.ones(()))  # variance of the noise
        self.register_buffer("kind", (torch.arange(C) % kinds)[:, None, None].repeat(1, h, w))
        # until it is measured, all slices of a brain have the same noise
        self.register_buffer("correlation", torch.ones(kinds, slices_per_brain, slices_per_brain))
        self.register_buffer("people_mean", torch.zeros(conditions))
        self.register_buffer("people_sd", torch.ones(conditions))
        self.register_buffer("effect", torch.zeros(modes, 2 * conditions))
        self.register_buffer("left", torch.ones(modes))  # variance of c_k that people do not explain
        self.register_buffer("cosines", cosines(COSINES, slices_per_brain), persistent=False)

    def fit_correlation(self, latents: Tensor) -> None:
        """Learns from n >= 2 brains [n, Z, C, h, w] how neighbouring slices correlate, in each kind of place."""
        self.kind.copy_(kinds_of_place(latents, len(self.correlation)))
        self.correlation.copy_(slice_correlation(latents, self.kind, len(self.correlation)))

    def fit(self, latents: Tensor, people: Tensor) -> None:
        """Learns mean, modes, variance and the effect of people [n, conditions] from n brains [n, Z, C, h, w].

        Their correlation is known before.
        """
        self.mean.copy_(latents.mean(0))
        self.set_modes(*principal_modes(latents, self.correlation, self.kind, len(self.modes)))
        self.set_people(latents, people)
        z, n = torch.arange(len(self.mean), device=latents.device), len(latents)
        one, none = (latents.new_full((len(z), 1, 1, 1), level) for level in (1.0, 0.0))
        left = sum((brain - self.of_modes(Noisy(brain, one, none, z, len(z)))).square() for brain in latents)
        self.variance.copy_(left / (n - 1 - len(self.modes)))

    def set_modes(self, modes: Tensor, rest: float) -> None:
        """Takes the modes and the variance that principal_modes found."""
        self.modes.copy_(modes.flatten(1, 2))
        self.rest.fill_(rest)

    def set_people(self, latents: Tensor, people: Tensor) -> None:
        """Learns how people [n, conditions], NaN where not known, move the modes of their latents [n, Z, C, h, w].

        By ridge regression of c_k on each number and its square; a number that is not known has no effect.
        """
        known = people[~people.isnan().all(1)]
        if not len(self.modes) or not len(known):
            return
        self.people_mean.copy_(known.nanmean(0).nan_to_num())
        self.people_sd.copy_((known - self.people_mean).square().nanmean(0).sqrt().nan_to_num(nan=1).clamp(min=1e-6))
        _, _, power = self._modes()
        products = self.project(latents)
        features = self._features(people)
        gram = features.T @ features + 0.01 * len(features) * torch.eye(features.shape[1]).to(features)
        self.effect.copy_(torch.linalg.solve(gram, features.T @ (products / power)).T)
        self.left.copy_((1 - (features @ self.effect.T).square().mean(0)).clamp(min=0.1))

    def _features(self, people: Tensor) -> Tensor:
        """[n, 2 conditions]: each number of people [n, conditions] in sd, and its square - 1; 0 if not known."""
        number = (people - self.people_mean) / self.people_sd
        return torch.cat([number, number.square() - 1], dim=1).nan_to_num()

    def _modes(self) -> tuple[Tensor, Tensor, Tensor]:
        """(modes, duals) [K, q, C, h, w], where <dual_k, x> = <q_k, whitened x>, and |q_k|^2 [K]."""
        modes = self.modes.unflatten(1, (COSINES, -1))
        (precision,) = _powers(self.cosines @ self.correlation @ self.cosines.T, -1)
        dual = torch.einsum("chwpq,kqchw->kpchw", precision[self.kind], modes)
        return modes, dual, (dual * modes).flatten(1).sum(1)

    def mean_at(self, z: Tensor) -> Tensor:
        """Mean training latents [B, C, h, w] at z [B]; where z is NaN, the mean over all z."""
        return _at(z, self.mean, self.mean.mean(0))

    def correlate(self, white: Tensor, z: Tensor, slices: int) -> Tensor:
        """Noise float32 [B, C, h, w] of unit variance, made of white noise of that shape.

        Every `slices` of the batch are of one brain, at z int64 [B], and correlated as at their place. A slice by
        itself keeps its white noise.
        """
        if slices == 1:
            return white
        z = z.view(-1, slices)
        value, vector = torch.linalg.eigh(self.correlation.double()[:, z[:, :, None], z[:, None, :]])
        root = ((vector * value.clamp(min=0).sqrt()[..., None, :]) @ vector.mT).float()  # [kinds, n, slices, slices]
        with torch.autocast(white.device.type, enabled=False):
            of_kinds = torch.einsum("knab,nbm->knam", root, white.unflatten(0, (-1, slices)).flatten(2))
        return of_kinds.take_along_dim(self.kind.view(1, 1, 1, -1), 0)[0].view(white.shape)

    def project(self, brains: Tensor) -> Tensor:
        """[n, K]: <q_k, whitened (x - mean)> of whole brains x [n, Z, C, h, w]."""
        _, dual, _ = self._modes()
        return torch.einsum("qa,nachw,kqchw->nk", self.cosines, brains - self.mean, dual)

    def project_noise(self, noise: Tensor, z: Tensor) -> Tensor:
        """[n, K]: <q_k, whitened noise> of the noise of n whole brains, of which only some slices are there.

        It is drawn given these, noise [n, S, C, h, w] at z int64 [n, S]: slices in the window have their say, and the
        others the variance that is left. So training on windows, and not on whole brains, shows the network the same
        guesses.
        """
        _, dual, _ = self._modes()
        K, P = self.correlation.double(), self.cosines.double()
        seen = (P @ K)[..., z].movedim(1, 2)  # [kinds, n, q, S], covariance of cosines and slices
        within = K[:, z[:, :, None], z[:, None, :]] + 1e-6 * torch.eye(z.shape[1], dtype=K.dtype, device=K.device)
        weight = torch.linalg.solve(within, seen.mT).mT
        left = ((P @ K @ P.T)[:, None] - weight @ seen.mT).to(dual)  # [kinds, n, q, q]
        of_kind = F.one_hot(self.kind.flatten(), len(K)).to(dual)
        overlap = torch.einsum("mi,kqm,lpm->iklqp", of_kind, dual.flatten(2), dual.flatten(2))
        value, vector = torch.linalg.eigh(torch.einsum("inqp,iklqp->nkl", left, overlap).double())
        root = (vector * value.clamp(min=0).sqrt()[:, None]).to(dual)
        white = util.draw_together(torch.randn_like, dual.new_empty(len(z), len(dual)))
        drawn = torch.einsum("nkl,nl->nk", root, white)
        return drawn + torch.einsum("chwnqa,nachw,kqchw->nk", weight.to(dual)[self.kind], noise, dual)

    def of_modes(self, given: Noisy) -> Tensor:
        """g [B, C, h, w] of (1)."""
        x, alpha, sigma, z, slices, people, products = given
        guess = self.mean_at(z)
        if not len(self.modes) or (products is None and slices != len(self.mean)):
            return guess
        modes, dual, power = self._modes()
        if products is None:
            difference = (x - alpha * guess).unflatten(0, (-1, slices))
            products = torch.einsum("qa,nachw,kqchw->nk", self.cosines, difference, dual)
        alpha, sigma = (level[::slices].flatten(1) for level in (alpha, sigma))
        expected, variance = torch.zeros_like(products), torch.ones_like(products)
        if people is not None:
            someone = ~people[::slices].isnan().all(1, keepdim=True)
            expected = self._features(people[::slices]) @ self.effect.T
            variance = torch.where(someone, self.left, variance)
        noise = alpha**2 * self.rest + sigma**2
        c = (noise * expected + alpha * variance * products) / (noise + alpha**2 * variance * power)
        c = c.masked_fill(z[::slices, None].isnan(), 0)
        along = self.cosines[:, z.nan_to_num().long()].unflatten(1, (-1, slices))
        return guess + torch.einsum("qna,nk,kqchw->nachw", along, c, modes).flatten(0, 1)

    def forward(self, given: Noisy) -> tuple[Tensor, Tensor, Tensor]:
        """(mean, sd) of x_0, and x_t - alpha g in units of its sd, [B, C, h, w] each."""
        with torch.autocast(given.x.device.type, enabled=False):
            given = given._replace(x=given.x.float())
            x, alpha, sigma, z, *_ = given
            g = self.of_modes(given)
            v = _at(z, self.variance, self.variance.mean(0) + self.mean.var(0, correction=0))
            away, total = x - alpha * g, alpha**2 * v + sigma**2
            return g + alpha * v / total * away, sigma * (v / total).sqrt(), away / total.sqrt()


def _at(z: Tensor, known: Tensor, anywhere: Tensor) -> Tensor:
    """known[z] [B, ...] of known [Z, ...] and z [B]; `anywhere` [...] where z is NaN."""
    return torch.cat([known, anywhere[None]])[z.nan_to_num(nan=len(known)).long()]
