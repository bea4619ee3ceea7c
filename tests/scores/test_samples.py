"""Laws of samples.py, tests of the tests: real heads, copies, blur, shuffled slices; and of realism_page.py."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch import Tensor

import dataset
import evaluate
from heads.phantom import phantom_case
from scores import samples
from scores.metrics import thumbnails
from scores.page import nearest_pairs, verdict
from scores.samples import SAMPLE_SCORES, score_samples
from scores.scorer import Scorer
from training import checkpoints


@pytest.fixture(scope="module")
def heads() -> Tensor:
    """uint8 [22, 32, 64, 64]: phantom heads."""
    return torch.stack([thumbnails(torch.from_numpy(phantom_case(7, case)[0])) for case in range(22)])


@pytest.fixture(scope="module")
def kept_measures(tmp_path_factory) -> Path:
    """A working folder for several tests: the real heads are the same in all, and measured once."""
    return tmp_path_factory.mktemp("measures")


@pytest.fixture
def real(heads, kept_measures, monkeypatch) -> tuple[dataset.Slices, dataset.Slices]:
    """(train, held_out): 10 and 6 heads; the other six are left to be samples."""
    monkeypatch.chdir(kept_measures)

    def slices(brains: Tensor, split: str, first: int) -> dataset.Slices:
        n = len(brains)
        z, case = torch.arange(32).repeat(n), (first + torch.arange(n)).repeat_interleave(32)
        return dataset.Slices(brains.flatten(0, 1), z, case, None, Path("phantom"), split, split)

    return slices(heads[:10], "train", 100), slices(heads[10:16], "validate", 200)


@pytest.fixture
def scorer() -> Scorer:
    """One that nobody trained: these laws hold for any."""
    torch.manual_seed(0)
    return Scorer(channels=(8, 8), features=8).eval()


DISTANCES = [name for name, (_, _, group) in SAMPLE_SCORES.items() if group == "distance"]


def test_real_brains_score_their_floor(heads, real, scorer):
    """Once, where the samples are the held-out brains themselves; about once, where they are other real ones."""
    same, _ = score_samples(heads[10:16], *real, scorer, "0", 40)
    for name in SAMPLE_SCORES:
        assert same["samples"][name] == pytest.approx(same["real"][name], rel=1e-5), name
    other, _ = score_samples(heads[16:], *real, scorer, "0", 40)
    for name in DISTANCES:
        if name.startswith("mmd2"):
            continue
        ratio = other["samples"][name] / other["real"][name]
        assert 1 / 3.5 < ratio < 3.5, f"{name}: {ratio}"
    differ = [name for name in SAMPLE_SCORES if verdict(other["samples"], other["real"], name) == "differs"]
    assert len(differ) <= 5, differ
    assert other["brains"] == 6 and other["training_brains"] == 10


def test_five_per_cent_of_copies_read_five_per_cent(heads, real, scorer):
    """Planted into new heads: training slices, moved by two pixels of 256, a little brighter and noisy."""
    brains, count = heads[10:16].clone(), 10  # of 192
    for n, at in enumerate(torch.randperm(192)[:count].tolist()):
        i, z = divmod(at, 32)
        copy = torch.roll(heads[n, z].float() * 0.95 + 2 * torch.randn(64, 64), (n % 2, n % 3 - 1), (0, 1))
        brains[i, z] = copy.clamp(0, 255).to(torch.uint8)
    result, measures = score_samples(brains, *real, scorer, "0", 40)
    assert result["samples"]["copies_excess"] == pytest.approx(count / 192, abs=0.01)
    assert result["real"]["copies"] == pytest.approx(0.01, abs=0.005) and result["samples"]["copied_brains"] <= 1 / 6
    pairs = nearest_pairs(measures["near"], list(range(6)), torch.arange(100, 110), result["samples"]["copies_limit"])
    assert all(pair["below_limit"] and pair["z"] == pair["training_z"] for pair in pairs[:4])
    order = [pair["relative_distance"] for pair in pairs]
    assert order == sorted(order) and len(pairs) == 8
    whole, _ = score_samples(heads[:6], *real, scorer, "0", 40)  # training brains
    assert whole["samples"]["copies"] == 1 == whole["samples"]["copied_brains"]


def test_blur_fails_the_spectrum_and_the_noise_level(heads, real, scorer):
    soft = torch.from_numpy(gaussian_filter(heads[10:16].float().numpy(), (0, 0, 0.7, 0.7))).round().to(torch.uint8)
    result, _ = score_samples(soft, *real, scorer, "0", 40)
    for name in ("spectrum", "noise", "sliced_wasserstein_finest", "frechet_texture"):
        assert verdict(result["samples"], result["real"], name) == "differs", name
    assert result["samples"]["spectrum"] > 4 * result["real"]["spectrum"]
    assert result["samples"]["noise"] < 0.7 * result["real"]["noise"]
    assert result["samples"]["copies"] < 0.05  # near to everything, copies of nothing


def test_slices_of_different_heads_fail_the_scores_of_brains_alone(heads, real, scorer):
    """Scores of single slices cannot see it: they are the same slices."""
    brains = heads[10:16].clone()
    for z in range(32):
        brains[:, z] = brains[torch.randperm(6), z]
    result, _ = score_samples(brains, *real, scorer, "0", 40)
    for name in ("adjacent_ssim", "adjacent_profile", "reslice_spectrum"):
        assert verdict(result["samples"], result["real"], name) == "differs", name
    assert result["samples"]["adjacent_profile"] > 5 * result["real"]["adjacent_profile"]
    for name in ("frechet_trained", "frechet_texture", "sliced_wasserstein", "noise", "copies"):
        assert result["samples"][name] == pytest.approx(result["real"][name], rel=1e-4), name


def test_real_brains_are_measured_once(real, scorer, tmp_path, monkeypatch):
    """And again when the scorer is another."""
    monkeypatch.chdir(tmp_path)
    measured, measure = [], samples.measure

    def watched(brains: Tensor, net: Scorer, title: str) -> dict[str, Tensor]:
        measured.append(title)
        return measure(brains[:3], net, title)

    monkeypatch.setattr(samples, "measure", watched)
    monkeypatch.setattr(samples, "diversity", lambda brains: torch.ones(3, 8))
    for digest in ("0", "0", "1"):
        samples.measure_real(real[1], torch.arange(200, 206), scorer, digest)
    assert measured == ["validate", "validate"] and len(list(Path("data/cache").glob("validate_measures_64_*"))) == 2


@pytest.fixture
def drawn(heads, phantom_folder, tmp_path) -> Path:
    """A working folder with a data folder of 64 px and the samples of a run named mine."""
    for split, part in (("train", heads[:4]), ("validate", heads[10:13])):
        for case, brain in enumerate(part, 100 if split == "train" else 200):
            dataset.write_slices(tmp_path / f"oasis/keras_png_slices_{split}", case, brain.numpy())
    for case, brain in enumerate(heads[16:20]):
        dataset.write_slices(tmp_path / "mine_vis/samples", case, brain.numpy())
    checkpoints.save_weights(
        tmp_path / "net.safetensors",
        Scorer(channels=(8, 8), features=8).state_dict(),
        {
            "kind": "scorer",
            "model_kwargs": {"channels": (8, 8), "features": 8},
            "step": 0,
            "data": {"cases": 3},
            "accuracy": {"validate": dict.fromkeys(("dice_csf", "dice_grey", "dice_white", "z_error"), 0.5)},
        },
    )
    return tmp_path


def test_the_command_scores_samples_of_a_run_and_writes_a_page(run_main, drawn):
    """By the run's name: JSON with every score, a page that embeds its pictures; as many brains as are held out."""
    flags = ("--data", "oasis", "--scorer", "net.safetensors", "--device", "cpu")
    status, out, errors = run_main(evaluate, "--samples", "mine", *flags)
    assert status == 0, errors
    folder = Path("mine_vis/samples")
    report = json.loads((folder / "samples_validate.json").read_text())
    for part in ("samples", "real"):
        for name in SAMPLE_SCORES:
            low, high = report["result"][part][f"{name}_interval"]
            assert low <= report["result"][part][name] + 1e-9 and report["result"][part][name] <= high + 1e-9
    assert report["result"]["brains"] == 3 and "3 of 4 brains are scored" in out
    assert report["scorer"]["path"] == "net.safetensors" and len(report["nearest"]) == 8
    page = (folder / "samples_validate.md").read_text()
    for picture in re.findall(r"\]\((\S+\.png)\)", page):
        with Image.open(folder / picture) as opened:
            assert len(np.unique(np.asarray(opened))) > 10
    assert all(title in page for title, _, _ in SAMPLE_SCORES.values()) and "Dice" in out
    status, out, _ = run_main(evaluate, "--samples", folder, *flags, "--limit-brains", 2, "--out", "elsewhere")
    assert status == 0 and json.loads(Path("elsewhere/samples_validate.json").read_text())["result"]["brains"] == 2


def test_what_cannot_be_scored_is_one_line_and_status_2(run_main, drawn):
    """No such run; held-out brains that are none; brains that lack slices; pictures of two sizes."""
    flags = ("--data", "oasis", "--scorer", "net.safetensors", "--device", "cpu")

    def refused(*more) -> str:
        status, _, errors = run_main(evaluate, *more, *flags)
        assert status == 2 and len(errors.splitlines()) == 1
        return errors

    assert "--sample --brains" in refused("--samples", "nobody")
    assert "held-out" in refused("--samples", "mine", "--split", "train")
    for case in (1, 2, 3):
        Path(f"mine_vis/samples/case_{case:03d}_slice_9.nii.png").unlink()
    assert "1 whole brains" in refused("--samples", "mine")
    dataset.write_slices(Path("mine_vis/samples"), 9, np.ones((32, 32, 32), np.uint8))
    assert "squares of one size" in refused("--samples", "mine")
