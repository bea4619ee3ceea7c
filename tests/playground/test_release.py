"""Laws of pretrained/ and of playground/release.py: what is given away loads, and is what was trained."""

import pytest
import torch

import prestage_train
import stable_diffusion
from model_VAE import MODELS
from playground import release
from scores import scorer
from training.checkpoints import RELEASED, load_weights
from training.stages import load_first_stage, load_second_stage

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
        (prestage_train, ["--start-from", "vqvae", "--name", "sharper", "--gan-weight", 0.5, "--steps", 1], "weights"),
        (stable_diffusion, [*TINY, "--steps", 1], "weights"),
        (release, ["vqvae", "first.safetensors"], "| `first.safetensors` |"),
        (release, ["diffusion", "second.safetensors", "--first-stage", "sharper", "--without-encoder"], "two decoders"),
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
    assert carried.encoder is None and carried.has_grain and prior.description["training"]["seed"] == 0
