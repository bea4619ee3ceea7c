"""Laws of utility.py: right masks teach and wrong ones do not, who learns from what, what the command writes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import dataset
import evaluate
import stable_diffusion
from dataset import Slices
from heads.phantom import phantom_case
from scores import utility
from scores.scorer import Scorer

CPU, Z = torch.device("cpu"), 4


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    """Data of 256 px with masks, brains of four slices: 3 heads to train on, 2 to validate; samples in both forms."""
    folder = tmp_path_factory.mktemp("utility")
    for split, cases in (("train", (1, 2, 3)), ("validate", (4, 5)), ("", (101, 102))):
        for case in cases:
            for kind, slices in zip(("case", "seg"), phantom_case(0, case, Z)):
                between = "_" if kind == "case" else "_seg_"
                places = [folder / f"oasis/keras_png_slices{between}{split}"]
                for place in places if split else (folder / "bare", folder / f"new/keras_png_slices{between}train"):
                    dataset.write_slices(place, case, slices, kind)
    return folder


@pytest.fixture
def folder(pristine, tmp_path, monkeypatch) -> Path:
    """The working folder, with a copy of them, and a network that is small and soon trained."""
    monkeypatch.setattr(utility, "Scorer", lambda box: Scorer(channels=(8, 8), features=8, box=box))
    for name, value in {"STEPS": 2, "BATCH": 2, "SEEDS": 2}.items():
        monkeypatch.setattr(utility, name, value)
    return Path(shutil.copytree(pristine, tmp_path, dirs_exist_ok=True))


@pytest.fixture
def splits(folder) -> tuple[Slices, Slices, Slices]:
    return utility.load_heads(Path("bare"), "oasis", "validate")


@pytest.fixture
def trained(monkeypatch) -> list[dict]:
    """What each training was told, in the order of the trainings; the trial that measures time aside."""
    told, fit = [], utility.fit

    def watched(images, masks, seed, box, device, *, steps, title="trial", **more):
        if title != "trial":
            told.append({"title": title, "images": images, "masks": masks, "seed": seed, "steps": steps})
        return fit(images, masks, seed, box, device, steps=steps, title=title, **more)

    monkeypatch.setattr(utility, "fit", watched)
    return told


@pytest.fixture
def measured(folder, run_main):
    """measured("bare", "--limit-brains", 1): (output, report) of the command."""

    def run(samples: str, *flags) -> tuple[str, dict]:
        flags = ("--utility", samples, "--data", "oasis", "--device", "cpu", *flags)
        status, out, errors = run_main(evaluate, *flags)
        assert status == 0, errors
        return out, json.loads(Path(samples, "utility_validate.json").read_text())

    return run


def test_wrong_masks_teach_far_less_and_equal_seeds_are_equal(splits, monkeypatch):
    """Wrong are those of another slice and, far worse, grey matter for CSF, white for grey, CSF for white."""
    monkeypatch.setattr(utility, "RATE", 1e-2)
    (images, masks), held_out = (splits[0].images, splits[0].masks), splits[2]

    def dice(masks: torch.Tensor, seed: int = 0, steps: int = 40) -> torch.Tensor:
        net = utility.fit(images, masks, seed, held_out.content_box(), CPU, steps=steps)
        found = utility.read(net, held_out, CPU)
        return found["common"].sum(0) / found["sizes"].sum(0)

    first, again, other = (dice(masks, seed, steps=2) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    right, of_another = dice(masks), dice(masks.roll(1, 0))
    cycled = dice(torch.where(masks > 0, masks % 255 + 85, 0).to(torch.uint8))
    assert right.mean() > 0.5 and cycled.mean() < 0.25 and of_another.mean() < right.mean()


def test_each_network_learns_from_its_heads_for_equally_long(measured, trained, splits):
    """Samples may lie bare or as the release does; the seed draws real heads; both are all of the others."""
    out, report = measured("bare", "--limit-brains", 1)
    assert [job["title"] for job in trained] == [f"{name}, seed {n}" for n in (0, 1) for name in utility.SETS]
    assert {job["steps"] for job in trained} == {2} and "6 trainings of 2 steps on CPU" in out
    for seed in (0, 1):
        synthetic, real, both = trained[3 * seed : 3 * seed + 3]
        for part in ("images", "masks"):
            assert torch.equal(synthetic[part], getattr(splits[0], part)[:Z])
            assert any(torch.equal(real[part], getattr(splits[1], part)[at]) for at in splits[1].whole_cases())
            assert torch.equal(both[part], torch.cat([synthetic[part], real[part]]))
        assert synthetic["seed"] == real["seed"] == both["seed"] == seed
    drawn = {tuple(utility.choose("real", *splits[:2], 1, seed)[0][1].tolist()) for seed in range(9)}
    assert len(drawn) > 1
    before = len(trained)
    _, again = measured("new", "--limit-brains", 1)
    assert len(trained) == before and again["result"] == report["result"]
    assert len({len(job["images"]) for job in trained}) == 2 and report["heads"] == 1
    _, report = measured("new")
    assert report["heads"] == 2 and len(trained[-1]["images"]) == 4 * Z


def test_a_finished_training_is_not_repeated(measured, trained, monkeypatch):
    """After an interruption in the fourth the same command trains the others; the scores are those of one go."""
    read, interrupted = utility.read, []

    def stops(*args):
        interrupted.append(1)
        if len(interrupted) == 4:
            raise KeyboardInterrupt
        return read(*args)

    monkeypatch.setattr(utility, "read", stops)
    with pytest.raises(AssertionError, match="interrupted"):
        measured("bare")
    out, report = measured("bare")
    assert len(trained) == 4 + 3 and "3 trainings of 2 steps" in out
    shutil.rmtree("data/cache")
    _, in_one_go = measured("bare")
    assert len(trained) == 4 + 3 + 6 and in_one_go["result"] == report["result"]


def test_the_command_writes_table_and_numbers(measured):
    out, report = measured("bare")
    page = Path("bare/utility_validate.md").read_text()
    for name, heads in (("synthetic", 2), ("real", 2), ("both", 4)):
        scores = report["result"][name]
        assert scores["dice"] == pytest.approx(np.mean([scores[f"dice_{t}"] for t in ("csf", "grey", "white")]))
        assert scores["dice"] == pytest.approx(np.mean(scores["seeds"])) and len(scores["seeds"]) == 2
        assert scores["ratio"] == pytest.approx(scores["dice"] / report["result"]["real"]["dice"])
        low, high = scores["ratio_interval"]
        assert low <= scores["ratio"] <= high
        row = next(line for line in page.splitlines() if line.startswith(f"| {name} | {heads} |"))
        assert row in out and f"{scores['dice']:.3f}" in row
    assert report["result"]["real"]["ratio"] == 1 and report["size"] == 256
    assert report["data"]["held_out"]["split"] == "validate" and "about" in out and "page: bare/" in out


def test_ratios_are_of_the_same_heads():
    """Where one network is a tenth worse on every head, hard or easy, the ratio is .9 without doubt."""
    sizes = torch.full((2, 20, 3), 1000.0)
    real = {"common": sizes * torch.rand(2, 20, 3).add(1).div(2), "sizes": sizes}
    worse = {"common": 0.9 * real["common"], "sizes": sizes}
    scores = utility.score_utility(worse, real)
    assert scores["ratio"] == pytest.approx(0.9) and scores["ratio_interval"] == pytest.approx([0.9, 0.9])
    low, high = scores["dice_interval"]
    assert high - low > 0.01 and scores["dice_grey"] == pytest.approx(worse["common"][..., 1].mean().item() / 1000)


def test_what_cannot_be_compared_is_one_line_and_status_2(refused, folder):
    flags = ("--data", "oasis", "--device", "cpu")
    assert stable_diffusion.flags().parse(utility.DRAW.split()[2:])[1]["sample"]  # the advice can be followed
    refused(evaluate, "--utility", "nowhere", *flags, names=["nowhere", "no such folder", "--sample --brains 71"])
    refused(evaluate, "--utility", "bare", "--split", "train", *flags, names=["--split train", "validate"])
    refused(evaluate, "--utility", "oasis", *flags, names=["slices of oasis", "new heads"])
    small, _ = phantom_case(0, 1, Z)
    dataset.write_slices(Path("small"), 1, np.ascontiguousarray(small[:, ::4, ::4]))
    refused(evaluate, "--utility", "small", *flags, names=["64 px", "256 px", "--sample --brains 71"])
    for path in Path("bare").glob("seg_*"):
        path.unlink()
    refused(evaluate, "--utility", "bare", *flags, names=["bare: train has no masks", "--sample --brains 71"])
    for path in Path("new").glob("*/*_slice_2.nii.png"):
        path.unlink()
    refused(evaluate, "--utility", "new", *flags, names=["no brain with all 4 slices"])
    shutil.rmtree("oasis/keras_png_slices_seg_validate")
    shutil.copytree("oasis/keras_png_slices_train", "other")
    for path in Path("oasis/keras_png_slices_seg_train").iterdir():
        shutil.copy(path, "other")
    next(Path("other").glob("case_*")).write_bytes(next(Path("bare").glob("case_*_0.nii.png")).read_bytes())
    refused(evaluate, "--utility", "other", *flags, names=["oasis: validate has no masks", "--data"])
