"""Laws of gaussian_prior.py: brute-force Gaussian conditioning, and brains made as it says that they are."""

import pytest
import torch

from module import cosines
from parts.gaussian_prior import (
    COSINES,
    GaussianPrior,
    Noisy,
    kinds_of_place,
    moments_at_each_z,
    principal_modes,
    slice_correlation,
)


def fading(slices: int, *rho: float) -> torch.Tensor:
    """Correlation [C, slices, slices] that is rho^|z - z'| in each channel."""
    z = torch.arange(slices)
    return torch.stack([r ** (z[:, None] - z).abs().float() for r in rho])


def channels(shape: tuple[int, int, int]) -> torch.Tensor:
    """Kinds of place [C, h, w]: every channel is one."""
    return torch.arange(shape[0])[:, None, None].expand(shape)


def prior_with(K: torch.Tensor, shape: tuple[int, int, int], modes: int, **more) -> GaussianPrior:
    """Untrained; every channel is a kind of place, with correlation K [C, Z, Z]."""
    prior = GaussianPrior(shape, modes, K.shape[1], kinds=len(K), **more)
    prior.correlation.copy_(K)
    return prior


def draw(count: int, modes: torch.Tensor, mean: torch.Tensor, K: torch.Tensor, rest: float, seed: int = 0):
    """Brains [count, Z, C, h, w] as principal_modes has them, of modes [k, q, C, h, w]."""
    generator = torch.Generator().manual_seed(seed)
    c = torch.randn(count, len(modes), generator=generator)
    white = torch.randn(count, *mean.shape, generator=generator)
    noise = torch.einsum("cab,nbchw->nachw", torch.linalg.cholesky(K), white)
    return mean + torch.einsum("qa,nk,kqchw->nachw", cosines(COSINES, len(mean)), c, modes) + rest**0.5 * noise


def test_the_correlation_of_slices_is_measured_about_the_mean_of_all_brains_in_each_kind_of_place():
    """Whatever the anatomy that all share, and whatever the spread at each z."""
    K, generator = fading(32, 0.8, 0.3), torch.Generator().manual_seed(0)
    kind = torch.randint(0, 2, (2, 6, 7), generator=generator)
    root = torch.linalg.cholesky(K)[kind]
    own = torch.einsum("chwab,nbchw->nachw", root, torch.randn(200, 32, 2, 6, 7, generator=generator))
    common = 5 * torch.randn(32, 2, 6, 7, generator=generator)
    spread = 0.1 + torch.rand(32, 1, 1, 1, generator=generator)
    measured = slice_correlation(common + spread * own, kind, 2)
    assert torch.allclose(measured, K, atol=0.06) and torch.allclose(measured[:, range(32), range(32)], torch.ones(()))
    assert torch.equal(slice_correlation(torch.zeros(2, 32, 2, 6, 7), kind, 2)[0], torch.eye(32))  # two equal brains


def test_places_are_sorted_by_how_slowly_heads_change_there():
    """Found again, however much heads differ at a place; the kinds have equal shares of all that differs."""
    generator = torch.Generator().manual_seed(0)
    rho = torch.tensor([0.1, 0.6, 0.95])[torch.randint(0, 3, (2, 6, 7), generator=generator)]
    root = torch.linalg.cholesky(torch.stack([fading(32, r)[0] for r in rho.flatten().tolist()])).view(2, 6, 7, 32, 32)
    own = torch.einsum("chwab,nbchw->nachw", root, torch.randn(60, 32, 2, 6, 7, generator=generator))
    sizes = torch.rand(2, 6, 7, generator=generator) + 0.5
    kind = kinds_of_place(own * sizes, 6)
    means = [rho[kind == k].mean().item() for k in range(6)]
    assert means == sorted(means) and means[0] == pytest.approx(0.1) and means[-1] == pytest.approx(0.95)
    shares = torch.stack([(own * sizes)[:, :, kind == k].square().sum() for k in range(6)])
    assert (shares / shares.sum() * 6 - 1).abs().max() < 0.25
    assert (kinds_of_place(torch.zeros(3, 32, 2, 6, 7), 6) < 6).all()


