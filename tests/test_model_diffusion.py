"""Laws of model_diffusion.py: schedules, the loss and its weights, samplers on an exact denoiser, the UNet."""

from itertools import pairwise

import pytest
import torch

import model_diffusion as md
from heads.people import CONDITIONS, Condition

MEAN, SD = 3.0, 0.5  # of the Gaussian data; far outside [-1, 1], where a clipping sampler would be found out


def tiny_model(recipe: str = "v", **changes) -> md.LatentDiffusion:
    sizes = {"latent_shape": (4, 6, 7), "widths": (8, 16), "blocks": 1, "drop_z": 0.0}
    return md.LatentDiffusion(**{**sizes, "recipe": recipe, **changes}).eval()


def perfect(model: md.LatentDiffusion, latent: torch.Tensor, error: torch.Tensor | float = 0.0):
    """The model with a network that knows the latent, but for an `error`."""

    def forward(x, guess, t, z, slices, people, moves=None):
        sigma = model.sigma[t].view(-1, 1, 1, 1)  # the sd of x_0 where the prior has variance 1
        return (latent + error - guess) / sigma

    model.unet.forward = forward
    return model


def gaussian_denoiser(alpha: torch.Tensor, sigma: torch.Tensor, mean=MEAN, sd=SD):
    """(x_t, t) -> (E[x_0 | x_t], the noise that goes with it), exactly, for data N(mean, sd^2)."""

    def denoise(x, t):
        x0 = mean + alpha[t] * sd**2 / (alpha[t] ** 2 * sd**2 + sigma[t] ** 2) * (x - alpha[t] * mean)
        return x0, (x - alpha[t] * x0) / sigma[t]

    return denoise


@pytest.mark.parametrize("schedule", md.SCHEDULES)
@pytest.mark.parametrize("T", [50, 1000, 4000])
def test_a_schedule_leads_from_data_to_noise_at_unit_variance(schedule, T):
    """alpha^2 + sigma^2 = 1; alpha falls at every step, from near 1 to near 0, or to 0 for rectified flow."""
    alpha, sigma = md.noise_levels(schedule, T)
    assert alpha.shape == sigma.shape == (T,) and alpha.dtype == sigma.dtype == torch.float32
    assert torch.allclose(alpha**2 + sigma**2, torch.ones(T), atol=1e-6)
    alpha, sigma = md.noise_levels(schedule, T, torch.float64)
    assert torch.allclose(alpha**2 + sigma**2, torch.ones(T, dtype=torch.float64), atol=1e-14)
    assert (alpha.diff() < 0).all() and (sigma.diff() > 0).all() and (sigma > 0).all()
    assert alpha[0] > 0.99 and 0 <= alpha[-1] < 0.013
    assert (alpha[-1] == 0) == (schedule == "flow")


def test_rectified_flow_is_the_same_process_at_another_scale():
    """x_t (alpha + sigma)^-1 is the point (1 - u) x_0 + u noise of a straight line."""
    alpha, sigma = md.noise_levels("flow", 1000, torch.float64)
    x0, noise, t = *torch.randn(2, 9, dtype=torch.float64), 299
    line = 0.7 * x0 + 0.3 * noise
    assert torch.allclose((alpha[t] * x0 + sigma[t] * noise) / (alpha[t] + sigma[t]), line, atol=1e-12)


def test_edm_s_preconditioning_is_v_prediction():
    """Karras et al. 2022, table 1, for sd 1: of D(x) = c_skip x + c_out F(c_in x), c_in x is x_t, and F predicts -v."""
    alpha, sigma = md.noise_levels("edm", 1000, torch.float64)
    s = sigma / alpha
    assert s[0].item() == pytest.approx(0.002) and s[-1].item() == pytest.approx(80)
    assert torch.allclose((s ** (1 / 7)).diff(), (s ** (1 / 7)).diff()[0])  # rho = 7
    x0, noise = torch.randn(2, 1000, dtype=torch.float64)
    c_skip, c_out, c_in = 1 / (1 + s**2), s / (1 + s**2).sqrt(), 1 / (1 + s**2).sqrt()
    x = x0 + s * noise
    target = (x0 - c_skip * x) / c_out  # of F
    assert torch.allclose(c_in * x, alpha * x0 + sigma * noise)
    assert torch.allclose(target, -(alpha * noise - sigma * x0), atol=1e-9)


