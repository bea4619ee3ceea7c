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
from scores.page import nearest_pairs, sample_rows, sample_table, verdict
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



def verdicts(result: dict) -> dict[str, str]:
    """{score: "inside", "above", "below"} of the samples."""
    known = result["allowed"].items()
    return {name: verdict(result["samples"][name], range_) for name, range_ in known if name in result["samples"]}


def test_real_brains_keep_to_what_is_allowed(heads, real, scorer):
    """The held-out brains themselves score as the column beside them; other real ones are nearly always inside."""
    same, measures = score_samples(heads[10:16], *real, scorer, "0", 40, draws=20)
    assert "coherence_outside_4" not in same["allowed"]  # to this scorer all is brain
    for name in verdicts(same):
        assert same["samples"][name] == pytest.approx(same["real"][name], rel=1e-5), name
    other, _ = score_samples(heads[16:], *real, scorer, "0", 40, draws=20)
    outside = [name for name, word in verdicts(other).items() if word != "inside"]
    assert len(outside) <= 0.5 * len(other["allowed"]), outside  # of 6 brains, by the range of 5 out of 10
    for range_ in other["allowed"].values():
        assert range_["low"] <= range_["middle"] <= range_["high"] and range_["least"] >= 0
    assert other["brains"] == 6 and other["training_brains"] == 10 and other["drawn_brains"] == 5
    assert "people" not in measures["samples"] and "spread_csf" not in same["samples"]  # nobody's age is known


def test_what_is_allowed_are_the_scores_of_draws_of_people():
    """As many people as asked, compared with all others; the difference that is seen four times in five."""
    generator = torch.Generator().manual_seed(1)
    people = {"noise": torch.randn(200, 1, generator=generator, dtype=torch.float64)}
    range_ = samples.allowed(people, None, 25, 400)["noise"]
    assert range_["middle"] == pytest.approx(float(people["noise"].mean()), abs=0.05)
    sd = float(people["noise"].std()) / 5 * (1 - 25 / 200) ** 0.5  # of a mean of 25, drawn without replacement
    assert range_["high"] - range_["middle"] == pytest.approx(1.645 * sd, rel=0.2)
    assert range_["least"] == pytest.approx((1.96 + 0.84) * sd, rel=0.15)


def test_the_error_of_z_is_allowed_what_people_have_whom_the_scorer_never_saw(heads, real, scorer):
    """Not what training people have, whom it knows by heart: there the range would keep real people out."""
    result, measures = score_samples(heads[10:16], *real, scorer, "0", 40, draws=60)
    ranges = {}
    for name in ("real", "reference"):
        statistic = samples.statistics_of(measures[name], measures["reference"])["z_error"]
        ranges[name] = samples.allowed_unseen(statistic, result["drawn_brains"], 60)
    assert result["allowed"]["z_error"] == ranges["real"] != ranges["reference"]
    errors = measures["real"]["z_error"].mean(1)
    assert errors.min() <= ranges["real"]["low"] < ranges["real"]["middle"] < ranges["real"]["high"] <= errors.max()


def test_people_are_drawn_at_the_ages_of_the_samples():
    ages = torch.arange(20.0, 90, 0.5)
    people = torch.stack([*(torch.zeros_like(ages),) * 3, ages], 1)
    old = torch.tensor([[0.0, 0, 0, age] for age in (70, 75, 80, 85)])
    generator = torch.Generator().manual_seed(0)
    drawn = [samples.draw_people(people, old, len(people), 4, generator) for _ in range(50)]
    assert all(len(chosen.unique()) == 4 for chosen in drawn)
    assert (ages[torch.stack(drawn)].sort(1).values - old[:, 3]).abs().max() <= 3
    anybody = samples.draw_people(None, None, 30, 10, generator)
    assert len(anybody.unique()) == 10 and anybody.max() < 30


def test_the_judge_tells_what_differs_and_not_what_does_not():
    """By features of brains with slices that are alike: what it learned of some people does not help with others."""
    torch.manual_seed(3)

    def brains(n: int, shift: float) -> Tensor:
        x = 2 * torch.randn(n, 1, 12) + torch.randn(n, 8, 12)
        x[..., 0] += shift
        return x

    auc = [[(score := samples.judge(brains(24, shift), brains(24, 0)))[0](torch.arange(score[1])) for _ in range(20)]
           for shift in (0.0, 8.0)]  # fmt: skip
    assert np.mean(auc[0]) == pytest.approx(0.5, abs=0.06) and np.mean(auc[1]) > 0.9


def test_under_curve_counts_pairs():
    a, b = torch.tensor([1.0, 3, 3, 5]), torch.tensor([3.0, 0, 4])
    expected = np.mean([1.0 if x > y else 0.5 if x == y else 0.0 for x in a for y in b])
    assert samples.under_curve(a, b) == pytest.approx(expected)


