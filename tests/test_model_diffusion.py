"""Laws of model_diffusion.py: schedules, predictions and their loss, samplers on an exact denoiser, the UNet."""

from itertools import pairwise

import pytest
import torch

from model_diffusion import PREDICTIONS, SCHEDULES, LatentDiffusion, UNet, noise_levels, sample_ddim, sample_ddpm

MEAN, SD = 3.0, 0.5  # of the Gaussian data; far outside [-1, 1], where a clipping sampler would be found out


def tiny_model(prediction: str = "v", **changes) -> LatentDiffusion:
    sizes = {"latent_shape": (4, 6, 7), "channels": 8, "channel_multipliers": (1, 2), "blocks": 1}
    return LatentDiffusion(**{**sizes, "prediction": prediction, **changes}).eval()


def perfect(model: LatentDiffusion, latent: torch.Tensor, noise: torch.Tensor, error: torch.Tensor | float = 0.0):
    """The model with a network that knows latent and noise, and is wrong about the latent by `error`."""

    def forward(x, t, z):
        alpha, sigma = model.alpha[t].view(-1, 1, 1, 1), model.sigma[t].view(-1, 1, 1, 1)
        x0 = latent + error
        implied = noise - alpha / sigma * error  # the noise for which x is still alpha x0 + sigma noise
        return {"v": alpha * implied - sigma * x0, "eps": implied, "x0": x0}[model.prediction]

    model.unet.forward = forward
    return model


def gaussian_denoiser(alpha: torch.Tensor, sigma: torch.Tensor):
    """(x_t, t) -> (E[x_0 | x_t], the noise that goes with it), exactly, for data N(MEAN, SD^2)."""

    def denoise(x, t):
        x0 = MEAN + alpha[t] * SD**2 / (alpha[t] ** 2 * SD**2 + sigma[t] ** 2) * (x - alpha[t] * MEAN)
        return x0, (x - alpha[t] * x0) / sigma[t]

    return denoise


# ---------------------------------------------------------------------------------------------------- noise schedules


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("T", [50, 1000, 4000])
def test_a_schedule_leads_from_data_to_noise_at_unit_variance(schedule, T):
    """alpha^2 + sigma^2 = 1; alpha falls at every step, from near 1 to near 0."""
    alpha, sigma = noise_levels(schedule, T)
    assert alpha.shape == sigma.shape == (T,) and alpha.dtype == sigma.dtype == torch.float32
    assert torch.allclose(alpha**2 + sigma**2, torch.ones(T), atol=1e-6)
    assert (alpha.diff() < 0).all() and (sigma.diff() >= 0).all() and (sigma > 0).all()
    assert alpha[0] > 0.99 and 0 < alpha[-1] < 0.01


def test_the_linear_schedule_is_the_published_table():
    """alpha_t^2 is the product of 1 - beta, with a thousand betas from 1e-4 to 0.02; other T scale beta."""
    alpha, _ = noise_levels("linear", 1000)
    product = 1.0
    for t in range(1000):
        product *= 1 - (1e-4 + t / 999 * (0.02 - 1e-4))
        assert alpha[t].item() ** 2 == pytest.approx(product, rel=1e-5)
    half, _ = noise_levels("linear", 500)
    assert 1 - half[0].item() ** 2 == pytest.approx(2e-4, rel=1e-3)
    assert (half[-1] / half[-2]).item() ** 2 == pytest.approx(1 - 0.04, rel=1e-4)


def test_the_cosine_schedule_is_the_published_formula():
    """alpha_t^2 = f(t + 1) / f(0) with f = cos^2, except at the last step, where beta is held at 0.999."""
    alpha, _ = noise_levels("cosine", 1000)
    u = (torch.arange(1001).double() / 1000 + 0.008) / 1.008
    f = torch.cos(u * torch.pi / 2) ** 2
    assert torch.allclose(alpha[:-1].double() ** 2, (f[1:] / f[0])[:-1], rtol=1e-5, atol=1e-9)
    assert (alpha[-1] / alpha[-2]).item() ** 2 == pytest.approx(0.001, rel=1e-4)


def test_a_wrong_argument_is_a_value_error_that_names_it():
    """And says what is possible instead."""
    alpha, sigma = noise_levels("cosine", 10)
    with pytest.raises(ValueError, match="schedule.*cosine.*squared"):
        noise_levels("squared", 10)
    with pytest.raises(ValueError, match="schedule"):
        tiny_model(schedule="squared")
    with pytest.raises(ValueError, match="prediction.*eps.*score"):
        tiny_model("score")
    for steps in (0, 11, -1):
        with pytest.raises(ValueError, match=f"steps.*10.*{steps}"):
            next(sample_ddim(gaussian_denoiser(alpha, sigma), torch.zeros(1), alpha, sigma, None, steps))


