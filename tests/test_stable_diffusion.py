"""Laws of stable_diffusion.py: a brain is a function of (seed, number), and what a run promises."""

import json
import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import stable_diffusion
import util
from dataset import load_slices, move, write_slices
from heads.layout import MASK_VALUES, list_slices, read_slice
from heads.people import CONDITIONS
from logger import read_log
from model_diffusion import SAMPLERS, LatentDiffusion
from model_VAE import VAE
from parts import calibration
from scores.metrics import adjacent_ssim
from stable_diffusion import BrainNoise, Sampling, decode_brain, draw_brains, sample_latents
from training import checkpoints
from training import run as training_run
from training.latents import TrainingLatents, head_moves
from training.stages import load_first_stage, load_second_stage

CPU = Namespace(device=torch.device("cpu"), autocast=lambda: util.autocast(torch.device("cpu"), "fp32"))


def weights(name: str = "diffusion") -> dict[str, torch.Tensor]:
    return checkpoints.load_weights(Path(f"model_ckpt/{name}/model.safetensors"))[0]


def load(name: str = "diffusion"):
    return load_second_stage(name, stable_diffusion.MODELS)


def tiny_prior(**changes) -> LatentDiffusion:
    """Untrained, with 12 steps and brains of 6 slices, whose noise is half the same."""
    sizes = {"latent_shape": (4, 6, 7), "widths": (8, 16), "blocks": 1, "T": 12, "slices_per_brain": 6}
    model = LatentDiffusion(**sizes | changes).eval()
    model.gaussian.correlation.fill_(0.5).diagonal(dim1=1, dim2=2).fill_(1)
    return model


def last(model: LatentDiffusion, sampling: Sampling, brains=range(1), people=None) -> torch.Tensor:
    """The sampled latents, [n Z, C, h, w]."""
    *_, latent = sample_latents(model, sampling, brains, people or [{}] * len(brains))
    return latent


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


def test_every_setting_of_sampling_changes_the_brain_and_wrong_ones_are_refused(awaken):
    model = awaken(tiny_prior())
    ways = [{"steps": 8}, {"steps": 12}, {"guidance": 2.0}, {"sampler": "heun"}, {"sampler": "ddim"}]
    brains = [last(model, Sampling(**{"steps": 10, "precision": "fp32"} | how)) for how in [*ways, {"sampler": "ddpm"}]]
    assert all((a - b).abs().max() > 1e-4 for n, a in enumerate(brains) for b in brains[:n])
    for wrong, words in (({"sampler": "euler"}, "sampler must be one of dpm"), ({"height": 1.8}, "age.*not height")):
        with pytest.raises(ValueError, match=words):
            Sampling(**wrong)
    assert Sampling(age=75, sex=None).person == {"age": 75}


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
    model = awaken(LatentDiffusion(latent_shape=(4, 12, 14), widths=(8,), blocks=1, slices_per_brain=2, T=120).eval())
    model.description = {}
    sampling = Sampling(steps=steps, precision="fp32")
    _, person, way = next(draw_brains(model, VAE(**tiny_sizes).eval(), sampling))
    passed = list(sample_latents(model, sampling, range(1), [{}]))
    assert person == {} and len(passed) == steps and min(steps, 16) <= len(way) <= 31
    assert torch.equal(way[-1], passed[-1]) and all(any(torch.equal(x, y) for y in passed) for x in way)


def test_brains_are_drawn_without_a_command_line(people_run):
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
    """With the texture of the brain, whichever slices are decoded."""
    codes = load_first_stage(first_stage, decoder="perceptual")
    latent = torch.randn(20, *codes.latent_shape)
    whole, shown = decode_brain(codes, latent, 5, 1), decode_brain(codes, latent, 5, 1, [3, 11])
    difference = np.abs(whole[[3, 11]].astype(int) - shown)
    assert difference.max() <= 1 and (difference > 0).mean() <= 0.001
    assert not np.array_equal(whole, decode_brain(codes, latent, 5, 2))


