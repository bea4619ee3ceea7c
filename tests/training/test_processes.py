"""Laws of training by torchrun's processes: together they make what one process makes of the joined batch."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, unlike

import stable_diffusion
import util
from logger import read_log
from model_diffusion import LatentDiffusion
from model_VAE import VAE
from pixelCNN import PixelCNN
from training.stages import load_first_stage

# ---------------------------------------------------------------------------- processes played by one, after the other


@pytest.fixture
def play(monkeypatch):
    """play(2, act): what act(rank) returns in each of two processes, which have one seed and send no messages."""

    def each(world: int, act) -> list:
        returned = []
        for rank in range(world):
            with monkeypatch.context() as patch:
                for name, value in (("is_initialized", True), ("get_rank", rank), ("get_world_size", world)):
                    patch.setattr(torch.distributed, name, lambda value=value: value)
                torch.manual_seed(0)
                returned.append(act(rank))
        return returned

    return each


@pytest.mark.parametrize("random", [torch.randn_like, torch.rand_like, F.dropout])
def test_random_numbers_are_those_of_the_joined_batch(play, random):
    """In its layout too, in whose order they are drawn."""
    x = torch.ones(6, 4, 5, 3).to(memory_format=torch.channels_last)
    parts = play(3, lambda rank: util.draw_together(random, x.chunk(3)[rank]))
    torch.manual_seed(0)
    assert torch.equal(torch.cat(parts), random(x)) and not torch.equal(parts[0], parts[1])


def vae(sizes: dict):
    """A model, a batch, and what a forward pass returns of each slice."""
    batch = {"x": 2 * torch.rand(4, 1, 64, 64) - 1, "z": torch.arange(4)}
    return VAE(**sizes), batch, lambda out: out[0].mean((1, 2, 3))


def diffusion(sizes: dict):
    """With windows of brains that have modes, and people."""
    sizes = {"latent_shape": (4, 6, 7), "widths": (8, 16), "blocks": 1, "slices": 2, "slices_per_brain": 8, "modes": 2}
    model = LatentDiffusion(**sizes, conditions=("age", "sex"), drop_z=0.2, drop_conditions=0.2)
    model.gaussian.correlation.fill_(0.5).diagonal(dim1=1, dim2=2).fill_(1)
    model.gaussian.modes.normal_()
    people = torch.tensor([[70.0, 0.0], [20.0, 1.0]]).repeat(4, 1).repeat_interleave(2, 0)
    batch = {"latent": torch.randn(16, 4, 6, 7), "z": torch.arange(16) % 8, "people": people}
    return model, batch | {"projections": torch.randn(8, 2)}, lambda out: out


def pixelcnn(sizes: dict):
    model = PixelCNN(codebook_size=5, grid=(4, 5), channels=8, layers=2, dropout=0.5)
    return model, {"idx": torch.randint(5, (4, 4, 5)), "z": torch.arange(4)}, lambda out: out["bits"]


@pytest.mark.parametrize("build", [vae, diffusion, pixelcnn])
def test_models_draw_for_the_joined_batch(play, awaken, tiny_sizes, build):
    """Noise, times, what is hidden, drop-out: each slice has the output, or the loss, that it has in one process."""
    model, batch, of_slices = build(tiny_sizes)
    awaken(model, 0.2).train()

    def forward(rank: int | None = None) -> torch.Tensor:
        return of_slices(model(**{name: x if rank is None else x.chunk(2)[rank] for name, x in batch.items()}))

    two = torch.cat(play(2, forward))
    torch.manual_seed(0)
    one, other = forward(), forward()
    assert torch.allclose(two, one, rtol=1e-5, atol=1e-6) and ((other - one).abs() > 1e-5).all()


# ------------------------------------------------------------------------------------------------------ real processes


def two_processes(folder: Path, runs: list[list], *flags: str) -> subprocess.CompletedProcess:
    """Runs, each a script and its flags, one after the other by two of torchrun's processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *flags]
    command += [str(ROOT / "tests/training/one_of_two.py"), json.dumps(runs, default=str)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def runs(heads_folder, first_stage) -> dict[str, list]:
    """{name of a run: its script and flags}. All are of six steps, and small."""
    each = ["--data", heads_folder, "--preset", "demo", "--precision", "fp32", "--steps", 6, "--batch-size", 2]
    first = ["prestage_train", *each, "--patch", 4, "--latent-channels", 4, "--widths", 8, 16]
    return {
        "vqvae": [*first, "--codebook-size", 16, "--gan-weight", 0.5],
        "vae": [*first, "--model", "vae", "--gan-weight", 0],
        "diffusion": ["stable_diffusion", *each, "--first-stage", first_stage, "--widths", 8, 16, "--slices", 2],
        "pixelcnn": ["pixelCNN", *each, "--first-stage", first_stage, "--channels", 8, "--layers", 2],
    }


@pytest.fixture(scope="module")
def together(runs, tmp_path_factory) -> tuple[Path, str]:
    """The folder of these runs by two processes, and what they said."""
    folder = tmp_path_factory.mktemp("two")
    done = two_processes(folder, list(runs.values()))
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def processes_differ(folder: Path, other: Path, name: str) -> list[str]:
    """Where the first process of a run in `folder` and the second in `other` differ at the end of a phase."""
    phases = [path.name.removesuffix("_0.pt") for path in folder.glob(f"{name}_*_0.pt")]
    assert len(phases) == (2 if name == "vqvae" else 1)
    pairs = ((torch.load(folder / f"{phase}_0.pt"), torch.load(other / f"{phase}_1.pt"), phase) for phase in phases)
    return [found for pair in pairs for found in unlike(*pair)]


@pytest.mark.slow
def test_two_processes_train_one_run(runs, together):
    """Through all phases: one log, one checkpoint of each, one process speaks; all that a checkpoint holds agrees."""
    folder, said = together
    assert said.count("run vqvae:") == 1 and said.count("step 4 ") == len(runs)
    assert load_first_stage(folder / "model_ckpt/vqvae").description["step"] == 6
    for name in runs:
        assert sorted({line["step"] for line in read_log(folder / "log" / name)}) == [1, 2, 3, 4, 5, 6]
        assert processes_differ(folder, folder, name) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vqvae", "vae", "diffusion", "pixelcnn"])
def test_two_processes_make_what_one_makes_of_the_joined_batch(name, runs, together, run_in, monkeypatch, tmp_path):
    """Weights and buffers, of model, average and discriminator, after six steps, up to roundings."""
    monkeypatch.setattr(stable_diffusion, "BLOCKS", 1)
    script, *flags = runs[name]
    run_in(tmp_path, importlib.import_module(script), *flags, "--batch-size", 4)
    checkpoints = list((tmp_path / "model_ckpt" / name).glob("*.pt"))
    assert len(checkpoints) == (2 if name == "vqvae" else 1)
    for checkpoint in checkpoints:
        one, two = (torch.load(folder / "model_ckpt" / name / checkpoint.name) for folder in (tmp_path, together[0]))
        for part in {"model", "ema", "critic"} & one.keys():
            # Adam makes full steps of the critic's smallest gradients, and of their roundings
            tolerance = 1e-4 if part == "critic" else 1e-6
            for tensor, value in one[part].items():
                assert torch.allclose(value, two[part][tensor], rtol=1e-5, atol=tolerance), f"{part} {tensor}"


@pytest.mark.slow
def test_where_one_process_is_killed_torchrun_starts_both_again(runs, together, tmp_path):
    """They go on from the last checkpoint, to the same end."""
    (tmp_path / "die").touch()
    done = two_processes(tmp_path, [runs["vae"]], "--max-restarts", "1")
    assert done.returncode == 0 and not (tmp_path / "die").exists(), done.stderr
    assert "resumed at step 3" in done.stdout
    assert processes_differ(together[0], tmp_path, "vae") == []