def test_the_moments_are_those_of_all_slices_at_each_z():
    """Of whole brains or not; mean 0 and variance 1 where there is no slice, variance 1 where there is one."""
    latents, z = torch.randn(51, 2, 3, 4), torch.cat([torch.randint(0, 7, (50,)), torch.tensor([8])])
    mean, variance = moments_at_each_z(latents, z, 9)
    assert all(torch.allclose(mean[k], latents[z == k].mean(0), atol=1e-5) for k in range(7))
    assert all(torch.allclose(variance[k], latents[z == k].var(0), atol=1e-5) for k in range(7))
    assert (mean[7] == 0).all() and torch.equal(mean[8], latents[50]) and (variance[7:] == 1).all()


def test_places_have_a_variance_of_their_own():
    """Of what the modes leave, at each place; mean and sd of x_0 are those of a Gaussian there."""
    torch.manual_seed(0)
    Z, shape = 8, (2, 4, 5)
    spread, K, mean = torch.rand(Z, *shape) + 0.1, fading(Z, 0.8, 0.5), torch.randn(Z, *shape)
    brains = mean + spread * torch.randn(2000, Z, *shape)
    prior = prior_with(K, shape, 0)
    prior.fit(brains, torch.empty(2000, 0))
    assert torch.allclose(prior.variance.sqrt(), spread, rtol=0.12)
    x, z, level = torch.randn(Z, *shape), torch.arange(Z), torch.full((Z, 1, 1, 1), 0.5**0.5)
    guess, sd, seen = prior(Noisy(x, level, level, z, Z))
    v = prior.variance
    assert torch.allclose(seen, (x / level - prior.mean) / (v + 1).sqrt(), atol=1e-5)
    assert torch.allclose(guess, prior.mean + v / (v + 1) * (x / level - prior.mean), atol=1e-5)
    assert torch.allclose(sd, (v / (v + 1)).sqrt(), atol=1e-5)
    nowhere = prior(Noisy(x, level, level, torch.full((Z,), torch.nan), Z))[1]  # any slice of any brain
    total = brains.flatten(0, 1).var(0)
    assert torch.allclose(nowhere[0], (total / (total + 1)).sqrt(), rtol=0.02)


def test_the_guess_is_the_posterior_mean_of_the_gaussian():
    """By brute force over the cosines it reads: cov(x_0 part, seen) cov(seen)^-1 (seen - its mean), at any noise."""
    torch.manual_seed(0)
    Z, C, h, w, rest = 9, 2, 2, 3, 0.4
    K, P = fading(Z, 0.9, 0.6), cosines(COSINES, Z)
    mean, brains = torch.randn(Z, C, h, w), torch.randn(30, Z, C, h, w)
    modes, _ = principal_modes(
        brains, K, channels((C, h, w)), 3
    )  # orthogonal after whitening, as the formula wants them
    modes = 5 * modes
    prior = prior_with(K, (C, h, w), 3)
    prior.mean.copy_(mean)
    prior.set_modes(modes, rest)
    for alpha, sigma in ((0.05, 0.99875), (0.6, 0.8), (0.99, 0.141)):
        x = torch.randn(2 * Z, C, h, w)
        levels = (torch.full((2 * Z, 1, 1, 1), level) for level in (alpha, sigma))
        guess = prior.of_modes(Noisy(x, *levels, torch.arange(Z).repeat(2), Z)).view(2, Z, C, h, w)
        A = modes.flatten(1).T.double()
        within = torch.einsum("qa,cab,pb->cqp", P, K, P).double()
        noise = torch.einsum("cqp,cd,xy->qcxpdy", within, torch.eye(C).double(), torch.eye(h * w).double())
        noise = noise.reshape(COSINES * C * h * w, -1)
        covariance = alpha**2 * (A @ A.T + rest * noise) + sigma**2 * noise
        seen = torch.einsum("qa,nachw->nqchw", P, x.view(2, Z, C, h, w) - alpha * mean).flatten(1).double()
        part = (alpha * A @ A.T @ torch.linalg.solve(covariance, seen.T)).T.view(2, COSINES, C, h, w).float()
        expected = mean + torch.einsum("qa,nqchw->nachw", P, part)
        assert torch.allclose(guess, expected, atol=1e-3)
        assert (guess - mean).abs().max() > 0.01


