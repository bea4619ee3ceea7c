"""Laws of prestage_train.py: its loss and schedules by hand, and what a run of its two phases promises."""

import json
import math
import os
import re
import shutil
import signal
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

import prestage_train
import util
from dataset import load_slices
from heads.layout import content_box, write_slices
from logger import read_log
from model_VAE import MODELS
from prestage_train import PENALTY, kl_factor, penalty_weight, phase_steps, reconstruction_loss
from training import checkpoints
from training import run as training_run
from training.presets import MEANINGS
from training.stages import load_first_stage

TINY = ["--preset", "demo", "--precision", "fp32", "--widths", 8, 16, "--patch", 4, "--latent-channels", 4]
TINY += ["--codebook-size", 16, "--batch-size", 4, "--gan-weight", 0.5]
VQVAE2 = "--model vqvae2 --patch 2"
ONE_STEP = ["--minutes", 1e-9]  # a limit that is over when the first step is done


@pytest.fixture(scope="module", autouse=True)
def tiny_run(heads_folder):
    """The flags of a run on few heads."""
    return ["--data", heads_folder, *TINY]


def weights(name: str) -> dict[str, torch.Tensor]:
    return checkpoints.load_weights(Path(f"model_ckpt/{name}/model.safetensors"))[0]


def state(name: str, phase: str) -> dict:
    return checkpoints.load_checkpoint(Path(f"model_ckpt/{name}/{phase}.pt"), "prestage_train.py")


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


def without(tensors: dict[str, torch.Tensor], *prefixes: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(prefixes)}


def test_the_schedules_by_hand():
    """100 steps, 2 cycles, ramps of half a cycle: two ramps, one over all, none. The penalty falls by a factor."""
    at, names = (0, 10, 25, 50, 60, 99), ("cyclical", "monotonic", "constant")
    weight = {name: [kl_factor(name, step, 100, cycles=2, ramp=0.5) for step in at] for name in names}
    assert weight["cyclical"] == pytest.approx([0, 0.4, 1, 0, 0.4, 1])
    assert weight["monotonic"] == pytest.approx([0, 0.2, 0.5, 1, 1, 1])
    assert weight["constant"] == [1] * 6 and kl_factor("cyclical", 0, 100, ramp=0.0) == 1
    penalty = [penalty_weight(step, 100) for step in (0, 50, 100)]
    assert [penalty[0], penalty[2]] == pytest.approx(PENALTY) and penalty[1] ** 2 == pytest.approx(math.prod(PENALTY))


def test_the_reconstruction_loss_is_its_formula_and_zero_at_equality_only():
    """L1 + 0.5 (1 - SSIM). Too black a black, which is clamped in the end, costs a tenth and is pulled back."""
    x = (torch.rand(2, 1, 24, 24) * 2 - 1) * 0.9
    assert abs(reconstruction_loss(x, x)) < 1e-6
    for offset in (0.02, -0.02):
        assert reconstruction_loss(x + offset, x) > 0.0199
    other = torch.rand(2, 1, 24, 24) * 2 - 1
    ssim = util.ssim_map((other + 1) / 2, (x + 1) / 2).mean()
    assert reconstruction_loss(other, x) == pytest.approx(((other - x).abs().mean() + (1 - ssim) / 2).item(), abs=1e-6)
    black = torch.full((1, 1, 24, 24), -1.0)
    below, above = (reconstruction_loss(black + d, black) for d in (-0.05, 0.05))
    ssim = util.ssim_map((black - 0.005 + 1) / 2, (black + 1) / 2).mean()
    assert below < 0.1 * above and torch.isclose(below, 0.005 + 0.5 * (1 - ssim), atol=1e-6)
    x_hat = (black - 0.05).requires_grad_()
    reconstruction_loss(x_hat, black).backward()
    assert (x_hat.grad < 0).all()
    assert reconstruction_loss(-black + 0.05, -black) > 0.0499  # nothing is white for sure