def test_people_of_one_age_are_compared_with_the_course_over_age():
    """Areas that are a parabola of age plus noise: half as much of it, moved by 50, and only age."""
    torch.manual_seed(0)

    def people(n: int, noise: float, offset: float = 0.0) -> Tensor:
        age = 20 + 70 * torch.rand(n)
        area = 1000 + 3 * age + 0.1 * age**2 + offset + noise * torch.randn(n)
        return torch.stack([area, torch.randn(n), torch.randn(n), age], 1)

    def score(what: str, x: Tensor, tissue: str = "csf") -> float:
        statistic, n = samples.at_equal_age(tissue, what)(x, people(2000, 100))
        return statistic(torch.arange(n))

    assert score("spread", people(2000, 50)) == pytest.approx(0.5, rel=0.07)
    assert score("offset", people(2000, 100, 50)) == pytest.approx(50, abs=10)
    assert score("age", people(2000, 0)) > 0.97 and abs(score("age", people(2000, 100), "grey")) < 0.1


def test_spread_along_components_is_that_of_people():
    """Heads that are moved along random directions: half as far, and as far."""
    torch.manual_seed(0)
    directions = torch.randn(3, 2, 64, 64) * torch.tensor([8.0, 6, 4]).view(3, 1, 1, 1)

    def heads_of(n: int, width: float) -> Tensor:
        moved = torch.einsum("nk,kzyx->nzyx", width * torch.randn(n, 3), directions)
        return (120 + moved).clamp(0, 255).to(torch.uint8)

    for width in (0.5, 1.0):
        statistic, n = samples.spread_along(slice(0, 3))(heads_of(400, width), heads_of(400, 1.0))
        assert statistic(torch.arange(n)) == pytest.approx(width, rel=0.15)


def test_five_per_cent_of_copies_read_five_per_cent(heads, real, scorer):
    """Planted into new brains: training slices, moved by a pixel, a little darker and noisy."""
    brains, count = heads[10:16].clone(), round(0.05 * 6 * Z)
    for n, at in enumerate(torch.randperm(6 * Z)[:count].tolist()):
        i, z = divmod(at, Z)
        copy = torch.roll(heads[n, z].float() * 0.95 + 2 * torch.randn(64, 64), (n % 2, n % 3 - 1), (0, 1))
        brains[i, z] = copy.clamp(0, 255).to(torch.uint8)
    result, measures = score_samples(brains, *real, scorer, "0", 40, draws=10)
    assert result["samples"]["copies_excess"] == pytest.approx(count / (6 * Z), abs=0.01)
    assert result["real"]["copies"] == pytest.approx(0.01, abs=1 / (6 * Z))
    assert result["samples"]["copied_brains"] <= 1 / 6
    pairs = nearest_pairs(measures["near"], list(range(6)), torch.arange(100, 110), result["samples"]["copies_limit"])
    assert all(pair["below_limit"] and pair["z"] == pair["training_z"] for pair in pairs[:4])
    order = [pair["relative_distance"] for pair in pairs]
    assert order == sorted(order) and len(pairs) == 8
    whole, _ = score_samples(heads[:6], *real, scorer, "0", 40, draws=10)  # training brains
    assert whole["samples"]["copies"] == 1 == whole["samples"]["copied_brains"]


def test_blur_is_seen(heads, real, scorer):
    soft = torch.from_numpy(gaussian_filter(heads[10:16].float().numpy(), (0, 0, 0.7, 0.7))).round().to(torch.uint8)
    result, _ = score_samples(soft, *real, scorer, "0", 40, draws=20)
    found = verdicts(result)
    for name in ("spectrum", "frechet_patterns", "judge"):
        assert found[name] == "above", name
    assert found["noise"] == "below" and result["samples"]["judge"] > 0.95
    assert result["samples"]["spectrum"] > 4 * result["real"]["spectrum"]
    assert result["samples"]["copies"] < 0.1  # near to everything, copies of nothing


def test_slices_of_different_heads_fail_the_scores_of_brains_alone(heads, real, scorer):
    """Scores of single slices cannot see it: they are the same slices."""
    brains = heads[10:16].clone()
    for z in range(Z):
        brains[:, z] = brains[torch.randperm(6), z]
    result, _ = score_samples(brains, *real, scorer, "0", 40, draws=20)
    found = verdicts(result)
    assert found["adjacent_ssim"] == "below" and found["adjacent_profile"] == found["reslice_spectrum"] == "above"
    assert result["samples"]["adjacent_profile"] > 5 * result["real"]["adjacent_profile"]
    for name in ("frechet_trained", "sliced_wasserstein", "noise", "copies"):
        assert result["samples"][name] == pytest.approx(result["real"][name], rel=1e-4), name


def test_haze_and_lost_white_are_seen(heads, real, scorer):
    hazy = heads[16:].clone().clamp(min=1, max=250)
    result, _ = score_samples(hazy, *real, scorer, "0", 40, draws=20)
    found = verdicts(result)
    assert (found["haze"], found["black"]) == ("above", "below") and result["samples"]["white"] == 0


