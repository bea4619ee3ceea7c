"""Laws of scorer.py: what it reads from slices of any size, what it trains on, and which file is taken."""

import json
from pathlib import Path

import pytest
import torch

import dataset
import util
from scores import scorer
from scores.scorer import RELEASED, Scorer, accuracy, csf_area, expected_z, find_scorer, read_slices, tissue_shares
from training import checkpoints

SIZES = {"channels": (8, 8), "features": 16}


@pytest.fixture
def validate(phantom_folder, tmp_path, monkeypatch) -> dataset.Slices:
    """Four slices of one head at 256 px, with masks."""
    monkeypatch.chdir(tmp_path)
    data = dataset.load_slices(phantom_folder, "validate", 256, masks=True)
    data.images, data.masks, data.z, data.case = (part[4::8] for part in (data.images, data.masks, data.z, data.case))
    return data


def test_pictures_of_every_size_are_read_and_nothing_lies_outside_the_box(validate, awaken):
    model = awaken(Scorer(**SIZES)).eval()
    x = validate.batch(torch.arange(2))[0]
    for factor in (1, 2, 4):
        logits, whole, features = model(torch.nn.functional.avg_pool2d(x, factor))
        assert logits.shape == (2, 4, 256, 256) and whole.shape == (2, 35) and features.shape == (2, 16)
    outside = logits.softmax(1)[:, 1:].clone()
    top, left, height, width = dataset.CONTENT_BOX
    outside[..., top : top + height, left : left + width] = 0
    assert outside.max() < 1e-6 and not outside.isnan().any()


def test_areas_are_sums_of_probabilities_whatever_the_batch(validate, awaken):
    model = awaken(Scorer(**SIZES)).eval()
    seen = read_slices(model, validate.images, batch_size=3)
    logits, whole, features = model(validate.batch(torch.arange(4))[0])
    assert torch.allclose(seen["areas"], logits.softmax(1)[:, 1:].sum((2, 3)), rtol=1e-4)
    assert torch.allclose(seen["features"], features, atol=1e-4) and torch.allclose(seen["z"], expected_z(whole))
    assert torch.allclose(csf_area(model, validate.images), seen["areas"][:, 0], rtol=1e-4)
    certain = torch.full((1, 35), -50.0)
    certain[0, 7] = 50
    assert expected_z(certain).item() == pytest.approx(7)


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


def test_accuracy_of_one_who_knows_the_masks_is_perfect(validate):
    class Perfect(torch.nn.Module):
        def forward(self, x):
            shares = tissue_shares(validate.masks)
            logits = 60 * torch.cat([1 - shares.sum(1, keepdim=True), shares], 1)
            whole = torch.full((4, 35), -50.0)
            whole[torch.arange(4), validate.z + 1] = 50  # a slice too high
            return logits, whole, None

    found = accuracy(Perfect(), validate)
    assert [found[f"dice_{tissue}"] for tissue in scorer.TISSUES] == pytest.approx([1, 1, 1])
    assert [found[f"area_error_{tissue}"] for tissue in scorer.TISSUES] == pytest.approx([0, 0, 0], abs=1e-6)
    assert found["z_error"] == pytest.approx(1)


def test_the_command_trains_and_its_scorer_is_then_taken(run_main, phantom_folder):
    """Same seed, same weights; the file says how good it is; before, the released one is taken."""
    assert not scorer.OWN.is_file() and find_scorer()[1]["path"] == str(RELEASED)
    digests = []
    for _ in range(2):
        flags = ("--data", phantom_folder, "--steps", 2, "--batch-size", 2, "--device", "cpu")
        status, out, errors = run_main(scorer, *flags)
        assert status == 0, errors
        model, description = find_scorer()
        digests.append(description["digest"])
    assert digests[0] == digests[1] and description["path"] == str(scorer.OWN) and not model.training
    accuracies = description["accuracy"]
    assert accuracies.keys() == {"validate", "validate at 64 px"} and "folder" not in description["data"]
    assert {"dice_csf", "area_error_white", "z_error"} <= accuracies["validate"].keys()
    assert "Dice csf" in out and Path("scorer_vis/tissues.png").is_file()
    assert json.loads(Path("log/scorer/run.json").read_text())["script"] == "scorer.py"


def test_the_released_scorer_is_small_and_good(tmp_path, monkeypatch):
    """Under 2 MB, and on held-out real slices good enough to tell brains by."""
    monkeypatch.chdir(tmp_path)
    assert RELEASED.stat().st_size < 2e6
    model, description = find_scorer()
    accuracies = description["accuracy"]["validate"]
    assert min(accuracies[f"dice_{tissue}"] for tissue in scorer.TISSUES) > 0.7 and accuracies["z_error"] < 3
    assert description["data"]["split"] == "train"
    assert read_slices(model, torch.zeros(1, 64, 64, dtype=torch.uint8))["features"].shape[1] <= 64


def test_what_is_no_scorer_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(util.UserError, match="python scorer.py"):
        find_scorer("nobody")
    checkpoints.save_weights(Path("other.safetensors"), {"w": torch.zeros(1)}, {"kind": "vqvae", "model_kwargs": {}})
    with pytest.raises(util.UserError, match="no scorer but a vqvae"):
        find_scorer("other.safetensors")
