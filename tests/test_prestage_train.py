"""Laws of prestage_train.py: its loss and schedules by hand, and what a run of it promises."""

import json
import math
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch

import prestage_train
import util
from logger import read_log
from model_VAE import VQVAE, load_first_stage
from prestage_train import cyclical_weight, kl_factor, ramp_weight, reconstruction_loss
from training import checkpoints

TINY = ["--preset", "demo", "--channels", 8, "--batch-size", 4, "--codebook-size", 32, "--latent-channels", 4]
TINY += ["--steps", 5]
# The discriminator learns from the second step on; from the third on the perceptual decoder trains against it.
GAN = ["--discriminator-start", 1, "--gan-start", 2]
ONE_STEP = ["--minutes", 1e-9]  # a limit that is over when the first step is done


@pytest.fixture
def train(run_main, phantom_folder):
    """train("--steps", 3): runs the script on the phantom, checks its exit status, and returns what it printed."""

    def start(*flags, status: int = 0) -> str:
        ended, out, errors = run_main(prestage_train, "--data", phantom_folder, *TINY, *flags)
        assert ended == status, errors
        return out

    return start


def weights(name: str) -> dict[str, torch.Tensor]:
    return checkpoints.load_weights(Path(f"model_ckpt/{name}/model.safetensors"))[0]


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    """Names of tensors that are not the same to the last bit."""
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


def checkpoint(name: str) -> dict:
    return checkpoints.load_checkpoint(Path(f"model_ckpt/{name}/last.pt"), "prestage_train.py")


def faithful(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """All but the perceptual decoder."""
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("perceptual.")}


