"""Laws of scorer.py: what it reads from slices of any size, what it trains on, and which file is taken."""

import json
from pathlib import Path

import pytest
import torch

import dataset
import evaluate
import util
from scores import scorer
from scores.scorer import RELEASED, Scorer, find_scorer, read_slices
from training import checkpoints

SIZES = {"channels": (8, 8), "features": 16}
FEW = {"steps": 3, "batch_size": 2, "precision": "fp32", "model_kwargs": SIZES}


@pytest.fixture
def validate(phantom_folder) -> dataset.Slices:
    """Four slices of one brain at 256 px, with masks."""
    data = dataset.load_slices(phantom_folder, "validate", 256, masks=True)
    data.images, data.masks, data.z, data.case = (part[4::8] for part in (data.images, data.masks, data.z, data.case))
    return data


@pytest.mark.parametrize("slices, box", [(32, (32, 16, 192, 224)), (20, (0, 0, 256, 256))])
def test_pictures_of_every_size_are_read_and_nothing_lies_outside_the_box(slices, box, validate, awaken):
    model = awaken(Scorer(**SIZES, slices_per_brain=slices, box=box)).eval()
    x = validate.batch(torch.arange(2))[0]
    for factor in (1, 2, 4):
        logits, whole, features = model(torch.nn.functional.avg_pool2d(x, factor))
        assert logits.shape == (2, 4, 256, 256) and whole.shape == (2, slices + 3) and features.shape == (2, 16)
    outside = logits.softmax(1)[:, 1:].clone()
    top, left, height, width = box
    outside[..., top : top + height, left : left + width] = 0
    assert outside.max() < 1e-6 and not outside.isnan().any()


def test_areas_are_sums_of_probabilities_whatever_the_batch(validate, awaken):
    model = awaken(Scorer(**SIZES)).eval()
    found = read_slices(model, validate.images, batch_size=3)
    logits, whole, features = model(validate.batch(torch.arange(4))[0])
    assert torch.allclose(found["areas"], logits.softmax(1)[:, 1:].sum((2, 3)), rtol=1e-4)
    assert torch.allclose(found["features"], features, atol=1e-4)
    assert torch.allclose(found["z"], scorer.expected_z(whole), atol=1e-3)
    assert torch.allclose(scorer.csf_area(model, validate.images), found["areas"][:, 0], rtol=1e-4)
    for slices in (20, 32):
        certain = torch.full((1, slices + 3), -50.0)
        certain[0, 7] = 50
        assert scorer.expected_z(certain).item() == pytest.approx(7)


def test_training_sees_shares_that_move_with_the_picture(validate):
    """They sum to 1 everywhere; equal seeds give equal batches; blurred and small ones come too, of the same masks."""
    for seed in range(4):
        (x, shares, z), again = (
            scorer.training_batch(validate, torch.arange(4), torch.Generator().manual_seed(seed)) for _ in range(2)
        )
        assert torch.equal(again[0], x) and torch.equal(again[1], shares) and torch.equal(z, validate.z)
        assert torch.allclose(shares.sum(1), torch.ones(4, 256, 256), atol=1e-5) and shares.min() > -1e-5
        bright = torch.nn.functional.interpolate(x, (256, 256))[:, 0] > -0.9
        assert (shares[:, 1:].sum(1)[~bright] < 0.5).float().mean() > 0.9  # tissue lies where the head lies
    one = torch.arange(1)
    sizes = {scorer.training_batch(validate, one, torch.Generator().manual_seed(n))[0].shape[-1] for n in range(40)}
    assert sizes == {64, 128, 256}