# ------------------------------------------------------------------------------------------- predictions and their loss


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_v_eps_and_x0_mean_the_same(schedule, prediction):
    """A network that outputs the true target gives back the latent and the noise, whichever target that is."""
    latent, noise, z = torch.randn(3, 4, 6, 7), torch.randn(3, 4, 6, 7), torch.arange(3)
    model = perfect(tiny_model(prediction, schedule=schedule), latent, noise)
    # Beyond t = 400, float32 itself loses what a division by alpha (eps) brings back; before 40, one by sigma (x0).
    for t in (40, 200, 400):
        x0, eps = model.denoise(model.alpha[t] * latent + model.sigma[t] * noise, t, z)
        assert torch.allclose(x0, latent, atol=1e-5) and torch.allclose(eps, noise, atol=1e-5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_loss_of_a_perfect_network_is_zero(prediction):
    """At any step, with given noise and with noise of its own drawing."""
    latent, noise, z = torch.randn(8, 4, 6, 7), torch.randn(8, 4, 6, 7), torch.arange(8)
    t = torch.tensor([0, 1, 10, 100, 500, 900, 990, 999])
    loss = perfect(tiny_model(prediction), latent, noise)(latent, z, t, noise)
    assert loss.shape == (8,) and loss.dtype == torch.float32 and (loss.abs() < 1e-9).all()
    torch.manual_seed(5)
    torch.randint(1000, (8,))  # the steps
    drawn = torch.randn_like(latent)
    model = perfect(tiny_model(prediction), latent, drawn)
    torch.manual_seed(5)
    assert (model(latent, z).abs() < 1e-9).all()
    # A network of zeros does have a loss, except at the last step, where min(SNR, 5) leaves x0 nothing.
    assert (tiny_model(prediction)(latent, z, t, noise)[:-1] > 1e-5).all()


def test_the_loss_counts_the_error_of_x0_by_min_snr_5():
    """The same error of x0 costs the same in all three parameterisations: min(SNR, 5) times its square."""
    latent, noise, z = torch.randn(6, 4, 6, 7), torch.randn(6, 4, 6, 7), torch.arange(6)
    t, error = torch.tensor([5, 50, 150, 400, 600, 900]), torch.randn(6, 4, 6, 7)
    model = tiny_model()
    snr = (model.alpha[t] / model.sigma[t]) ** 2
    assert (snr > 5).sum() == 3  # both sides of the minimum are tried
    expected = snr.clamp(max=5) * error.square().mean((1, 2, 3))
    for prediction in PREDICTIONS:
        loss = perfect(tiny_model(prediction), latent, noise, error)(latent, z, t, noise)
        assert torch.allclose(loss, expected, rtol=1e-3)


def test_steps_are_drawn_from_the_whole_process():
    """Training sees t = 0 and t = T - 1, and noise of unit variance."""
    model, seen = tiny_model(T=5), []
    model.unet.forward = lambda x, t, z: (seen.append((x, t)), torch.zeros_like(x))[1]
    model(torch.zeros(500, 4, 6, 7), torch.zeros(500, dtype=torch.long))
    x, t = seen[0]
    assert torch.bincount(t, minlength=5).min() > 60 and t.max() == 4
    for step in range(5):
        assert x[t == step].std().item() == pytest.approx(model.sigma[step].item(), rel=0.05)


# ------------------------------------------------------------------------------------------------------------- samplers


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ddpm_draws_the_gaussian(schedule):
    """Ancestral sampling with the exact denoiser has the mean and the standard deviation of the data."""
    alpha, sigma = noise_levels(schedule, 1000)
    denoise, draw = gaussian_denoiser(alpha, sigma), lambda: torch.randn(20_000)
    *_, x0 = sample_ddpm(denoise, draw(), alpha, sigma, draw)
    assert x0.mean().item() == pytest.approx(MEAN, abs=0.015)
    assert x0.std().item() == pytest.approx(SD, rel=0.02)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ddim_converges_to_the_probability_flow(schedule):
    """Its error falls in proportion to the number of steps: twice the steps, about half the error."""
    alpha, sigma = (level.double() for level in noise_levels(schedule, 4000))
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    scale = (alpha[-1] ** 2 * SD**2 + sigma[-1] ** 2).sqrt()
    exact = MEAN + SD * (x - alpha[-1] * MEAN) / scale  # the flow keeps quantiles
    errors = []
    for steps in (25, 50, 100, 200, 400):
        *_, x0 = sample_ddim(gaussian_denoiser(alpha, sigma), x, alpha, sigma, None, steps)
        errors.append((x0 - exact).abs().max().item())
    assert errors[0] < 0.3 and errors[-1] < 0.01
    assert all(fine < 0.65 * coarse for coarse, fine in pairwise(errors))


def test_ddim_with_noise_draws_the_gaussian():
    """Any eta leaves the marginals as they are: mean and standard deviation of the data."""
    alpha, sigma = noise_levels("cosine", 1000)
    for eta in (0.5, 1.0):
        denoise, draw = gaussian_denoiser(alpha, sigma), lambda: torch.randn(20_000)
        *_, x0 = sample_ddim(denoise, draw(), alpha, sigma, draw, 250, eta)
        assert x0.mean().item() == pytest.approx(MEAN, abs=0.015)
        assert x0.std().item() == pytest.approx(SD, rel=0.03)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ddim_with_eta_1_over_all_steps_is_ddpm(schedule):
    """The same draws give the same path, step by step."""
    alpha, sigma = (level.double() for level in noise_levels(schedule, 60))
    x, exact = torch.randn(50, dtype=torch.float64), gaussian_denoiser(alpha, sigma)
    draws = torch.randn(59, 50, dtype=torch.float64)
    ancestral = list(sample_ddpm(exact, x, alpha, sigma, iter(draws).__next__))
    noisy = list(sample_ddim(exact, x, alpha, sigma, iter(draws).__next__, 60, 1.0))
    # The levels were rounded to float32, so alpha^2 + sigma^2 = 1 holds to 1e-7 only.
    assert torch.allclose(torch.stack(ancestral), torch.stack(noisy), atol=1e-4)
    quiet = list(sample_ddim(exact, x, alpha, sigma, None, 60))
    assert (quiet[-1] - ancestral[-1]).abs().max() > 0.1  # which eta = 0 does not give


def test_samplers_yield_once_per_step_on_the_way_from_noise_to_data():
    """ddpm visits every time; ddim `steps` different ones from T - 1 downward, and draws noise only for eta > 0.

    What is yielded is the x that the next step begins with, and at last x_0.
    """
    alpha, sigma = noise_levels("cosine", 30)
    exact, times, given, draws = gaussian_denoiser(alpha, sigma), [], [], []

    def denoise(x, t):
        times.append(t)
        given.append(x)
        return exact(x, t)

    def draw():
        draws.append(1)
        return torch.zeros(2)

    yields = list(sample_ddpm(denoise, torch.zeros(2), alpha, sigma, draw))
    assert times == list(range(29, -1, -1)) and len(yields) == 30 and len(draws) == 29  # none after the last step
    assert torch.equal(torch.stack(yields[:-1]), torch.stack(given[1:]))
    assert torch.equal(yields[-1], exact(given[-1], 0)[0])
    for steps in range(1, 31):
        times.clear(), given.clear(), draws.clear()
        yields = list(sample_ddim(denoise, torch.zeros(2), alpha, sigma, draw, steps))
        assert len(yields) == len(times) == steps and draws == []
        assert all(torch.equal(x, y) for x, y in zip(yields[:-1], given[1:], strict=True))
        assert torch.equal(yields[-1], exact(given[-1], times[-1])[0])
        assert times[0] == 29 and all(a > b for a, b in pairwise(times)) and 0 <= times[-1] <= 30 / steps
        list(sample_ddim(denoise, torch.zeros(2), alpha, sigma, draw, steps, 0.3))
        assert len(draws) == steps - 1


# ------------------------------------------------------------------------------------------------------------- the UNet


@pytest.mark.parametrize("size", [(6, 7), (3, 7), (1, 1), (8, 8)])
def test_the_unet_takes_any_size(awaken, size):
    """Odd sides lose half a pixel on the way down and get it back on the way up; every output sees every level."""
    unet = awaken(UNet(4, 8, (1, 2, 3), 1))
    x = torch.randn(2, 4, *size)
    out = unet(x, torch.tensor([0, 999]), torch.tensor([0, 31]))
    assert out.shape == x.shape and out.isfinite().all() and out.std() > 0
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in unet.parameters())  # nothing in it is idle