def test_the_phases_share_the_steps():
    """Each has at least one however short --steps is; those that are not wanted have none."""

    def steps(count: int, gan_weight: float = 0.5, start_from: str | None = None) -> list[int]:
        phases = phase_steps(Namespace(steps=count, gan_weight=gan_weight, start_from=start_from))
        assert list(phases) == ["codec", "texture"]
        return list(phases.values())

    assert steps(1200) == [500, 700]
    assert steps(1000, start_from="run") == [0, 1000]
    assert steps(1000, gan_weight=0) == [1000, 0]
    for count in range(1, 40):
        for phases in (steps(count), steps(count, start_from="run")[1:]):
            assert min(phases) >= 1 and sum(phases) == max(count, len(phases))


@pytest.mark.parametrize("preset", MEANINGS)
@pytest.mark.parametrize("kind", sorted(MODELS))
def test_every_preset_builds_its_model(preset, kind):
    """On the content box and on the whole frame, which data that leave the box need."""
    args = Namespace(model=kind, **prestage_train.flags().presets[preset], latent_channels=8, levels=None)
    size = args.image_size
    for box in (content_box(np.zeros((size, size), bool)), (0, 0, size, size)):
        with torch.device("meta"):
            model, kwargs = prestage_train.build(args, box)
            embedding = model.embed_z(torch.zeros(1))
            inputs = model.encoder.stem[1].in_channels // args.patch**2  # the bottom encoder has two
            h = model.encoder(torch.zeros(1, inputs, *box[2:]), embedding)
            assert h.shape[2:] == model.latent_shape[1:] and kwargs["box"] == box
            assert model.decoder(torch.zeros(1, *model.latent_shape), embedding).shape == (1, 1, *box[2:])


@pytest.fixture
def two_reports(monkeypatch):
    """Eight steps are four in each phase, with a report after every second."""
    monkeypatch.setattr(training_run, "REPORTS", 2)


@pytest.fixture(scope="module")
def straight(tiny_run, tmp_path_factory, run_in):
    """straight("vae"): the folder of a run "run" that nothing interrupted, with four steps in each phase."""
    made = {}

    def build(model: str) -> Path:
        if model not in made:
            made[model] = tmp_path_factory.mktemp("straight")
            with pytest.MonkeyPatch.context() as patch:
                two_reports.__wrapped__(patch)
                run_in(made[model], prestage_train, *tiny_run, "--name", "run", "--model", model, "--steps", 8)
        return made[model]

    return build


@pytest.fixture
def finished(straight, two_reports, tmp_path) -> None:
    shutil.copytree(straight("vqvae"), tmp_path, dirs_exist_ok=True)


def test_a_run_stopped_after_every_step_is_the_same(train, straight, differences, two_reports, tmp_path):
    """A VAE by its time limit: weights, averages, optimisers, critic and log of both phases, to the bit."""
    flags = ("--name", "run", "--model", "vae", "--steps", 8)
    stops = []
    while stops[-1:] != [8]:
        stopped = re.search(r"stopped after (\d+) steps", train(*flags, *ONE_STEP))
        stops.append(int(stopped[1]) if stopped else 8)
    assert stops == [1, 2, 4, 5, 6, 7, 8]  # a phase that is finished goes over into the next
    assert differences(straight("vae"), "run", tmp_path, "run") == []
    critic = state("run", "texture")["critic"]
    torch.manual_seed(0)
    fresh = prestage_train.PatchDiscriminator().state_dict()
    assert len(differing(critic, fresh)) > 5  # it was trained


@pytest.mark.parametrize("step", [3, 4, 7])
def test_a_signal_ends_a_run_after_a_whole_step(train, straight, differences, two_reports, at_step, tmp_path, step):
    """A VQ-VAE in any phase, and in the last step of one: saved, status 128 + signal; the same command continues."""
    at_step(step, lambda: os.kill(os.getpid(), signal.SIGTERM if step == 7 else signal.SIGINT))
    flags = ("--name", "run", "--steps", 8)
    assert f"stopped after {step} steps; the same command continues" in train(*flags, status=143 if step == 7 else 130)
    assert f"resumed at step {step}" in train(*flags) or step == 3
    assert differences(straight("vqvae"), "run", tmp_path, "run") == []


