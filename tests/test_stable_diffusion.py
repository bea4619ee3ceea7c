"""Laws of stable_diffusion.py: a brain is a function of (seed, number), and what a run promises."""

import json
import os
import shutil
import signal
from argparse import Namespace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image

import stable_diffusion
import util
from dataset import list_slices, load_slices, move, write_slices
from heads.people import CONDITIONS
from logger import read_log
from model_diffusion import SAMPLERS, LatentDiffusion
from model_VAE import VAE
from scores.metrics import adjacent_ssim
from stable_diffusion import (
    BrainNoise,
    Sampling,
    around_windows,
    decode_brain,
    draw_brains,
    sample_latents,
    window_starts,
)
from training import checkpoints
from training import run as training_run
from training.stages import load_first_stage, load_second_stage, save_second_stage

TINY = ["--preset", "demo", "--precision", "fp32", "--steps", 4, "--widths", 8, 16, "--batch-size", 4, "--slices", 2]
ONE_STEP = ["--minutes", 1e-9]  # a limit that is over when the first step is done
CPU = Namespace(device=torch.device("cpu"), autocast=lambda: util.autocast(torch.device("cpu"), "fp32"))


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Two reports a run, a shallow network; four training brains are enough to calibrate by."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_run, "REPORTS", 2)
        patch.setattr(stable_diffusion, "BLOCKS", 1)
        patch.setattr(stable_diffusion, "CALIBRATION_LEAST", 2)
        yield


@pytest.fixture(scope="module")
def straight(heads_folder, first_stage, tmp_path_factory, run_in) -> Path:
    """The folder of a run "diffusion" of four steps that nothing interrupted. Read only."""
    folder = tmp_path_factory.mktemp("second")
    run_in(folder, stable_diffusion, "--data", heads_folder, "--first-stage", first_stage, *TINY)
    return folder


