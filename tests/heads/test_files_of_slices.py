"""Laws of layout.py: files are read as they lie on disk, whatever their form, and a head lies within its box."""

import gzip
import io
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dataset import load_slices
from heads import layout
from heads.layout import Layout, content_box, list_slices, read_png
from util import UserError


@pytest.mark.filterwarnings("ignore:Image size")
def test_whatever_the_decoder_says_of_a_file_it_is_one_file_that_cannot_be_read(tmp_path):
    """A picture of 400 million pixels in 50 kB, and a comment of three million letters."""
    path, comment = tmp_path / "a.png", PngInfo()
    Image.new("1", (20_000, 20_000)).save(path)
    path.write_bytes(path.read_bytes())
    comment.add_text("history", "x" * 3_000_000, zip=True)
    for name, save in (("huge", lambda: None), ("long", lambda: Image.new("L", (8, 8)).save(path, pnginfo=comment))):
        save()
        with pytest.raises(UserError, match="a.png cannot be read as PNG") as error:
            read_png(path)
        assert "\n" not in str(error.value), name


@pytest.mark.filterwarnings("ignore:Image size")
def test_a_damaged_png_is_refused_wherever_it_is_damaged(tmp_path):
    """Cut anywhere, the reader raises a UserError or still finds every pixel; a flipped byte raises nothing else."""
    path, buffer = tmp_path / "a.png", io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16), np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    whole, refused = buffer.getvalue(), {"cut": 0, "flipped": 0}
    for at in range(len(whole)):
        flipped = whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :]
        for damage, content in (("cut", whole[:at]), ("flipped", flipped)):
            path.write_bytes(content)
            try:
                assert np.array_equal(read_png(path), pixels) or damage == "flipped"
            except UserError as error:
                assert str(path) in str(error)
                refused[damage] += 1
    assert refused["cut"] > len(whole) - 30 and refused["flipped"] > 200  # only the end mark carries no pixels


def test_a_further_layout_is_one_more_entry(noise_folder, tmp_path, monkeypatch):
    """NIfTI slices under other names load as the same slices in the release's layout do, beside that layout."""
    other = tmp_path / "other"
    for kind in ("case", "seg"):
        for case, z, path in list_slices(noise_folder, "train", kind):
            part = other / f"keras_slices_{'seg_' * (kind == 'seg')}train"
            part.mkdir(parents=True, exist_ok=True)
            voxels = nibabel.Nifti1Image(read_png(path), np.eye(4)).to_bytes()
            (part / f"{kind}_{case:03d}_week_0_slice_{z}.nii.gz").write_bytes(gzip.compress(voxels, 1))
    with pytest.raises(UserError, match="case_NNN"):
        list_slices(other, "train")
    nifti = Layout(
        folders={"case": "keras_slices_{split}", "seg": "keras_slices_seg_{split}"},
        names={kind: rf"{kind}_(\d+)_week_0_slice_(\d+)\.nii\.gz" for kind in ("case", "seg")},
        read=lambda path: np.asanyarray(nibabel.Nifti1Image.from_bytes(gzip.decompress(path.read_bytes())).dataobj),
    )
    monkeypatch.setattr(layout, "LAYOUTS", [*layout.LAYOUTS, nifti])
    release, found = (load_slices(folder, "train", 64, masks=True) for folder in (noise_folder, other))
    assert found.digest == release.digest and found.masks.equal(release.masks)
    assert found.z.equal(release.z) and found.case.equal(release.case)
    with pytest.raises(UserError, match="test"):  # a split that is not there is not looked for elsewhere
        list_slices(other, "test")


def test_a_folder_of_bare_slices_counts_as_any_split(noise_folder, tmp_path):
    bare = Path(shutil.copytree(noise_folder / "keras_png_slices_test", tmp_path / "samples"))
    wanted = [(case, z, path.name) for case, z, path in list_slices(noise_folder, "test")]
    for split in ("test", "train", "samples"):
        assert [(case, z, path.name) for case, z, path in list_slices(bare, split)] == wanted
    assert not layout.has_splits(bare) and layout.has_splits(noise_folder)


@pytest.mark.parametrize("size", [32, 64, 96, 128, 160, 192, 200, 240, 256, 320, 512])
def test_the_content_box_is_scaled_or_the_whole_picture(size):
    """Models halve its sides several times, so they are rounded up to multiples of 16."""
    seen, whole = np.zeros((size, size), bool), (0, 0, size, size)
    seen[-(-40 * size // 256) : 216 * size // 256, -(-24 * size // 256) : 232 * size // 256] = True  # every head
    before = seen.copy()
    top, left, height, width = box = content_box(seen)
    if size in (128, 256, 512):
        assert box == tuple(side * size // 256 for side in (32, 16, 192, 224))
    assert (box == whole) == (size == 32) and (seen == before).all()
    assert not seen[:top].any() and not seen[top + height :].any() and max(top + height, left + width) <= size
    if box != whole:
        assert height % 16 == width % 16 == 0
        for row, column in ((0, 0), (top - 1, size // 2), (size - 1, size - 1)):
            beyond = seen.copy()
            beyond[row, column] = True
            assert content_box(beyond) == whole
        seen[top, left] = seen[top + height - 1, left + width - 1] = True
        assert content_box(seen) == box