def perfect_outputs(data: dataset.Slices, wrong: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A Scorer's logits and second output where it is sure of the truth, but for z, which is `wrong` slices off."""
    shares = scorer.tissue_shares(data.masks)
    logits = 60 * torch.cat([1 - shares.sum(1, keepdim=True), shares], 1)
    whole = torch.full((len(data), 35), -50.0)
    whole[torch.arange(len(data)), data.z + wrong] = 50
    whole[:, -3:] = 10 * shares.mean((2, 3))
    return logits, whole


def test_accuracy_and_losses_of_one_who_knows_the_masks(validate):
    found = scorer.accuracy(lambda x: (*perfect_outputs(validate, 1), None), validate)
    assert [found[f"dice_{tissue}"] for tissue in scorer.TISSUES] == pytest.approx([1, 1, 1])
    assert [found[f"area_error_{tissue}"] for tissue in scorer.TISSUES] == pytest.approx([0, 0, 0], abs=1e-6)
    assert found["z_error"] == pytest.approx(1)
    shares = scorer.tissue_shares(validate.masks)
    shares = torch.cat([1 - shares.sum(1, keepdim=True), shares], 1)
    right, near, far = (
        scorer.scorer_losses(*perfect_outputs(validate, wrong), shares, validate.z) for wrong in (0, 1, 2)
    )
    assert right["tissue"] < 1e-6 and right["areas"] < 1e-5 and right.keys() == scorer.WEIGHTS.keys()
    assert right["z"] < near["z"] < far["z"]


def test_a_scorer_is_trained_for_the_slices_of_its_data_and_resumes(phantom_folder, tmp_path, at_step, differences):
    """Killed in its last step it ends as if it had not been; the file says how good it is; it is then the one taken."""
    assert find_scorer()[1]["path"] == str(RELEASED)
    folder = tmp_path / "twenty"
    dataset.write_phantom(folder, {"train": 1, "validate": 1}, slices=20)
    description = scorer.train_scorer(folder, "cpu", **FEW)
    assert description["model_kwargs"]["slices_per_brain"] == 20 and description["step"] == 3
    accuracies = description["accuracy"]
    assert accuracies.keys() == {"validate", "validate at 64 px"} and "folder" not in description["data"]
    assert {"dice_csf", "area_error_white", "z_error"} <= accuracies["validate"].keys()
    model, found = find_scorer()
    assert found["path"] == str(checkpoints.run_weights("scorer")) and not model.training
    assert model.slices_per_brain == 20 and list(Path("scorer_vis").glob("tissues_*.png"))
    assert json.loads(Path("log/scorer/run.json").read_text())["script"] == "evaluate.py"
    with at_step(3):
        scorer.train_scorer(folder, "cpu", name="again", **FEW)
    assert scorer.train_scorer(folder, "cpu", name="again", **FEW)["accuracy"] == accuracies
    assert not differences(tmp_path, "scorer", tmp_path, "again")
    before = checkpoints.run_weights("again").stat().st_mtime_ns
    scorer.train_scorer(folder, "cpu", name="again", **FEW)  # finished: nothing is left to do
    assert checkpoints.run_weights("again").stat().st_mtime_ns == before


def test_the_command_trains_on_the_data_it_is_told(run_main, phantom_folder, monkeypatch):
    called = []
    monkeypatch.setattr(evaluate, "train_scorer", lambda *args, **kwargs: called.append((args, kwargs)))
    for flags in ((), ("--scorer", "mine")):
        assert run_main(evaluate, "--train-scorer", "--data", phantom_folder, "--device", "cpu", *flags)[0] == 0
    assert called == [((phantom_folder, "cpu"), {"name": name, "steps": scorer.STEPS}) for name in ("scorer", "mine")]


def test_the_released_scorer_is_small_and_good(monkeypatch):
    """Under 2 MB, and on held-out real slices good enough to tell brains by; the usual crop plays no part."""
    monkeypatch.setattr("heads.layout.CONTENT_BOX", (0, 0, 128, 128))
    assert RELEASED.stat().st_size < 2e6
    model, description = find_scorer()
    accuracies = description["accuracy"]["validate"]
    assert min(accuracies[f"dice_{tissue}"] for tissue in scorer.TISSUES) > 0.7 and accuracies["z_error"] < 3
    assert description["data"]["split"] == "train" and model.slices_per_brain == 32
    assert read_slices(model, torch.zeros(1, 64, 64, dtype=torch.uint8))["features"].shape[1] <= 64


def test_what_is_no_scorer_is_refused():
    with pytest.raises(util.UserError, match="--train-scorer --scorer nobody"):
        find_scorer("nobody")
    checkpoints.save_weights(Path("other.safetensors"), {"w": torch.zeros(1)}, {"kind": "vqvae", "model_kwargs": {}})
    with pytest.raises(util.UserError, match="no scorer but a vqvae"):
        find_scorer("other.safetensors")


def test_no_run_of_another_script_is_trained_over(tmp_path):
    util.write_file(Path("log/mine/run.json"), b'{"script": "prestage_train.py", "settings": {}}')
    util.write_file(Path("model_ckpt/yours/thesis.txt"), b"precious")
    for name, words in (("mine", "run of prestage_train.py"), ("yours", "is not empty"), ("a/b", "plain one")):
        with pytest.raises(util.UserError, match=f"{words}.*") as error:
            scorer.train_scorer(tmp_path, name=name)
        assert "--scorer" in str(error.value) and "--name" not in str(error.value)