def test_the_unet_starts_at_zero():
    """The last convolution is zero, so the first loss is that of the mean prediction."""
    assert (UNet(4, 8, (1, 2), 1)(torch.randn(2, 4, 6, 7), torch.zeros(2), torch.zeros(2)) == 0).all()


def test_the_unet_hears_of_t_and_z_and_never_of_its_neighbours(awaken):
    """Each of x, t and z changes the own output and no other element's of the batch."""
    unet = awaken(UNet(4, 8, (1, 2), 2).eval())
    x, t, z = torch.randn(3, 4, 6, 7), torch.tensor([10, 500, 900]), torch.tensor([3, 16, 30])
    out = unet(x, t, z)
    changed = x.clone(), t.clone(), z.clone()
    changed[0][1] += 1
    changed[1][1] += 1
    changed[2][1] += 1
    for n in range(3):
        other = unet(*[b if n == i else a for i, (a, b) in enumerate(zip((x, t, z), changed))])
        assert torch.equal(other[[0, 2]], out[[0, 2]]) and (other[1] - out[1]).abs().max() > 1e-4
    alone = torch.cat([unet(x[i : i + 1], t[i : i + 1], z[i : i + 1]) for i in range(3)])
    assert torch.allclose(alone, out, atol=1e-5)
    assert not torch.allclose(unet(x, z, t), out, atol=1e-3)  # t and z are told apart