def test_the_linear_and_the_cosine_schedule_are_the_published_ones():
    """alpha^2 is a product of 1 - beta; or cos^2, with the last beta held at 0.999. Other T scale the linear beta."""
    alpha, _ = md.noise_levels("linear", 1000)
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    assert torch.allclose(alpha.double() ** 2, (1 - betas).cumprod(0), rtol=1e-5, atol=0)
    half, _ = md.noise_levels("linear", 500)
    assert 1 - half[0].item() ** 2 == pytest.approx(2e-4, rel=1e-3)
    assert (half[-1] / half[-2]).item() ** 2 == pytest.approx(1 - 0.04, rel=1e-4)
    alpha, _ = md.noise_levels("cosine", 1000)
    f = torch.cos((torch.arange(1001).double() / 1000 + 0.008) / 1.008 * torch.pi / 2) ** 2
    assert torch.allclose(alpha[:-1].double() ** 2, (f[1:] / f[0])[:-1], rtol=1e-5, atol=1e-9)
    assert (alpha[-1] / alpha[-2]).item() ** 2 == pytest.approx(0.001, rel=1e-4)


def test_a_wrong_argument_is_a_value_error_that_names_it():
    alpha, sigma = md.noise_levels("cosine", 10)
    with pytest.raises(ValueError, match="schedule.*cosine.*squared"):
        md.noise_levels("squared", 10)
    with pytest.raises(ValueError, match="recipe.*ddpm.*score"):
        tiny_model("score")
    with pytest.raises(ValueError, match="conditions.*age.*height"):
        tiny_model(conditions=("height",))
    for steps in (0, 11, -1):
        with pytest.raises(ValueError, match=f"steps.*10.*{steps}"):
            next(md.sample_ddim(gaussian_denoiser(alpha, sigma), torch.zeros(1), alpha, sigma, steps))


@pytest.mark.parametrize("recipe", md.RECIPES)
def test_a_network_without_error_denoises_at_no_loss(recipe):
    """At any step, with given noise and with noise of its own drawing; latent and noise come back."""
    latent, noise, z = torch.randn(8, 4, 6, 7), torch.randn(8, 4, 6, 7), torch.arange(8)
    t = torch.tensor([0, 1, 10, 100, 500, 900, 990, 999])
    model = perfect(tiny_model(recipe), latent)
    loss = model(latent, z, t, noise)
    assert loss.shape == (8,) and loss.dtype == torch.float32 and (loss.abs() < 1e-6).all()
    for step in (0, 40, 500, 900):
        x0, eps = model.denoise(model.alpha[step].float() * latent + model.sigma[step].float() * noise, step, z)
        ratio = float(model.sigma[step] / model.alpha[step])  # by which the division by alpha multiplies rounding
        assert torch.allclose(x0, latent, atol=1e-5 * max(1, ratio))
        assert torch.allclose(eps, noise, atol=1e-5 * max(1, 1 / ratio))
    assert (model(latent, z).abs() < 1e-6).all()
    # a network of zeros does have a loss, except at the last step, where min(SNR, 5) leaves x_0 nothing
    assert (tiny_model(recipe)(latent, z, t, noise)[:-1] > 1e-5).all()