def test_noise_of_a_window_tells_of_the_whole_brains_as_far_as_it_goes():
    """Drawn projections of noise, given some slices of it, are distributed as those of noise of whole brains."""
    torch.manual_seed(0)
    Z, shape, n = 12, (2, 3, 4), 4000
    K = fading(Z, 0.9, 0.6)
    prior = prior_with(K, shape, 2)
    prior.set_modes(*principal_modes(torch.randn(30, Z, *shape), K, prior.kind, 2))
    noise = draw(n, torch.zeros(1, COSINES, *shape), torch.zeros(Z, *shape), K, 1.0)
    true = prior.project(noise)
    everything = prior.project_noise(noise, torch.arange(Z).expand(n, -1))
    assert torch.allclose(everything, true, atol=0.02 * float(true.std()))  # nothing is left to draw
    for first, S in ((0, 4), (7, 4), (11, 1)):
        window, z = noise[:, first : first + S], torch.arange(first, first + S).expand(n, -1)
        drawn = prior.project_noise(window, z)
        numbers = torch.randn(window[0].numel(), 3)  # any three linear parts of the window
        seen = window.flatten(1) @ numbers
        both = [torch.cat([part, seen / seen.std(0) * true.std()], 1).T.cov() for part in (drawn, true)]
        assert torch.allclose(*both, atol=0.08 * float(both[1].diagonal().max()))


def test_modes_are_found_again():
    """Of brains made of three modes and noise: their span, their strength, and the noise that is left."""
    torch.manual_seed(0)
    Z, shape = 16, (2, 4, 5)
    K, mean = fading(Z, 0.8, 0.5), torch.randn(Z, *shape)
    true = torch.randn(3, COSINES, *shape) * torch.tensor([2.0, 1.4, 1.0]).view(3, 1, 1, 1, 1)
    brains = draw(60, true, mean, K, 0.3)
    modes, rest = principal_modes(brains, K, channels(shape), 3)
    assert modes.shape == true.shape and rest == pytest.approx(0.3, rel=0.1)
    span = torch.linalg.qr(modes.flatten(1).T)[0]
    assert (true.flatten(1) @ span).square().sum() / true.square().sum() > 0.97
    assert modes.square().sum() / true.square().sum() == pytest.approx(1, abs=0.2)
    with pytest.raises(ValueError, match="5 brains.*5 modes"):
        principal_modes(brains[:5], K, channels(shape), 5)


def test_noise_of_few_brains_does_not_make_a_mode_stronger():
    """The first component of 20 brains has the mode's variance, 60, and a 20th of that of 512 numbers of noise."""
    shape, n = (2, 8, 8), 20
    mode = torch.randn(COSINES, *shape)
    mode *= (60 / mode.square().sum()).sqrt()
    c = torch.ones(n) - 2 * (torch.arange(n) % 2)
    brains = torch.einsum("qa,n,qchw->nachw", cosines(COSINES, 16), c, mode) + torch.randn(n, 16, *shape)
    modes, _ = principal_modes(brains, torch.eye(16).expand(2, -1, -1), channels(shape), 1)
    assert modes.square().sum().item() == pytest.approx(62, rel=0.15)


def test_whole_brains_are_denoised_better_than_by_the_mean_or_by_the_noisy_picture():
    """New brains, made as those it learned from; at much noise nearly as the best that there is."""
    torch.manual_seed(0)
    Z, shape = 16, (2, 4, 5)
    K, mean, true = fading(Z, 0.8, 0.5), torch.randn(Z, *shape), 1.5 * torch.randn(3, COSINES, *shape)
    known, new, z = draw(100, true, mean, K, 0.3), draw(50, true, mean, K, 0.3, seed=1), torch.arange(Z).repeat(50)
    prior = GaussianPrior(shape, 3, Z)
    prior.fit_correlation(known)
    prior.fit(known, torch.empty(100, 0))
    x0, noise = new.flatten(0, 1), draw(50, 0 * true, 0 * mean, K, 1.0, seed=2).flatten(0, 1)
    alpha, sigma = torch.full((len(x0), 1, 1, 1), 0.3), torch.full((len(x0), 1, 1, 1), 0.954)
    x = alpha * x0 + sigma * noise
    error = (prior(Noisy(x, alpha, sigma, z, Z))[0] - x0).square().mean()
    assert error < 0.4 * (prior.mean_at(z) - x0).square().mean() and error < 0.4 * (x / alpha - x0).square().mean()


