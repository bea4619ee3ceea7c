"""Laws of phantom.py: what the built-in data promise to everybody who trains on them."""

import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

from heads import phantom
from heads.phantom import phantom_case


@pytest.fixture(scope="module")
def heads() -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Images and masks of cases 1, 2 and 3 of seed 0."""
    return {case: phantom_case(0, case) for case in (1, 2, 3)}


def test_a_head_depends_on_seed_and_case_alone(heads):
    """Not on which heads were drawn before, nor on the global generator, nor on the process."""
    np.random.seed(5)
    images, masks = phantom_case(0, 2)
    assert np.array_equal(images, heads[2][0]) and np.array_equal(masks, heads[2][1])
    script = "import zlib; from heads.phantom import phantom_case; print(zlib.crc32(phantom_case(0, 3)[0]))"
    folder = Path(phantom.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=True)
    assert int(done.stdout) == zlib.crc32(heads[3][0])


def test_a_head_has_the_same_anatomy_at_any_number_of_heights(heads):
    """Cut twice as densely, every second mask is the one of before; only the scanner's noise is another."""
    images, masks = phantom_case(0, 1, slices=63)
    brain = heads[1][1] > 0
    assert images.shape == masks.shape == (63, 256, 256)
    assert (masks[::2] != heads[1][1])[brain].mean() < 0.01
    assert np.abs(images[::2][brain].astype(int) - heads[1][0][brain]).mean() < 6
    for few, labels in (phantom_case(0, 1, slices=2), phantom_case(0, 1, slices=20)):
        assert (few.max((1, 2)) == 255).all() and all(set(np.unique(mask)) == {0, 85, 170, 255} for mask in labels)
        for z in (0, -1):  # the lowest and the highest are the same
            assert (labels[z] != masks[z])[brain[z]].mean() < 0.1
            assert np.corrcoef(few[z][brain[z]], images[z][brain[z]])[0, 1] > 0.9
    alike = np.corrcoef(images[:, brain.all(0)])
    assert np.diagonal(alike, 1).mean() > np.diagonal(alike, 2).mean()  # 0.5 mm and 1 mm apart


def test_two_heads_differ(heads):
    """In every slice and in anatomy, not by noise alone; another seed is another head."""
    heads = heads | {"other seed": phantom_case(1, 1)}
    for a, b in ((1, 2), (2, 3), (1, "other seed")):
        brain = (heads[a][1] > 0) & (heads[b][1] > 0)
        other_tissue = (heads[a][1] != heads[b][1]) & brain
        assert (other_tissue.sum((1, 2)) / brain.sum((1, 2)) > 0.1).all()


def test_black_outside_the_box_and_brightest_255(heads):
    """Rows 40..215 and columns 24..231 hold every head, as in the release; each slice is scaled by itself."""
    for images, masks in heads.values():
        assert images.shape == masks.shape == (32, 256, 256) and images.dtype == masks.dtype == np.uint8
        for pixels in (images, masks):
            outside = pixels.copy()
            outside[:, 40:216, 24:232] = 0
            assert not outside.any()
        assert (images.max((1, 2)) == 255).all()
        assert 0.1 < (images[:, 40:216, 24:232] == 0).mean() < 0.4 and 0.4 < (images == 0).mean() < 0.65


def test_masks_hold_the_four_labels_on_the_brain_only_and_contrast_is_that_of_t1(heads):
    """In every slice: fluid is darker than grey matter, grey darker than white."""
    for images, masks in heads.values():
        assert (images[masks > 0] > 0).mean() > 0.99
        shares = [(masks == label).sum() / (masks > 0).sum() for label in (85, 170, 255)]
        assert min(shares) > 0.05 and 0.1 < (masks > 0).mean() < 0.4
        for image, mask in zip(images, masks):
            assert set(np.unique(mask)) == {0, 85, 170, 255}
            fluid, grey, white = (image[mask == label].mean() for label in (85, 170, 255))
            assert fluid < 0.8 * grey and grey < 0.9 * white


def test_neighbouring_slices_belong_together_and_the_two_sides_are_no_mirror_images(heads):
    """The farther apart two slices are, the less alike inside the brain; else nobody would notice a flip."""
    for images, masks in heads.values():
        inside = (masks > 0).all(0)
        alike = np.corrcoef(images[:, inside])
        near, middle, far = (np.diagonal(alike, distance).mean() for distance in (1, 4, 16))
        assert near > 0.7 and near > middle + 0.15 and middle > far + 0.1
        assert np.diagonal(alike, 1).min() > far
        both = inside & inside[::-1]
        assert np.mean([np.corrcoef(a[both], b[both])[0, 1] for a, b in zip(images, images[:, ::-1])]) < 0.9


def test_numbers_without_a_head_are_refused():
    for seed, case, slices in ((-1, 0, 32), (0, -1, 32), (0, 0, 1)):
        with pytest.raises(ValueError, match="case=-1|seed=-1|slices=1"):
            phantom_case(seed, case, slices)