@pytest.mark.parametrize("channel", range(4))
def test_errors_of_channels_count_by_their_weight(channel):
    latent, noise, z, t = torch.randn(4, 4, 6, 7), torch.randn(4, 4, 6, 7), torch.arange(4), torch.full((4,), 500)
    weight, error = torch.tensor([2.5, 1.0, 0.4, 0.1]), torch.zeros(4, 1, 1)
    error[channel] = 0.3
    plain, weighted = (perfect(tiny_model(), latent, error) for _ in range(2))
    weighted.channel_weight.copy_(weight.view(-1, 1, 1))
    loss = plain(latent, z, t, noise)
    assert torch.allclose(loss, 0.09 / 4 / plain.sigma[500].float() ** 2, rtol=1e-3)
    assert torch.allclose(weighted(latent, z, t, noise), loss * weight[channel], rtol=1e-5)


@pytest.mark.parametrize("weight", md.WEIGHTS)
def test_an_error_of_x0_costs_what_it_does_to_the_published_target(weight, monkeypatch):
    """v, noise and noise - x_0 are those for which x_t stays what it is; min-SNR counts x_0 min(SNR, 5) times."""
    latent, noise, z = torch.randn(6, 4, 6, 7), torch.randn(6, 4, 6, 7), torch.arange(6)
    t, error = torch.tensor([5, 50, 150, 400, 600, 900]), torch.randn(6, 4, 6, 7)
    monkeypatch.setitem(md.RECIPES, "tried", md.Recipe("cosine", weight))
    model = perfect(tiny_model("tried"), latent, error)
    alpha, sigma = (level[t].view(-1, 1, 1, 1) for level in (model.alpha, model.sigma))
    wrong = -alpha / sigma * error  # of the noise
    snr = (alpha / sigma) ** 2
    assert 0 < (snr > 5).sum() < 6  # both sides of the minimum are tried
    apart = {"v": alpha * wrong - sigma * error, "eps": wrong, "flow": wrong - error,
             "min-snr": snr.clamp(max=5).sqrt() * error}[weight]  # fmt: skip
    assert torch.allclose(model(latent, z, t, noise).double(), apart.square().mean((1, 2, 3)), rtol=1e-3)


def test_training_begins_at_the_gaussian_denoiser():
    """With the UNet's output 0; and where the prior has no variance, no output changes that."""
    model, z = tiny_model(), torch.arange(8)
    model.gaussian.mean.normal_()
    model.gaussian.variance.copy_(torch.rand(32, 4, 6, 7))
    model.gaussian.variance[:, :, :2] = 0
    latent, noise, t = torch.randn(8, 4, 6, 7), torch.randn(8, 4, 6, 7), torch.full((8,), 300)
    alpha, sigma = model.alpha[300].float(), model.sigma[300].float()
    x, mean, v = alpha * latent + sigma * noise, model.gaussian.mean[:8], model.gaussian.variance[:8]
    best = mean + alpha * v / (alpha**2 * v + sigma**2) * (x - alpha * mean)
    assert torch.allclose(model.denoise(x, 300, z)[0], best, atol=1e-5)
    assert torch.allclose(model(latent, z, t, noise), ((best - latent) / sigma).square().mean((1, 2, 3)), rtol=1e-4)
    model.unet.forward = lambda *given: torch.ones(8, 4, 6, 7)
    x0, _ = model.denoise(x, 300, z)
    assert torch.allclose(x0 - best, sigma * (v / (alpha**2 * v + sigma**2)).sqrt(), atol=1e-5)
    assert torch.allclose(x0[:, :, :2], mean[:, :, :2])
    farther, noise = model.denoise(x, 300, z, away=1.5)
    assert torch.allclose(farther - best, 1.5 * (x0 - best), atol=1e-5)
    assert torch.allclose(alpha * farther + sigma * noise, x, atol=1e-5)  # the noise is that of the same x_0


