"""Laws of calibration.py: bands of frequency, and samples of wrong denoisers."""

import pytest
import torch
from torch import Tensor, nn

from model_diffusion import RECIPES, LatentDiffusion, guide, sample_dpm, sampling_times
from parts.calibration import BANDS, LEVELS, Calibration

SHAPE = (2, 8, 9)
ALL_Z = torch.arange(32)


@pytest.fixture(scope="module")
def wanted() -> Tensor:
    """[2, BANDS]: power of invented brains, more of it where things change slowly."""
    return torch.linspace(3, 0.2, BANDS).expand(2, -1).clone()


class LinearUNet(nn.Module):
    """Its output means the guess factor alpha P / (alpha^2 P + sigma^2) x_t; for factor 1 it is exact."""

    def __init__(self, model: LatentDiffusion, power: Tensor, factor: Tensor):
        super().__init__()
        self.levels, self.calibration, self.minus_mean = (model.alpha, model.sigma), model.calibration, model.minus_mean
        self.power, self.factor = power, factor

    def forward(self, seen, guess, t, *more) -> Tensor:
        alpha, sigma = (level[t[0]].float() for level in self.levels)
        share = self.factor * alpha * self.power / (alpha**2 * self.power + sigma**2)
        z = ALL_Z.repeat(len(seen) // 32)
        coefficients = self.calibration.transform(seen.unflatten(0, (-1, 32)))  # x_t - alpha mean, since that has sd 1
        x0 = self.calibration.back(share[:, self.calibration.band].transpose(0, 1) * coefficients).flatten(0, 1)
        x0 = x0 - self.minus_mean(torch.zeros_like(seen), 1, z).flatten(0, 1)
        return (x0 - guess) / sigma  # which is the sd of the prior, whose variance is 1


def linear_model(wanted: Tensor, factor: Tensor, recipe: str = "v") -> LatentDiffusion:
    """A model of brains whose coefficients are independent, with the power wanted; the mean is not 0."""
    model = LatentDiffusion(latent_shape=SHAPE, widths=(8,), blocks=1, recipe=recipe).eval()
    model.gaussian.correlation.copy_(torch.eye(32).expand(8, -1, -1))
    model.gaussian.mean.copy_(torch.randn(model.gaussian.mean.shape, generator=torch.Generator().manual_seed(5)))
    model.unet = LinearUNet(model, wanted, factor)
    model.calibration.power.copy_(wanted)
    return model


@torch.no_grad()
def sample(model: LatentDiffusion, brains: int, seed: int, guidance: float = 1, measure: bool = False) -> Tensor:
    """Latents [32 n, C, h, w] by dpm in LEVELS steps; with `measure`, each step measures the calibration before it."""
    z = ALL_Z.repeat(brains)
    alphas, sigmas = model.alpha, model.sigma
    times = sampling_times(alphas, sigmas, LEVELS)

    def denoise(x: Tensor, t: int) -> tuple[Tensor, Tensor]:
        x0, noise = model.denoise(x, t, z, 32)
        if measure:
            alpha = alphas[t].float()
            deviations = model.minus_mean(x, alpha, z), model.minus_mean(x0, 1, z)
            model.calibration.measure(times.index(t), alpha, *deviations)
        return x0, noise

    if measure:
        model.calibration.reset((sigmas / alphas)[times].log())
    guided = denoise if guidance == 1 else guide(denoise, denoise, guidance)
    noise = torch.randn(len(z), *SHAPE, generator=torch.Generator().manual_seed(seed))
    *_, x0 = sample_dpm(model.calibrated(guided, z), noise, alphas, sigmas, LEVELS)
    return x0


def power_of_samples(model: LatentDiffusion, brains: int = 12, **how) -> Tensor:
    latents = sample(model, brains, seed=0, **how)
    coefficients = model.calibration.transform(model.minus_mean(latents, 1, ALL_Z.repeat(brains)))
    return model.calibration.mean_product(coefficients, coefficients)


@pytest.mark.parametrize("slices", [20, 32, 48])
def test_bands_divide_an_orthonormal_transform(slices):
    """By frequency, not by number: brains of more slices, or of fewer, have the same bands."""
    calibration = Calibration(SHAPE, slices)
    brains = torch.randn(3, slices, *SHAPE, generator=torch.Generator().manual_seed(0))
    coefficients = calibration.transform(brains)
    assert torch.allclose(calibration.back(coefficients), brains, atol=1e-4)
    assert torch.allclose(coefficients.square().sum(), brains.square().sum(), rtol=1e-4)
    count = calibration.band_size
    assert len(count) == BANDS and count.sum() == slices * 8 * 9 and calibration.band.max() == BANDS - 1
    total = (calibration.mean_product(coefficients, coefficients) * count).sum()
    assert torch.allclose(total, brains.square().sum() / 3, rtol=1e-4)
    slowly = torch.ones(1, slices, *SHAPE)
    fast = (-1.0) ** torch.arange(slices).view(1, slices, 1, 1, 1) * torch.ones(1, 1, *SHAPE)
    for brain, band in ((slowly, 0), (fast, 5 * 6)):  # the last band along z begins at 5 x 6
        power = calibration.mean_product(calibration.transform(brain), calibration.transform(brain))
        assert power.argmax(1).tolist() == [band, band]


def test_an_exact_denoiser_is_changed_by_chance_alone(wanted):
    """Law (1): E[guess x_t] is alpha E[x_0^2]."""
    model = linear_model(wanted, torch.ones_like(wanted))
    before = power_of_samples(model) / wanted
    assert not model.calibration.measured
    sample(model, 64, seed=1, measure=True)
    after = power_of_samples(model) / wanted
    assert model.calibration.measured and (after.log() - before.log()).abs().max() < 0.3
    ratio = model.calibration.levels.exp()[:, None, None]
    alpha = (1 + ratio**2).rsqrt()
    by_itself = alpha * wanted / (alpha**2 * wanted + 1 - alpha**2)  # the guess is so many times x_t
    assert ((model.calibration.weight / by_itself).abs()[ratio.flatten() < 3] < 0.2).all()


@pytest.mark.parametrize("wrong, recipe", [(1.1, "v"), *((0.8, recipe) for recipe in RECIPES if recipe != "min-snr")])
def test_samples_of_a_wrong_denoiser_have_the_power_of_training(wanted, wrong, recipe):
    factor = torch.ones_like(wanted)
    factor[:, 1::2] = wrong  # every other band
    model = linear_model(wanted, factor, recipe)
    before = power_of_samples(model) / wanted
    sample(model, 32, seed=1, measure=True)
    after = power_of_samples(model) / wanted
    assert model.calibration.weight.isfinite().all()
    assert (after.log().abs() < before.log().abs())[:, 1::2].all()
    assert before[:, 1::2].mean().log().abs() > 0.3  # a fifth too little at each step is far more in the end
    assert after[:, 1::2].mean().log().abs() < 0.06 and after[:, ::2].mean().log().abs() < 0.06


def test_guidance_does_not_multiply_it(wanted):
    """Away from itself, any weight gives the samples of weight 1: this network knows nothing of z or people."""
    model = linear_model(wanted, torch.full_like(wanted, 0.8))
    sample(model, 16, seed=1, measure=True)
    plain, guided = (power_of_samples(model, 3, guidance=weight) for weight in (1, 3))
    assert torch.allclose(plain, guided, rtol=1e-3)


def test_guess_and_noise_stay_parts_of_x(wanted):
    model = linear_model(wanted, torch.ones_like(wanted))
    sample(model, 4, seed=1, measure=True)
    x = torch.randn(32, *SHAPE, generator=torch.Generator().manual_seed(1))
    denoise = model.calibrated(lambda x, t: model.denoise(x, t, ALL_Z), ALL_Z)
    for t in (30, 500, 900):
        x0, noise = denoise(x, t)
        assert not torch.allclose(x0, model.denoise(x, t, ALL_Z)[0], atol=1e-3)
        assert torch.allclose(model.alpha[t].float() * x0 + model.sigma[t].float() * noise, x, atol=1e-4)


def test_weights_are_interpolated_between_levels():
    calibration = Calibration(SHAPE, 32)
    calibration.weight.fill_(1)
    calibration.reset(torch.linspace(5, -5, LEVELS))
    assert not calibration.measured
    calibration.weight.copy_(torch.arange(LEVELS).view(-1, 1, 1).expand_as(calibration.weight))
    levels = calibration.levels
    for level, number in ((levels[3], 3), ((levels[3] + levels[4]) / 2, 3.5), (torch.tensor(9.0), 0),
                          (torch.tensor(-9.0), LEVELS - 1), (levels[0], 0), (levels[-1], LEVELS - 1)):  # fmt: skip
        assert torch.allclose(calibration.weight_at(level), torch.tensor(float(number)), atol=1e-5)


def test_power_is_that_of_differences_between_training_brains():
    """Their variance, without bias: n - 1 of n brains are independent of the mean."""
    calibration = Calibration(SHAPE, 32)
    brains = 2 * torch.randn(11, 32, *SHAPE, generator=torch.Generator().manual_seed(0)) + 5
    calibration.measure_power(brains - brains.mean(0))
    weight = calibration.band_size / calibration.band_size.sum()
    assert (calibration.power @ weight).tolist() == pytest.approx([4, 4], rel=0.05)