@pytest.mark.parametrize("step, saved", [(3, 2), (8, 6)])
def test_a_killed_run_goes_on(train, straight, differences, two_reports, at_step, tmp_path, step, saved):
    """In the last step of each phase: what was done since the last checkpoint is done again."""
    flags = ("--name", "run", "--steps", 8)
    with at_step(step):
        train(*flags)
    assert f"resumed at step {saved}" in train(*flags)
    assert differences(straight("vqvae"), "run", tmp_path, "run") == []


def test_a_finished_run_stays_as_it_is(train, finished, straight, differences, tmp_path):
    assert "weights: model_ckpt/run/model.safetensors" in train("--name", "run", "--steps", 8)
    assert differences(straight("vqvae"), "run", tmp_path, "run") == []


def test_fewer_steps_than_are_done_are_refused(train, finished, straight, differences, tmp_path, capsys):
    """In one line, and run.json still says how many were done."""
    train("--name", "run", "--steps", 4, status=2)
    assert differences(straight("vqvae"), "run", tmp_path, "run") == []
    assert json.loads(Path("log/run/run.json").read_text())["settings"]["steps"] == 8


def test_a_longer_codec_makes_the_texture_start_anew(train, finished):
    """It is built on it: with more --steps the codec goes on, and what followed is forgotten."""
    out = train("--name", "run", "--steps", 10)
    assert "resumed at step 3" in out and "phase texture starts anew" in out
    assert [state("run", phase)["step"] for phase in ("codec", "texture")] == [4, 6]
    steps = [line["step"] for line in read_log(Path("log/run"))]
    assert steps == sorted(steps) and steps[-1] == load_first_stage("run").description["step"] == 10


@pytest.mark.parametrize("model", ["vae", "vqvae"])
def test_a_tiny_run_reduces_the_loss(train, monkeypatch, model):
    """From the linear floor on, and the averaged weights score better than before on brains never seen."""
    monkeypatch.setattr(training_run, "REPORTS", 3)
    train("--model", model, "--steps", 90, "--gan-weight", 0, "--learning-rate", 5e-3)
    log = read_log(Path("log") / model)
    loss = [line["train/reconstruction"] for line in log if "train/reconstruction" in line]
    assert len(loss) == 30 and sum(loss[-5:]) < 0.9 * sum(loss[:5])
    ssim = [line["validate/ssim"] for line in log if "validate/ssim" in line]
    brain = [line["validate/brain_ssim"] for line in log if "validate/brain_ssim" in line]
    assert len(ssim) == 3 and ssim[-1] > ssim[0] + 0.005 and brain[-1] > brain[0] + 0.005


def test_the_texture_leaves_the_codec_as_it_is(finished):
    """To the last bit: codes, latents and faithful pictures. The texture draws what they leave out."""
    codec, sharp, final = state("run", "codec")["ema"], state("run", "texture"), weights("run")
    assert differing(codec, without(final, "texture.")) == [] and codec["latent_sd"].min() != 1
    assert differing(sharp["ema"], checkpoints.part_of(final, "texture.")) == []
    assert differing(sharp["ema"], sharp["model"]) != []  # what is used is the average
    x, z = torch.rand(2, 1, 64, 64) * 2 - 1, torch.tensor([3, 18])
    models = [load_first_stage("run", decoder=decoder) for decoder in ("fidelity", "perceptual")]
    latents = [model.encode(x, z) for model in models]
    assert torch.equal(*latents)
    assert torch.equal(*(model.decode(latents[0], z) for model in models))
    assert not torch.equal(*(model.draw(latents[0], z, torch.Generator().manual_seed(0), 20) for model in models))
    logged = {key for line in read_log(Path("log/run")) for key in line}
    assert {"train/discriminator", "train/generator", "train/likeness", "validate/spectrum"} <= logged