@pytest.mark.parametrize("recipe", ["flow", "edm"])
def test_times_follow_the_noise(recipe):
    """ln(sigma / alpha) has the mean that TIMES gives and variance 1, as far as the table reaches."""
    model, times = tiny_model(recipe), md.RECIPES[recipe].times
    t = model.draw_times(20_000)
    assert t.dtype == torch.int64 and t.min() >= 0 and t.max() < 1000
    drawn = (model.sigma[t] / model.alpha[t]).double().log()
    assert drawn.median().item() == pytest.approx(md.TIMES[times], abs=0.04)
    assert (drawn < md.TIMES[times] - 1).float().mean().item() == pytest.approx(0.1587, abs=0.012)
    assert (drawn > md.TIMES[times] + 1).float().mean().item() == pytest.approx(0.1587, abs=0.012)


@pytest.mark.parametrize("recipe", md.RECIPES)
def test_hiding_z_is_part_of_training_alone(awaken, recipe):
    """A share drop_z of the latents is denoised without z; evaluation always knows z."""
    model, told = awaken(tiny_model(recipe, drop_z=0.25)), []
    model.gaussian.mean.normal_()
    forward = model.unet.forward
    model.unet.forward = lambda x, guess, t, z, *more: (told.append(z), forward(x, guess, t, z))[1]
    latent, z = torch.randn(400, 4, 6, 7), torch.arange(400) % 32
    model(latent, z)
    model.train()
    model(latent, z).mean().backward()
    known = ~told[1].isnan()
    assert torch.equal(told[0], z) and torch.equal(told[1][known].long(), z[known]) and 260 < known.sum() < 340
    assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in model.parameters())
    x, guess, t = *torch.randn(2, 2, 4, 6, 7), torch.tensor([500, 500])
    hidden, known = (forward(x, guess, t, z) for z in torch.tensor([[torch.nan, torch.nan], [0, 31]]))
    assert hidden.isfinite().all() and (hidden - known).abs().amax((1, 2, 3)).min() > 1e-3


def test_guidance_goes_beyond_the_conditional_model():
    """Weight 1 is the model, 0 the one without condition; x_0 and noise remain the two parts of x."""
    alpha, sigma = md.noise_levels("cosine", 1000, torch.float64)
    conditional = gaussian_denoiser(alpha, sigma)

    def unconditional(x, t):
        x0 = conditional(x, t)[0] + 0.3
        return x0, (x - alpha[t] * x0) / sigma[t]

    x = torch.randn(5, dtype=torch.float64)
    for weight, error in ((1.0, 0.0), (0.0, 0.3), (2.0, -0.3)):
        x0, noise = md.guide(conditional, unconditional, weight)(x, 300)
        assert torch.allclose(x0, conditional(x, 300)[0] + error)
        assert torch.allclose(alpha[300] * x0 + sigma[300] * noise, x)


@pytest.mark.parametrize("schedule", md.SCHEDULES)
def test_ddpm_draws_the_gaussian(schedule):
    alpha, sigma = md.noise_levels(schedule, 1000, torch.float64)
    denoise, draw = gaussian_denoiser(alpha, sigma), lambda: torch.randn(20_000)
    *_, x0 = md.sample_ddpm(denoise, draw(), alpha, sigma, draw=draw)
    assert x0.mean().item() == pytest.approx(MEAN, abs=0.015)
    assert x0.std().item() == pytest.approx(SD, rel=0.02)


@pytest.mark.parametrize("schedule", md.SCHEDULES)
@pytest.mark.parametrize("sampler, order", [(md.sample_ddim, 1), (md.sample_heun, 2), (md.sample_dpm, 2)])
def test_samplers_converge_to_the_probability_flow(schedule, sampler, order):
    """At their order: four times the evaluations, a quarter of the error for DDIM, a sixteenth for the others."""
    alpha, sigma = md.noise_levels(schedule, 20_000, torch.float64)  # so many, to have a short last step
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    # the probability flow keeps the quantiles of the Gaussian
    exact, errors = MEAN + SD * (x - alpha[-1] * MEAN) / (alpha[-1] ** 2 * SD**2 + sigma[-1] ** 2).sqrt(), []
    for steps in (20, 80, 320):
        *_, x0 = sampler(gaussian_denoiser(alpha, sigma), x, alpha, sigma, steps)
        errors.append((x0 - exact).abs().max().item())
    slope = torch.tensor(errors).log2().diff() / -2
    assert errors[0] < 0.3 and slope.min() > (0.85, 1.4)[order - 1], (errors, slope)


