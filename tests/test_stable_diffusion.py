"""Laws of stable_diffusion.py: a brain is a function of (seed, number), and what a run promises."""

import copy
import json
import shutil
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image

import prestage_train
import stable_diffusion
import util
from dataset import list_slices, load_slices, move, write_slices
from heads.people import CONDITIONS
from logger import read_log
from model_diffusion import LatentDiffusion
from model_VAE import VAE, load_first_stage, load_second_stage
from scores.metrics import adjacent_ssim
from stable_diffusion import BrainNoise, around_windows, decode_brain, encode_all, sample_latents, window_starts
from training import checkpoints

CPU = torch.device("cpu")
FIRST = ["--preset", "demo", "--steps", "3", "--report-every", "2", "--channels", "8", "--patch", "4"]
FIRST += ["--codebook-size", "16", "--latent-channels", "4", "--batch-size", "4"]
# with a perceptual decoder whose grain shows, whatever it does to SSIM
FIRST += ["--discriminator-start", "1", "--gan-start", "1", "--guard", "1", "--learning-rate", "0.05"]
TINY = ["--steps", "3", "--report-every", "2", "--channels", "8", "--blocks", "1", "--batch-size", "4", "--slices", "2"]
ONE_STEP = ["--minutes", "1e-6"]  # a limit that is over when the first step is done


def run_in(folder: Path, module, *flags) -> None:
    """Runs a script in this process, working in `folder`; for fixtures that outlive one test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", [Path(module.__file__).name, *map(str, flags)])
        module.main()


@pytest.fixture(scope="module", autouse=True)
def quick_calibration():
    """Two brains are drawn at the end of trainings, and two training brains are enough for that."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stable_diffusion, "CALIBRATION_BRAINS", 2)
        patch.setattr(stable_diffusion, "CALIBRATION_LEAST", 2)
        yield


@pytest.fixture(scope="module")
def first_stage(phantom_folder, tmp_path_factory) -> Path:
    """The weights file of a VQ-VAE with latents of 4x6x7, trained for three steps. Read only."""
    folder = tmp_path_factory.mktemp("first")
    run_in(folder, prestage_train, "--data", phantom_folder, "--name", "codes", *FIRST)
    return folder / "model_ckpt/codes/model.safetensors"


@pytest.fixture(scope="module")
def _trained(phantom_folder, first_stage, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("second")
    run_in(folder, stable_diffusion, "--data", phantom_folder, "--first-stage", first_stage, *TINY)
    return folder


@pytest.fixture
def trained(_trained, tmp_path, monkeypatch) -> Path:
    """The working folder, with a copy of the run "diffusion", trained for three steps."""
    shutil.copytree(_trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def start(run_main, phantom_folder, first_stage):
    """start("--steps", 3): runs the script on the tiny first stage; returns (exit status, stdout, stderr)."""
    return lambda *flags: run_main(
        stable_diffusion, "--data", phantom_folder, "--first-stage", first_stage, *TINY, *flags
    )


@pytest.fixture
def train(start):
    """train("--steps", 3): as start, but checks that it ends well, and returns what it printed."""

    def run(*flags) -> str:
        status, out, errors = start(*flags)
        assert status == 0, errors
        return out

    return run


def settings(*flags):
    """What sample_latents reads, in float32."""
    return stable_diffusion.flags().parse_args(["--precision", "fp32", *map(str, flags)])


def differing(name: str, other: str) -> list[str]:
    """Names of tensors in two runs' model.safetensors that are not the same to the last bit."""
    a, b = (checkpoints.load_weights(Path(f"model_ckpt/{run}/model.safetensors"))[0] for run in (name, other))
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


def tiny_prior(**changes) -> LatentDiffusion:
    """Untrained, with 12 steps, and able to do without z."""
    sizes = {"latent_shape": (4, 6, 7), "channels": 8, "channel_multipliers": (1, 2), "blocks": 1}
    return LatentDiffusion(**{**sizes, "T": 12, "drop_z": 0.1, **changes}).eval()


# ------------------------------------------------------------------------------------------------------------ sampling


def test_the_noise_of_a_brain_depends_on_seed_and_number_alone():
    """Draw after draw, in any batch; its slices share what is asked, and other brains and seeds have others."""
    model = tiny_prior()
    model.slice_correlation.copy_(torch.full((32, 32), 0.5).fill_diagonal_(1))
    for how, shared in (("shared", 1.0), ("matched", 0.5), (None, 0.5), ("own", 0.0)):
        together, alone = (BrainNoise(5, brains, model, how) for brains in (range(3), range(2, 3)))
        draws = []
        for _ in range(3):
            noise = together()
            torch.manual_seed(0)  # nobody else's generator plays a part
            assert noise.shape == (96, 4, 6, 7) and torch.equal(noise[64:], alone())
            assert torch.corrcoef(noise[:32].flatten(1)).mean().item() == pytest.approx(shared, abs=0.12)
            draws += [noise[0], noise[32], noise[64]]
        draws.append(BrainNoise(6, range(1), model, how)()[0])
        assert len({tuple(draw.flatten().tolist()) for draw in draws}) == 10
        assert torch.stack(draws).std().item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--sampler", "heun"],
        ["--sampler", "ddim", "--eta", 0.7],
        ["--sampler", "ddpm"],
        ["--guidance", 2],
        ["--slice-noise", "own"],
    ],
    ids=lambda flags: " ".join(map(str, flags)) or "dpm",
)
@pytest.mark.parametrize("slices", [1, 8])
def test_a_brain_is_the_same_in_any_batch(awaken, flags, slices):
    """Brain 1 drawn alone is the second half of a batch of two, at every step that is kept."""
    model, args = awaken(tiny_prior(slices=slices)), settings("--sample-steps", 8, "--seed", 3, *flags)
    both, alone = (sample_latents(model, brains, args, CPU) for brains in (range(2), range(1, 2)))
    assert len(both) == len(alone) == (12 if "ddpm" in flags else 8)
    assert torch.allclose(torch.stack(both)[:, 32:], torch.stack(alone), atol=1e-4)
    assert (both[-1][:32] - alone[-1]).abs().max() > 0.1
    assert (alone[-1][0] - alone[-1][31]).abs().max() > 1e-3  # one noise, and yet z tells slices apart
    other = sample_latents(model, range(1, 2), settings("--sample-steps", 8, "--seed", 4, *flags), CPU)
    assert (other[-1] - alone[-1]).abs().max() > 0.1