def test_training_sees_every_head_moved_as_a_whole_and_told(train, heads_folder, first_stage, monkeypatch):
    """Once as it is, and as often as asked for in another place: what is said of it is what was done to it.

    First slice by slice, then in windows.
    """
    seen, forward = [], LatentDiffusion.forward

    def watched(self, latent, z, *rest, moves=None, projections=None, **more):
        if self.training:
            seen.append((latent, z, moves, projections, self))
        return forward(self, latent, z, *rest, moves=moves, projections=projections, **more)

    monkeypatch.setattr(LatentDiffusion, "forward", watched)
    monkeypatch.setattr(stable_diffusion, "ALONE", 0.2)
    train("--moved-heads", 1, "--slices", 10, "--batch-size", 10, "--steps", 50)
    assert all(len(set(z.tolist())) > 1 and (z.diff() != 1).any() for _, z, *_ in seen[:10])
    assert all(projections.shape == (10, 1) for *_, projections, _ in seen[:10])
    del seen[:10]
    data, codes, found = load_slices(heads_folder, "train", 64), load_first_stage(first_stage), set()
    for latent, z, moves, projections, model in seen:
        assert torch.equal(z, z[0] + torch.arange(10)) and (moves == moves[0]).all()
        assert torch.equal(model.channel_weight, codes.channel_weight())  # errors count by what they do to a picture
        for case in range(4):
            x, all_z, _ = data.batch(torch.arange(20 * case, 20 * case + 20))
            x = move(x, moves[:1].expand(20, -1), mode="bicubic").clamp(-1, 1) if moves.any() else x
            brain = codes.encode(x, all_z).half().float()
            if torch.allclose(brain[z], latent, atol=5e-3):
                found.add((case, *moves[0].tolist()))
                whole = model.gaussian.project(brain[None])  # of which this is a window
                assert torch.allclose(whole, projections, rtol=1e-3, atol=1e-2)
    assert len(found) == 8 and len({head[1:] for head in found}) == 5  # 4 heads as they are, and 4 that were moved
    one, two = (head_moves(data, copies, seed=0) for copies in (1, 2))
    assert torch.equal(one[0], two[0]) and {tuple(m) for m in one[0].tolist()} < {head[1:] for head in found}


def test_training_leads_below_the_loss_of_the_gaussian_prior(train, heads_folder):
    """At which it begins: on training heads at fixed noise and steps, with the network and with its output 0."""
    train("--steps", 200, "--learning-rate", 0.002, "--batch-size", 8)
    assert "validate/loss" in read_log(Path("log/diffusion"))[-1]
    model, first_stage = load("diffusion")
    args = Namespace(precision="fp32", slices=2)
    known = TrainingLatents(load_slices(heads_folder, "train", 64), first_stage, [], args)
    t = torch.linspace(0, model.T - 1, 16).long().repeat_interleave(len(known.z))
    batch = [part.repeat(16, *[1] * (part.ndim - 1)) for part in (known.latents, known.z)]
    noise = model.gaussian.correlate(torch.randn_like(batch[0]), batch[1], model.slices_per_brain)
    with torch.no_grad():
        trained = model(*batch, t, noise, model.slices_per_brain).mean()
        model.unet.forward = lambda x, *more: torch.zeros_like(x)
        gaussian = model(*batch, t, noise, model.slices_per_brain).mean()
    assert trained < 0.97 * gaussian


@pytest.mark.parametrize("slices, steps, apart", [(1, 100, 12), (3, 33, 33)])
def test_validation_is_a_function_of_the_model(awaken, slices, steps, apart):
    """At fixed steps, whatever the generator's state. A model that mixes slices sees whole brains, each at one step."""
    model, seen, losses = awaken(tiny_prior(T=1000, slices=slices)), [], []
    model.register_forward_pre_hook(lambda module, args: seen.append((args[2], args[4])))
    count = 100 if slices == 1 else 18
    latents, z = torch.randn(count, 4, 6, 7), torch.arange(count) % 6
    for seed in (1, 2):
        seen.clear(), torch.manual_seed(seed)
        losses.append(stable_diffusion.validate(model, latents, z, torch.zeros(count, 0), CPU))
    assert losses[0] == losses[1] > 0
    brain = 1 if slices == 1 else 6
    t = torch.cat([t for t, _ in seen]).view(-1, brain)
    assert {slices for _, slices in seen} == {brain} and (t == t[:, :1]).all()
    assert len(t) == steps and t.min() == 0 and t.max() == 999 and t[:, 0].diff().max() < apart


