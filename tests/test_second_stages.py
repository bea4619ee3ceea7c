"""Laws that pixelCNN.py and stable_diffusion.py promise alike of their runs."""

import json
import re
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from conftest import FIRST_STAGE, Killed
from PIL import Image

import pixelCNN
import prestage_train
import stable_diffusion
from dataset import list_slices, load_slices
from logger import read_log
from model_diffusion import LatentDiffusion
from model_VAE import VAE
from pictures import sheets
from training.checkpoints import save_weights
from training.stages import load_first_stage, load_second_stage, save_second_stage


@pytest.fixture(scope="module", params=[pixelCNN, stable_diffusion], ids=lambda module: module.__name__)
def script(request):
    return request.param


ONE_STEP = ["--minutes", 1e-9]  # a limit that is over when the first step is done
SAMPLE = {
    pixelCNN: ["--sample", "--temperature", 0.8],
    stable_diffusion: ["--sample", "--sampler", "heun", "--sample-steps", 3, "--precision", "fp32"],
}


@pytest.fixture
def name(script) -> str:
    return {pixelCNN: "pixelcnn", stable_diffusion: "diffusion"}[script]


def load(name: str):
    """(prior, first stage) of a run."""
    return load_second_stage(name, pixelCNN.PRIORS | stable_diffusion.MODELS)


def files_in(folder: Path) -> dict[Path, bytes]:
    """{place in the folder: content} of all files but the signs of its owner."""
    files = (file for file in folder.rglob("*") if file.is_file() and file.name[0] != ".")
    return {file.relative_to(folder): file.read_bytes() for file in files}


def drawn(script, name: str, seed: int, i: int) -> np.ndarray:
    """The brain i that SAMPLE stands for."""
    model, first_stage = load(name)
    if script is pixelCNN:
        return pixelCNN.decode_brain(first_stage, pixelCNN.sample_brain(model, seed, i, 0.8), seed, i)
    sampling = stable_diffusion.Sampling(seed=seed, sampler="heun", steps=3, precision="fp32")
    return next(stable_diffusion.draw_brains(model, first_stage, sampling, range(i, i + 1)))[0]


def test_a_run_leaves_what_the_layout_promises(script, name, trained, first_stage):
    model, inside = load(name)
    assert inside.decoder_in_use == "perceptual"  # the default, where there is one
    assert model.slices_per_brain == 20 and model.description["data"]["slices"] == 80
    expected = load_first_stage(first_stage)
    assert all(torch.equal(a, b) for a, b in zip(inside.state_dict().values(), expected.state_dict().values()))
    run = json.loads(Path("log", name, "run.json").read_text())
    assert run["script"] == f"{script.__name__}.py" and run["settings"]["preset"] == "demo"
    assert run["parameters"] == sum(p.numel() for p in model.parameters())
    log = read_log(Path("log", name))
    assert [line["step"] for line in log if "train/loss" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in log if any(key.startswith("validate/") for key in line)] == [2, 4]
    assert {path.name for path in Path(f"{name}_vis").iterdir()} == {"sample_000002.png", "sample_000004.png"}


@pytest.mark.parametrize(
    "script, flags",
    [(pixelCNN, []), (stable_diffusion, ["--moved-heads", 2]), (stable_diffusion, ["--recipe", "ddpm", "--slices", 1])],
    scope="module",
)
def test_a_run_stopped_after_every_step_equals_an_uninterrupted_one(script, flags, name, train, differences):
    """Weights, averages, optimiser, patience, calibration and log to the bit, with all that happens at a stop."""
    for folder, starts in (("straight", [[]]), ("stopped", [ONE_STEP] * 3 + [[]])):
        Path(folder).mkdir()
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            for step, more in enumerate(starts, 1):
                out = train(*flags, *more)
                assert (f"stopped after {step} steps" in out) == (more == ONE_STEP)
                assert (f"resumed at step {step - 1}" in out) == (step > 1)
                load(name)  # from the first stop on, there is something to sample from
    assert differences(Path("straight"), name, Path("stopped"), name) == []