def test_texture_learned_later_is_the_same(train, run_main, heads_folder):
    """A run of both phases, and a codec that gets its texture in a run of its own, draw alike."""
    assert phase_steps(Namespace(steps=4, gan_weight=0.5, start_from=None)) == {"codec": 2, "texture": 2}
    train("--steps", 4)
    train("--steps", 2, "--gan-weight", 0, "--name", "codec")
    textured = ["--start-from", "codec", "--preset", "demo", "--precision", "fp32", "--batch-size", 4]
    status, _, errors = run_main(prestage_train, "--data", heads_folder, *textured, "--name", "later", "--steps", 2,
                                 "--gan-weight", 0.5)  # fmt: skip
    assert status == 0, errors
    assert differing(weights("vqvae"), weights("later")) == []


def test_without_a_critic_there_is_no_texture(train):
    train("--gan-weight", 0, "--steps", 2)
    assert not any(name.startswith("texture.") for name in weights("vqvae"))
    assert [path.name for path in Path("model_ckpt/vqvae").glob("*.pt")] == ["codec.pt"]
    assert load_first_stage("vqvae", decoder=None).decoder_in_use == "fidelity"


def test_textures_are_trained_on_codes_and_on_latents_by_turns(tiny_sizes, awaken):
    x, z = torch.rand(4, 1, 64, 64) * 2 - 1, torch.arange(4)
    for kind, codes in (("vqvae", {"codebook_size": 16}), ("vqvae2", {"codebook_size": 16}), ("vae", {})):
        codec = awaken(MODELS[kind](**tiny_sizes, **codes).eval())
        latent, known = prestage_train.latents_of(codec, x, z), codec.encode(x, z)
        assert torch.equal(latent[1::2], known[1::2])
        other = codec.dequantise(codec.encode_indices(x, z)) if codes else known
        assert torch.equal(latent[::2], other[::2]) and torch.equal(latent[::2], known[::2]) == (kind == "vae")


def test_a_finished_first_stage_gets_another_perceptual_decoder(train, run_main, refused, heads_folder, differences):
    """--start-from: the latents are those of before to the last bit, the sizes come with it, and it resumes."""
    train("--gan-weight", 0, "--steps", 3)
    path = Path("model_ckpt/vqvae/model.safetensors")
    kept, description = checkpoints.load_weights(path)
    kept["encoder.stem.1.bias"][0] = -0.0  # a digest sees the sign of nothing
    checkpoints.save_weights(path, kept, description)
    textured = ["--data", heads_folder, "--start-from", "vqvae", "--preset", "demo", "--precision", "fp32"]
    textured += ["--batch-size", 4, "--steps", 5, "--learning-rate", 0.01]
    for name, more in (("straight", []), ("stopped", ONE_STEP), ("stopped", [])):
        status, out, errors = run_main(prestage_train, *textured, "--name", name, *more)
        assert status == 0, errors
    assert "resumed at step 1" in out and differences(Path(), "straight", Path(), "stopped") == []
    assert differing(weights("vqvae"), without(weights("straight"), "texture.")) == []
    digests = {load_first_stage(name).description["digest"] for name in ("vqvae", "straight")}
    assert len(digests) == 1 and load_first_stage("straight").description["model_kwargs"]["widths"] == [8, 16]
    assert load_first_stage("straight").description["started_from"]["digest"] == digests.pop()
    for flags, words in (
        (["--name", "new", "--widths", 16], "--widths comes with"),
        (["--name", "new", "--gan-weight", 0], "--gan-weight above 0"),
        ([], "give it a --name"),
    ):
        refused(prestage_train, *textured, *flags, names=[words])
    assert not Path("log/new").exists()


@pytest.mark.parametrize("flags", ["--levels 4 3 2", VQVAE2, f"{VQVAE2} --levels 8 5 5 5"])
def test_every_kind_of_latent_trains_through_both_phases(train, flags):
    """The file is what the flags say, its scale is set, its losses are finite, both decoders decode."""
    train("--name", "run", *flags.split(), "--steps", 5)
    log = read_log(Path("log/run"))
    ssim = [line["validate/ssim"] for line in log if "validate/ssim" in line]
    assert log[-1]["step"] == 5 and 0.1 < ssim[-1] < 1
    for decoder in ("fidelity", "perceptual"):
        model = load_first_stage("run", decoder=decoder)
        latent = model.prior_latent(2)
        pictures = model.draw(latent, torch.tensor([3, 18]), torch.Generator(), 20)
        assert 0.2 < latent.std() < 5 and pictures.isfinite().all()
    if "--levels" in flags:
        levels = tuple(map(int, flags.partition("--levels")[2].split()))
        assert model.quantizer.levels == levels and model.codebook_size == math.prod(levels)