def test_a_run_stopped_before_its_calibration_is_calibrated_by_the_same_command(
    trained, train, straight, differences, monkeypatch
):
    """Also by Ctrl-C in the last step; once it is, it is not calibrated again, but after more steps it is."""
    with monkeypatch.context() as patch:
        patch.setattr(stable_diffusion, "CALIBRATION_LEAST", 5)
        assert "not calibrated: 4 whole training brains" in train("--name", "few")
        assert not load("few")[0].calibration.measured
        patch.setattr(stable_diffusion, "calibrate", lambda *args: False)
        train("--name", "late")
    assert not any(weights("late")["prior.calibration.weight"].flatten() != 0)
    with monkeypatch.context() as patch:
        patch.setattr(stable_diffusion, "CALIBRATION_LEAST", 4)
        assert "is not calibrated yet" in train("--name", "late", "--sample", "--sample-steps", 1)
    train("--name", "late")
    calibrated = weights("late")
    assert all(torch.equal(tensor, calibrated[name]) for name, tensor in weights().items())
    assert (calibrated["prior.calibration.weight"] != 0).any()
    monkeypatch.setattr(stable_diffusion, "sample_dpm", None)  # what calibration draws brains with
    train()
    assert differences(straight, "diffusion", trained, "diffusion") == []
    with pytest.raises(TypeError):
        train("--steps", 5)


def test_samples_go_away_from_the_gaussian_prior_once_they_are_calibrated(awaken, monkeypatch):
    """As calibration was measured with that; before it, and where training looks on, guesses are the network's own."""
    model, seen = awaken(tiny_prior(T=50)), set()
    denoise = model.denoise
    monkeypatch.setattr(model, "denoise", lambda *args: seen.add(args[-1]) or denoise(*args))
    for level, expected in ((0.0, 1.0), (0.1, stable_diffusion.AWAY)):
        model.calibration.weight.fill_(level), seen.clear()
        list(stable_diffusion.sample_latents(model, Sampling(steps=2), range(1), [{}]))
        assert seen == {expected}


def test_a_calibration_that_was_stopped_goes_on(trained, train, monkeypatch):
    """At the level of noise that it was at, to the same end."""
    levels = []

    def progress(path, title, *args, **kwargs):
        for n, x in enumerate(path):
            if title == "calibrate" and n == 6:
                raise KeyboardInterrupt
            yield x

    real = stable_diffusion.denoiser
    monkeypatch.setattr(stable_diffusion, "denoiser", lambda *args: lambda x, t: levels.append(t) or real(*args)(x, t))
    shutil.rmtree("data/cache")
    with monkeypatch.context() as patch:
        patch.setattr(util, "progress", progress)
        train("--name", "stopped", status=130)
    levels.clear()
    train("--name", "stopped")
    assert len(levels) == calibration.LEVELS - 7
    assert all(torch.equal(tensor, weights()[name]) for name, tensor in weights("stopped").items())


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


def test_a_run_measures_what_it_needs_and_reports_on_neighbouring_slices(trained, heads_folder):
    """The first at its beginning, but for the calibration, which comes last and is not trained on."""
    model, _ = load()
    assert not torch.allclose(model.gaussian.correlation, torch.ones(()), atol=0.1)
    assert len(model.gaussian.modes) == 1 and (model.gaussian.mean.flatten(1).abs().amax(1) > 0).all()
    assert model.calibration.measured and (model.calibration.power > 0).any(1).all()
    checkpoint = checkpoints.load_checkpoint(Path("model_ckpt/diffusion/last.pt"), "stable_diffusion.py")
    assert not (checkpoint["model"]["calibration.weight"] != 0).any()
    assert model.latent_shape == (4, 6, 8) and model.description["step"] == 4
    real = adjacent_ssim(load_slices(heads_folder, "validate", 64).whole_brains()).mean().item()
    for line in (line for line in read_log(Path("log/diffusion")) if "validate/loss" in line):
        assert line["real/adjacent_ssim"] == pytest.approx(real, abs=1e-6) and -1 <= line["sample/adjacent_ssim"] <= 1