def test_a_killed_run_goes_on_from_its_last_checkpoint(name, train, straight, differences, at_step, tmp_path):
    with at_step(4):
        train()
    assert "resumed at step 2" in train()
    assert differences(straight, name, tmp_path, name) == []


def test_sampling_writes_sheet_volume_and_slices_per_brain_and_the_gif(script, name, trained, run_main):
    """In the form that training reads; each brain is the one that its number and the seed stand for."""
    status, out, errors = run_main(script, *SAMPLE[script], "--brains", 2, "--seed", 5)
    assert status == 0 and "training it first" not in out, errors
    samples = Path(f"{name}_vis/samples")
    splits = ("train", "validate")  # of brains 0 and 1
    slices = np.stack([load_slices(samples, split, 64).whole_brains()[0].numpy() for split in splits])
    found = [list_slices(samples, split) for split in splits]
    assert [slice_[:2] for files in found for slice_ in files] == [(i, z) for i in range(2) for z in range(20)]
    for i in range(2):
        assert np.array_equal(slices[i], drawn(script, name, 5, i))
        voxels = np.asanyarray(nibabel.load(samples / f"brain_{i:03d}.nii.gz").dataobj)
        assert np.array_equal(voxels.transpose(2, 0, 1), slices[i])
        assert (samples / f"brain_{i:03d}.png").stat().st_size > 1000
    assert not np.array_equal(slices[0], slices[1])
    record = json.loads((samples / "samples.json").read_text())
    assert record["made_by"]["settings"]["seed"] == 5 and record["brains"].keys() == {"0", "1"}
    assert b"NiiVue" in (samples / "index.html").read_bytes()
    with Image.open(samples / "process.gif") as gif:
        assert 1 < gif.n_frames <= 24 and gif.width == 448 + 8
    assert (samples / "process.gif").stat().st_size < 3_000_000


def test_a_killed_set_goes_on_with_the_brain_at_which_it_was(script, name, trained, run_main, monkeypatch):
    """Killed within brain 0, within brain 1, and asked for more brains: the files are those of one go, to the byte."""
    save_gif, fatal = sheets.save_gif, ""

    def save_or_die(path: Path, *args, **kwargs) -> None:
        if path.name == fatal:
            raise Killed
        save_gif(path, *args, **kwargs)

    def draw(out: str, brains: int) -> tuple[list[int], str]:
        """Which brains were drawn, and what was printed."""
        status, said, errors = run_main(script, *SAMPLE[script], "--brains", brains, "--out", out)
        assert status == 0, errors
        return [int(number) for number in re.findall(r"^brain (\d+)(?:, .*)?, in ", said, re.MULTILINE)], said

    monkeypatch.setattr(sheets, "save_gif", save_or_die)
    assert draw("straight", 3)[0] == [0, 1, 2]
    for brains, fatal, there in ((3, "brain_000_scroll.gif", []), (1, "", ["0"]), (3, "brain_001_scroll.gif", ["0"])):
        if fatal:
            with pytest.raises(Killed):
                draw("stopped", brains)
        else:
            assert draw("stopped", brains)[0] == [0]
        assert list(json.loads(Path("stopped/samples.json").read_text())["brains"]) == there
    fatal = ""
    numbers, said = draw("stopped", 3)
    assert numbers == [1, 2] and "2 of 3 brains are to be drawn" in said and "brains to go: 1, about " in said
    assert draw("stopped", 3)[0] == []
    assert files_in(Path("stopped")) == files_in(Path("straight"))


def test_samples_are_data_to_train_on(script, name, trained, run_main):
    """A first stage learns from what a second stage drew, by the name of the folder alone."""
    assert run_main(script, *SAMPLE[script], "--brains", 3, "--out", "synthetic")[0] == 0
    status, out, errors = run_main(prestage_train, "--data", "synthetic", "--name", "again", *FIRST_STAGE, "--steps", 2)
    assert status == 0 and "data: synthetic (--data, synthetic)" in out, errors
    described = load_first_stage("again").description["data"]
    assert described["cases"] == 2 and described["slices"] == 40


