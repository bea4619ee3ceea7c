"""Laws of calibration.py, and of the calibration that ends a training of latent diffusion."""

import copy

import pytest
import torch
from torch import Tensor, nn

import stable_diffusion
from model_diffusion import SCHEDULES, LatentDiffusion
from parts.calibration import BANDS, LEVELS, Calibration
from stable_diffusion import calibrate, sample_latents

SHAPE = (2, 8, 9)
ALL_Z = torch.arange(32)


@pytest.fixture(scope="module")
def wanted() -> Tensor:
    """[2, BANDS]: power of invented brains, more of it where things change slowly."""
    return torch.linspace(3, 0.2, BANDS).expand(2, -1).clone()


class LinearUNet(nn.Module):
    """Says v, or the noise, of the guess factor alpha P / (alpha^2 P + sigma^2) x_t; for factor 1 it is exact."""

    def __init__(self, model: LatentDiffusion, power: Tensor, factor: Tensor):
        super().__init__()
        self.levels, self.calibration, self.less_mean = (model.alpha, model.sigma), model.calibration, model.less_mean
        self.power, self.factor, self.prediction = power, factor, model.prediction

    def forward(self, x, guess, t, *rest) -> Tensor:
        alpha, sigma = (level[t[0]].float() for level in self.levels)
        share = self.factor * alpha * self.power / (alpha**2 * self.power + sigma**2)
        z = ALL_Z.repeat(len(x) // 32)
        coefficients = self.calibration.transform(self.less_mean(x, alpha, z))
        x0 = self.calibration.back(share[:, self.calibration.band].transpose(0, 1) * coefficients).flatten(0, 1)
        x0 = x0 - self.less_mean(torch.zeros_like(x), 1, z).flatten(0, 1)
        return (x - alpha * x0 if self.prediction == "eps" else alpha * x - x0) / sigma


def linear_model(wanted: Tensor, factor: Tensor, prediction: str = "v", schedule: str = "cosine") -> LatentDiffusion:
    """A model of brains whose coefficients are independent, with the power wanted; the mean is not 0."""
    sizes = {"channels": 8, "channel_multipliers": (1,), "blocks": 1}
    model = LatentDiffusion(
        latent_shape=SHAPE, slice_noise="own", prediction=prediction, schedule=schedule, **sizes
    ).eval()
    model.linear.mean.copy_(torch.randn(model.linear.mean.shape, generator=torch.Generator().manual_seed(5)))
    model.unet = LinearUNet(model, wanted, factor)
    model.calibration.power.copy_(wanted)
    return model


def settings(*flags):
    args = stable_diffusion.flags().parse_args([str(flag) for flag in flags])
    args.seed, args.precision = 0, "fp32"
    return args


def power_of_samples(model: LatentDiffusion, brains: range, *flags) -> Tensor:
    latents = sample_latents(model, brains, settings(*flags), torch.device("cpu"))[-1]
    coefficients = model.calibration.transform(model.less_mean(latents, 1, ALL_Z.repeat(len(brains))))
    return model.calibration.mean_product(coefficients, coefficients)


def test_bands_divide_an_orthonormal_transform():
    calibration = Calibration(SHAPE, 32)
    brains = torch.randn(3, 32, *SHAPE, generator=torch.Generator().manual_seed(0))
    coefficients = calibration.transform(brains)
    assert torch.allclose(calibration.back(coefficients), brains, atol=1e-4)
    assert torch.allclose(coefficients.square().sum(), brains.square().sum(), rtol=1e-4)
    count = calibration.band.flatten().bincount(minlength=BANDS)
    assert len(count) == BANDS and count.sum() == 32 * 8 * 9
    total = (calibration.mean_product(coefficients, coefficients) * count).sum()
    assert torch.allclose(total, brains.square().sum() / 3, rtol=1e-4)
    slowly, fast = torch.ones(1, 32, *SHAPE), (-1.0) ** ALL_Z.view(1, 32, 1, 1, 1) * torch.ones(1, 1, *SHAPE)
    for brain, band in ((slowly, 0), (fast, 5 * 6)):  # the last band along z begins at 5 x 6
        power = calibration.mean_product(calibration.transform(brain), calibration.transform(brain))
        assert power.argmax(1).tolist() == [band, band]


def test_an_exact_denoiser_is_changed_by_chance_alone(wanted):
    """Law (1): E[guess x_t] is alpha E[x_0^2]."""
    model = linear_model(wanted, torch.ones_like(wanted))
    before = power_of_samples(model, range(12)) / wanted
    calibrate(model, {}, 64, settings())
    after = power_of_samples(model, range(12)) / wanted
    assert model.calibration.measured and (after.log() - before.log()).abs().max() < 0.3
    ratio = model.calibration.levels.exp()[:, None, None]
    alpha = (1 + ratio**2).rsqrt()
    by_itself = alpha * wanted / (alpha**2 * wanted + 1 - alpha**2)  # the guess is so many times x_t
    assert ((model.calibration.weight / by_itself).abs()[ratio.flatten() < 3] < 0.2).all()


@pytest.mark.parametrize(
    "wrong, prediction, schedule",
    [(0.8, "v", "cosine"), (1.1, "v", "cosine"), (0.8, "eps", "cosine"), *((0.8, "v", other) for other in SCHEDULES)],
)
def test_samples_of_a_wrong_denoiser_have_the_power_of_training(wanted, wrong, prediction, schedule):
    factor = torch.ones_like(wanted)
    factor[:, 1::2] = wrong  # every other band
    model = linear_model(wanted, factor, prediction, schedule)
    before = power_of_samples(model, range(12)) / wanted
    calibrate(model, {}, 32, settings())
    after = power_of_samples(model, range(12)) / wanted
    assert model.calibration.weight.isfinite().all()
    assert (after.log().abs() < before.log().abs())[:, 1::2].all()
    assert before[:, 1::2].mean().log().abs() > 0.3  # a fifth too little at each step is far more in the end
    assert after[:, 1::2].mean().log().abs() < 0.06 and after[:, ::2].mean().log().abs() < 0.06


def test_guidance_does_not_multiply_it(wanted):
    """Away from itself, any weight gives the samples of weight 1: this network knows nothing of z or people."""
    factor = torch.full_like(wanted, 0.8)
    model = linear_model(wanted, factor)
    model.drop_z = 0.1
    calibrate(model, {}, 16, settings())
    plain, guided = (power_of_samples(model, range(3), "--guidance", weight) for weight in (1, 3))
    assert torch.allclose(plain, guided, rtol=1e-3)


def test_samples_of_another_noise_go_without(wanted):
    model = linear_model(wanted, torch.full_like(wanted, 0.8))
    before, own = (power_of_samples(model, range(2), "--slice-noise", how) for how in ("shared", "own"))
    calibrate(model, {}, 8, settings())
    assert torch.equal(power_of_samples(model, range(2), "--slice-noise", "shared"), before)
    assert not torch.allclose(power_of_samples(model, range(2), "--slice-noise", "own"), own)


def test_guess_and_noise_stay_parts_of_x(wanted):
    model = linear_model(wanted, torch.ones_like(wanted))
    calibrate(model, {}, 4, settings())
    x = torch.randn(32, *SHAPE, generator=torch.Generator().manual_seed(1))
    denoise = model.calibrated(lambda x, t: model.denoise(x, t, ALL_Z), ALL_Z)
    for t in (30, 500, 900):
        x0, noise = denoise(x, t)
        assert not torch.allclose(x0, model.denoise(x, t, ALL_Z)[0], atol=1e-3)
        assert torch.allclose(model.alpha[t].float() * x0 + model.sigma[t].float() * noise, x, atol=1e-4)


def test_weights_from_before_calibration_load_and_go_without(wanted):
    model = linear_model(wanted, torch.ones_like(wanted))
    older = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("calibration.")}
    calibrated = copy.deepcopy(model)
    calibrated.calibration.weight.fill_(1)
    assert model.load_state_dict(older) and not model.calibration.measured
    calibrated.load_state_dict(model.state_dict())
    assert not calibrated.calibration.measured