def test_samplers_are_told_apart(awaken):
    """Every sampling flag changes the brain."""
    model = awaken(tiny_prior())
    brains = [
        sample_latents(model, range(1), settings(*flags), CPU)[-1]
        for flags in (
            ["--sample-steps", 8],
            ["--sample-steps", 12],
            ["--sample-steps", 12, "--guidance", 2],
            ["--sample-steps", 12, "--sampler", "heun"],
            ["--sample-steps", 12, "--sampler", "ddim"],
            ["--sample-steps", 12, "--sampler", "ddim", "--eta", 0.5],
            ["--sampler", "ddpm"],
        )
    ]
    assert all((a - b).abs().max() > 1e-4 for n, a in enumerate(brains) for b in brains[:n])
    ancestral = settings("--sampler", "ddim", "--sample-steps", 12, "--eta", 1)
    assert torch.allclose(sample_latents(model, range(1), ancestral, CPU)[-1], brains[-1], atol=1e-4)


def test_guidance_by_a_weaker_model(awaken):
    """Beyond the model, away from the weak one; a model guided by itself is itself."""
    model, weak, args = awaken(tiny_prior()), awaken(tiny_prior(drop_z=0.0)), settings("--sample-steps", 8)
    plain = sample_latents(model, range(1), args, CPU)[-1]
    args.guidance = 2.0
    assert torch.allclose(sample_latents(model, range(1), args, CPU, weak=model)[-1], plain, atol=1e-4)
    guided = sample_latents(model, range(1), args, CPU, weak)[-1]
    toward = sample_latents(weak, range(1), settings("--sample-steps", 8), CPU)[-1]
    assert ((guided - plain) * (plain - toward)).sum() > 0


@pytest.mark.parametrize("steps", [1, 23, 24, 50, 120])
def test_the_path_for_the_gif_is_short_and_ends_with_the_sample(awaken, steps):
    """At most 34 latents, first and last step among them."""
    sizes = {"latent_shape": (2, 2, 2), "channels": 8, "channel_multipliers": (1,), "blocks": 1, "T": 120}
    model, seen = awaken(LatentDiffusion(**sizes).eval()), []
    denoise = model.denoise

    def watched(x, *condition):
        seen.append((x, denoise(x, *condition)[0]))
        return denoise(x, *condition)

    model.denoise = watched
    path = sample_latents(model, range(1), settings("--sample-steps", steps), CPU)
    assert len(seen) == steps and min(steps, 16) <= len(path) <= 34
    assert torch.equal(path[-1], seen[-1][1])  # the sample is what the last step makes of its x,
    assert all(any(torch.equal(x, y) for y, _ in seen[1:]) for x in path[:-1])  # and the way there is those x


# ------------------------------------------------------------------------------------------------------ what a run does