def test_the_kl_weight_follows_its_schedule(train):
    for schedule, expected in (("constant", [1, 1, 1]), ("monotonic", [0, 2 / 3, 1])):
        flags = ("--kl-schedule", schedule, "--kl-weight", 0.5, "--steps", 3, "--gan-weight", 0)
        train("--name", schedule, "--model", "vae", *flags)
        weight = [line["weight/kl"] * 64**2 / 0.5 for line in read_log(Path("log") / schedule) if "weight/kl" in line]
        assert weight == pytest.approx(expected, rel=1e-3)


def test_weights_follow_from_the_seed_alone(train, finished, monkeypatch):
    """Reports, pictures and checkpoints in between leave no trace; another seed is another run."""
    monkeypatch.setattr(training_run, "REPORTS", 4)
    train("--name", "often", "--steps", 8)
    train("--name", "other", "--steps", 3, "--seed", 1, "--gan-weight", 0)
    for phase in ("codec", "texture"):
        assert differing(state("run", phase)["model"], state("often", phase)["model"]) == []
    same = without(weights("run"), "texture.")
    assert "encoder.stem.1.weight" in differing(same, weights("other"))


def test_slices_are_moved_for_the_codec_and_not_for_the_texture(train, two_reports, monkeypatch):
    """Interpolation takes away what the texture has to learn."""
    seen = {"moved": [], "whole": []}

    def spy(owner, method: str, found: list) -> None:
        original = getattr(owner, method)
        monkeypatch.setattr(owner, method, lambda model, x, *more: (found.append(x), original(model, x, *more))[1])

    spy(prestage_train.VQVAE, "forward", seen["moved"])
    spy(prestage_train, "latents_of", seen["whole"])
    train("--steps", 8)

    def whole_greys(x: torch.Tensor) -> bool:
        grey = (x + 1) * 127.5
        return torch.allclose(grey, grey.round(), atol=1e-3)

    moved = [x for x in seen["moved"] if not torch._subclasses.fake_tensor.is_fake(x)]
    assert len(moved) == 3 and not any(map(whole_greys, moved))
    assert len(seen["whole"]) == 5 and all(map(whole_greys, seen["whole"]))


@pytest.mark.parametrize("content", ["another model", "cut off"])
def test_a_checkpoint_of_something_else_is_one_line(train, refused, tiny_run, content):
    train("--name", "run", "--steps", 6, *ONE_STEP)
    path, found = Path("model_ckpt/run/codec.pt"), state("run", "codec")
    if content == "another model":
        found["model"]["encoder.stem.1.weight"] = torch.zeros(1, 2, 3, 4)
    checkpoints.save_checkpoint(path, found)
    if content == "cut off":
        path.write_bytes(path.read_bytes()[:-300])
    refused(prestage_train, *tiny_run, "--name", "run", "--steps", 6, names=["codec.pt"])


def test_other_data_on_resume_are_refused(train, refused, tiny_run, heads_folder, noise_folder, tmp_path):
    """Half a run on each of two data sets is no experiment; the same slices in another place are the same."""
    train("--steps", 6, *ONE_STEP)
    before = Path("log/vqvae/run.json").read_bytes()
    refused(prestage_train, *tiny_run, "--data", noise_folder, "--steps", 6, names=["other train slices", "--data"])
    assert Path("log/vqvae/run.json").read_bytes() == before
    (tmp_path / "moved").symlink_to(heads_folder)
    assert "resumed at step 1" in train("--data", tmp_path / "moved", "--steps", 6)


def test_what_cannot_be_built_is_one_line(refused, tiny_run):
    for flags, flag in ((["--patch", "5"], "--patch"), (["--codebook-size", "99999"], "--codebook-size")):
        refused(prestage_train, *tiny_run, *flags, names=[flag])
        assert not Path("log").exists()