@pytest.mark.parametrize("schedule", md.SCHEDULES)
@pytest.mark.parametrize("T", [1, 30, 1000])
def test_times_of_sampling_are_different_and_begin_at_the_last(schedule, T):
    alpha, sigma = md.noise_levels(schedule, T)
    for steps in {1, min(T, 7), min(T, 20), T - T // 3, T}:
        times = md.sampling_times(alpha, sigma, steps)
        assert len(times) == steps and times[0] == T - 1 and times[-1] >= 0
        assert all(a > b for a, b in pairwise(times))
    if T == 1000:
        ratio = sigma / alpha
        levels = torch.linspace(ratio[-1].clamp(max=80) ** (1 / 7), ratio[0] ** (1 / 7), 20) ** 7  # of EDM
        assert torch.allclose(ratio[md.sampling_times(alpha, sigma, 20)][1:18], levels[1:18], rtol=0.15)


@pytest.mark.parametrize("schedule", md.SCHEDULES)
def test_samples_differ_as_much_as_heads_do(schedule):
    """What is 30, 10 or 3 times as strong as the noise, or a tenth, keeps its strength in 20 steps of any sampler."""
    alpha, sigma = md.noise_levels(schedule, 1000, torch.float64)
    start, sd = torch.ones(5, dtype=torch.float64), torch.tensor([30.0, 10.0, 3.0, 1.0, 0.1], dtype=torch.float64)
    for sampler in (md.sample_dpm, md.sample_heun, md.sample_ddim):  # in as many steps as they take by default
        *_, end = sampler(gaussian_denoiser(alpha, sigma, 0, sd), start, alpha, sigma)
        assert torch.allclose(end / sd, start, atol=0.15)


@pytest.mark.parametrize("name", md.SAMPLERS)
def test_samplers_yield_once_per_step_on_the_way_from_noise_to_data(name):
    """ddpm at every time, with fresh noise, the others at `steps` of them; heun asks twice, but for the last."""
    alpha, sigma = md.noise_levels("cosine", 30)
    exact, times, given, draws = gaussian_denoiser(alpha, sigma), [], [], []

    def denoise(x, t):
        times.append(t)
        given.append(x)
        return exact(x, t)

    def draw():
        draws.append(1)
        return torch.zeros(2)

    for steps in (1, 2, 7, 29, 30):
        times.clear(), given.clear(), draws.clear()
        yields = list(md.SAMPLERS[name](denoise, torch.zeros(2), alpha, sigma, steps, draw))
        visited = 30 if name == "ddpm" else steps
        assert len(yields) == visited and len(draws) == (29 if name == "ddpm" else 0)  # none after the last step
        assert len(times) == (2 * steps - 1 if name == "heun" else visited) and times[0] == 29
        assert name != "ddpm" or times == list(range(29, -1, -1))
        begun = given[::2] if name == "heun" else given
        assert all(torch.equal(x, y) for x, y in zip(yields[:-1], begun[1:], strict=True))
        assert torch.equal(yields[-1], exact(given[-1], times[-1])[0])


@pytest.mark.parametrize("size", [(6, 7), (3, 7), (1, 1), (8, 8)])
def test_the_unet_takes_any_size_and_begins_at_zero(awaken, size):
    """Odd sides lose half a pixel on the way down and get it back on the way up; every output sees every level."""
    unet, (x, guess) = md.UNet(4, (8, 16, 24), 1), torch.randn(2, 2, 4, *size)
    assert not unet(x, guess, torch.zeros(2), torch.zeros(2)).any()
    out = awaken(unet)(x, guess, torch.tensor([0, 999]), torch.tensor([0, 31]))
    assert out.shape == x.shape and out.isfinite().all() and out.std() > 0
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in unet.parameters())  # nothing in it is idle