def test_a_run_leaves_what_the_layout_promises(trained, first_stage):
    """Weights that carry their first stage, a description, a log that reads, pictures."""
    model, inside, description = load_second_stage("diffusion", LatentDiffusion, "cpu")
    assert not torch.allclose(model.slice_correlation, torch.ones(()), atol=0.1)  # it was measured
    assert (model.linear.mean.flatten(1).abs().amax(1) > 0).all()  # and so were this
    assert model.calibration.measured and (model.calibration.power > 0).any(1).all()  # and this, after the last step
    checkpoint = checkpoints.load_checkpoint(Path("model_ckpt/diffusion/last.pt"), "stable_diffusion.py")
    assert not (checkpoint["model"]["calibration.weight"] != 0).any()  # training further begins without
    assert model.latent_shape == (4, 6, 7) and description["step"] == 3 and description["data"]["slices"] == 96
    expected = load_first_stage(first_stage)
    assert all(torch.equal(a, b) for a, b in zip(inside.state_dict().values(), expected.state_dict().values()))
    run = json.loads(Path("log/diffusion/run.json").read_text())
    assert run["script"] == "stable_diffusion.py" and run["settings"]["preset"] == "demo"
    assert run["parameters"] == sum(p.numel() for p in model.parameters())
    log = read_log(Path("log/diffusion"))
    assert [line["step"] for line in log if "train/loss" in line] == [1, 2, 3]
    assert [line["step"] for line in log if "validate/loss" in line] == [2, 3]
    assert {path.name for path in Path("diffusion_vis").iterdir()} == {"sample_000002.png", "sample_000003.png"}


def test_sampling_writes_sheet_volume_and_32_slices_per_brain_and_the_gif(trained, run_main):
    """In the form that dataset.py reads; each brain is the one that its number and the seed stand for."""
    # Untrained, v = 0 leaves x nearly where it is; fresh noise moves it, and a GIF holds equal frames but once.
    flags = ["--seed", 5, "--sampler", "ddim", "--sample-steps", 12, "--eta", 1]
    status, out, errors = run_main(stable_diffusion, "--sample", "--brains", 2, "--precision", "fp32", *flags)
    assert status == 0 and "trained for 3 steps" in out, errors
    samples = Path("diffusion_vis/samples")
    assert [slice_[:2] for slice_ in list_slices(samples, "test")] == [(i, z) for i in range(2) for z in range(32)]
    slices = load_slices(samples, "test", 64).images.numpy().reshape(2, 32, 64, 64)
    model, first_stage, _ = load_second_stage("diffusion", LatentDiffusion, CPU, decoder=None)
    assert first_stage.draws  # the decoder that draws is the default
    args = settings(*flags)
    alone = sample_latents(model, range(1, 2), args, CPU)
    assert np.array_equal(slices[1], decode_brain(first_stage, alone[-1], 5, 1))
    for seed, number in ((5, 0), (6, 1)):  # the grain, too, is that of seed and number
        assert not np.array_equal(slices[1], decode_brain(first_stage, alone[-1], seed, number))
    both = sample_latents(model, range(2), args, CPU)
    assert torch.allclose(both[-1][32:], alone[-1], atol=1e-4)
    assert not np.array_equal(slices[0], slices[1])
    for i in range(2):
        voxels = np.asanyarray(nibabel.load(samples / f"brain_{i:03d}.nii.gz").dataobj)
        assert np.array_equal(voxels.transpose(2, 0, 1), slices[i])
        sheet = np.asarray(Image.open(samples / f"brain_{i:03d}.png").convert("L"))
        height, width = (sheet.shape[0] - 26) // 4, (sheet.shape[1] - 4) // 8
        for z in (0, 13, 31):  # every second pixel of the sheet is one of the slice's, doubled
            top, left = 26 + z // 8 * height, 4 + z % 8 * width
            assert np.array_equal(sheet[top : top + 128 : 2, left : left + 128 : 2], slices[i, z])
    with Image.open(samples / "process.gif") as gif:
        assert 5 < gif.n_frames <= 51 and gif.size == (4 * 64, 64)
    assert (samples / "process.gif").stat().st_size < 3_000_000


def test_sample_trains_first_if_nothing_was_trained(train):
    """One command from a first stage to pictures, wherever they are to go."""
    out = train("--sample", "--out", "mine", "--sample-steps", 6)
    assert "training it first" in out and "step 3 " in out
    assert len(list_slices(Path("mine"), "test")) == 32 and not Path("diffusion_vis/samples").exists()


def test_training_lowers_the_loss_of_brains_never_seen(train):
    """With validation at fixed noise and steps, so that two reports can be compared."""
    train("--steps", 60, "--report-every", 15, "--learning-rate", 0.01, "--batch-size", 8)
    loss = [line["validate/loss"] for line in read_log(Path("log/diffusion")) if "validate/loss" in line]
    assert len(loss) == 4 and loss[-1] < 0.9 * loss[0]