def test_weights_follow_from_the_seed_alone(trained, train, monkeypatch):
    """Reports, pictures and checkpoints in between leave no trace; another seed is another run."""
    monkeypatch.setattr(training_run, "REPORTS", 4)
    train("--name", "often")
    train("--name", "other", "--seed", 1, "--steps", 1)
    runs = [weights(name) for name in ("diffusion", "often", "other")]
    assert all(torch.equal(tensor, runs[1][name]) for name, tensor in runs[0].items())
    assert not torch.equal(*(run["prior.unet.stem.weight"] for run in runs[1:]))


@pytest.mark.parametrize("recipe", ["min-snr", "flow", "edm"])
def test_every_recipe_trains_and_samples(train, recipe):
    train("--recipe", recipe, "--steps", 1)
    assert json.loads(Path("log/diffusion/run.json").read_text())["settings"]["recipe"] == recipe
    model, first_stage = load()
    slices, _, _ = next(draw_brains(model, first_stage, Sampling(steps=3, precision="fp32")))
    assert slices.shape == (20, 64, 64) and slices.max() > slices.min()


def test_windows_need_whole_and_equal_brains(refused, run_main, tiny_run, noise_folder, tmp_path):
    run = [*tiny_run, "--data", noise_folder, "--steps", 1]
    (noise_folder / "keras_png_slices_train/case_001_slice_7.nii.png").unlink()
    refused(stable_diffusion, *run, "--slices", 4, names=["--slices 4", "train"])
    images = np.random.default_rng(1).integers(0, 256, (30, 64, 64), dtype=np.uint8)
    for split, case in (("train", 1), ("validate", 2)):
        write_slices(tmp_path / f"other/keras_png_slices_{split}", case, images[: 30 - case])
    names = ["--slices 4", "29", "28"]
    refused(stable_diffusion, *run, "--data", tmp_path / "other", "--slices", 4, names=names)
    status, _, errors = run_main(stable_diffusion, *run, "--slices", 1)
    assert status == 0, errors


@pytest.fixture
def people_run(train, people_folder) -> None:
    """A run "people" of one step, on the slices of a woman of 74 with CDR 0.5."""
    train("--data", people_folder, "--steps", 1, "--name", "people")


def test_a_model_learns_of_people_what_the_table_tells(people_run, train, run_main, refused, people_folder):
    """Age, sex and CDR; the weights remember what training saw of them, and nobody else can be asked for."""
    model, _ = load("people")
    assert model.conditions == tuple(CONDITIONS)
    assert model.description["people"] == {"age": [74, 74], "sex": [0], "cdr": [0.5]}
    sample = ["--sample", "--sample-steps", 2, "--name"]
    status, out, errors = run_main(stable_diffusion, *sample, "people", "--age", 74, "--cdr", 0.5)
    assert status == 0 and "brain 0, age 74, sex F, cdr 0.5, in" in out, errors
    (people_folder / "oasis_cross-sectional.csv").unlink()
    assert "nothing is learned of age" in train("--data", people_folder, "--steps", 1, "--name", "none")
    for flags, words in (
        (["people", "--age", 75], ["--age 75", "age 74 to 74"]),
        (["people", "--sex", "M"], ["--sex M", "sex F"]),
        (["none", "--cdr", 0.5], ["--cdr 0.5", "without"]),
        (["people", "--cdr", 3], ["--cdr"]),
    ):
        refused(stable_diffusion, *sample, *flags, "--out", "new", names=words)
    assert not Path("new").exists()


# ---------------------------------------------------------------------------------------------------------- completion


@pytest.fixture
def given(heads_folder, tmp_path) -> Path:
    """A folder with every third of the 20 slices of case 5, which is held out."""
    files = {path.name: path for _, z, path in list_slices(heads_folder, "validate") if z % 3 == 0}
    (tmp_path / "given").mkdir()
    for name, path in files.items():
        shutil.copy(path, tmp_path / "given" / name)
    return tmp_path / "given"


