"""Laws that need a CUDA GPU: what the CPU does is done there too, within what its arithmetic allows. pytest -m gpu"""

import gc
from pathlib import Path

import numpy as np
import pytest
import torch

import pixelCNN
import prestage_train
import stable_diffusion
from dataset import load_slices
from pixelCNN import PRIORS, decode_brain, sample_brain
from scores.scorer import train_scorer
from stable_diffusion import Sampling, draw_brains
from training import checkpoints
from training import run as training_run
from training.stages import load_first_stage, load_second_stage

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

FIRST = ["--preset", "demo", "--widths", 8, 16, "--latent-channels", 4, "--codebook-size", 16, "--batch-size", 4]
FIRST += ["--patch", 2, "--gan-weight", 0.5]
DIFFUSION = ["--preset", "demo", "--widths", 8, 16, "--batch-size", 4, "--slices", 2]
PIXELCNN = ["--preset", "demo", "--channels", 8, "--layers", 2, "--batch-size", 4]


@pytest.fixture(scope="module")
def device() -> str:
    """The device of all tests here."""
    return "cuda"


@pytest.fixture
def train(device, heads_folder, run_main, monkeypatch):
    """train(pixelCNN, "--steps", 3): trains on the GPU, checks the exit status, and returns what was printed."""
    monkeypatch.setattr(stable_diffusion, "CALIBRATION_LEAST", 4)

    def run(module, *flags) -> str:
        status, out, errors = run_main(module, "--data", heads_folder, "--device", device, *flags)
        assert status == 0, errors
        return out

    return run


def weights(name: str) -> dict[str, torch.Tensor]:
    return checkpoints.load_weights(Path(f"model_ckpt/{name}/model.safetensors"))[0]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_trainer_takes_a_step(train, precision):
    """All phases of every first stage, both second stages on it, and brains from them: finite, and on the GPU."""
    more = ["--precision", precision, "--steps", 3]
    for model in ("vae", "vqvae", "vqvae2"):
        train(prestage_train, "--model", model, *FIRST, *more)
    train(stable_diffusion, *DIFFUSION, *more, "--sample", "--sample-steps", 3)
    train(stable_diffusion, "--name", "of_vae", "--first-stage", "vae", *DIFFUSION, *more)
    train(pixelCNN, *PIXELCNN, *more, "--sample")
    train(pixelCNN, "--name", "two", "--first-stage", "vqvae2", *PIXELCNN, *more, "--sample")
    for name in ("vae", "vqvae", "vqvae2", "diffusion", "of_vae", "pixelcnn", "two"):
        assert all(tensor.isfinite().all() for tensor in weights(name).values()), name


def test_the_scorer_takes_a_step(device, phantom_folder):
    description = train_scorer(phantom_folder, device, name="scorer", steps=1, batch_size=2)
    assert description["kind"] == "scorer"


@pytest.mark.parametrize(
    "module, name, flags",
    [(prestage_train, "vqvae", FIRST), (stable_diffusion, "diffusion", DIFFUSION), (pixelCNN, "pixelcnn", PIXELCNN)],
    ids=["first stage", "diffusion", "pixelcnn"],
)
def test_a_resumed_run_equals_an_uninterrupted_one(train, first_stage, module, name, flags):
    """To the last bit, in the precision of the card."""
    flags = [*flags, "--steps", 6]
    flags += [] if module is prestage_train else ["--first-stage", first_stage]
    train(module, *flags, "--name", "straight")
    begun = None
    while "stopped after" in train(module, *flags, "--name", "paused", "--minutes", 1e-9):
        begun = begun or weights("paused")
    straight, paused = weights("straight"), weights("paused")
    assert [name for name, tensor in straight.items() if not torch.equal(tensor, paused[name])] == []
    assert any(name in straight and not torch.equal(tensor, straight[name]) for name, tensor in begun.items())


def test_samples_are_those_of_the_cpu(train, device):
    """In float32: brains by diffusion differ by at most one grey level, in at most .1 % of the pixels."""
    train(prestage_train, *FIRST, "--precision", "fp32", "--steps", 30, "--learning-rate", 1e-2)
    train(stable_diffusion, *DIFFUSION, "--precision", "fp32", "--steps", 30, "--learning-rate", 1e-2)
    sampling = Sampling(precision="fp32")
    there, here = (
        next(draw_brains(*load_second_stage("diffusion", stable_diffusion.MODELS, where), sampling))[0]
        for where in (device, "cpu")
    )
    difference = np.abs(there.astype(int) - here)
    assert difference.max() <= 1 and (difference > 0).mean() <= 0.001 and here.std() > 1