def test_validation_is_a_function_of_the_model(awaken):
    """Whatever the state of the generator; and it has the fixed steps spread over the whole process."""
    sizes = {"latent_shape": (4, 6, 7), "channels": 8, "channel_multipliers": (1,), "blocks": 1}
    model, seen = awaken(LatentDiffusion(**sizes).eval()), []
    model.register_forward_pre_hook(lambda module, args: seen.append(args[2]))
    latents, z, losses = torch.randn(100, 4, 6, 7), torch.arange(100) % 32, []
    for seed in (1, 2):
        torch.manual_seed(seed)
        losses.append(stable_diffusion.validate(model, latents, z, CPU, "fp32"))
    assert losses[0] == losses[1] > 0
    t = torch.cat(seen[: len(seen) // 2])
    assert len(t) == 100 and t.min() == 0 and t.max() == 999 and t.diff().max() < 12


def test_few_brains_are_validated_at_many_steps(awaken):
    """A model that mixes slices sees them whole, all slices at one step."""
    sizes = {"latent_shape": (4, 2, 2), "channels": 8, "channel_multipliers": (1,), "blocks": 1, "slices": 8}
    model, seen = awaken(LatentDiffusion(**sizes).eval()), []
    model.register_forward_pre_hook(lambda module, args: seen.append((args[2], args[4])))
    stable_diffusion.validate(model, torch.randn(96, 4, 2, 2), torch.arange(96) % 32, CPU, "fp32")
    t = torch.cat([t for t, _ in seen]).view(-1, 32)
    assert {slices for _, slices in seen} == {32} and (t == t[:, :1]).all()
    assert len(t) == 33 and t.min() == 0 and t.max() == 999 and t[:, 0].diff().max() < 33


@pytest.mark.parametrize(
    "flags",
    [
        ["--moved-heads", 2],
        ["--recipe", "ddpm", "--slices", 1],
        ["--recipe", "edm", "--drop-z", 0, "--slice-noise", "own"],
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(train, flags):
    """Stopped after every single step, with everything else that happens at a stop in between."""
    assert "stopped" not in train("--name", "straight", *flags)
    for step in range(1, 4):
        out = train("--name", "stopped", *flags, *ONE_STEP)
        assert (f"stopped after {step} of 3 steps" in out) == (step < 3)
        assert (f"resumed at step {step - 1}" in out) == (step > 1)
    assert differing("straight", "stopped") == []
    one, other = (
        checkpoints.load_checkpoint(Path(f"model_ckpt/{name}/last.pt"), "stable_diffusion.py")
        for name in ("straight", "stopped")
    )
    assert one["step"] == 3 and all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])
    assert "has its 3 steps; raise --steps" in train("--name", "stopped", *flags)
    assert "resumed at step 3" in train("--name", "straight", *flags, "--steps", 4)


def test_a_run_stopped_before_its_calibration_is_calibrated_by_the_same_command(trained, train):
    path = Path("model_ckpt/diffusion/last.pt")
    weights = checkpoints.load_weights(path.with_name("model.safetensors"))[0]
    state = checkpoints.load_checkpoint(path, "stable_diffusion.py")
    state["ema"]["calibration.weight"].zero_()
    checkpoints.save_checkpoint(path, state)
    assert "calibrating: 2 brains" in train()
    again = checkpoints.load_weights(path.with_name("model.safetensors"))[0]
    assert (weights["prior.calibration.weight"] != 0).any()
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert "calibrating" not in train()


def test_models_of_few_brains_or_shared_noise_are_not_calibrated(train, tmp_path, monkeypatch):
    assert "not calibrated: slices share their noise" in train("--slice-noise", "shared", "--name", "shared")
    monkeypatch.setattr(stable_diffusion, "CALIBRATION_LEAST", 4)
    assert "not calibrated: 3 whole training cases" in train("--name", "few")
    for name in ("shared", "few"):
        assert not load_second_stage(name, LatentDiffusion, "cpu")[0].calibration.measured


def test_a_limit_of_one_start_is_not_the_next_one_s(train):
    """Without --minutes there is no limit, as its help says, though an earlier start of the run had one."""
    assert "stopped after 1 of 3 steps" in train(*ONE_STEP)
    assert "stopped" not in train()


def test_a_stop_right_after_a_report_does_not_report_again(train):
    """Every report is one line of the log, wherever the run was stopped."""
    for _ in range(3):
        train("--report-every", 1, *ONE_STEP)
    lines = [line for line in read_log(Path("log/diffusion")) if "validate/loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3]


def test_weights_follow_from_the_seed_alone(train):
    """Reports, pictures and checkpoints in between leave no trace; another seed is another run."""
    for name, flags in {"a": [], "b": ["--report-every", 1], "c": ["--seed", 1]}.items():
        train("--name", name, *flags)
    assert differing("a", "b") == []
    assert any(name.startswith("prior.unet") for name in differing("a", "c"))


def test_what_does_not_fit_is_one_line(trained, run_main, start, phantom_folder, first_stage, tiny_sizes):
    """No first stage, another one on resume, weights of another kind, a setting that differs; nothing is written."""
    before = {path: path.read_bytes() for path in Path("model_ckpt/diffusion").iterdir()}

    def refused(*words, flags):
        status, _, errors = run_main(stable_diffusion, "--data", phantom_folder, *flags)
        assert status == 2 and len(errors.splitlines()) == 1 and all(word in errors for word in words), errors

    refused("there are no weights at vqvae", "python prestage_train.py", flags=["--name", "new"])
    gone = ["--first-stage", "gone"]
    refused("there are no weights at gone", "python prestage_train.py", flags=[*gone, "--name", "new"])
    refused("--first-stage gone", "contradicts", flags=gone)
    refused("diffusion", "no first stage", flags=["--first-stage", "diffusion", "--name", "new"])
    description = {"kind": "vae", "preset": "demo", "model_kwargs": tiny_sizes, "data": {}, "step": 1}
    checkpoints.save_weights(Path("model_ckpt/vae/model.safetensors"), VAE(**tiny_sizes).state_dict(), description)
    refused("is a vae, no diffusion", flags=["--sample", "--name", "vae"])
    refused("--first-stage vae", "contradicts", flags=["--first-stage", "vae"])
    refused("--prediction eps", "contradicts", flags=["--first-stage", first_stage, "--prediction", "eps"])
    refused("--sample-steps 1001", "1000", flags=["--sample", "--sample-steps", 1001])
    flow = ["--name", "new", "--first-stage", first_stage, "--recipe", "flow", "--prediction", "eps"]
    refused("--prediction eps", "--schedule flow", flags=flow)
    refused("--recipe edm", "contradicts", flags=["--first-stage", first_stage, "--recipe", "edm"])
    refused("--weak", "--guidance", flags=["--sample", "--weak", "diffusion"])
    refused("no weights at gone", flags=["--sample", "--guidance", 2, "--weak", "gone"])
    Path("broken.safetensors").write_bytes(first_stage.read_bytes()[:-99])
    refused("broken.safetensors", flags=["--first-stage", "broken.safetensors", "--name", "new"])

    tensors, description = checkpoints.load_weights(first_stage)
    keep = first_stage.read_bytes()
    try:  # the same path, but trained further
        checkpoints.save_weights(first_stage, {name: 1.01 * tensor for name, tensor in tensors.items()}, description)
        status, _, errors = start("--steps", 4)
        assert status == 2 and len(errors.splitlines()) == 1 and "another first stage" in errors
    finally:
        first_stage.write_bytes(keep)
    assert {path: path.read_bytes() for path in Path("model_ckpt/diffusion").iterdir()} == before and len(before) == 2
    assert not Path("log/new").exists() and not Path("model_ckpt/new").exists()
    assert "resumed at step 3" in start("--steps", 4)[1]


def test_recipes_are_recorded_and_single_flags_beat_them(trained, train):
    """A resumed run keeps what it was started with."""
    train("--name", "other", "--recipe", "edm", "--schedule", "cosine-zero", *ONE_STEP)
    train("--name", "other", "--recipe", "edm")
    for name, expected in {
        "diffusion": ["v", "cosine", "v", "plain", "uniform"],
        "other": ["edm", "cosine-zero", "v", "plain", "log-normal"],
    }.items():
        recorded = json.loads(Path(f"log/{name}/run.json").read_text())["settings"]
        flags = ("recipe", "schedule", "prediction", "weighting", "times")
        assert [recorded[flag] for flag in flags] == expected
        model, _, _ = load_second_stage(name, LatentDiffusion, "cpu")
        assert [getattr(model, flag) for flag in flags[1:]] == expected[1:]


def test_guidance_needs_what_it_moves_away_from(trained, train, run_main):
    """A model that has hidden z in training, or a weaker run with the same schedule."""
    train("--name", "sure", "--drop-z", 0)
    train("--name", "edm", "--recipe", "edm")
    sample = ["--sample", "--sample-steps", 3, "--guidance", 2]
    for name, flags, words in (
        ("sure", [], ["run sure was trained with --drop-z 0", "--weak"]),
        ("sure", ["--weak", "edm"], ["--weak edm has --schedule edm", "cosine"]),
    ):
        status, _, errors = run_main(stable_diffusion, *sample, "--name", name, *flags)
        assert status == 2 and len(errors.splitlines()) == 1 and all(word in errors for word in words), errors
    assert "guidance 2" in run_main(stable_diffusion, *sample)[1]
    status, out, errors = run_main(stable_diffusion, *sample, "--name", "sure", "--weak", "diffusion")
    assert status == 0 and "guidance 2 from diffusion" in out, errors


def test_windows_are_neighbouring_slices_of_one_case(phantom_folder):
    """Of any length up to a brain; every slice is seen nearly as often as any other."""
    data = load_slices(phantom_folder, "train", 64)
    assert torch.equal(window_starts(data, 1), torch.arange(96))
    for slices in (2, 8, 20, 32):
        index = window_starts(data, slices)[:, None] + torch.arange(slices)
        assert (data.case[index] == data.case[index[:, :1]]).all() and (data.z[index].diff(dim=1) == 1).all()
        seen = torch.bincount(index.flatten(), minlength=96)
        assert seen.min() >= slices and seen.max() < 3 * slices
        around, shown = around_windows(window_starts(data, slices), slices)  # whole brains, and the windows in them
        assert torch.equal(around[shown], index.flatten()) and torch.equal(
            data.z[around], torch.arange(len(around)) % 32
        )
        assert (data.case[around].view(-1, 32) == data.case[index[:, :1]]).all()
    single, shown = around_windows(torch.tensor([70, 3]), 1)
    assert single.tolist() == [70, 3] and shown is None


def test_training_sees_every_head_moved_as_a_whole_and_told(start, phantom_folder, first_stage, monkeypatch):
    """Once as it is, and as often as asked for in another place: what is said of it is what was done to it."""
    seen, forward = [], LatentDiffusion.forward

    def watched(self, latent, z, t=None, *rest):
        if self.training:
            seen.append((latent, z, rest[4]))
        return forward(self, latent, z, t, *rest)

    monkeypatch.setattr(LatentDiffusion, "forward", watched)
    flags = ["--moved-heads", 2, "--slices", 16, "--batch-size", 16, "--steps", 40, "--precision", "fp32"]
    status, _, errors = start(*flags)
    assert status == 0, errors
    data, codes, found = load_slices(phantom_folder, "train", 64), load_first_stage(first_stage), set()
    for latent, z, moves in seen:
        assert torch.equal(z, torch.arange(32)) and (moves == moves[0]).all()
        for case in range(3):
            x, z, _ = data.batch(torch.arange(32 * case, 32 * case + 32))
            x = move(x, moves, mode="bicubic").clamp(-1, 1) if moves.any() else x
            if torch.allclose(codes.encode(x, z), latent, atol=1e-4):
                found.add((case, *moves[0].tolist()))
    assert len(found) == 9 and len({head[1:] for head in found}) == 7  # 3 heads as they are, and 6 that were moved
    again = stable_diffusion.head_moves(data, 1, seed=0)[0]
    assert {tuple(moves) for moves in again.tolist()} < {head[1:] for head in found}  # copies do not hang on how many


def test_training_hears_the_guess_of_a_denoiser_that_has_not_seen_the_head(
    train, people_folder, first_stage, monkeypatch
):
    """With as few heads as these each has a denoiser of its own, of all others; the weights have that of all."""
    for case in range(11, 18):
        pictures = np.random.default_rng(case).integers(0, 256, (32, 64, 64), dtype=np.uint8)
        write_slices(people_folder / "keras_png_slices_train", case, pictures)
    calls, forward = [], LatentDiffusion.forward

    def watched(self, latent, z, t=None, noise=None, slices=None, people=None, *rest):
        if self.training:
            level = torch.full((len(z), 1, 1, 1), 0.5**0.5)
            calls.append((latent, rest[-1](latent, level, level, z, slices, self.slice_correlation, people)))
        return forward(self, latent, z, t, noise, slices, people, *rest)

    monkeypatch.setattr(LatentDiffusion, "forward", watched)
    flags = ["--data", people_folder, "--slices", 32, "--batch-size", 32, "--steps", 12, "--precision", "fp32"]
    train(*flags)
    model, codes, _ = load_second_stage("diffusion", LatentDiffusion, CPU)
    data = load_slices(people_folder, "train", 64)
    brains = encode_all(codes, data, CPU, "fp32")[0].unflatten(0, (8, 32))
    people, z = data.people(CONDITIONS), torch.arange(32)
    level = torch.full((32, 1, 1, 1), 0.5**0.5)
    for latent, guess in calls:
        brain = (brains - latent).flatten(1).abs().amax(1).argmin()
        rest = torch.arange(8) != brain
        own = copy.deepcopy(model.linear)
        own.fit(brains[rest], people.view(8, 32, -1)[rest, 0], model.slice_correlation)
        person = people.view(8, 32, -1)[brain]
        given = level, level, z, 32, model.slice_correlation, person
        assert torch.allclose(guess, own(latent, *given), atol=1e-4)
        assert (guess - model.linear(latent, *given)).abs().max() > 0.01


def test_windows_need_whole_cases_and_whole_batches(start, run_main, noise_folder, first_stage, tmp_path):
    """One line names the flag; slices one by one do without."""
    for flags, words in (
        (["--slices", 33, "--batch-size", 33], ["--slices 33", "32"]),
        (["--slices", 8, "--batch-size", 12], ["--batch-size 12", "--slices 8"]),
    ):
        status, _, errors = start(*flags)
        assert status == 2 and len(errors.splitlines()) == 1 and all(word in errors for word in words), errors
    (noise_folder / "keras_png_slices_train/case_001_slice_7.nii.png").unlink()
    run = ["--data", noise_folder, "--first-stage", first_stage, *TINY, *ONE_STEP]
    status, _, errors = run_main(stable_diffusion, *run, "--slices", 4)
    assert status == 2 and len(errors.splitlines()) == 1 and "--slices 4" in errors and "train" in errors, errors
    status, _, errors = run_main(stable_diffusion, *run, "--slices", 1, "--slice-noise", "matched")
    assert status == 2 and len(errors.splitlines()) == 1 and "--slice-noise matched" in errors, errors
    assert run_main(stable_diffusion, *run, "--slices", 1)[0] == 0
    assert load_second_stage("diffusion", LatentDiffusion, CPU)[0].slice_noise == "shared"


def test_reports_compare_neighbouring_slices_with_real_ones(trained, phantom_folder):
    """One number for the sampled brain, and beside it that of the brains held out."""
    reports = [line for line in read_log(Path("log/diffusion")) if "validate/loss" in line]
    expected = adjacent_ssim(load_slices(phantom_folder, "validate", 64).whole_brains()).mean().item()
    for line in reports:
        assert line["real/adjacent_ssim"] == pytest.approx(expected, abs=1e-6)
        assert -1 <= line["sample/adjacent_ssim"] <= 1
    assert len(reports) == 2


def test_a_model_learns_of_people_what_the_table_tells(run_main, people_folder, first_stage):
    """Age, sex and CDR by default; the weights remember which, and what training saw of them."""
    run = ["--data", people_folder, "--first-stage", first_stage, *TINY]
    assert run_main(stable_diffusion, *run, "--name", "all", *ONE_STEP)[0] == 0
    assert run_main(stable_diffusion, *run, "--name", "all")[0] == 0  # and resumes with them
    assert run_main(stable_diffusion, *run, "--name", "some", "--conditions", "cdr", "age", *ONE_STEP)[0] == 0
    assert run_main(stable_diffusion, *run, "--name", "none", "--conditions", *ONE_STEP)[0] == 0
    for name, people in {
        "all": {"age": [74, 74], "sex": [0], "cdr": [0.5]},
        "some": {"cdr": [0.5], "age": [74, 74]},
        "none": {},
    }.items():
        model, _, description = load_second_stage(name, LatentDiffusion, "cpu")
        assert description["people"] == people and model.conditions == tuple(people)
        assert json.loads(Path(f"log/{name}/run.json").read_text())["settings"]["conditions"] == list(people)

    sample = ["--sample", "--sample-steps", 2, "--name"]
    for flags, words in (
        (["all", "--age", 75], ["--age 75", "ages 74 to 74"]),
        (["all", "--sex", "M"], ["--sex M", "no such sex"]),
        (["none", "--cdr", 0.5], ["--cdr 0.5", "without", "--conditions cdr"]),
        (["some", "--sex", "F"], ["--sex F", "without"]),
        (["all", "--cdr", 3], ["--cdr"]),
        (["all", "--conditions", "age"], ["--conditions", "contradicts"]),
    ):
        status, _, errors = run_main(stable_diffusion, *sample, *flags)
        assert status == 2 and len(errors.splitlines()) == 1 and all(word in errors for word in words), errors
    status, out, errors = run_main(stable_diffusion, *sample, "all", "--age", 74, "--sex", "F", "--cdr", 0.5)
    assert status == 0 and "age 74, sex F, cdr 0.5" in out, errors
    assert "brain 0, age 74, sex F, cdr 0.5, in" in run_main(stable_diffusion, *sample, "all", "--sex", "F")[1]
    assert "brain 0, sex F, in" in run_main(stable_diffusion, *sample, "all", "--sex", "F", "--unknown-person")[1]
    (people_folder / "oasis_cross-sectional.csv").unlink()
    status, _, errors = run_main(stable_diffusion, *run, "--name", "new", "--conditions", "age")
    assert status == 2 and len(errors.splitlines()) == 1 and "oasis_cross-sectional.csv" in errors
    assert "nothing is learned of age" in run_main(stable_diffusion, *run, "--name", "new", *ONE_STEP)[1]


def test_a_person_changes_the_brain(awaken):
    """Each condition does, what is not said is unknown, and guidance moves away from knowing nothing."""
    model = awaken(tiny_prior(conditions=("age", "sex", "cdr"), slices=4), 0.2)
    people = [None, {"age": 75.0}, {"age": 25.0}, {"age": 75.0, "sex": 1.0}, {"age": 75.0, "cdr": 1.0}]
    plain, guided = settings("--sample-steps", 4), settings("--sample-steps", 4, "--guidance", 2)
    brains = [sample_latents(model, range(1), plain, CPU, person=person)[-1] for person in people]
    brains.append(sample_latents(model, range(1), guided, CPU, person=people[1])[-1])
    assert all((a - b).abs().max() > 1e-4 for n, a in enumerate(brains) for b in brains[:n])
    assert torch.equal(sample_latents(model, range(1), plain, CPU, person={})[-1], brains[0])


def test_a_loss_that_is_not_finite_keeps_the_checkpoint(trained, start, monkeypatch):
    """It names the step and what to do."""
    before = {path: path.read_bytes() for path in Path("model_ckpt/diffusion").iterdir()}
    forward = LatentDiffusion.forward
    monkeypatch.setattr(
        LatentDiffusion, "forward", lambda self, *args, **more: forward(self, *args, **more) * torch.nan
    )
    status, _, errors = start("--steps", 5)
    assert status == 2 and len(errors.splitlines()) == 1 and "loss became nan at step 3" in errors
    assert {path: path.read_bytes() for path in Path("model_ckpt/diffusion").iterdir()} == before


def test_training_weighs_errors_by_channel(trained):
    """As the first stage says, and the record of the run tells."""
    run = json.loads(Path("log/diffusion/run.json").read_text())
    first_stage, weight = load_first_stage(run["settings"]["first_stage"]), run["channel_weight"]
    assert weight == first_stage.channel_weight().flatten().tolist() and max(weight) > 1.5 * min(weight)


def test_one_file_is_enough_to_sample(trained, run_main, monkeypatch):
    """The weights carry their first stage: elsewhere, without it and without the data, they draw the same brain."""
    assert run_main(stable_diffusion, "--sample", "--sample-steps", 6, "--out", "here")[0] == 0
    Path("elsewhere/model_ckpt/mine").mkdir(parents=True)
    shutil.copy("model_ckpt/diffusion/model.safetensors", "elsewhere/model_ckpt/mine")
    monkeypatch.chdir("elsewhere")
    monkeypatch.setattr(stable_diffusion, "load_first_stage", None)
    assert run_main(stable_diffusion, "--sample", "--sample-steps", 6, "--name", "mine")[0] == 0
    here, there = ({f.name: f.read_bytes() for f in d.iterdir()} for d in (trained / "here", Path("mine_vis/samples")))
    assert len(here) == 32 + 6 and here == there


def test_a_model_of_single_slices_goes_on_as_one_that_mixes_them(trained, start, first_stage):
    """At first it denoises as before. Other sizes and another first stage are refused in one line."""
    assert start("--name", "single", "--slices", 1)[0] == 0
    before, inside, description = stable_diffusion.load_second_stage("single", LatentDiffusion, "cpu")
    mixing = LatentDiffusion(**description["model_kwargs"] | {"slices": 4})
    stable_diffusion.start_from("single", mixing, stable_diffusion.load_first_stage(first_stage))
    mixing.linear.load_state_dict(before.linear.state_dict())  # which training measures again
    noise, z = torch.randn(8, *before.latent_shape), torch.arange(8)
    for a, b in zip(before.denoise(noise, 500, z), mixing.eval().denoise(noise, 500, z), strict=True):
        assert torch.equal(a, b)
    assert start("--name", "mixed", "--slices", 4, "--start-from", "single", "--moved-heads", 1)[0] == 0
    assert start("--name", "still", "--slices", 4, "--start-from", "mixed")[0] == 0  # and heads may stand still again
    status, _, errors = start("--name", "flat", "--slices", 1, "--start-from", "mixed")
    assert status == 2 and len(errors.splitlines()) == 1 and "--slices" in errors
    status, _, errors = start("--name", "wide", "--slices", 4, "--start-from", "single", "--channels", 24)
    assert status == 2 and len(errors.splitlines()) == 1 and "--channels" in errors
    inside.description["digest"] = "another"
    with pytest.raises(util.UserError, match="another first stage"):
        stable_diffusion.start_from("single", mixing, inside)


def test_two_processes_train_one_run(run_script, phantom_folder, first_stage, tmp_path):
    """torchrun with gloo: one log, one checkpoint, one process speaks."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    flags = ("--data", phantom_folder, "--first-stage", first_stage, *TINY)
    done = run_script("stable_diffusion.py", *flags, launcher=launcher, threads=1, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run diffusion:") == 1 and done.stdout.count("step 3 ") == 1
    assert checkpoints.load_checkpoint(tmp_path / "model_ckpt/diffusion/last.pt", "stable_diffusion.py")["step"] == 3
