"""Laws of scorer.py: what it reads from slices of any size, what it trains on, and which file is taken."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import dataset
import evaluate
import util
from heads.layout import MASK_VALUES
from scores import scorer
from scores.scorer import RELEASED, Scorer, find_scorer, read_masks, read_slices
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


@pytest.mark.parametrize("size", [64, 128, 240, 256, 512])
def test_masks_have_the_size_of_the_slices_and_are_most_probable_tissue(size, validate, awaken, capsys):
    """At 256 px every pixel; else those that lie in the middle of the pixels there are."""
    model, brain = awaken(Scorer(**SIZES, slices_per_brain=4)).eval(), validate.images
    pictures = torch.nn.functional.interpolate(brain[:, None].float(), (size, size), mode="area")[:, 0].to(torch.uint8)
    masks = read_masks(model, pictures.numpy())
    middle = ((torch.arange(size) + 0.5) * 256 / size).long()
    logits = model(dataset.to_float(pictures)[:, None])[0][:, :, middle][..., middle]
    assert masks.dtype == np.uint8 and np.array_equal(masks, np.array(MASK_VALUES)[logits.argmax(1)])
    assert not capsys.readouterr().out


def test_masks_are_left_out_where_the_scorer_does_not_fit(validate, capsys):
    brain = validate.images.numpy()
    for wrong in ({"slices_per_brain": 20}, {"slices_per_brain": 4, "box": (64, 64, 128, 128)}):
        assert read_masks(Scorer(**SIZES, **wrong), brain) is None
        assert capsys.readouterr().out.startswith("no masks: the scorer reads heads of")
    specks = brain.copy()
    specks[0, 0, :9] = 255
    masks = read_masks(Scorer(**SIZES, slices_per_brain=4), specks)
    assert masks is not None and not masks[:, 0].any()


def test_training_sees_the_masks_of_sharp_blurred_and_small_pictures(validate):
    """Most batches are the slices as they are; equal seeds give equal batches; the masks are always those of 256 px."""
    pictures, shares = validate.batch(torch.arange(4))[0], scorer.tissue_shares(validate.masks)
    shares, kinds = torch.cat([1 - shares.sum(1, keepdim=True), shares], 1), []
    for seed in range(40):
        (x, seen, z), again = (
            scorer.training_batch(validate, torch.arange(4), torch.Generator().manual_seed(seed)) for _ in range(2)
        )
        assert torch.equal(again[0], x) and torch.equal(seen, shares) and torch.equal(z, validate.z)
        kinds.append(x.shape[-1] if x.shape[-1] < 256 or torch.equal(x, pictures) else "blurred")
    assert set(kinds) == {64, 128, 256, "blurred"} and kinds.count(256) > 20


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
