"""Laws of samples.py, tests of the scores: real brains, copies, blur, shuffled slices; and of page.py."""

import json
import re
import shutil
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
from scores.page import nearest_pairs, sample_rows, verdict
from scores.samples import SAMPLE_SCORES, Score, score_samples
from scores.scorer import Scorer
from training import checkpoints
from util import UserError

Z = 20  # slices a brain, fewer than in the release


@pytest.fixture(scope="module")
def heads() -> Tensor:
    """uint8 [22, Z, 64, 64]: phantom brains."""
    return torch.stack([thumbnails(torch.from_numpy(phantom_case(7, case, Z)[0])) for case in range(22)])


@pytest.fixture(scope="module")
def kept_measures(tmp_path_factory) -> Path:
    """A working folder for several tests: the real brains are the same in all, and measured once."""
    return tmp_path_factory.mktemp("measures")


@pytest.fixture
def real(heads, kept_measures, monkeypatch) -> tuple[dataset.Slices, dataset.Slices]:
    """(train, held_out): 10 and 6 brains; the other six are left to be samples."""
    monkeypatch.chdir(kept_measures)

    def slices(brains: Tensor, split: str, first: int) -> dataset.Slices:
        n = len(brains)
        z, case = torch.arange(Z).repeat(n), (first + torch.arange(n)).repeat_interleave(Z)
        return dataset.Slices(brains.flatten(0, 1), z, case, None, Path("phantom"), split, split)

    return slices(heads[:10], "train", 100), slices(heads[10:16], "validate", 200)


@pytest.fixture
def scorer() -> Scorer:
    """An untrained one: these laws hold for any."""
    torch.manual_seed(0)
    return Scorer(channels=(8, 8), features=8, slices_per_brain=Z).eval()


def test_real_brains_score_their_floor(heads, real, scorer):
    """Once, where the samples are the held-out brains themselves; about once, where they are other real ones."""
    same, _ = score_samples(heads[10:16], *real, scorer, "0", 40)
    for name in SAMPLE_SCORES:
        assert same["samples"][name] == pytest.approx(same["real"][name], rel=1e-5), name
    other, _ = score_samples(heads[16:], *real, scorer, "0", 40)
    for name, score in SAMPLE_SCORES.items():
        if score.group == "distance" and not score.signed:
            assert 1 / 3.5 < other["samples"][name] / other["real"][name] < 3.5, name
    differ = [name for name in SAMPLE_SCORES if verdict(other["samples"], other["real"], name) == "differs"]
    assert len(differ) <= 5, differ
    assert other["brains"] == 6 and other["training_brains"] == 10


def test_five_per_cent_of_copies_read_five_per_cent(heads, real, scorer):
    """Planted into new brains: training slices, moved by a pixel, a little darker and noisy."""
    brains, count = heads[10:16].clone(), round(0.05 * 6 * Z)
    for n, at in enumerate(torch.randperm(6 * Z)[:count].tolist()):
        i, z = divmod(at, Z)
        copy = torch.roll(heads[n, z].float() * 0.95 + 2 * torch.randn(64, 64), (n % 2, n % 3 - 1), (0, 1))
        brains[i, z] = copy.clamp(0, 255).to(torch.uint8)
    result, measures = score_samples(brains, *real, scorer, "0", 40)
    assert result["samples"]["copies_excess"] == pytest.approx(count / (6 * Z), abs=0.01)
    assert result["real"]["copies"] == pytest.approx(0.01, abs=1 / (6 * Z))
    assert result["samples"]["copied_brains"] <= 1 / 6
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
    assert result["samples"]["copies"] < 0.1  # near to everything, copies of nothing


def test_slices_of_different_heads_fail_the_scores_of_brains_alone(heads, real, scorer):
    """Scores of single slices cannot see it: they are the same slices."""
    brains = heads[10:16].clone()
    for z in range(Z):
        brains[:, z] = brains[torch.randperm(6), z]
    result, _ = score_samples(brains, *real, scorer, "0", 40)
    for name in ("adjacent_ssim", "adjacent_profile", "reslice_spectrum"):
        assert verdict(result["samples"], result["real"], name) == "differs", name
    assert result["samples"]["adjacent_profile"] > 5 * result["real"]["adjacent_profile"]
    for name in ("frechet_trained", "frechet_texture", "sliced_wasserstein", "noise", "copies"):
        assert result["samples"][name] == pytest.approx(result["real"][name], rel=1e-4), name


def test_real_brains_are_measured_once(real, scorer, tmp_path, monkeypatch):
    """And again when the scorer is another, or the code that measures."""
    monkeypatch.chdir(tmp_path)
    measured, code = [], "a"

    def watched(brains: Tensor, net: Scorer, title: str) -> dict[str, Tensor]:
        measured.append(title)
        return {"noise": torch.arange(len(brains))}

    monkeypatch.setattr(samples, "measure", watched)
    monkeypatch.setattr(samples, "digest_of_code", lambda: code)
    for digest, code in (("0", "a"), ("0", "a"), ("1", "a"), ("0", "b"), ("0", "b")):
        found = samples.measure_real(real[1], real[1].whole_cases(), scorer, digest)
        assert torch.equal(found["noise"], torch.arange(6))
    assert measured == ["validate"] * 3 == 3 * [measured[0]]
    assert len(list(Path("data/cache").glob("validate_measures_64_*"))) == 3