def decoders(tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights of the fidelity decoder, and of the perceptual one without its grain."""
    perceptual = checkpoints.part_of(tensors, "perceptual.")
    return checkpoints.part_of(tensors, "decoder."), {n: w for n, w in perceptual.items() if not n.startswith("grain.")}


def settings(name: str) -> dict:
    return json.loads(Path(f"log/{name}/run.json").read_text())["settings"]


# --------------------------------------------------------------------------------------------------- losses, schedules


def test_cyclical_weight_by_hand():
    """Two cycles of 50 steps; linear over the first half of each, then one."""
    at = [cyclical_weight(step, 100, cycles=2, ramp=0.5) for step in (0, 5, 20, 25, 49, 50, 60, 75, 99)]
    assert at == pytest.approx([0, 0.2, 0.8, 1, 1, 0, 0.4, 1, 1])
    assert cyclical_weight(0, 100, cycles=4, ramp=0.0) == 1
    assert cyclical_weight(24, 100, cycles=4, ramp=1.0) == pytest.approx(0.96)


def test_the_kl_schedules_by_hand():
    """100 steps, 2 cycles, ramps of half a cycle: two ramps, one over all, none."""
    at = (0, 10, 25, 50, 60, 99)
    weight = {
        name: [kl_factor(name, step, 100, cycles=2, ramp=0.5) for step in at]
        for name in ("cyclical", "monotonic", "constant")
    }
    assert weight["cyclical"] == pytest.approx([0, 0.4, 1, 0, 0.4, 1])
    assert weight["monotonic"] == pytest.approx([0, 0.2, 0.5, 1, 1, 1])
    assert weight["constant"] == [1] * 6


def test_ramp_weight_by_hand():
    assert [ramp_weight(step, 10, 4) for step in (0, 9, 10, 11, 13, 14, 1000)] == [0, 0, 0, 0.25, 0.75, 1, 1]


def test_the_reconstruction_loss_is_zero_at_equality_only():
    """And it is L1 + 0.5 (1 - SSIM)."""
    x = (torch.rand(2, 1, 24, 24) * 2 - 1) * 0.9
    assert abs(reconstruction_loss(x, x)) < 1e-6
    for offset in (0.02, -0.02):
        assert reconstruction_loss(x + offset, x) > 0.0199
    other = torch.rand(2, 1, 24, 24) * 2 - 1
    ssim = util.ssim_map((other + 1) / 2, (x + 1) / 2).mean()
    assert reconstruction_loss(other, x) == pytest.approx(((other - x).abs().mean() + (1 - ssim) / 2).item(), abs=1e-6)


def test_black_that_is_too_black_costs_a_tenth_and_is_still_pulled_back():
    """It is clamped in the end, but must not drift away without a gradient."""
    black = torch.full((1, 1, 24, 24), -1.0)
    below, above = (reconstruction_loss(black + d, black) for d in (-0.05, 0.05))
    ssim = util.ssim_map((black - 0.005 + 1) / 2, (black + 1) / 2).mean()
    assert below < 0.1 * above and torch.isclose(below, 0.005 + 0.5 * (1 - ssim), atol=1e-6)
    x_hat = (black - 0.05).requires_grad_()
    reconstruction_loss(x_hat, black).backward()
    assert (x_hat.grad < 0).all()
    assert reconstruction_loss(-black + 0.05, -black) > 0.0499  # nothing is white for sure


# ------------------------------------------------------------------------------------------------------ what a run does


@pytest.mark.parametrize("model", ["vae", "vqvae"])
def test_a_tiny_run_reduces_the_loss(train, model):
    """From the linear floor on, and the averaged weights score better than before on brains never seen."""
    train("--model", model, "--steps", 120, "--report-every", 40, "--gan-weight", 0, "--learning-rate", 3e-3)
    log = read_log(Path("log") / model)
    loss = [line["train/reconstruction"] for line in log if "train/reconstruction" in line]
    assert len(loss) == 30 and sum(loss[-5:]) < 0.9 * sum(loss[:5])
    ssim = [line["validate/ssim"] for line in log if "validate/ssim" in line]
    brain = [line["validate/brain_ssim"] for line in log if "validate/brain_ssim" in line]
    assert len(ssim) == 3 and ssim[-1] > ssim[0] + 0.005 and brain[-1] > brain[0] + 0.005


@pytest.mark.parametrize(
    "flags",
    [
        ["--model", "vqvae", *GAN],
        ["--model", "vqvae", *GAN, "--report-every", "4", "--guard", "0", "--learning-rate", "0.3"],
        ["--model", "vqvae", "--codebook", "loss", "--gan-weight", "0"],
        ["--model", "vae", *GAN, "--kl-cycles", "2", "--kl-ramp", "0.3"],
    ],
    ids=["vqvae with GAN", "vqvae with GAN and roll-back", "vqvae without, codebook by loss", "vae with GAN"],
)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(train, flags):
    """Stopped after every single step, before, at and after --gan-start, with all that happens at a stop in between."""
    out = train("--name", "straight", *flags)
    assert "stopped" not in out
    for step in range(1, 6):
        out = train("--name", "stopped", *flags, *ONE_STEP)
        assert (f"stopped after {step} of 5 steps" in out) == (step < 5)
    assert differing(weights("straight"), weights("stopped")) == []
    one, other = checkpoint("straight"), checkpoint("stopped")
    for part in ("model", "ema", "discriminator"):
        assert differing(one[part], other[part]) == []
    anchors, others = (state["gan"].pop("anchors") for state in (one, other))
    assert one["gan"] == other["gan"] and torch.equal(anchors, others)
    if "--gan-weight" not in flags:
        assert one["gan"]["balance"] != 1 and anchors.any()  # the discriminator did have its say
        assert (differing(*decoders(one["model"])) == []) == ("--guard" in flags)  # all of it was rolled back
    assert (one["gan"]["scale"] < 1) == ("--guard" in flags)


def test_weights_follow_from_the_seed_alone(train):
    """Reports, pictures and checkpoints in between leave no trace; another seed is another run."""
    for name, flags in {"a": [], "b": ["--report-every", 1], "c": ["--seed", 1]}.items():
        train("--name", name, *GAN, *flags)
    assert differing(weights("a"), weights("b")) == []
    assert "encoder.stem.1.weight" in differing(weights("a"), weights("c"))


def test_the_two_phases_do_not_touch_each_other(train):
    """A discriminator that only watches changes nothing; without weight there is no perceptual decoder either."""
    train("--name", "alone", "--gan-weight", 0)
    train("--name", "watched", "--discriminator-start", 1, "--gan-start", 100)
    train("--name", "seen", *GAN)
    assert weights("alone").keys() == faithful(weights("watched")).keys() != weights("watched").keys()
    assert differing(weights("alone"), faithful(weights("watched"))) == []
    assert differing(*decoders(weights("watched"))) == [] != differing(*decoders(weights("seen")))
    critics = [checkpoint(name)["discriminator"] for name in ("alone", "watched")]
    assert differing(*critics) != []
    logged = {name: {key for line in read_log(Path("log") / name) for key in line} for name in ("alone", "seen")}
    adversarial = {"train/discriminator", "train/generator", "train/feature_matching", "weight/generator"}
    adversarial |= {"train/lecam", "train/grain", "weight/guard"}
    assert adversarial <= logged["seen"] and not adversarial & logged["alone"]


def test_the_perceptual_phase_leaves_everything_else_as_it_was(train):
    """The file at --gan-start and the file at the end: encoder, codes, fidelity decoder and scale to the last bit."""
    train(*GAN, "--steps", 2, "--learning-rate", 0.01)
    begun = weights("vqvae")
    assert differing(*decoders(begun)) == []  # until it begins, the perceptual decoder is the fidelity decoder
    train(*GAN, "--steps", 5, "--learning-rate", 0.01)
    ended = weights("vqvae")
    assert differing(faithful(begun), faithful(ended)) == [] and begun["latent_sd"].min() != 1
    assert differing(*decoders(ended)) != []
    x, z = torch.rand(2, 1, 64, 64) * 2 - 1, torch.tensor([3, 28])
    models = [load_first_stage("vqvae", decoder=decoder) for decoder in ("fidelity", "perceptual")]
    latents = [model.encode(x, z) for model in models]
    assert torch.equal(*latents)
    assert not torch.equal(*(model.decode(latent, z) for model, latent in zip(models, latents, strict=True)))


def test_a_finished_first_stage_gets_another_perceptual_decoder(train, run_main, phantom_folder):
    """--start-from: the latents are those of before to the last bit, the sizes come with it, and it resumes."""
    train("--gan-weight", 0)
    path = Path("model_ckpt/vqvae/model.safetensors")
    kept, description = checkpoints.load_weights(path)
    kept["encoder.stem.1.bias"][0] = -0.0  # a digest sees the sign of nothing
    checkpoints.save_weights(path, kept, description)
    sharpen = ["--data", phantom_folder, "--start-from", "vqvae", "--preset", "demo", "--steps", 3]
    for name, more in (("straight", []), ("stopped", ONE_STEP), ("stopped", ONE_STEP), ("stopped", [])):
        status, out, errors = run_main(prestage_train, *sharpen, "--name", name, *more)
        assert status == 0, errors
    assert "resumed at step 2" in out and differing(weights("straight"), weights("stopped")) == []
    assert differing(weights("vqvae"), faithful(weights("straight"))) == []
    assert (
        differing(*decoders(weights("straight"))) != []
        and weights("straight")["perceptual.grain.strength.4.weight"].any()
    )
    digests = {load_first_stage(name).description["digest"] for name in ("vqvae", "straight")}
    assert len(digests) == 1 and settings("straight")["channels"] == 8
    assert load_first_stage("straight", decoder=None).draws
    for flags, words in ((["--channels", 16], "--channels comes with"), (["--gan-weight", 0], "--gan-weight above 0")):
        status, _, errors = run_main(prestage_train, *sharpen, "--name", "new", *flags)
        assert status == 2 and len(errors.splitlines()) == 1 and words in errors, errors
    train("--name", "smooth", "--no-grain", *GAN)
    assert not load_first_stage("smooth", decoder="perceptual").draws


def test_the_guard_keeps_the_perceptual_decoder_close_to_the_fidelity_decoder(train, phantom_folder):
    """A hostile setting ruins it with the guard off; with the guard on what is saved has lost no more than allowed."""
    data = prestage_train.load_slices(phantom_folder, "validate", 64)
    hostile = ["--learning-rate", 0.3, "--discriminator-learning-rate", 3, "--gan-weight", 1, "--precision", "fp32"]
    hostile += ["--discriminator-start", 1, "--gan-start", 1, "--steps", 5, "--report-every", 2]
    lost = {}
    for guard in (1, 0.01):
        train("--name", f"guard{guard}", *hostile, "--guard", guard)
        ssim = {
            decoder: prestage_train.validate(
                load_first_stage(f"guard{guard}", decoder=decoder), data, torch.arange(32), torch.device("cpu"), "fp32"
            )["validate/ssim"]
            for decoder in ("fidelity", "perceptual")
        }
        lost[guard] = ssim["fidelity"] - ssim["perceptual"]
    assert lost[1] > 0.02 and lost[0.01] <= 0.01 + 1e-6
    log = [line for line in read_log(Path("log/guard0.01")) if "weight/guard" in line]
    assert log[-1]["weight/guard"] < 1 and checkpoint("guard1")["gan"]["scale"] == 1
    assert log[-1]["validate/ssim"] == pytest.approx(ssim["perceptual"], abs=1e-5)  # what is logged is what is saved


@pytest.mark.parametrize(
    "flags",
    [
        ["--quantizer", "fsq", "--levels", "4", "3", "2"],
        ["--code-space", "sphere"],
        ["--code-gradient", "rotation", "--codebook", "loss"],
        ["--model", "vqvae2"],
        ["--model", "vqvae2", "--quantizer", "fsq", "--levels", "8", "5", "5", "5"],
        ["--model", "vae", "--kl-schedule", "constant", "--lecam-weight", "0"],
        ["--model", "vae", "--kl-schedule", "monotonic", "--discriminator-learning-rate", "0.01"],
    ],
    ids=lambda flags: " ".join(flags).replace("--", ""),
)
def test_every_kind_of_latent_trains_through_both_phases(train, flags):
    """Three steps: the file is what the flags say, its scale is set, its losses are finite, both decoders decode."""
    train("--name", "run", *flags, *GAN, "--steps", 3)
    log = read_log(Path("log/run"))
    floor = 0.1 if "--code-space" in flags else 0.3  # a sphere has no brightness, and no black, before it learns them
    assert log[-1]["step"] == 3 and floor < log[-1]["validate/ssim"] < 1
    for decoder in ("fidelity", "perceptual"):
        model = load_first_stage("run", decoder=decoder)
        latent = model.prior_latent(2)
        assert 0.2 < latent.std() < 5 and torch.isfinite(model.decode(latent, torch.tensor([3, 28]))).all()
    kwargs = model.description["model_kwargs"]
    if "fsq" in flags:
        levels = tuple(int(L) for L in flags[flags.index("--levels") + 1 :])
        assert model.quantizer.levels == levels and model.codebook_size == math.prod(levels)
        assert kwargs["latent_channels"] == len(levels)
    if "--code-space" in flags:
        assert model.quantizer.sphere and not model.quantizer.rotation
    if "--code-gradient" in flags:
        assert model.quantizer.rotation and not model.quantizer.sphere and not model.quantizer.ema
    if "--kl-schedule" in flags:
        expected = 1e-3 if "constant" in flags else 1e-3 * (0 + 1) / 2  # two steps: factors 0 and 1
        assert log[0]["weight/kl"] * 64**2 == pytest.approx(expected, rel=1e-3)


def test_ctrl_c_ends_after_a_whole_step_and_the_same_command_continues(train, monkeypatch):
    calls, loss = [], prestage_train.reconstruction_loss

    def interrupted(x_hat, x):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return loss(x_hat, x)

    train("--name", "straight")
    monkeypatch.setattr(prestage_train, "reconstruction_loss", interrupted)
    flags = ("--name", "run", "--minutes", 60)  # 130 tells `make demo` not to go on, with a time limit or without
    assert "stopped after 2 of 5 steps; the same command continues" in train(*flags, status=130)
    assert "resumed at step 2" in train("--name", "run")
    assert differing(weights("straight"), weights("run")) == []
    assert "has its 5 steps; raise --steps" in train("--name", "run")


def test_a_time_limit_holds_for_the_start_that_it_was_typed_for(train):
    """--help says that without the flag there is no limit; a resumed run is no exception."""
    train("--name", "run", *ONE_STEP)
    assert "stopped" not in train("--name", "run")


def test_a_loss_that_is_not_finite_names_itself_and_keeps_the_checkpoint(train, run_main, monkeypatch, phantom_folder):
    train("--name", "run", *ONE_STEP)
    before = {path: path.read_bytes() for path in Path("model_ckpt/run").iterdir()}
    monkeypatch.setattr(prestage_train, "reconstruction_loss", lambda x_hat, x: x_hat.mean() * math.nan)
    status, _, errors = run_main(prestage_train, "--data", phantom_folder, *TINY, "--name", "run")
    assert status == 2 and len(errors.splitlines()) == 1
    assert "reconstruction became nan at step 1" in errors
    assert {path: path.read_bytes() for path in Path("model_ckpt/run").iterdir()} == before and len(before) == 2


@pytest.mark.parametrize("content", ["list", "another script", "another model", "cut off"])
def test_a_checkpoint_of_something_else_is_one_line(train, run_main, phantom_folder, content):
    train("--name", "run", *ONE_STEP)
    path = Path("model_ckpt/run/last.pt")
    state = checkpoints.load_checkpoint(path, "prestage_train.py")
    if content == "another model":
        state["model"]["encoder.stem.1.weight"] = torch.zeros(1, 2, 3, 4)
    if content == "another script":
        state["script"] = "pixelCNN.py"
    checkpoints.save_checkpoint(path, [1, 2] if content == "list" else state)
    if content == "cut off":
        path.write_bytes(path.read_bytes()[:-300])
    status, _, errors = run_main(prestage_train, "--data", phantom_folder, *TINY, "--name", "run")
    assert status == 2 and len(errors.splitlines()) == 1 and "last.pt" in errors


def test_a_changed_setting_on_resume_is_one_line_naming_the_flag(train, run_main, phantom_folder):
    train("--model", "vae", "--name", "run", *ONE_STEP)
    before = Path("model_ckpt/run/last.pt").read_bytes()
    for flag, value in (("--channels", "16"), ("--learning-rate", "0.5"), ("--model", "vqvae"), ("--preset", "base")):
        status, _, errors = run_main(prestage_train, "--data", phantom_folder, "--name", "run", flag, value)
        assert status == 2 and len(errors.splitlines()) == 1 and flag in errors and value in errors
    flags = ("--data", phantom_folder, "--name", "new", "--discriminator-start", 3, "--gan-start", 2)
    status, _, errors = run_main(prestage_train, *flags, *TINY)
    assert status == 2 and len(errors.splitlines()) == 1 and "--gan-start 2" in errors
    assert Path("model_ckpt/run/last.pt").read_bytes() == before


def test_other_data_on_resume_are_refused(train, run_main, noise_folder, phantom_folder, tmp_path):
    """Half a run on each of two data sets is no experiment; the same slices in another place are the same."""
    train("--name", "run", *ONE_STEP)
    before = Path("log/run/run.json").read_bytes()
    status, _, errors = run_main(prestage_train, "--data", noise_folder, *TINY, "--name", "run")
    assert status == 2 and len(errors.splitlines()) == 1 and "other train slices" in errors and "--data" in errors
    assert Path("log/run/run.json").read_bytes() == before
    shutil.copytree(phantom_folder, tmp_path / "moved")
    assert "resumed at step 1" in train("--data", tmp_path / "moved", "--name", "run")


def test_what_cannot_be_built_is_one_line(run_main, phantom_folder):
    """A factor that does not divide the box, and more codes than vectors to start them from."""
    for flags, flag in ((["--patch", "5"], "--patch"), (["--codebook-size", "99999"], "--codebook-size")):
        status, _, errors = run_main(prestage_train, "--data", phantom_folder, *TINY, *flags)
        assert status == 2 and len(errors.splitlines()) == 1 and flag in errors
        assert not Path("log").exists()


def test_a_run_leaves_what_the_layout_promises(train):
    """Weights for use that load by the run's name, a description, a log that reads, pictures; settings as typed."""
    out = train("--model", "vae", "--name", "mine", "--blocks", 2, "--feature-weight", 0.2, "--kl-weight", 0.5, *GAN)
    model = load_first_stage("mine")
    assert model.description["step"] == 5 and model.description["kind"] == "vae"
    assert model.description["model_kwargs"]["blocks"] == 2 and model.description["data"]["slices"] == 96
    assert model.latent_shape == (4, 12, 14)
    described = json.loads(Path("log/mine/run.json").read_text())
    assert described["script"] == "prestage_train.py" and described["parameters"] == sum(
        p.numel() for p in model.parameters()
    )
    assert (settings("mine")["feature_weight"], settings("mine")["kl_weight"]) == (0.2, 0.5)
    log = read_log(Path("log/mine"))
    assert log[-1]["step"] == 5 and {"train/kl", "weight/kl"} <= log[0].keys() and "validate/psnr" in log[-1]
    assert "train/kl" not in log[-2] and "train/generator" in log[-2]  # the latent is frozen then
    pictures = {"reconstruction_000002.png", "prior_000002.png", "reconstruction_000005.png"}
    assert {path.name for path in Path("mine_vis").iterdir()} == pictures  # a draw from the prior with every latent
    assert re.search(r"step 5 .*validate/ssim 0\.\d+", out)
    x = torch.rand(40, 1, 64, 64) * 2 - 1
    assert model.encode(x, torch.arange(40) % 32).std() > 0.1  # the scale was set


def test_the_scale_of_a_finished_run_is_that_of_the_whole_training_set(train, phantom_folder):
    train("--name", "run", "--precision", "fp32")
    model, data = load_first_stage("run"), prestage_train.load_slices(phantom_folder, "train", 64)
    x, z, _ = data.batch(torch.arange(len(data)))
    latent = model.encode(x, z).movedim(1, 0).flatten(1)
    assert torch.allclose(latent.mean(1), torch.zeros(4), atol=1e-3)
    assert torch.allclose(latent.std(1), torch.ones(4), atol=1e-3)


def test_the_kl_weight_anneals_as_its_flags_say(train):
    train("--model", "vae", "--steps", 8, "--report-every", 10, "--kl-weight", 2, "--kl-cycles", 2, "--kl-ramp", 1)
    weight = [line["weight/kl"] * 64**2 for line in read_log(Path("log/vae")) if "weight/kl" in line]
    assert weight == pytest.approx([0, 0.5, 1, 1.5] * 2, rel=1e-4)


def test_training_time_is_logged_before_a_validation_begins(train, monkeypatch):
    """Else the speed is that of more images than the time is of; 25 is no multiple of the logger's interval of 2."""
    at, validate = [], prestage_train.validate

    def watched(*args):
        at.append(read_log(Path("log/vqvae"))[-1]["step"])
        return validate(*args)

    monkeypatch.setattr(prestage_train, "validate", watched)
    train("--steps", 30, "--report-every", 25, "--gan-weight", 0)
    assert at == [25, 30]


def test_bf16_trains_and_scores_like_float32(train):
    """The quantiser, the losses and the linear path stay float32, so a start in bf16 loses nothing one could see."""
    scores = []
    for precision in ("fp32", "bf16"):
        train("--name", precision, "--precision", precision)
        scores.append(read_log(Path("log") / precision)[-1])
    assert abs(scores[0]["validate/ssim"] - scores[1]["validate/ssim"]) < 0.01
    assert differing(weights("fp32"), weights("bf16")) != []
    assert all(tensor.dtype == torch.float32 for tensor in weights("bf16").values())


def test_compile_reaches_both_networks_and_changes_no_name(train, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda network: (compiled.append(type(network).__name__), network)[1])
    train("--compile", *GAN)
    assert compiled == ["VQVAE", "PatchDiscriminator", "VQVAE"]  # anew when the perceptual decoder begins
    assert load_first_stage("vqvae").description["step"] == 5


@pytest.mark.parametrize("phantom, preset", [(True, "demo"), (False, "small")])
def test_the_preset_follows_the_data_on_a_cpu(run_main, noise_folder, monkeypatch, phantom, preset):
    """Real data deserve 256 pixels. (The run ends when it reads this folder of 64, and has said what it would do.)"""
    if phantom:
        (noise_folder / "PHANTOM.txt").write_text("phantom")
    monkeypatch.setattr(prestage_train, "load_slices", lambda *args, **kwargs: util.sys.exit(0))
    _, out, _ = run_main(prestage_train, "--data", noise_folder, "--device", "cpu")
    assert f"preset {preset}," in out


def test_the_help_names_every_flag_and_its_default():
    text = " ".join(prestage_train.flags().format_help().split())
    plain = vars(prestage_train.flags().parse_args([]))
    assert all(f"--{flag.replace('_', '-')}" in text for flag in plain)
    plain = {flag: " ".join(map(str, v)) if isinstance(v, tuple) else v for flag, v in plain.items()}
    shown = [value for value in plain.values() if value not in (None, False)]
    assert all(f"default: {value}" in text for value in shown) and len(shown) > 8


def test_two_processes_train_one_run(run_script, phantom_folder, tmp_path):
    """torchrun with gloo, discriminator and all: one log, one checkpoint, one process speaks."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    flags = ("--data", phantom_folder, *TINY, "--steps", 4, *GAN, "--batch-size", 2, "--report-every", 2)
    done = run_script("prestage_train.py", *flags, launcher=launcher, threads=1)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run vqvae:") == 1 and done.stdout.count("step 4 ") == 1
    assert checkpoints.load_checkpoint(tmp_path / "model_ckpt/vqvae/last.pt", "prestage_train.py")["step"] == 4
    assert [line["step"] for line in read_log(tmp_path / "log/vqvae")] == [1, 2, 2, 3, 4, 4]
    assert load_first_stage(tmp_path / "model_ckpt/vqvae").description["step"] == 4


def test_grain_sees_slices_as_they_are_and_the_decoder_turned_ones(train, monkeypatch):
    seen, forward = [], VQVAE.forward

    def spy(self, x, z, still=None):
        seen.append((x, still))
        return forward(self, x, z, still)

    monkeypatch.setattr(VQVAE, "forward", spy)
    train("--model", "vqvae", "--steps", 8, "--report-every", 8, "--discriminator-start", 2, "--gan-start", 4)
    assert [still is not None for _, still in seen] == [False] * 4 + [True] * 4

    def whole_greys(x: torch.Tensor) -> bool:
        grey = (x + 1) * 127.5
        return torch.allclose(grey, grey.round(), atol=1e-3)

    for x, still in seen[4:]:
        assert whole_greys(still) and not whole_greys(x) and (x - still).abs().mean() < 0.3  # the same heads
