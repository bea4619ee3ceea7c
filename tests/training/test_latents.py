"""Laws of training/latents.py: windows of neighbours, and latents that are encoded once."""

import pytest
import torch

from dataset import load_slices
from training.latents import encode_all, head_moves, window_starts
from training.stages import load_first_stage


def test_windows_are_neighbouring_slices_of_one_case(heads_folder):
    """Of any length up to a brain; every slice is seen nearly as often as any other."""
    data = load_slices(heads_folder, "train", 64)
    assert torch.equal(window_starts(data, 1), torch.arange(80))
    for slices in (2, 8, 13, 20):
        index = window_starts(data, slices)[:, None] + torch.arange(slices)
        assert (data.case[index] == data.case[index[:, :1]]).all() and (data.z[index].diff(dim=1) == 1).all()
        seen = torch.bincount(index.flatten(), minlength=80)
        assert seen.min() >= slices and seen.max() < 3 * slices


def test_latents_are_encoded_once_for_each_first_stage_and_each_move(heads_folder, first_stage, monkeypatch):
    """A later start reads them, bit for bit; half precision is near enough."""
    data, codes = load_slices(heads_folder, "train", 64), load_first_stage(first_stage)
    (moves,) = head_moves(data, 1, seed=0)
    first = [encode_all(codes, data, "fp32", by) for by in (None, moves)]
    x, z, _ = data.batch(torch.arange(8))
    assert torch.allclose(first[0][:8], codes.encode(x, z), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(*first, atol=0.1)
    with monkeypatch.context() as patch:
        patch.setattr(codes, "encode", None)
        again = [encode_all(codes, data, "fp32", by) for by in (None, moves)]
        assert all(map(torch.equal, first, again))
        codes.description["digest"] = "another"
        with pytest.raises(TypeError):
            encode_all(codes, data, "fp32")
