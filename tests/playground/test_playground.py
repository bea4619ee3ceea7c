"""Laws of playground/: each script asks one question, its commands parse, and what it computes or releases is right."""

import importlib
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

import prestage_train
import stable_diffusion
from model_diffusion import LatentDiffusion
from model_VAE import MODELS
from playground import age, equal_time, noise_sharing, recipes, release, spread
from scores import scorer
from training.checkpoints import RELEASED, load_weights
from training.stages import load_first_stage, load_second_stage


@pytest.mark.parametrize("name", sorted(path.stem for path in Path(age.__file__).parent.glob("*.py")))
def test_each_script_asks_a_question_and_its_own_commands_parse(name):
    script = importlib.import_module(f"playground.{name}")
    assert "?" in script.__doc__.splitlines()[0]
    commands = [line for line in script.__doc__.splitlines() if line.startswith(f"    python playground/{name}.py")]
    assert commands and all(script.flags().parse_args(shlex.split(line, comments=True)[2:]) for line in commands)


def test_correlation_components_slopes_and_interpolated_time():
    ages = np.arange(20.0, 60.0)
    assert age.correlation(ages, 3 - 2 * ages) == (pytest.approx(-1), pytest.approx([-1, -1]))
    brains = torch.randn(30, 4, 2, 3, 3, dtype=torch.float64)
    axes, difference = spread.principal_components(brains, 29), (brains - brains.mean(0)).flatten(1)
    assert torch.allclose(axes @ axes.T, torch.eye(29, dtype=torch.float64), atol=1e-9)
    truth = difference @ axes.T
    assert torch.allclose(truth @ axes, difference, atol=1e-9) and (truth.var(0).diff() < 0).all()
    assert spread.slopes(0.5 * truth + 7, truth) == pytest.approx([0.5] * 5)
    points = [{"seconds": 10.0, "ssim": 0.5}, {"seconds": 20.0, "ssim": 0.9}]
    assert [equal_time.seconds_to(points, ssim) for ssim in (0.4, 0.8, 0.95)] == [10, pytest.approx(17.5), None]


def test_kinds_of_noise_and_the_error_of_a_network_that_knows_nothing():
    """Untrained, v is 0, so x_0 is guessed as alpha x_t, with an error of sigma^2 on latents of unit variance."""
    model = LatentDiffusion(latent_shape=(4, 8, 8), widths=(8,), blocks=1, slices_per_brain=6).eval()
    white, z, noise = torch.randn(6, 4, 8, 8), torch.arange(6), {}
    for kind, correlation in noise_sharing.correlations(model).items():
        model.gaussian.correlation.copy_(correlation)
        noise[kind] = model.gaussian.correlate(white, z, 6)
    assert torch.allclose(noise["shared"], noise["shared"][:1], atol=1e-5)
    assert torch.allclose(noise["own"], white, atol=1e-5) and torch.equal(noise["matched"], noise["shared"])
    errors = recipes.denoising_error(model, torch.randn(60, 4, 8, 8), z.repeat(10))
    assert errors == pytest.approx((1 / (1 + torch.exp(-2 * recipes.NOISE))).tolist(), rel=0.05)


TINY = ["--widths", 8, "--batch-size", 8]


@pytest.mark.parametrize("path", sorted(set(RELEASED.glob("*.safetensors")) - {scorer.RELEASED}))
def test_every_released_stage_loads_and_second_stages_fit_their_first(path):
    if load_weights(path)[1]["kind"] in MODELS:
        assert load_first_stage(path, decoder=None).description["training"]
        return
    _, carried = load_second_stage(path, release.PRIORS)
    assert carried.description["digest"] == load_first_stage(RELEASED / "vqvae_f8.safetensors").description["digest"]


def test_a_second_stage_is_released_with_any_decoder_of_its_latents(phantom_folder, run_main):
    """Rounded but for its codes, and without an encoder; what does not fit is said in one line."""
    for script, flags, words in (
        (prestage_train, [*TINY, "--patch", 4, "--codebook-size", 16, "--steps", 2], "weights"),
        (prestage_train, ["--start-from", "vqvae", "--name", "textured", "--gan-weight", 0.5, "--steps", 1], "weights"),
        (stable_diffusion, [*TINY, "--steps", 1], "weights"),
        (release, ["vqvae", "first.safetensors"], "| `first.safetensors` |"),
        (release, ["diffusion", "second.safetensors", "--first-stage", "textured",
                    "--without-encoder"], "two decoders"),
        (release, ["diffusion", "x.safetensors", "--first-stage", RELEASED / "vqvae_f8.safetensors"], "other latents"),
        (release, ["second.safetensors", "x.safetensors"], "has no encoder"),
    ):
        status, out, errors = run_main(script, "--data", phantom_folder, *flags)
        assert words in (errors if "x.safetensors" in flags else out) and status == 2 * ("x.safetensors" in flags)
    trained, first = (load_first_stage(run).state_dict() for run in ("vqvae", "first.safetensors"))
    exact = {name for name, weight in trained.items() if torch.equal(first[name], weight)}
    assert {"latent_mean", "latent_sd", "linear.analysis.weight", "quantizer.codebook"} <= exact
    assert all(torch.equal(first[name], trained[name].half().float()) for name in trained.keys() - exact)
    prior, carried = load_second_stage("second.safetensors", release.PRIORS)
    assert carried.encoder is None and carried.decoder_in_use == "perceptual"
    assert prior.description["training"]["seed"] == 0