def test_the_unet_knows_t_and_z_and_nothing_of_its_neighbours(awaken):
    """Each of x, guess, t and z changes the own output and no other element's of the batch."""
    unet = awaken(md.UNet(4, (8, 16), 2).eval())
    x, guess, t, z = *torch.randn(2, 3, 4, 6, 7), torch.tensor([10, 20, 31]), torch.tensor([3, 16, 30])
    given = (x, guess, t, z)
    out = unet(*given)
    for n in range(4):
        changed = [part.clone() for part in given]
        changed[n][1] += 1
        other = unet(*changed)
        assert torch.equal(other[[0, 2]], out[[0, 2]]) and (other[1] - out[1]).abs().max() > 1e-4
    alone = torch.cat([unet(*(part[i : i + 1] for part in given)) for i in range(3)])
    assert torch.allclose(alone, out, atol=1e-5)
    assert not torch.allclose(unet(x, guess, z, t), out, atol=1e-3)  # t and z are told apart
    torch.nn.init.zeros_(unet.stem_guess.weight)  # as before training
    assert torch.equal(unet(x, guess, t, z), unet(x, 0 * guess, t, z))


def test_the_unet_is_told_how_a_head_was_moved(awaken):
    """It begins as the network that is not told; by default the head was not moved. So does the loss."""
    plain = awaken(tiny_model())
    model = tiny_model(moved=True)
    assert model.unet.load_state_dict(plain.unet.state_dict(), strict=False).missing_keys == ["embed_moves.weight"]
    latent, noise, moves = torch.randn(2, 4, 6, 7), torch.randn(2, 4, 6, 7), torch.tensor([[0.0] * 4, [0.5, 0, 0, -1]])
    batch = latent, torch.tensor([3, 30]), torch.tensor([300, 700]), noise
    assert torch.equal(model(*batch, moves=moves), plain(*batch))
    torch.nn.init.normal_(model.unet.embed_moves.weight)
    loss = model(*batch, moves=moves)
    assert loss[0] == plain(*batch)[0] and (loss[1] - plain(*batch)[1]).abs() > 1e-4
    assert torch.equal(model(*batch), plain(*batch))


def test_mixing_begins_as_the_2d_model_and_then_mixes(awaken):
    """Also after other layers have learned: what is new is zero. Any number of slices goes, and brains stay apart."""
    torch.manual_seed(1)
    flat = awaken(md.UNet(4, (8, 16), 1).eval())
    mixed = md.UNet(4, (8, 16), 1, mixing=True).eval()
    assert not mixed.load_state_dict(flat.state_dict(), strict=False).unexpected_keys
    x, guess, t, z = *torch.randn(2, 6, 4, 6, 7), torch.full((6,), 300), torch.arange(6)
    for slices in (1, 2, 3, 6):
        assert torch.equal(mixed(x, guess, t, z, slices), flat(x, guess, t, z))
    awaken(mixed)
    other = x.clone()
    other[4] += 1
    changed = (mixed(other, guess, t, z, 3) - mixed(x, guess, t, z, 3)).abs().amax((1, 2, 3))
    assert (changed[:3] == 0).all() and changed[3:].min() > 1e-4


def test_slices_of_a_brain_train_at_one_step_and_are_hidden_alike(awaken):
    """Windows are the unit of everything random; their noise is correlated as that of slices at their z."""
    model, told = awaken(tiny_model(slices=4, drop_z=0.5, T=20)).train(), []
    model.gaussian.correlation.copy_(torch.full((32, 32), 0.25).fill_diagonal_(1))
    forward = model.unet.forward
    model.unet.forward = lambda *given: (told.append(given), forward(*given))[1]
    loss = model(torch.zeros(240, 4, 6, 7), torch.arange(240) % 32)
    x, _, t, z, slices, *_ = told[0]
    assert loss.shape == (240,) and slices == 4
    windows, hidden = t.view(60, 4), z.isnan().view(60, 4)
    assert (windows == windows[:, :1]).all() and torch.equal(torch.bincount(windows[:, 0]), torch.full((20,), 3))
    assert (hidden == hidden[:, :1]).all() and 15 < hidden[:, 0].sum() < 45
    noise = (x / model.sigma[t].float().view(-1, 1, 1, 1)).view(60, 4, -1)
    covariance = torch.cov(noise.transpose(0, 1).flatten(1))
    assert torch.allclose(covariance, torch.full((4, 4), 0.25).fill_diagonal_(1), atol=0.05)