def test_a_run_leaves_what_the_layout_promises(train, heads_folder):
    out = train("--model", "vae", "--name", "mine", "--steps", 6, "--kl-weight", 0.5)
    assert len(re.findall(r"^run mine: .*kl-weight 0.5.*widths 8 16", out, re.MULTILINE)) == 1
    assert re.search(r"^step 4 .*validate/ssim 0\.\d+", out, re.MULTILINE) and "\ntime: " in out
    assert len(re.findall(r"^memory: about .* for a step", out, re.MULTILINE)) == 2  # codec, texture
    model = load_first_stage("mine")
    assert model.description["step"] == 6 and model.description["kind"] == "vae" and model.latent_shape == (4, 6, 8)
    assert model.description["data"]["slices"] == 80 and model.description["preset"] == "demo"
    described = json.loads(Path("log/mine/run.json").read_text())
    assert described["script"] == "prestage_train.py" and described["settings"]["kl_weight"] == 0.5
    assert described["parameters"] == sum(p.numel() for p in model.texture.parameters())  # of the last phase
    log = read_log(Path("log/mine"))
    assert {"train/kl", "weight/kl", "learning_rate"} <= log[0].keys() and "validate/psnr" in log[1]
    kinds = {path.name.rpartition("_")[0] for path in Path("mine_vis").iterdir()}
    assert kinds == {"reconstruction", "prior"} and Path("mine_vis/reconstruction_000005.png").is_file()
    data = load_slices(heads_folder, "train", 64)
    x, z, _ = data.batch(torch.arange(len(data)))
    latent = model.encode(x, z).movedim(1, 0).flatten(1)  # the scale is that of the whole training set
    assert torch.allclose(latent.mean(1), torch.zeros(4), atol=1e-3)
    assert torch.allclose(latent.std(1), torch.ones(4), atol=1e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_reduced_precision_trains_and_scores_like_float32(train, finished, precision):
    """The quantiser, the losses and the linear path stay float32, so a start in bf16 loses nothing one could see."""
    train("--name", precision, "--precision", precision, "--steps", 8)
    scores = [[line["validate/ssim"] for line in read_log(Path("log") / name) if "validate/ssim" in line][-1]
              for name in ("run", precision)]  # fmt: skip
    assert abs(scores[0] - scores[1]) < 0.01
    assert differing(weights("run"), weights(precision)) != []
    assert all(tensor.dtype == torch.float32 for tensor in weights(precision).values())


def test_compile_reaches_both_phases_and_changes_no_name(train, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda network: (compiled.append(type(network).__name__), network)[1])
    train("--compile", "--steps", 3)
    assert compiled == ["VQVAE", "Texture"] and load_first_stage("vqvae").description["step"] == 3


@pytest.mark.parametrize("phantom, preset", [(True, "demo"), (False, "small")])
def test_the_preset_follows_the_data_on_a_cpu(run_main, noise_folder, monkeypatch, phantom, preset):
    """Real data deserve 256 pixels. (The run ends when it reads this folder of 64, and has said what it would do.)"""
    if phantom:
        (noise_folder / "PHANTOM.txt").write_text("phantom")
    monkeypatch.setattr(prestage_train, "load_slices", lambda *args, **kwargs: util.sys.exit(0))
    _, out, _ = run_main(prestage_train, "--data", noise_folder, "--device", "cpu")
    assert f"preset {preset}," in out


def test_validation_without_masks_leaves_brain_scores_out(train, heads_folder, tmp_path):
    for split in ("train", "validate"):
        data = load_slices(heads_folder, split, 64)
        for case, images in zip(data.case.unique().tolist(), data.whole_brains()):
            write_slices(tmp_path / f"bare/keras_png_slices_{split}", case, images.numpy())
    assert "no masks" in train("--data", tmp_path / "bare", "--steps", 1, "--gan-weight", 0)
    report = read_log(Path("log/vqvae"))[-1]
    assert "validate/ssim" in report and "validate/brain_ssim" not in report