def test_weights_are_interpolated_between_levels():
    calibration = Calibration(SHAPE, 32)
    calibration.start(torch.linspace(5, -5, LEVELS))
    calibration.weight.copy_(torch.arange(LEVELS).view(-1, 1, 1).expand_as(calibration.weight))
    levels = calibration.levels
    for level, number in ((levels[3], 3), ((levels[3] + levels[4]) / 2, 3.5), (torch.tensor(9.0), 0),
                          (torch.tensor(-9.0), LEVELS - 1), (levels[0], 0), (levels[-1], LEVELS - 1)):  # fmt: skip
        assert torch.allclose(calibration.weight_at(level), torch.tensor(float(number)), atol=1e-5)


def test_brains_of_the_calibration_are_none_that_are_sampled(wanted, monkeypatch):
    """Else samples would have exactly the power of training, by chance of the same noise."""
    seeds, noise = [], stable_diffusion.BrainNoise
    monkeypatch.setattr(stable_diffusion, "BrainNoise", lambda seed, *rest: seeds.append(seed) or noise(seed, *rest))
    model = linear_model(wanted, torch.ones_like(wanted))
    calibrate(model, {}, 2, settings())
    power_of_samples(model, range(1))
    assert len(seeds) == 2 and seeds[0] != seeds[1]