def test_every_byte_of_the_code_that_measures_counts(tmp_path):
    """Of metrics, of the scorer, of samples themselves, and of what they call; not of the rest."""
    for name in ("util.py", "module.py", "dataset.py", "evaluate.py"):
        shutil.copy(samples.ROOT / name, tmp_path)
    shutil.copytree(samples.ROOT / "scores", tmp_path / "scores", ignore=shutil.ignore_patterns("__pycache__"))
    known = {samples.digest_of_code(tmp_path)}
    assert known == {samples.digest_of_code()}
    for name in ("util.py", "module.py", "dataset.py", "scores/metrics.py", "scores/samples.py", "scores/scorer.py"):
        with open(tmp_path / name, "ab") as file:
            file.write(b"#")
        known.add(samples.digest_of_code(tmp_path))
    assert len(known) == 7
    (tmp_path / "evaluate.py").write_text("")
    assert samples.digest_of_code(tmp_path) in known


def test_a_score_is_added_in_one_place(heads, real, scorer, monkeypatch):
    """An entry of the table, made of what is measured anyway, is scored, and stands on the page."""
    brightest = Score("largest area of white matter", "mm²", "value", "areas",
                      lambda x, reference: (lambda i: float(x[i, :, 2].max()), len(x)))  # fmt: skip
    monkeypatch.setitem(SAMPLE_SCORES, "largest", brightest)
    result, measures = score_samples(heads[16:18], *real, scorer, "0", 10)
    assert result["samples"]["largest"] == pytest.approx(measures["samples"]["areas"][:, :, 2].max().item())
    assert any("largest area of white matter, mm²" in row[0] for row in sample_rows(result)["value"])


def save_scorer(path: Path, **options) -> None:
    """A file of an untrained scorer, described as by its training."""
    kwargs = {"channels": (8, 8), "features": 8, "slices_per_brain": Z, **options}
    accuracy = {"validate": dict.fromkeys(("dice_csf", "dice_grey", "dice_white", "z_error"), 0.5)}
    description = {"kind": "scorer", "model_kwargs": kwargs, "step": 0, "data": {"cases": 3}, "accuracy": accuracy}
    checkpoints.save_weights(path, Scorer(**kwargs).state_dict(), description)


@pytest.fixture
def drawn(heads, tmp_path) -> Path:
    """A working folder with a data folder of 64 px and the samples of a run named mine."""
    for split, part in (("train", heads[:4]), ("validate", heads[10:13])):
        for case, brain in enumerate(part, 100 if split == "train" else 200):
            dataset.write_slices(tmp_path / f"oasis/keras_png_slices_{split}", case, brain.numpy())
    for case, brain in enumerate(heads[16:20]):
        dataset.write_slices(tmp_path / "mine_vis/samples", case, brain.numpy())
    save_scorer(tmp_path / "net.safetensors")
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
    assert all(score.title in page for score in SAMPLE_SCORES.values()) and "Dice" in out
    assert f"3 brains of {Z} slices" in page and {pair["z"] for pair in report["nearest"]} <= set(range(Z))


def test_what_cannot_be_scored_is_one_line_and_status_2(refused, drawn):
    flags = ("--data", "oasis", "--scorer", "net.safetensors", "--device", "cpu")
    refused(evaluate, "--samples", "nobody", *flags, names=["--sample --brains"])
    refused(evaluate, "--samples", "mine", "--split", "train", *flags, names=["held-out"])
    names = [f"of 32 slices, these have {Z}", "--train-scorer"]
    refused(evaluate, "--samples", "mine", "--data", "oasis", "--device", "cpu", names=names)  # the released scorer
    for case in (0, 1):
        dataset.write_slices(Path("fewer"), case, np.ones((Z - 1, 64, 64), np.uint8))
    refused(evaluate, "--samples", "fewer", *flags, names=[f"{Z - 1} slices a brain", f"train in oasis has {Z}"])
    for case in (1, 2, 3):
        Path(f"mine_vis/samples/case_{case:03d}_slice_9.nii.png").unlink()
    refused(evaluate, "--samples", "mine", *flags, names=["1 whole brains"])
    dataset.write_slices(Path("mine_vis/samples"), 9, np.ones((Z, 32, 32), np.uint8))
    refused(evaluate, "--samples", "mine", *flags, names=["squares of one size"])
    alone = dataset.Slices(torch.zeros(32, 64, 64).byte(), torch.arange(32), torch.ones(32).long(), None, Path("one"),
                           "validate", "")  # fmt: skip
    with pytest.raises(UserError, match="fewer than two whole brains"):
        samples.whole_brains(alone)
