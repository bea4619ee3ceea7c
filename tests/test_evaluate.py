"""Laws of evaluate.py: what the command prints and writes for a first stage, and what it refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dataset
import evaluate
from model_diffusion import LatentDiffusion
from model_VAE import VAE, VQVAE
from pixelCNN import PixelCNN
from scores.ledger import score_reconstruction
from training import checkpoints
from training.stages import latent_digest, save_second_stage
from util import UserError


@pytest.fixture
def validate(phantom_folder) -> dataset.Slices:
    """The split at 64 px, with masks, read in the folder in which the command then works."""
    return dataset.load_slices(phantom_folder, "validate", 64, masks=True)


@pytest.fixture
def run_of(validate, tiny_sizes):
    """run_of(VQVAE, "mine", codebook_size=16): such a model at the start of its training, saved as a run."""

    def save(kind: type, name: str, **options):
        model = kind(**tiny_sizes, **options)
        model.fit(*validate.batch(torch.arange(0, 32, 4))[:2])
        description = {"kind": kind.kind, "model_kwargs": tiny_sizes | options, "step": 0}
        checkpoints.save_weights(checkpoints.run_weights(name), model.state_dict(), description)
        model.description = description | {"digest": latent_digest(model.state_dict())}
        return model.eval()

    return save


@pytest.fixture
def scored(run_main, phantom_folder, tmp_path):
    """scored("--reconstruction", "mine"): (output, report) of the command on the phantom."""

    def run(*flags, file="mine/reconstruction_validate.json") -> tuple[str, dict]:
        status, out, errors = run_main(evaluate, *flags, "--data", phantom_folder, "--device", "cpu")
        assert status == 0, errors
        return out, json.loads((tmp_path / "model_ckpt" / file).read_text())

    return run


def test_the_command_scores_a_run_and_says_where(run_of, scored, validate):
    model = run_of(VQVAE, "mine", codebook_size=16)
    out, report = scored("--reconstruction", "mine")
    direct = score_reconstruction(model, validate)
    assert report["result"]["brain_ssim"] == pytest.approx(direct["brain_ssim"], abs=1e-3)
    assert report["data"]["split"] == "validate" and report["decoder"] == "fidelity"
    assert report["rows"][0]["codec"] == "vqvae (mine)" and report["rows"][0]["bits"] == 672
    assert [row["codec"].split()[0] for row in report["rows"]] == ["vqvae", "k-means", "block", "AVIF"]
    assert all({"ssim", "brain_ssim", "ms_ssim", "psnr"} <= row.keys() for row in report["rows"])
    assert "| k-means 4x4, K 16 | 672 |" in out and "python pixelCNN.py --first-stage" in out
    with Image.open("model_ckpt/mine/reconstruction_validate.png") as picture:
        assert len(np.unique(np.asarray(picture))) > 10
    flags = ("--reconstruction", "mine", "--split", "train", "--no-floors", "--out", "elsewhere")
    out, report = scored(*flags, file="../elsewhere/reconstruction_train.json")
    assert report["data"]["split"] == "train" and len(report["rows"]) == 1 and "k-means" not in out
    for name in ("ssim", "brain_ssim", "ms_ssim", "psnr", "ssim_shuffled_z", "brain_ssim_shuffled_z"):
        low, high = report["result"][f"{name}_interval"]  # three brains
        assert low <= report["result"][name] <= high
    low, high = report["result"]["ssim_per_z_interval"]["7"]
    assert low <= report["result"]["ssim_per_z"]["7"] <= high


def test_the_command_scores_a_vae_with_floors_at_its_kl_bits(run_of, scored, refused):
    run_of(VAE, "mine")
    out, report = scored("--reconstruction", "mine")
    assert [row["codec"].split()[0] for row in report["rows"]] == ["vae", "block", "AVIF"] and "noise share" in out
    assert "(KL)" in out and "bits" not in report["rows"][0] and "prior" not in out
    refused(evaluate, "--reconstruction", "mine", "--prior", "any", names=["no codes"])
    refused(evaluate, "--reconstruction", "nobody", names=["nobody"])


def test_the_prior_of_this_first_stage_prices_its_codes(run_of, scored, refused, awaken, validate):
    """The run pixelcnn by itself, but only if its first stage is this one; any other by --prior, or one line."""
    model = run_of(VQVAE, "mine", codebook_size=16)
    run_of(VQVAE, "other", codebook_size=8)
    sizes = {"codebook_size": 16, "grid": [12, 14], "channels": 16, "layers": 2}
    prior = awaken(PixelCNN(**sizes)).eval()
    save_second_stage(checkpoints.run_weights("pixelcnn"), prior, model, {"model_kwargs": sizes})
    out, report = scored("--reconstruction", "mine", "--no-floors")
    x, z, _ = validate.batch(torch.arange(32))
    expected = prior.bits(model.encode_indices(x, z), z).mean().item()
    assert "under the PixelCNN" in out and report["result"]["prior_bits"] == pytest.approx(expected, rel=1e-3)
    other = ("--reconstruction", "other", "--no-floors")
    out, _ = scored(*other, file="other/reconstruction_validate.json")
    assert "under the PixelCNN" not in out and "left out" in out and "--name NEW" in out
    refused(evaluate, *other, "--prior", "pixelcnn", names=["another first stage"])


def test_each_decoder_has_scores_of_its_own(run_of, scored):
    run_of(VQVAE, "mine", codebook_size=16, perceptual=True)
    flags = ("--reconstruction", "mine", "--no-floors")
    reports = [scored(*flags)[1]]
    reports += [scored(*flags, "--decoder", "perceptual", file="mine/reconstruction_validate_perceptual.json")[1]]
    assert [report["decoder"] for report in reports] == ["fidelity", "perceptual"]
    assert reports[1]["rows"][0]["codec"] == "vqvae (mine), perceptual decoder"
    assert scored(*flags)[1] == reports[0]


def test_held_out_heads_go_through_the_first_stage_of_the_samples(run_of, validate, tmp_path, monkeypatch):
    """That of the weights which samples.json names: with its decoder, and its encoder wherever that is; else none."""
    monkeypatch.chdir(tmp_path)
    model, brains = run_of(VAE, "vae"), validate.whole_brains()
    z, x = torch.arange(32), dataset.to_float(brains[0])[:, None]
    prior = LatentDiffusion(latent_shape=model.latent_shape, widths=(8,), blocks=1)
    own, released = checkpoints.run_weights("mine"), Path("pretrained/made_here.safetensors")
    described = {"model_kwargs": {"latent_shape": list(model.latent_shape), "widths": [8], "blocks": 1}}
    save_second_stage(own, prior, model, described)
    expected = dataset.to_slices(model.decode(model.encode(x, z), z))
    model.keep_decoders()
    save_second_stage(released, prior, model, described)  # its encoder is that of the run vae
    for weights in (own, released):
        record = {"made_by": {"weights": checkpoints.file_digest(weights)}}
        through = evaluate.first_stage_of(record, torch.device("cpu"))
        assert (through(brains)[0].int() - expected.int()).abs().max() <= 1
    checkpoints.run_weights("vae").unlink()
    own.unlink()
    assert evaluate.first_stage_of(record, torch.device("cpu")) is None
    assert evaluate.first_stage_of({"made_by": {}}, torch.device("cpu")) is None


def test_ages_of_samples_are_those_of_their_record():
    record = {"brains": {"0": {"age": "64", "sex": "F"}, "2": {}}}
    ages = evaluate.ages_of_samples(Path("mine"), record, [0, 2, 5])
    assert ages[0] == 64 and ages[1:].isnan().all()
    assert evaluate.ages_of_samples(Path("mine"), {"brains": {}}, [0]) is None
    with pytest.raises(UserError, match="mine/samples.json has an age that is no number"):
        evaluate.ages_of_samples(Path("mine"), {"brains": {"0": {"age": "old"}}}, [0])