def test_heads_alike_and_heads_through_the_first_stage(heads, real, scorer):
    """Six times nearly one head are too alike; what the first stage does has a column of its own."""
    one = (heads[16:17].float() + 2 * torch.randn(6, Z, 64, 64)).clamp(0, 255).to(torch.uint8)
    result, measures = score_samples(one, *real, scorer, "0", 40, draws=20, through=lambda brains: brains // 2)
    found = verdicts(result)
    assert found["diversity"] == "above"
    assert result["through"]["noise"] < 0.7 * result["real"]["noise"] and "through" in measures
    assert "stage one" in sample_table({"result": result, "data": {"held_out": {"split": "validate"}}})


def test_real_brains_are_measured_once(real, scorer, tmp_path, monkeypatch):
    """And again when the scorer is another, or the code that measures."""
    monkeypatch.chdir(tmp_path)
    measured, code = [], "a"

    def watched(brains: Tensor, net: Scorer, title: str, known: samples.Known) -> dict[str, Tensor]:
        measured.append(title)
        return {"noise": torch.arange(len(brains))}

    monkeypatch.setattr(samples, "measure", watched)
    monkeypatch.setattr(samples, "digest_of_code", lambda: code)
    for digest, code in (("0", "a"), ("0", "a"), ("1", "a"), ("0", "b"), ("0", "b")):
        found = samples.measure_real(real[1], real[1].whole_cases(), scorer, None, digest)
        assert torch.equal(found["noise"], torch.arange(6))
    assert measured == ["validate"] * 3 == 3 * [measured[0]]
    assert len(list(Path("data/cache").glob("validate_measures_64px_*"))) == 3


def test_every_byte_of_the_code_that_measures_counts(tmp_path):
    """Of metrics, of the scorer, of samples themselves, and of what they call; not of the rest."""
    for name in ("util.py", "module.py", "dataset.py", "evaluate.py"):
        shutil.copy(samples.ROOT / name, tmp_path)
    shutil.copytree(samples.ROOT / "scores", tmp_path / "scores", ignore=shutil.ignore_patterns("__pycache__"))
    known = {samples.digest_of_code(tmp_path)}
    assert known == {samples.digest_of_code()}
    scores = [f"scores/{name}.py" for name in ("metrics", "appearance", "samples", "scorer")]
    for name in ("util.py", "module.py", "dataset.py", *scores):
        with open(tmp_path / name, "ab") as file:
            file.write(b"#")
        known.add(samples.digest_of_code(tmp_path))
    assert len(known) == 8
    (tmp_path / "evaluate.py").write_text("")
    (tmp_path / "scores/page.py").write_text("")
    assert samples.digest_of_code(tmp_path) in known


def test_a_score_is_added_in_one_place(heads, real, scorer, monkeypatch):
    """An entry of the table, made of what is measured anyway, is scored, and stands on the page."""
    brightest = Score("largest area of white matter", "mm²", "look", "areas",
                      lambda x, reference: (lambda i: float(x[i, :, 2].max()), len(x)))  # fmt: skip
    monkeypatch.setitem(SAMPLE_SCORES, "largest", brightest)
    result, measures = score_samples(heads[16:18], *real, scorer, "0", 10, draws=5)
    assert result["samples"]["largest"] == pytest.approx(measures["samples"]["areas"][:, :, 2].max().item())
    assert any("largest area of white matter, mm²" in row[0] for row in sample_rows(result)["look"])


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
    scored = [name for name in SAMPLE_SCORES if name in report["result"]["samples"]]
    unknown = {name for name in SAMPLE_SCORES if name not in scored}  # without ages, an outside, ten components
    assert all(SAMPLE_SCORES[name].measure in ("people", "coherence", "thumbnails") for name in unknown)
    for part in ("samples", "real"):
        for name in scored:
            low, high = report["result"][part][f"{name}_interval"]
            assert low <= report["result"][part][name] + 1e-9 and report["result"][part][name] <= high + 1e-9
    assert report["result"]["brains"] == 3 and "3 of 4 brains are scored" in out
    assert report["samples"]["brains"] == 4 and 3 in {pair["case"] for pair in report["nearest"]}  # copies: of all
    assert not (folder / "README.md").exists()  # a card is of samples alone
    assert report["scorer"]["path"] == "net.safetensors" and len(report["nearest"]) == 8
    page = (folder / "samples_validate.md").read_text()
    for picture in re.findall(r"\]\((\S+\.png)\)", page):
        with Image.open(folder / picture) as opened:
            assert len(np.unique(np.asarray(opened))) > 10
    assert all(SAMPLE_SCORES[name].title in page for name in scored) and "Dice" in out
    assert f"3 brains of {Z} slices" in page and {pair["z"] for pair in report["nearest"]} <= set(range(Z))


def test_what_cannot_be_scored_is_one_line_and_status_2(refused, drawn):
    flags = ("--data", "oasis", "--scorer", "net.safetensors", "--device", "cpu")
    refused(evaluate, "--samples", "nobody", *flags, names=["--name nobody --sample --brains"])
    refused(evaluate, "--samples", "nobody/samples", *flags, names=["mend the path"])
    refused(evaluate, "--samples", "mine", "--limit-brains", 1, *flags, names=["--limit-brains 1"])
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