def test_codes_are_those_of_the_cpu(train, device):
    """The price of codes to 1e-4, the picture of codes to a grey level, and drawn codes but for close calls."""
    train(prestage_train, *FIRST, "--precision", "fp32", "--steps", 30, "--learning-rate", 1e-2)
    train(pixelCNN, *PIXELCNN, "--precision", "fp32", "--steps", 30, "--learning-rate", 1e-2)
    (prior, first_stage), (prior_cpu, first_cpu) = (
        load_second_stage("pixelcnn", PRIORS, where) for where in (device, "cpu")
    )
    there, here = sample_brain(prior).cpu(), sample_brain(prior_cpu)
    z = torch.arange(len(here))
    bits = prior.bits(here.to(device), z.to(device)).cpu()
    assert torch.allclose(bits, prior_cpu.bits(here, z), rtol=1e-4)
    assert (there == here).flatten(1).all(1).float().mean() >= 0.9  # a code that differs makes others differ
    pictures = [decode_brain(model, here.to(where)) for model, where in ((first_stage, device), (first_cpu, "cpu"))]
    difference = np.abs(pictures[0].astype(int) - pictures[1])
    assert difference.max() <= 1 and (difference > 0).mean() <= 0.001


@pytest.mark.parametrize("model", ["vae", "vqvae"])
def test_the_memory_of_a_step_is_what_was_predicted(train, device, monkeypatch, model):
    """Within 35 %, in 16 bits: in float32, exact convolutions take workspace that is not predicted."""
    found, update, forward = {}, training_run.Run.update, training_run.Run.forward

    def begin(self, *args, **kwargs):
        if self.peak is not None:  # the first step also makes Adam's moments, and loads libraries
            torch.cuda.reset_peak_memory_stats()
        return forward(self, *args, **kwargs)

    def end(self, *args):
        due = update(self, *args)
        found["predicted"], found["peak"] = self.peak, torch.cuda.max_memory_allocated() - found["before"]
        return due

    monkeypatch.setattr(training_run.Run, "forward", begin)
    monkeypatch.setattr(training_run.Run, "update", end)
    gc.collect()
    torch.cuda.empty_cache()
    found["before"] = torch.cuda.memory_allocated()
    sizes = ["--widths", 128, 256, "--blocks", 2, "--batch-size", 64, "--gan-weight", 0]
    train(prestage_train, "--model", model, *FIRST, *sizes, "--precision", "bf16", "--steps", 3)
    assert found["peak"] > 300e6
    assert found["predicted"] == pytest.approx(found["peak"], rel=0.35)


def test_a_first_stage_begins_as_on_the_cpu(train, heads_folder):
    """The linear path is fitted to slices that the card holds; after steps of no size it is still there."""
    slices = load_slices(heads_folder, "train", 64, torch.device("cuda"))
    assert slices.images.is_cuda
    for index in torch.arange(len(slices)).split(16):
        assert torch.equal(slices.batch(index)[0], load_slices(heads_folder, "train", 64).batch(index)[0])
    for device in ("cuda", "cpu"):
        train(prestage_train, *FIRST, "--precision", "fp32", "--steps", 2, "--learning-rate", 1e-12, "--name", device,
              "--device", device)  # fmt: skip
    there, here = (weights(name)["linear.analysis.weight"] for name in ("cuda", "cpu"))
    assert torch.allclose(there, here, atol=1e-4) and here.std() > 0.01


@pytest.mark.slow
def test_compiled_networks_take_a_step(train):
    """All phases, and diffusion; what is written has the names of weights that were not compiled."""
    train(prestage_train, *FIRST, "--steps", 3, "--compile")
    train(stable_diffusion, *DIFFUSION, "--steps", 1, "--compile")
    assert load_first_stage("vqvae", decoder="perceptual").texture is not None
    assert load_second_stage("diffusion", stable_diffusion.MODELS)[0].description["step"] == 1