def test_conditions_are_hidden_by_the_brain_and_unknown_is_nan(awaken):
    """Each alone, all of them, or all and z; in evaluation nothing is hidden. None known is all NaN."""
    model = awaken(tiny_model(slices=2, drop_z=0.2, conditions=("age", "cdr")))
    people = torch.tensor([[70.0, 0.5], [70.0, 0.5], [20.0, torch.nan], [20.0, torch.nan]]).repeat(1000, 1)
    z = torch.arange(4000) % 32
    hidden_z, hidden = model.hide(z, people, 2)
    assert torch.equal(hidden_z.view(-1, 2).isnan()[:, 0], hidden_z.view(-1, 2).isnan()[:, 1])
    assert torch.equal(hidden.isnan()[::2], hidden.isnan()[1::2])
    lost = hidden.isnan()[people[:, 1] == 0.5]
    no_z = hidden_z.isnan()[people[:, 1] == 0.5]
    assert lost[no_z].all() and no_z.float().mean().item() == pytest.approx(0.2, abs=0.05)
    everything, one = lost[~no_z].all(1).float().mean().item(), lost[~no_z][:, 0].float().mean().item()
    assert everything == pytest.approx(0.1 + 0.9 * 0.01, abs=0.04) and one == pytest.approx(0.19, abs=0.05)
    kept = ~hidden.isnan()
    assert torch.equal(hidden[kept], people[kept])

    given = *torch.randn(2, 2, 4, 6, 7), torch.tensor([500, 500]), torch.tensor([3, 4]), 2
    forward = model.unet.forward
    out = forward(*given, people[:2])
    for other in ([[71.0, 0.5]] * 2, [[70.0, 1.0]] * 2, [[70.0, torch.nan]] * 2, None):
        other = other and torch.tensor(other)
        assert (forward(*given, other) - out).abs().max() > 1e-5
    assert torch.allclose(forward(*given), forward(*given, torch.full((2, 2), torch.nan)), atol=1e-6)
    model.train()(torch.randn(8, 4, 6, 7), torch.arange(8), people=people[:8]).mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_a_further_condition_is_embedded_by_its_row_of_the_table(monkeypatch):
    """A vector for each of its values, or an embedding of the number in units of its scale."""
    monkeypatch.setitem(CONDITIONS, "hand", Condition("Hand", "hand", {"R": 0.0, "L": 1.0}))
    monkeypatch.setitem(CONDITIONS, "volume", Condition("eTIV", "volume", scale=100))
    unet, numbers = md.UNet(4, (8, 16), 1, conditions=("hand", "volume")), []
    assert unet.embed_people["hand"].vectors.shape == (3, 32) and unet.embed_people["volume"].unknown.shape == (32,)
    unet.embed_people["volume"].register_forward_pre_hook(lambda _, args: numbers.append(args[0].item()))
    unet(*torch.randn(2, 1, 4, 6, 7), torch.zeros(1), torch.zeros(1), people=torch.tensor([[1.0, 1500.0]]))
    assert numbers == [15.0]