def brain_in(folder: str) -> np.ndarray:
    """int [20, 64, 64] of case 5."""
    return np.stack([read_slice(path) for _, _, path in list_slices(Path(folder), "train")]).astype(int)


def test_given_slices_stay_and_the_others_are_drawn_to_fit(trained, given, run_main):
    """One seed draws one brain, another seed another; drawn slices are nearer to their given neighbours than those of
    a new brain of the same noise."""
    command = [stable_diffusion, "--complete", given, "--sample-steps", 6, "--precision", "fp32"]
    for out, seed in (("first", 0), ("again", 0), ("other", 1)):
        status, said, errors = run_main(*command, "--out", out, "--seed", seed)
        assert status == 0 and "case 5, given z = 0 3 6 9 12 15 18, in" in said, errors
    first, again, other = (brain_in(out) for out in ("first", "again", "other"))
    real, kept = brain_in(given), np.arange(0, 20, 3)
    drawn = np.setdiff1d(np.arange(20), kept)
    assert first.shape == (20, 64, 64) and np.array_equal(first, again)
    assert np.array_equal(first[kept], real) and np.array_equal(other[kept], real)
    assert all((first[z] != other[z]).any() for z in drawn)
    new, _, _ = next(draw_brains(*load(), Sampling(steps=6, precision="fp32"), range(5, 6)))
    likeness = [np.corrcoef(brain[drawn].ravel(), first[drawn - drawn % 3].ravel())[0, 1] for brain in (first, new)]
    assert likeness[0] > likeness[1] + 0.05
    record = json.loads(Path("first/samples.json").read_text())
    assert record["brains"] == {"5": {"given": "0 3 6 9 12 15 18"}} and Path("first/index.html").is_file()
    (given / "case_005_slice_3.nii.png").unlink()  # then it is another brain, and goes elsewhere
    status, _, errors = run_main(*command, "--out", "first")
    assert status == 2 and "other weights or settings" in errors


def test_a_completed_brain_is_of_the_person_in_the_table_or_of_the_flags(
    people_run, people_folder, run_main, monkeypatch
):
    """Who is in neither is unknown."""
    told, some = [], people_folder / "some"
    for case in (1, 7):
        write_slices(some, case, np.random.default_rng(case).integers(0, 256, (3, 64, 64), dtype=np.uint8))

    def watched(*args):
        told.append(args[-1])
        return np.zeros((32, 64, 64), np.uint8)

    monkeypatch.setattr(stable_diffusion, "complete_brain", watched)
    for flags in ([], ["--sex", "F"]):
        status, _, errors = run_main(stable_diffusion, "--complete", some, "--name", "people", *flags)
        assert status == 0, errors
    known = {"age": 74, "sex": 0, "cdr": 0.5}
    assert told == [known, {}, known, {"sex": 0}]


def test_what_cannot_be_completed_is_refused_in_one_line(trained, given, heads_folder, refused, tmp_path):
    def without(*flags, names: list[str]) -> None:
        refused(stable_diffusion, "--complete", *flags, names=names)

    slice_, pixels = given / "case_005_slice_3.nii.png", np.full((64, 64), 7, np.uint8)
    without(given, "--brains", 2, names=["--brains", "--seed"])
    without(tmp_path / "nowhere", names=["nowhere", "itself holds slices"])
    without(heads_folder, names=["itself holds slices"])
    without(heads_folder / "keras_png_slices_validate", names=["case 5", "all 20"])
    without(heads_folder / "keras_png_slices_seg_validate", names=["no case_NNN_slice_Z.nii.png"])
    Image.fromarray(pixels).save(given / "case_006_slice_20.nii.png")
    without(given, names=["case_006_slice_20", "0 to 19"])
    (given / "case_006_slice_20.nii.png").unlink()
    Image.fromarray(pixels[:32, :32]).save(slice_)
    without(given, names=["case_005_slice_3", "32x32", "64x64"])
    Image.fromarray(np.random.default_rng(0).choice(np.array(MASK_VALUES, np.uint8), (64, 64))).save(slice_)
    without(given, names=["case_005_slice_3", "masks"])
