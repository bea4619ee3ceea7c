"""Laws of playground/guess.py: what is mixed, that nothing but the picture gives it away, and how answers score."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from PIL import Image

from dataset import load_slices
from playground import guess

TRAIN, VALIDATE = "keras_png_slices_train", "keras_png_slices_validate"


@pytest.fixture
def folder(heads_folder, tmp_path) -> Path:
    """A data folder with four people to hold out, whose brains stand for new ones as well."""
    for split in (TRAIN, VALIDATE):
        shutil.copytree(heads_folder / TRAIN, tmp_path / "held_out" / split)
    return tmp_path / "held_out"


class Lossless:
    """A first stage that loses nothing, and darkens a corner where it draws."""

    def encode(self, x, z):
        return x

    def draw(self, latent, z, generator, slices_per_brain):
        latent[..., 0, 3] = -0.5
        return latent


def test_kinds_have_the_same_zs_and_every_brain_is_shown_once(folder):
    data = load_slices(folder, "validate", 64)
    pixels = data.images.clone()
    pixels[:, 0, 0], pixels[:, 0, 1], pixels[:, 0, 2:4] = data.z, data.case, 255  # written where all is black
    data.images, brains = pixels, pixels.view(4, 20, 64, 64)
    zs = set()
    for seed in range(3):
        slices = guess.slices_by_kind(data, Lossless(), brains, 2, seed)
        z, case = slices[..., 0, 0], slices[..., 0, 1]
        assert (z == z[0]).all() and z[0, 0] < z[0, 1] and sorted(case[:2].ravel()) == [1, 2, 3, 4]
        assert case[2, 0] != case[2, 1] and (slices[1, :, 0, 3] == 64).all() and (slices[::2, :, 0, 3] == 255).all()
        for a, b in zip(z.ravel(), case.ravel()):
            assert (slices[(z == a) & (case == b)][:, 1:] == brains[b - 1, a, 1:].numpy()).all()
        zs.add(tuple(z[0]))
    assert len(zs) > 1


def test_pages_key_and_the_score_of_planted_answers(folder, first_stage, run_main, refused):
    command = [guess, "--first-stage", first_stage, "--samples", folder / TRAIN, "--data", folder, "--each", 2]
    keys = []
    for seed in range(4):
        status, out, errors = run_main(*command, "--seed", seed, "--out", f"seed_{seed}")
        assert status == 0 and "perceptual decoder" in out, errors
        keys.append(json.loads(Path(f"seed_{seed}/guess_key.json").read_text()))
        assert sorted(keys[-1].values()) == sorted(guess.KINDS * 2) and sorted(map(int, keys[-1])) == [*range(1, 7)]
    assert len({tuple(key.values()) for key in keys}) > 1
    with Image.open("seed_0/guess_1.png") as picture:
        page = np.asarray(picture)

    command += ["--out", "seed_0", "--answers"]
    status, out, _ = run_main(*command, "seed_0/guess_key.json")  # a reader who knows the key
    assert out.count("2 of 2 right, 100% [16%, 100%], by chance 33%") == 3 and "all: 6 of 6 right, 100%" in out
    assert Path("seed_0/guess.png").is_file() and np.array_equal(page, np.asarray(Image.open("seed_0/guess_1.png")))
    Path("none.json").write_text(json.dumps(dict.fromkeys(keys[0], "not real")))
    status, out, _ = run_main(*command, "none.json")
    assert "real: 0 of 2 right, 0% [0%, 84%], by chance 0%" in out and "new: 2 of 2 right" in out
    Path("few.json").write_text('{"1": "real"}')
    refused(*command, "few.json", names=["few.json", "1 to 6"])
    refused(*command, "none.json", "--seed", 1, names=["seed_0/guess_key.json", "--seed"])
    refused(*command, "none.json", "--each", 3, names=["--each 3", "at most 2"])


def test_pages_show_slices_pixel_for_pixel_in_their_order():
    slices = np.random.default_rng(0).integers(0, 256, (14, 48, 56), dtype=np.uint8)
    found = []
    for page in guess.pages(slices):
        view = np.lib.stride_tricks.sliding_window_view(np.asarray(page), (48, 56))
        places = [(n, *np.argwhere((view == part).all((2, 3)))) for n, part in enumerate(slices)]
        found.append([(n, *at[0]) for n, *at in places if at])
    assert [n for n, *_ in found[0]] == [*range(12)] and [n for n, *_ in found[1]] == [12, 13]
    assert all(part == sorted(part, key=lambda place: place[1:]) for part in found)


def test_binomial_interval_is_that_of_scipy():
    for right, count in ((0, 8), (3, 8), (8, 8), (11, 24)):
        exact = scipy.stats.binomtest(right, count).proportion_ci(0.95, method="exact")
        assert guess.binomial_interval(right, count) == pytest.approx((exact.low, exact.high), abs=1e-5)
