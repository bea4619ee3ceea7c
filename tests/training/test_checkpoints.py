"""Laws of training/checkpoints.py: what is written comes back, and nothing else is taken for it."""

import os
import pickle
import time

import pytest
import safetensors.torch
import torch
from torch import nn

import dataset
import util
from training import checkpoints
from util import UserError


class Trap:
    """Unpickling it makes a folder: what an attacker would do, only harmless."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("legacy", [False, True])
def test_load_checkpoint_never_runs_code_from_the_file(tmp_path, legacy):
    path, sign = tmp_path / "last.pt", tmp_path / "code ran"
    if legacy:
        path.write_bytes(pickle.dumps({"script": "x.py", "step": Trap(sign)}))
    else:
        torch.save({"script": "x.py", "step": Trap(sign)}, path)
    with pytest.raises(UserError, match="last.pt"):
        checkpoints.load_checkpoint(path, "x.py")
    assert not sign.exists()


def test_load_checkpoint_refuses_damaged_files_and_those_of_others(tmp_path):
    path = tmp_path / "last.pt"
    with pytest.raises(UserError, match="last.pt"):
        checkpoints.load_checkpoint(path, "x.py")
    for state in ({"script": "y.py", "step": 1}, {"step": 1}, [1, 2], torch.zeros(2)):
        checkpoints.save_checkpoint(path, state)
        with pytest.raises(UserError, match="last.pt is no checkpoint of x.py"):
            checkpoints.load_checkpoint(path, "x.py")
    checkpoints.save_checkpoint(path, {"script": "x.py", "x": torch.randn(100)})
    whole = path.read_bytes()
    one_bit = bytearray(whole)
    one_bit[whole.index(torch.load(path)["x"].numpy().tobytes()) + 7] ^= 1
    for content in (whole[:-1], whole[: len(whole) // 2], whole[:10], b"", b"hello\n", bytes(1000), one_bit):
        path.write_bytes(content)
        with pytest.raises(UserError, match="last.pt"):
            checkpoints.load_checkpoint(path, "x.py")


def test_weights_round_trip_with_their_description(tmp_path):
    weights = {f"conv{k}": torch.randn(4, 3, k, k).to(memory_format=torch.channels_last) for k in (1, 2)}
    weights["view"] = torch.randn(6, 4).T
    description = {"kind": "vae", "model_kwargs": {"channels": 8, "rate": 0.1, "box": [1, 2]}, "step": 3}
    checkpoints.save_weights(tmp_path / "m.safetensors", weights, description)
    back, told = checkpoints.load_weights(tmp_path / "m.safetensors")
    assert told == description and back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)


def test_load_weights_refuses_what_is_not_ours(tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(UserError, match="does not exist"):
        checkpoints.load_weights(path)
    checkpoints.save_weights(path, {"w": torch.randn(50)}, {"kind": "vae", "model_kwargs": {}})
    whole = path.read_bytes()
    for content in (whole[:-1], whole[:20], b"", b"hello", bytes(100)):
        path.write_bytes(content)
        with pytest.raises(UserError, match="model.safetensors is no whole safetensors file; copy it again"):
            checkpoints.load_weights(path)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match="is damaged"):
        checkpoints.load_weights(path)
    for metadata in ({"format": "pt"}, None, {"project": checkpoints.PROJECT}, {"description": "[]"}):
        path.write_bytes(safetensors.torch.save({"w": torch.zeros(1)}, metadata))
        with pytest.raises(UserError, match="model.safetensors"):
            checkpoints.load_weights(path)


def test_the_same_weights_make_the_same_file(tmp_path):
    """Twenty times: several entries of metadata would stand in any order."""
    files = [tmp_path / f"{i}.safetensors" for i in range(20)]
    for file in files:
        checkpoints.save_weights(file, {"w": torch.arange(5.0)}, {"kind": "vae", "model_kwargs": {}, "step": 1})
    assert len({file.read_bytes() for file in files}) == 1


def test_cached_makes_again_what_is_missing_or_damaged(capsys):
    """A cut file and one flipped bit alike; else what is kept is read."""
    made = []

    def make() -> dict:
        made.append(1)
        return {"x": torch.arange(4).half()}

    for count in (1, 1):
        assert torch.equal(checkpoints.cached("numbers", make)["x"], torch.arange(4).half()) and len(made) == count
    (path,) = dataset.CACHE.glob("*.safetensors")
    whole = path.read_bytes()
    for count, damaged in enumerate((whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1]), b""), 2):
        path.write_bytes(damaged)
        assert torch.equal(checkpoints.cached("numbers", make)["x"], torch.arange(4).half()) and len(made) == count
        assert "damaged" in capsys.readouterr().out and path.read_bytes() == whole


def test_the_cache_stays_within_its_size_but_keeps_what_is_of_today(monkeypatch, capsys):
    """Of four files of 1 kB the one used longest ago goes, though it was made last."""
    for name in "abcd":
        checkpoints.cached(name, lambda: {"x": torch.zeros(250)})
    for name, days in (("a", 2), ("b", 4), ("c", 3), ("d", 0)):
        os.utime(dataset.CACHE / f"{name}.safetensors", (time.time() - days * 86_400,) * 2)
    size = sum(path.stat().st_size for path in dataset.CACHE.glob("*.safetensors"))
    monkeypatch.setattr(dataset, "CACHE_GB", 0.8 * size / 1e9)
    dataset.tidy_cache()
    assert {path.stem for path in dataset.CACHE.glob("*.safetensors")} == {"a", "c", "d"}
    monkeypatch.setattr(dataset, "CACHE_GB", 0)
    checkpoints.cached("a", dict)  # used again
    dataset.tidy_cache()
    assert {path.stem for path in dataset.CACHE.glob("*.safetensors")} == {"a", "d"}
    said = capsys.readouterr().out.splitlines()
    assert ["b.safetensors was removed" in line for line in said] == [True, False] and "c.safet" in said[1]


def test_digest_tells_weights_apart_by_their_names_and_numbers():
    """Not by their memory format: models are trained channels-last, where 1x1 convolutions have peculiar strides."""
    weights = {"a": torch.arange(4.0), "b": torch.ones(2)}
    other = {"a": torch.arange(4.0), "b": torch.tensor([1, 1 + 2**-23])}  # one bit
    assert checkpoints.digest_of(weights) == checkpoints.digest_of(dict(reversed(weights.items())))
    assert len({checkpoints.digest_of(w) for w in (weights, other, {"c": weights["a"], "b": weights["b"]})}) == 3
    for shape in ((4, 3, 2, 2), (4, 3, 1, 1), (4, 1, 2, 2)):
        plain = torch.randn(shape)
        again = plain.to(memory_format=torch.channels_last)
        assert checkpoints.digest_of({"w": plain}) == checkpoints.digest_of({"w": again})


def test_find_weights_takes_a_file_a_folder_or_a_name(tmp_path):
    util.write_file(tmp_path / "model_ckpt/mine/model.safetensors", b"")
    for run in ("mine", "model_ckpt/mine", tmp_path / "model_ckpt/mine", "model_ckpt/mine/model.safetensors"):
        assert checkpoints.find_weights(run, "").resolve() == tmp_path / "model_ckpt/mine/model.safetensors"
    with pytest.raises(UserError, match="yours.*python train.py yours"):
        checkpoints.find_weights("yours", "python train.py yours")
    for path in ("pretrained/yours.safetensors", "yours.safetensors", "model_ckpt/yours"):  # no name of a run to train
        with pytest.raises(UserError, match=f"{path}: no such file or folder; mend the path"):
            checkpoints.find_weights(path, "python train.py")


def test_fill_model_wants_every_key_and_shape(tmp_path):
    weights = {"weight": torch.randn(2, 3), "bias": torch.randn(2)}
    assert torch.equal(checkpoints.fill_model(nn.Linear(3, 2), weights, tmp_path).weight, weights["weight"])
    few, more, other = {"bias": weights["bias"]}, weights | {"more": torch.zeros(1)}, weights | {"bias": torch.zeros(3)}
    for wrong in (few, more, other):
        with pytest.raises(UserError, match="another model"):
            checkpoints.fill_model(nn.Linear(3, 2), wrong, tmp_path / "last.pt")