def test_one_command_trains_first_if_nothing_was_trained_and_samples(script, name, train):
    out = train(*SAMPLE[script], "--out", "mine")
    assert "training it first" in out and "step 4 " in out
    assert len(list_slices(Path("mine"), "train")) == 20 and not Path(f"{name}_vis/samples").exists()


def test_one_file_is_enough_to_sample(script, name, trained, run_main, monkeypatch):
    """The weights carry their first stage: elsewhere, without it and without the data, they draw the same brain."""
    flags = SAMPLE[script]
    assert run_main(script, *flags, "--out", "here")[0] == 0
    shutil.copytree(f"model_ckpt/{name}", "elsewhere/model_ckpt/mine")
    shutil.copy(f"model_ckpt/{name}/model.safetensors", f"elsewhere/{script.__name__.lower()}.safetensors")
    monkeypatch.chdir("elsewhere")
    monkeypatch.setattr(script, "load_first_stage", None)
    monkeypatch.setattr(script, "RELEASED", Path())
    assert run_main(script, *flags, "--name", "mine")[0] == 0
    assert run_main(script, *flags, "--name", "model_ckpt/mine/model.safetensors", "--out", "named")[0] == 0
    status, out, _ = run_main(script, *flags)  # nothing was trained here
    assert status == 0 and "sampling the released weights" in out
    here = files_in(trained / "here")
    assert len(here) == 20 + 8
    for folder in ("mine_vis/samples", "named", f"{name}_vis/samples"):
        assert here == files_in(Path(folder))


def test_what_does_not_fit_is_one_line(script, name, trained, refused, heads_folder, first_stage, tiny_sizes):
    """No first stage, weights of another kind, a setting that differs, too much asked for; nothing is written."""
    before = {path: path.read_bytes() for path in Path("model_ckpt", name).iterdir()}
    description = {"kind": "vae", "preset": "demo", "model_kwargs": tiny_sizes, "data": {}, "step": 1}
    save_weights(Path("model_ckpt/vae/model.safetensors"), VAE(**tiny_sizes).state_dict(), description)
    Path("broken.safetensors").write_bytes(first_stage.read_bytes()[:-99])
    new = ["--data", heads_folder, "--preset", "demo", "--name", "new", "--first-stage"]
    wrong = [
        ([*new, "gone"], ["there are no weights at gone", "python prestage_train.py"]),
        ([*new, name], [name, "no first stage"]),
        ([*new, "broken.safetensors"], ["broken.safetensors"]),
        (["--first-stage", "vae"], ["--first-stage vae", "contradicts"]),
        (["--sample", "--name", "vae"], ["is a vae", name]),
    ]
    if script is pixelCNN:
        wrong += [([*new, "vae"], ["vae", "no codes", "--model vqvae"])]
        wrong += [([*sample, "--layers", 3], ["--layers 3", "contradicts"]) for sample in ([], ["--sample"])]
    else:
        model, inside = load(name)
        kwargs = model.description["model_kwargs"] | {"drop_z": 0}
        sure = LatentDiffusion(**kwargs)
        save_second_stage(Path("sure.safetensors"), sure, inside, model.description | {"model_kwargs": kwargs})
        wrong += [
            ([*new, first_stage, "--slices", 21, "--batch-size", 21], ["--slices 21", "20"]),
            ([*new, first_stage, "--slices", 8, "--batch-size", 12], ["--batch-size 12", "--slices 8"]),
            (["--recipe", "edm"], ["--recipe edm", "contradicts"]),
            (["--sample", "--widths", 8], ["--widths", "contradicts"]),
            (["--sample", "--sample-steps", 1001], ["--sample-steps 1001", "1000"]),
            (["--sample", "--guidance", 2, "--name", "sure.safetensors"], ["--guidance 2", "always needs z"]),
        ]
    for flags, words in wrong:
        refused(script, *flags, names=words)
    assert {path: path.read_bytes() for path in Path("model_ckpt", name).iterdir()} == before
    assert not Path("model_ckpt/new").exists() and not list(Path("log/new").glob("metrics*"))