def test_without_a_whole_brain_or_z_the_guess_is_the_mean():
    """At its z, or of all where that is not known; brain by brain."""
    prior = prior_with(fading(8, 0.9, 0.5), (2, 3, 4), 2)
    prior.mean.normal_()
    prior.modes.normal_()
    x, z = torch.randn(16, 2, 3, 4), torch.arange(8.0).repeat(2)
    alpha = sigma = torch.full((16, 1, 1, 1), 0.5**0.5)
    mean = prior.mean.repeat(2, 1, 1, 1)
    assert torch.equal(prior.of_modes(Noisy(x, alpha, sigma, z, 4)), mean)  # windows
    assert torch.equal(prior.of_modes(Noisy(x[:3], alpha[:3], sigma[:3], z[[5, 2, 7]], 1)), prior.mean[[5, 2, 7]])
    whole = prior.of_modes(Noisy(x, alpha, sigma, z, 8))
    assert (whole - mean).abs().mean() > 0.01
    z[:8] = torch.nan
    half = prior.of_modes(Noisy(x, alpha, sigma, z, 8))
    assert torch.equal(half[:8], prior.mean.mean(0).expand(8, -1, -1, -1)) and torch.equal(half[8:], whole[8:])
    flat = GaussianPrior((2, 3, 4), 0, 8)
    assert torch.equal(flat.of_modes(Noisy(x, alpha, sigma, z.nan_to_num(), 8)), torch.zeros_like(x))


def test_people_tell_of_the_modes_what_regression_finds_and_nobody_tells_nothing():
    """Where all is noise the guess is the head of such a person; where little is, what is seen counts."""
    torch.manual_seed(0)
    Z, shape = 8, (2, 4, 5)
    K, mean, true = fading(Z, 0.8, 0.5), torch.randn(Z, *shape), 2 * torch.randn(1, COSINES, *shape)
    age = torch.randint(20, 90, (300,)).float()
    c = 0.9 * (age - 55) / age.std() + 0.4 * torch.randn(300)
    rest = draw(300, 0 * true, mean, K, 0.1)
    brains = rest + torch.einsum("qa,n,qchw->nachw", cosines(COSINES, Z), c, true[0])
    people = torch.stack([age, torch.full((300,), torch.nan)], dim=1)  # of the second nothing is known
    prior = prior_with(K, shape, 1, conditions=2)
    prior.fit(brains, people)
    assert prior.left.item() == pytest.approx(0.16 / 0.97, abs=0.06)

    def guess(x, age, alpha):
        person = None if age is None else torch.tensor([[age, torch.nan]]).expand(Z, -1)
        levels = torch.full((Z, 1, 1, 1), alpha), torch.full((Z, 1, 1, 1), (1 - alpha**2) ** 0.5)
        return prior.of_modes(Noisy(x, *levels, torch.arange(Z), Z, person))

    noise = torch.zeros(Z, *shape)
    old, young, middle = (guess(noise, float(a), 1e-4) for a in (85, 25, 55))
    expected = torch.einsum("qa,qchw->achw", cosines(COSINES, Z), true[0]) * 0.9 * 60 / age.std()
    assert (old - young - expected).square().mean() < 0.1 * expected.square().mean()
    assert (middle - prior.mean).square().mean() < 0.05 * expected.square().mean()
    assert torch.allclose(guess(noise, None, 1e-4), guess(noise, torch.nan, 1e-4), atol=1e-6)
    assert torch.allclose(guess(noise, None, 1e-4), prior.mean, atol=1e-2)
    seen = [guess(0.995 * brains[0], a, 0.995) for a in (25.0, 85.0, None)]
    assert all((a - b).square().mean() < 0.02 * expected.square().mean() for a in seen for b in seen)