def test_windows_are_guessed_at_with_their_whole_brains(awaken):
    """All slices as a window have the loss of the whole brain; fewer have a guess that the rest of the brain moves."""
    model = awaken(tiny_model(slices=4, modes=3, conditions=("age",))).eval()
    model.gaussian.correlation[:4] = fading(0.9, 0.8, 0.7, 0.6)
    model.gaussian.fit(2 * torch.randn(20, 32, 4, 6, 7), torch.rand(20, 1))
    brains, z, people = torch.randn(2, 32, 4, 6, 7), torch.arange(32).repeat(2), torch.full((64, 1), 50.0)
    noise = model.gaussian.correlate(torch.randn(64, 4, 6, 7), z, 32)
    t, projections = torch.tensor([900, 400]), model.gaussian.project(brains)
    batch = brains.flatten(0, 1), z, t.repeat_interleave(32), noise, 32, people
    assert torch.allclose(model(*batch, projections=projections), model(*batch), rtol=1e-3)
    window = [part.unflatten(0, (2, 32))[:, 8:12].flatten(0, 1) for part in (batch[0], z, batch[2], noise)]
    losses = []
    for more in ({}, {"projections": projections}, {"projections": projections + 50}):
        torch.manual_seed(0)
        losses.append(model(*window, 4, people[:8], **more))
    assert losses[0].shape == (8,)
    assert all((a - b).abs().min() > 1e-6 for a, b in pairwise(losses))


def fading(*rho: float) -> torch.Tensor:
    """Correlation [C, 32, 32] that is rho^|z - z'| in each channel."""
    z = torch.arange(32)
    return torch.stack([r ** (z[:, None] - z).abs().float() for r in rho])


def test_noise_of_a_brain_has_unit_variance_and_the_measured_correlation():
    """Channel by channel, for any slices of two brains; between brains and channels there is none."""
    model, z = tiny_model(latent_shape=(2, 100, 200)), torch.tensor([3, 4, 9, 29, 30, 31])
    white = torch.randn(6, 2, 100, 200, generator=torch.Generator().manual_seed(0))
    for K in (
        model.gaussian.correlation[:2].clone(),
        fading(0.9, 0.5),
    ):  # until it is measured, one noise for all slices
        model.gaussian.correlation[:2] = K
        noise = model.gaussian.correlate(white, z, 3)
        for channel in range(2):
            blocks = [K[channel][at[:, None], at] for at in z.split(3)]
            assert torch.allclose(torch.cov(noise[:, channel].flatten(1)), torch.block_diag(*blocks), atol=0.03)
        assert torch.cov(noise.movedim(1, 0).flatten(1))[0, 1].abs() < 0.03
    assert torch.equal(model.gaussian.correlate(white, z, 1), white)  # a slice by itself has no neighbours


@pytest.mark.parametrize("slices", [20, 48])
def test_brains_may_have_any_number_of_slices(awaken, slices):
    model = awaken(tiny_model(slices=4, slices_per_brain=slices, modes=2)).eval()
    brains, z = torch.randn(5, slices, 4, 6, 7), torch.arange(slices)
    model.gaussian.fit(brains, torch.empty(5, 0))
    for window in (4, slices):
        projections = model.gaussian.project(brains)
        loss = model(brains[:, :window].flatten(0, 1), z[:window].repeat(5), slices=window, projections=projections)
        assert loss.shape == (5 * window,) and loss.isfinite().all()


@pytest.mark.parametrize("recipe", md.RECIPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_are_float32_and_finite_in_half_precision(awaken, recipe, dtype):
    model = awaken(tiny_model(recipe, slices=4, slices_per_brain=8, modes=2))
    brains, z, noise = torch.randn(5, 8, 4, 6, 7), torch.arange(8), torch.randn(8, 4, 6, 7)
    model.gaussian.fit(brains, torch.empty(5, 0))
    t = torch.full((8,), 400)
    for ask in (lambda: [model(brains[0], z, t, noise, 8)], lambda: model.denoise(brains[0], 400, z)):
        with torch.autocast("cpu", dtype):
            answers = ask()
        for answer, exact in zip(answers, ask(), strict=True):
            assert answer.dtype == torch.float32 and torch.allclose(answer, exact, rtol=0.1, atol=0.1)
