"""Laws of pretrained/ and of playground/release.py: what is given away loads, and is what was trained."""

import sys
from pathlib import Path

import pytest
import torch

import pixelCNN
import prestage_train
import stable_diffusion
from model_diffusion import LatentDiffusion
from model_VAE import MODELS, load_first_stage, load_second_stage
from pixelCNN import load_prior
from playground import release
from scores.scorer import find_scorer
from training import checkpoints

ROOT = Path(__file__).resolve().parents[1]
FIRST = ["--preset", "demo", "--channels", 8, "--patch", 4, "--codebook-size", 16, "--batch-size", 4]
SECOND = ["--preset", "demo", "--steps", 1, "--channels", 8, "--batch-size", 8, "--first-stage", "vqvae"]


@pytest.mark.parametrize("path", sorted((ROOT / "pretrained").glob("*.safetensors")), ids=lambda path: path.stem)
def test_every_released_file_loads_and_second_stages_fit_their_first(path):
    """With the settings that it carries; the released priors are of the released vqvae_f8."""
    kind = checkpoints.load_weights(path)[1]["kind"]
    if kind in MODELS:
        assert load_first_stage(path, decoder=None).description["kind"] == kind
        return
    if kind == "scorer":
        assert find_scorer(path)[1]["kind"] == kind
        return
    load = load_prior if kind in pixelCNN.PRIORS else lambda path: load_second_stage(path, LatentDiffusion, "cpu")
    first_stage = load_first_stage(ROOT / "pretrained/vqvae_f8.safetensors")
    assert load(path)[2]["first_stage"]["digest"] == first_stage.description["digest"]
    assert path.stat().st_size < 30e6


@pytest.fixture
def trained(run_main, phantom_folder) -> list:
    """--data FOLDER, with runs vqvae, sharper (vqvae with another perceptual decoder) and diffusion trained here."""
    data = ["--data", phantom_folder]
    for module, flags in (
        (prestage_train, [*FIRST, "--steps", 2, "--gan-weight", 0]),
        (stable_diffusion, SECOND),
        (prestage_train, ["--preset", "demo", "--steps", 1, "--start-from", "vqvae", "--name", "sharper"]),
    ):
        status, _, errors = run_main(module, *data, *flags)
        assert status == 0, errors
    return data


def test_a_second_stage_is_released_with_any_decoder_of_its_latents(trained, run_main, monkeypatch):
    """Half as large, and without an encoder smaller still; it samples, and says what does not fit."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    status, out, errors = run_main(release, "sharper", "first.safetensors", *trained)
    assert status == 0 and "| `first.safetensors` |" in out, errors
    flags = ["diffusion", "second.safetensors", *trained, "--without-encoder"]
    assert run_main(release, *flags)[0] == 0
    _, carried, _ = load_second_stage("second.safetensors", LatentDiffusion, "cpu", decoder=None)
    assert carried.encoder is None and not carried.draws
    status, _, errors = run_main(release, *flags, "--first-stage", "sharper")
    assert status == 0, errors
    _, carried, description = load_second_stage("second.safetensors", LatentDiffusion, "cpu", decoder=None)
    assert carried.draws and description["training"]["settings"]["batch_size"] == 8
    whole, halved = (Path(p).stat().st_size for p in ("model_ckpt/diffusion/model.safetensors", "second.safetensors"))
    assert halved < 0.7 * whole  # of so small a model the metadata are a part
    trained_on = load_first_stage("first.safetensors")
    assert torch.equal(trained_on.linear.analysis.weight, load_first_stage("vqvae").linear.analysis.weight)
    sampled = ["--sample", "--name", "second.safetensors", "--sample-steps", 2, "--out", "new"]
    status, out, errors = run_main(stable_diffusion, *sampled)
    assert status == 0 and "perceptual decoder" in out and len(list(Path("new").glob("case_000_*"))) == 32, errors

    run_main(prestage_train, *trained, *FIRST, "--steps", 1, "--seed", 1, "--gan-weight", 0, "--name", "other")
    for flags, words in (
        (["diffusion", "x.safetensors", "--first-stage", "other"], "other latents"),
        (["vqvae", "x.safetensors", "--first-stage", "vqvae"], "is for second stages"),
        (["vqvae", "x.safetensors", "--without-encoder"], "is for second stages"),
        (["second.safetensors", "x.safetensors"], "has no encoder"),
    ):
        status, _, errors = run_main(release, *flags, *trained)
        assert status == 2 and len(errors.splitlines()) == 1 and words in errors, errors
        assert not Path("x.safetensors").exists()


def test_settings_of_another_version_are_one_line(trained, run_main):
    weights, description = checkpoints.load_weights(Path("model_ckpt/diffusion/model.safetensors"))
    description["model_kwargs"]["shared_noise"] = 1.0
    checkpoints.save_weights(Path("old.safetensors"), weights, description)
    status, _, errors = run_main(stable_diffusion, "--sample", "--name", "old.safetensors")
    assert status == 2 and len(errors.splitlines()) == 1 and "does not know" in errors, errors