@pytest.fixture
def trained(straight, tmp_path, monkeypatch) -> Path:
    """The working folder, with a copy of the run "diffusion"."""
    shutil.copytree(straight, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def train(run_main, heads_folder, first_stage):
    """train("--steps", 3): trains on few heads, checks the exit status, and returns what was printed."""

    def run(*flags, status: int = 0) -> str:
        start = ["--data", heads_folder, "--first-stage", first_stage, *TINY]
        ended, out, errors = run_main(stable_diffusion, *start, *flags)
        assert ended == status, errors
        return out

    return run


@pytest.fixture
def load(first_stage):
    """load("diffusion"): (prior, first stage) of a run."""
    return lambda name="diffusion": load_second_stage(name, stable_diffusion.MODELS)


def weights(name: str = "diffusion") -> dict[str, torch.Tensor]:
    return checkpoints.load_weights(Path(f"model_ckpt/{name}/model.safetensors"))[0]


def tiny_prior(**changes) -> LatentDiffusion:
    """Untrained, with 12 steps and brains of 6 slices, whose noise is half the same."""
    sizes = {"latent_shape": (4, 6, 7), "widths": (8, 16), "blocks": 1, "T": 12, "slices_per_brain": 6}
    model = LatentDiffusion(**sizes | changes).eval()
    model.slice_correlation.copy_(torch.full_like(model.slice_correlation[0], 0.5).fill_diagonal_(1))
    return model


def last(model: LatentDiffusion, sampling: Sampling, brains=range(1), people=None) -> torch.Tensor:
    """The sampled latents, [n Z, C, h, w]."""
    *_, latent = sample_latents(model, sampling, brains, people or [{}] * len(brains))
    return latent


# ------------------------------------------------------------------------------------------------------------- sampling


def test_the_noise_of_a_brain_depends_on_seed_and_number_alone():
    """Draw after draw, in any batch; it is correlated along z as the model says, and other brains have others."""
    model = tiny_prior()
    together, alone = (BrainNoise(model, 5, brains) for brains in (range(3), range(2, 3)))
    draws = []
    for _ in range(3):
        noise = together()
        torch.manual_seed(0)  # nobody else's generator plays a part
        assert noise.shape == (18, 4, 6, 7) and torch.equal(noise[12:], alone())
        draws += [noise[0], noise[6], noise[12]]
    draws.append(BrainNoise(model, 6, range(1))()[0])
    assert len({tuple(draw.flatten().tolist()) for draw in draws}) == 10
    assert torch.stack(draws).std().item() == pytest.approx(1, abs=0.05)
    many = torch.stack([BrainNoise(model, 0, range(i, i + 1))().flatten(1) for i in range(20)])
    assert torch.einsum("nad,nbd->ab", many, many)[0, 3].item() / many[:, 0].numel() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("how", [{"sampler": name} for name in SAMPLERS] + [{"guidance": 2.0}], ids=str)
@pytest.mark.parametrize("slices", [1, 3])
def test_a_brain_is_the_same_in_any_batch(awaken, how, slices):
    """Brain 1 drawn alone is the second half of a batch of two, at every step; drawn again it is so to the bit."""
    model, sampling = awaken(tiny_prior(slices=slices)), Sampling(seed=3, steps=8, precision="fp32", **how)
    both, alone, again = (
        list(sample_latents(model, sampling, brains, [{}] * len(brains)))
        for brains in (range(2), range(1, 2), range(1, 2))
    )
    assert len(both) == len(alone) == (12 if sampling.sampler == "ddpm" else 8)
    assert torch.allclose(torch.stack(both)[:, 6:], torch.stack(alone), atol=1e-4)
    assert torch.equal(alone[-1], again[-1])
    assert (both[-1][:6] - alone[-1]).abs().max() > 0.1
    assert (alone[-1][0] - alone[-1][5]).abs().max() > 1e-3
    other = last(model, Sampling(seed=4, steps=8, precision="fp32", **how), range(1, 2))
    assert (other - alone[-1]).abs().max() > 0.1


def test_every_setting_of_sampling_changes_the_brain(awaken):
    model = awaken(tiny_prior())
    ways = [{"steps": 8}, {"steps": 12}, {"guidance": 2.0}, {"sampler": "heun"}, {"sampler": "ddim"}]
    brains = [last(model, Sampling(**{"steps": 10, "precision": "fp32"} | how)) for how in [*ways, {"sampler": "ddpm"}]]
    assert all((a - b).abs().max() > 1e-4 for n, a in enumerate(brains) for b in brains[:n])


def test_sampling_refuses_what_there_is_not():
    for wrong, words in (({"sampler": "euler"}, "sampler must be one of dpm"), ({"height": 1.8}, "age.*not height")):
        with pytest.raises(ValueError, match=words):
            Sampling(**wrong)
    assert Sampling(age=75, sex=None).person == {"age": 75}
    assert Sampling(steps=9, guidance=1.5).words() == "dpm in 9 steps, guidance 1.5"
    assert Sampling(sampler="ddpm").words() == "ddpm"


def test_a_person_changes_the_brain(awaken):
    """Each condition does, what is not said is unknown, and guidance moves away from knowing nothing."""
    model = awaken(tiny_prior(conditions=("age", "sex", "cdr"), slices=3), 0.2)
    people = [{}, {"age": 75.0}, {"age": 25.0}, {"age": 75.0, "sex": 1.0}, {"age": 75.0, "cdr": 1.0}]
    plain, guided = (Sampling(steps=4, precision="fp32", guidance=weight) for weight in (1.0, 2.0))
    brains = [last(model, plain, people=[person]) for person in people]
    brains.append(last(model, guided, people=[people[1]]))
    assert all((a - b).abs().max() > 1e-4 for n, a in enumerate(brains) for b in brains[:n])
    assert torch.equal(last(model, plain, people=[{}]), brains[0])


@pytest.mark.parametrize("steps", [1, 15, 16, 31, 33, 120])
def test_the_way_for_the_gif_is_short_and_ends_with_the_sample(awaken, steps, tiny_sizes):
    """Some sixteen latents of those that sampling passes, the last among them."""
    model = awaken(LatentDiffusion(latent_shape=(4, 12, 14), widths=(8,), blocks=1, slices_per_brain=2, T=120).eval())
    model.description = {}
    sampling = Sampling(steps=steps, precision="fp32")
    _, person, way = next(draw_brains(model, VAE(**tiny_sizes).eval(), sampling))
    passed = list(sample_latents(model, sampling, range(1), [{}]))
    assert person == {} and len(passed) == steps and min(steps, 16) <= len(way) <= 31
    assert torch.equal(way[-1], passed[-1]) and all(any(torch.equal(x, y) for y in passed) for x in way)


def test_brains_are_drawn_without_a_command_line(people_run, load):
    """draw_brains with a Sampling: brain i is the same whatever is drawn before it, and nearly so in a batch."""
    model, first_stage = load("people")
    sampling = Sampling(age=74, sex="F", steps=4, precision="fp32")
    drawn = {}
    for order in (range(3), range(2, -1, -1)):
        for i in order:
            slices, person, _ = next(draw_brains(model, first_stage, sampling, range(i, i + 1)))
            assert np.array_equal(drawn.setdefault(i, slices), slices)
            assert person["age"] == 74 and person["sex"] == 0 and slices.shape == (32, 64, 64)
    assert not np.array_equal(drawn[0], drawn[1])
    together = last(model, sampling, range(3), [person] * 3)
    for i, latent in enumerate(together.split(32)):
        difference = np.abs(decode_brain(first_stage, latent, 0, i).astype(int) - drawn[i])
        assert difference.max() <= 1 and (difference > 0).mean() <= 0.001
    with pytest.raises(util.UserError, match="--age 20: the model was trained on age 74"):
        next(draw_brains(model, first_stage, Sampling(age=20)))


def test_shown_slices_are_those_of_the_whole_brain(first_stage):
    """With the grain of the brain, whichever slices are decoded."""
    codes = load_first_stage(first_stage, decoder="perceptual")
    latent = torch.randn(20, *codes.latent_shape)
    whole, shown = decode_brain(codes, latent, 5, 1), decode_brain(codes, latent, 5, 1, [3, 11])
    difference = np.abs(whole[[3, 11]].astype(int) - shown)
    assert difference.max() <= 1 and (difference > 0).mean() <= 0.001
    assert codes.has_grain and not np.array_equal(whole, decode_brain(codes, latent, 5, 2))


# ------------------------------------------------------------------------------------------------------------- training


def test_windows_are_neighbouring_slices_of_one_case(heads_folder, tmp_path, monkeypatch):
    """Of any length up to a brain; every slice is seen nearly as often as any other."""
    monkeypatch.chdir(tmp_path)
    data = load_slices(heads_folder, "train", 64)
    assert torch.equal(window_starts(data, 1), torch.arange(80))
    for slices in (2, 8, 13, 20):
        index = window_starts(data, slices)[:, None] + torch.arange(slices)
        assert (data.case[index] == data.case[index[:, :1]]).all() and (data.z[index].diff(dim=1) == 1).all()
        seen = torch.bincount(index.flatten(), minlength=80)
        assert seen.min() >= slices and seen.max() < 3 * slices
        around, visible = around_windows(window_starts(data, slices), slices, 20)  # whole brains, the windows in them
        assert torch.equal(around[visible], index.flatten())
        assert torch.equal(data.z[around], torch.arange(len(around)) % 20)
        assert (data.case[around].view(-1, 20) == data.case[index[:, :1]]).all()
    single, visible = around_windows(torch.tensor([70, 3]), 1, 20)
    assert single.tolist() == [70, 3] and visible is None


def test_training_sees_every_head_moved_as_a_whole_and_told(train, heads_folder, first_stage, monkeypatch):
    """Once as it is, and as often as asked for in another place: what is said of it is what was done to it."""
    seen, forward = [], LatentDiffusion.forward

    def watched(self, latent, z, *rest, moves=None, **more):
        if self.training:
            seen.append((latent, z, moves, self.channel_weight))
        return forward(self, latent, z, *rest, moves=moves, **more)

    monkeypatch.setattr(LatentDiffusion, "forward", watched)
    train("--moved-heads", 1, "--slices", 10, "--batch-size", 10, "--steps", 40)
    data, codes, found = load_slices(heads_folder, "train", 64), load_first_stage(first_stage), set()
    for latent, z, moves, channel_weight in seen:
        assert torch.equal(z, torch.arange(20)) and (moves == moves[0]).all()
        assert torch.equal(channel_weight, codes.channel_weight())  # errors count by what they do to a picture
        for case in range(4):
            x, z, _ = data.batch(torch.arange(20 * case, 20 * case + 20))
            x = move(x, moves, mode="bicubic").clamp(-1, 1) if moves.any() else x
            if torch.allclose(codes.encode(x, z), latent, atol=1e-4):
                found.add((case, *moves[0].tolist()))
    assert len(found) == 8 and len({head[1:] for head in found}) == 5  # 4 heads as they are, and 4 that were moved
    one, two = (stable_diffusion.head_moves(data, copies, seed=0) for copies in (1, 2))
    assert torch.equal(one[0], two[0]) and {tuple(m) for m in one[0].tolist()} < {head[1:] for head in found}


def test_training_lowers_the_loss_of_brains_never_seen(train):
    """With validation at fixed noise and steps, so that two reports can be compared."""
    train("--steps", 60, "--learning-rate", 0.02, "--batch-size", 8)
    loss = [line["validate/loss"] for line in read_log(Path("log/diffusion")) if "validate/loss" in line]
    assert len(loss) == 2 and loss[-1] < 0.95 * loss[0]


def test_validation_is_a_function_of_the_model(awaken):
    """Whatever the state of the generator; and it has the fixed steps spread over the whole process."""
    model, seen = awaken(tiny_prior(T=1000)), []
    model.register_forward_pre_hook(lambda module, args: seen.append(args[2]))
    latents, z, losses = torch.randn(100, 4, 6, 7), torch.arange(100) % 6, []
    for seed in (1, 2):
        torch.manual_seed(seed)
        losses.append(stable_diffusion.validate(model, latents, z, torch.zeros(100, 0), CPU))
    assert losses[0] == losses[1] > 0
    t = torch.cat(seen[: len(seen) // 2])
    assert len(t) == 100 and t.min() == 0 and t.max() == 999 and t.diff().max() < 12


def test_few_brains_are_validated_at_many_steps(awaken):
    """A model that mixes slices sees them whole, all slices at one step."""
    model, seen = awaken(tiny_prior(T=1000, slices=3)), []
    model.register_forward_pre_hook(lambda module, args: seen.append((args[2], args[4])))
    stable_diffusion.validate(model, torch.randn(18, 4, 6, 7), torch.arange(18) % 6, torch.zeros(18, 0), CPU)
    t = torch.cat([t for t, _ in seen]).view(-1, 6)
    assert {slices for _, slices in seen} == {6} and (t == t[:, :1]).all()
    assert len(t) == 33 and t.min() == 0 and t.max() == 999 and t[:, 0].diff().max() < 33


# ------------------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("flags", [["--moved-heads", 2], ["--recipe", "ddpm", "--slices", 1]], ids=lambda f: f[0])
def test_a_run_stopped_after_every_step_equals_an_uninterrupted_one(train, differences, flags):
    """Weights, averages, optimiser, calibration and log to the bit, with all that happens at a stop in between."""
    for folder, starts in (("straight", [[]]), ("stopped", [ONE_STEP] * 3 + [[]])):
        Path(folder).mkdir()
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            for step, more in enumerate(starts, 1):
                out = train(*flags, *more)
                assert (f"stopped after {step} steps" in out) == (more == ONE_STEP)
                assert (f"resumed at step {step - 1}" in out) == (step > 1)
    assert differences(Path("straight"), "diffusion", Path("stopped"), "diffusion") == []


def test_a_signal_ends_a_run_after_a_whole_step(train, straight, differences, at_step, tmp_path):
    at_step(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert "stopped after 3 steps; the same command continues" in train(status=130)
    assert "resumed at step 3" in train()
    assert differences(straight, "diffusion", tmp_path, "diffusion") == []


def test_a_run_that_was_killed_goes_on_from_its_last_checkpoint(
    train, straight, differences, at_step, die, tmp_path
):
    at_step(4, die)
    with pytest.raises(die.error):
        train()
    assert "resumed at step 2" in train()
    assert differences(straight, "diffusion", tmp_path, "diffusion") == []


def test_a_run_stopped_before_its_calibration_is_calibrated_by_the_same_command(
    trained, train, straight, differences, monkeypatch
):
    """Also by Ctrl-C in the last step; once it is, it is not calibrated again, but after more steps it is."""
    with monkeypatch.context() as patch:
        patch.setattr(stable_diffusion, "calibrate", lambda *args: False)
        train("--name", "late")
    assert not any(weights("late")["prior.calibration.weight"].flatten() != 0)
    train("--name", "late")
    calibrated = weights("late")
    assert all(torch.equal(tensor, calibrated[name]) for name, tensor in weights().items())
    assert (calibrated["prior.calibration.weight"] != 0).any()
    monkeypatch.setattr(stable_diffusion, "sample_dpm", None)  # what calibration draws brains with
    train()
    assert differences(straight, "diffusion", trained, "diffusion") == []
    with pytest.raises(TypeError):
        train("--steps", 5)


def test_models_of_few_brains_are_not_calibrated(train, load, monkeypatch):
    monkeypatch.setattr(stable_diffusion, "CALIBRATION_LEAST", 5)
    assert "not calibrated: 4 whole training brains" in train()
    assert not load()[0].calibration.measured


def test_a_second_stage_of_another_first_stage_starts_anew(trained, train, first_stage):
    """The same path, but trained further: latents of both would be a mixture."""
    tensors, description = checkpoints.load_weights(first_stage)
    keep = first_stage.read_bytes()
    try:
        checkpoints.save_weights(first_stage, {name: 1.01 * tensor for name, tensor in tensors.items()}, description)
        out = train("--steps", 2)
        assert "made from other weights" in out and "step 2 " in out
    finally:
        first_stage.write_bytes(keep)


# ------------------------------------------------------------------------------------------------------ what a run does


def test_a_run_leaves_what_the_layout_promises(trained, load, first_stage, heads_folder):
    """Weights that carry their first stage, a description, a log that reads, pictures; brains of 20 slices."""
    model, inside = load()
    assert not torch.allclose(model.slice_correlation, torch.ones(()), atol=0.1)  # it was measured
    assert len(model.linear.modes) == 1 and (model.linear.mean.flatten(1).abs().amax(1) > 0).all()  # and so was this
    assert model.calibration.measured and (model.calibration.power > 0).any(1).all()  # and this, after the last step
    checkpoint = checkpoints.load_checkpoint(Path("model_ckpt/diffusion/last.pt"), "stable_diffusion.py")
    assert not (checkpoint["model"]["calibration.weight"] != 0).any()  # training further begins without
    assert model.latent_shape == (4, 6, 8) and model.slices_per_brain == 20
    assert model.description["step"] == 4 and model.description["data"]["slices"] == 80
    expected = load_first_stage(first_stage)
    assert all(torch.equal(a, b) for a, b in zip(inside.state_dict().values(), expected.state_dict().values()))
    run = json.loads(Path("log/diffusion/run.json").read_text())
    assert run["script"] == "stable_diffusion.py" and run["settings"]["preset"] == "demo"
    assert run["parameters"] == sum(p.numel() for p in model.parameters())
    log = read_log(Path("log/diffusion"))
    assert [line["step"] for line in log if "train/loss" in line] == [1, 2, 3, 4]
    reports = [line for line in log if "validate/loss" in line]
    assert [line["step"] for line in reports] == [2, 4]
    real = adjacent_ssim(load_slices(heads_folder, "validate", 64).whole_brains()).mean().item()
    for line in reports:  # neighbouring slices of the sampled brain beside those of the brains held out
        assert line["real/adjacent_ssim"] == pytest.approx(real, abs=1e-6) and -1 <= line["sample/adjacent_ssim"] <= 1
    assert {path.name for path in Path("diffusion_vis").iterdir()} == {"sample_000002.png", "sample_000004.png"}


def test_sampling_writes_sheet_volume_and_slices_per_brain_and_the_gif(trained, run_main, load):
    """In the form that dataset.py reads; each brain is the one that its number and the seed stand for."""
    flags = ["--seed", 5, "--sampler", "heun", "--sample-steps", 6, "--precision", "fp32"]
    status, out, errors = run_main(stable_diffusion, "--sample", "--brains", 2, *flags)
    assert status == 0 and "trained for 4 steps" in out and "heun in 6 steps" in out, errors
    samples = Path("diffusion_vis/samples")
    assert [slice_[:2] for slice_ in list_slices(samples, "test")] == [(i, z) for i in range(2) for z in range(20)]
    slices = load_slices(samples, "test", 64).images.numpy().reshape(2, 20, 64, 64)
    model, first_stage = load()
    assert first_stage.has_grain  # the decoder with grain is the default
    sampling = Sampling(seed=5, sampler="heun", steps=6, precision="fp32")
    assert np.array_equal(slices[1], next(draw_brains(model, first_stage, sampling, range(1, 2)))[0])
    assert not np.array_equal(slices[0], slices[1])
    for i in range(2):
        voxels = np.asanyarray(nibabel.load(samples / f"brain_{i:03d}.nii.gz").dataobj)
        assert np.array_equal(voxels.transpose(2, 0, 1), slices[i])
        assert (samples / f"brain_{i:03d}.png").stat().st_size > 1000
    record = json.loads((samples / "samples.json").read_text())
    assert record["made_by"]["settings"]["sample_steps"] == 6 and record["brains"].keys() == {"0", "1"}
    with Image.open(samples / "process.gif") as gif:
        assert 1 < gif.n_frames <= 51 and gif.size == (4 * 64, 64)
    assert (samples / "process.gif").stat().st_size < 3_000_000


def test_sample_trains_first_if_nothing_was_trained(train):
    """One command from a first stage to pictures, wherever they are to go."""
    out = train("--sample", "--out", "mine", "--sample-steps", 3)
    assert "training it first" in out and "step 4 " in out
    assert len(list_slices(Path("mine"), "test")) == 20 and not Path("diffusion_vis/samples").exists()


def test_one_file_is_enough_to_sample(trained, run_main, monkeypatch):
    """The weights carry their first stage: elsewhere, without it and without the data, they draw the same brain."""
    flags = ("--sample", "--sample-steps", 3)
    assert run_main(stable_diffusion, *flags, "--out", "here")[0] == 0
    shutil.copytree("model_ckpt/diffusion", "elsewhere/model_ckpt/mine")
    shutil.copy("model_ckpt/diffusion/model.safetensors", "elsewhere/stable_diffusion.safetensors")
    monkeypatch.chdir("elsewhere")
    monkeypatch.setattr(stable_diffusion, "load_first_stage", None)
    monkeypatch.setattr(stable_diffusion, "RELEASED", Path())
    assert run_main(stable_diffusion, *flags, "--name", "mine")[0] == 0
    status, out, _ = run_main(stable_diffusion, *flags)  # nothing was trained here
    assert status == 0 and "sampling the released weights" in out
    here = {file.name: file.read_bytes() for file in (trained / "here").iterdir()}
    assert len(here) == 20 + 6
    for folder in ("mine_vis", "diffusion_vis"):
        assert here == {file.name: file.read_bytes() for file in Path(folder, "samples").iterdir()}


def test_weights_follow_from_the_seed_alone(trained, train, monkeypatch):
    """Reports, pictures and checkpoints in between leave no trace; another seed is another run."""
    monkeypatch.setattr(training_run, "REPORTS", 4)
    train("--name", "often")
    train("--name", "other", "--seed", 1, "--steps", 1)
    runs = [weights(name) for name in ("diffusion", "often", "other")]
    assert all(torch.equal(tensor, runs[1][name]) for name, tensor in runs[0].items())
    assert not torch.equal(*(run["prior.unet.stem.weight"] for run in runs[1:]))


@pytest.mark.parametrize("recipe", ["min-snr", "flow", "edm"])
def test_every_recipe_trains_and_samples(train, load, recipe):
    """And a resumed run keeps the one that it was started with."""
    train("--recipe", recipe, "--steps", 1)
    assert json.loads(Path("log/diffusion/run.json").read_text())["settings"]["recipe"] == recipe
    model, first_stage = load()
    slices, _, _ = next(draw_brains(model, first_stage, Sampling(steps=3, precision="fp32")))
    assert slices.shape == (20, 64, 64) and slices.max() > slices.min()


def test_what_does_not_fit_is_one_line(trained, refused, heads_folder, first_stage, tiny_sizes, load):
    """No first stage, weights of another kind, a setting that differs, too much asked for; nothing is written."""
    before = {path: path.read_bytes() for path in Path("model_ckpt/diffusion").iterdir()}
    description = {"kind": "vae", "preset": "demo", "model_kwargs": tiny_sizes, "data": {}, "step": 1}
    checkpoints.save_weights(Path("model_ckpt/vae/model.safetensors"), VAE(**tiny_sizes).state_dict(), description)
    Path("broken.safetensors").write_bytes(first_stage.read_bytes()[:-99])
    model, inside = load()
    sure = LatentDiffusion(**model.description["model_kwargs"] | {"drop_z": 0})
    save_second_stage(Path("sure.safetensors"), sure, inside, model.description | {"model_kwargs": {
        **model.description["model_kwargs"], "drop_z": 0}})  # fmt: skip
    new = ["--data", heads_folder, "--preset", "demo", "--name", "new", "--first-stage"]
    for flags, words in (
        ([*new, "gone"], ["there are no weights at gone", "python prestage_train.py"]),
        ([*new, "diffusion"], ["diffusion", "no first stage"]),
        ([*new, "broken.safetensors"], ["broken.safetensors"]),
        ([*new, first_stage, "--slices", 21, "--batch-size", 21], ["--slices 21", "20"]),
        ([*new, first_stage, "--slices", 8, "--batch-size", 12], ["--batch-size 12", "--slices 8"]),
        (["--first-stage", "vae"], ["--first-stage vae", "contradicts"]),
        (["--recipe", "edm"], ["--recipe edm", "contradicts"]),
        (["--sample", "--widths", 8], ["--widths", "contradicts"]),
        (["--sample", "--name", "vae"], ["is a vae", "diffusion"]),
        (["--sample", "--sample-steps", 1001], ["--sample-steps 1001", "1000"]),
        (["--sample", "--guidance", 2, "--name", "sure.safetensors"], ["--guidance 2", "always needs z"]),
    ):
        refused(stable_diffusion, *flags, names=words)
    assert {path: path.read_bytes() for path in Path("model_ckpt/diffusion").iterdir()} == before
    assert not Path("log/new").exists() and not Path("model_ckpt/new").exists()


def test_windows_need_whole_and_equal_brains(refused, run_main, noise_folder, first_stage, tmp_path):
    """One line names the flag; slices one by one do without."""
    run = ["--data", noise_folder, "--first-stage", first_stage, *TINY, "--steps", 1]
    (noise_folder / "keras_png_slices_train/case_001_slice_7.nii.png").unlink()
    refused(stable_diffusion, *run, "--slices", 4, names=["--slices 4", "train"])
    images = np.random.default_rng(1).integers(0, 256, (30, 64, 64), dtype=np.uint8)
    for split, case in (("train", 1), ("validate", 2)):
        write_slices(tmp_path / f"other/keras_png_slices_{split}", case, images[: 30 - case])
    names = ["--slices 4", "29", "28"]
    refused(stable_diffusion, *run, "--data", tmp_path / "other", "--slices", 4, names=names)
    status, _, errors = run_main(stable_diffusion, *run, "--slices", 1)
    assert status == 0, errors


# --------------------------------------------------------------------------------------------------------------- people


@pytest.fixture
def people_run(run_main, people_folder, first_stage) -> None:
    """A run "people" of one step, on the slices of a woman of 74 with CDR 0.5."""
    run = ["--data", people_folder, "--first-stage", first_stage, *TINY, "--steps", 1, "--name", "people"]
    assert run_main(stable_diffusion, *run)[0] == 0


def test_a_model_learns_of_people_what_the_table_tells(people_run, run_main, refused, people_folder, first_stage, load):
    """Age, sex and CDR; the weights remember what training saw of them, and nobody else can be asked for."""
    model, _ = load("people")
    assert model.conditions == tuple(CONDITIONS)
    assert model.description["people"] == {"age": [74, 74], "sex": [0], "cdr": [0.5]}
    sample = ["--sample", "--sample-steps", 2, "--name"]
    status, out, errors = run_main(stable_diffusion, *sample, "people", "--age", 74, "--cdr", 0.5)
    assert status == 0 and "brain 0, age 74, sex F, cdr 0.5, in" in out, errors
    (people_folder / "oasis_cross-sectional.csv").unlink()
    run = ["--data", people_folder, "--first-stage", first_stage, *TINY, "--steps", 1, "--name", "none"]
    assert "nothing is learned of age" in run_main(stable_diffusion, *run)[1]
    for flags, words in (
        (["people", "--age", 75], ["--age 75", "age 74 to 74"]),
        (["people", "--sex", "M"], ["--sex M", "sex F"]),
        (["none", "--cdr", 0.5], ["--cdr 0.5", "without"]),
        (["people", "--cdr", 3], ["--cdr"]),
    ):
        refused(stable_diffusion, *sample, *flags, names=words)
