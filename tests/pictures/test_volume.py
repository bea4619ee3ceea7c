"""Laws of volume.py: a viewer finds every voxel where the head has it, and the pictures say the same."""

import gzip
import itertools
import json
import re
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image, ImageSequence

import dataset
import util
from heads.layout import list_slices, read_png
from heads.people import PEOPLE_TABLE
from heads.phantom import phantom_case
from pictures import sheets, volume
from util import UserError


@pytest.fixture(scope="module")
def head() -> np.ndarray:
    """Slices uint8 [32, 256, 256] of a phantom. Read only."""
    return phantom_case(0, 1)[0]


def small(head: np.ndarray, size: int, slices: int = 32) -> np.ndarray:
    """The head at size x size pixels, every one of them one of the head's; above slice 31 it begins again."""
    step = 256 // size
    return head[np.arange(slices) % 32, ::step, ::step].copy()


@pytest.mark.parametrize("size", [64, 128, 256])
def test_nifti_read_back_is_the_slices_in_ras_and_mm(head, size):
    """Voxel by voxel; both transforms, the sizes of voxels, units, and a description that says what it is."""
    slices = small(head, size)
    image = nibabel.Nifti1Image.from_bytes(volume.to_nifti(slices).to_bytes())
    voxels = np.asanyarray(image.dataobj)
    assert voxels.dtype == np.uint8 and np.array_equal(voxels.transpose(2, 0, 1), slices)
    assert nibabel.aff2axcodes(image.affine) == ("R", "A", "S")
    header = image.header
    assert header.get_zooms() == (256 / size, 256 / size, 1) and header.get_xyzt_units()[0] == "mm"
    for transform, code in (image.get_sform(coded=True), image.get_qform(coded=True)):
        assert code > 0 and np.array_equal(transform, image.affine)
    assert "synthetic" in bytes(header["descrip"]).decode() and (header["cal_min"], header["cal_max"]) == (0, 255)
    for wrong in (slices.astype(float), slices[:, :, 1:], slices[0]):  # other types or axes than a viewer would show
        with pytest.raises(ValueError, match="slices must be uint8"):
            volume.to_nifti(wrong)


def test_up_is_left_and_right_is_anterior_and_the_origin_is_the_middle():
    """A mark in the upper right of the highest slice is to the left, in front and up, at any size as many mm."""
    for size in (64, 128, 256):
        slices = np.zeros((32, size, size), np.uint8)
        slices[31, size // 4, 3 * size // 4 : 3 * size // 4 + 1] = 255
        image = volume.to_nifti(slices)
        (voxel,) = np.argwhere(np.asanyarray(image.dataobj))
        half = 128 / size  # the middle of the voxel
        assert np.allclose(nibabel.affines.apply_affine(image.affine, voxel), (half - 64, 64 + half, 15.5))
    for size, count in ((256, 32), (64, 32), (64, 20), (240, 5)):
        affine = volume.affine_of(np.zeros((count, size, size), np.uint8))
        corners = nibabel.affines.apply_affine(affine, [(0, 0, 0), (size - 1, size - 1, count - 1)])
        assert np.allclose(corners.sum(0), 0)


def test_a_new_brain_overlays_the_official_volumes(tmp_path):
    """Voxel (row, column, z) of what we write has the mm that nibabel gives to the voxel of which it is a slice."""
    nibabel.save(nibabel.AnalyzeImage(np.zeros((176, 208, 176), np.int16), None), tmp_path / "official.img")
    official = nibabel.load(tmp_path / "official.img")  # without an origin in its header
    written = volume.to_nifti(np.zeros((32, 256, 256), np.uint8))
    assert nibabel.aff2axcodes(official.affine) == ("L", "A", "S")
    rng = np.random.default_rng(0)
    for i, j, z in rng.integers(0, (176, 208, 32), (50, 3)):
        row, column = 40 + (175 - i), 24 + j
        ours = nibabel.affines.apply_affine(written.affine, (row, column, z))
        assert np.allclose(ours, (row - 127.5, column - 127.5, z - 15.5))
        assert np.allclose(ours, nibabel.affines.apply_affine(official.affine, (i, j, 72 + z)))


def test_equal_slices_give_equal_files_whatever_the_time(head, tmp_path, monkeypatch):
    slices, files = small(head, 64), []
    for folder, time in (("a", 1e9), ("b", 2e9)):
        monkeypatch.setattr("time.time", lambda time=time: time)
        volume.write_brain(tmp_path / folder, 0, slices, "a head")
        written = (file for file in (tmp_path / folder).rglob("*") if file.is_file())
        files.append({file.name: file.read_bytes() for file in written})
    assert files[0] == files[1] and len(files[0]) == 36
    assert len(gzip.decompress(files[0]["brain_000.nii.gz"])) == 352 + slices.size


@pytest.mark.parametrize("size", [64, 256])
def test_cut_is_the_plane_of_the_volume_at_these_mm(head, size):
    """The same voxels that NIfTI's affine puts there."""
    slices = small(head, size)
    image = volume.to_nifti(slices)
    voxels, inverse = np.asanyarray(image.dataobj), np.linalg.inv(image.affine)
    for mm in (-100.7, -20.3, 0.7, 7.2, 99.4):
        i, j, _ = np.round(nibabel.affines.apply_affine(inverse, (mm, mm, 0))).astype(int)
        assert np.array_equal(volume.cut(slices, "x", mm), voxels[i].T)
        assert np.array_equal(volume.cut(slices, "y", mm), voxels[:, j].T)
    assert np.array_equal(volume.cut(slices, "z", -8.5), slices[7])
    for axis, mm in (("x", 128.1), ("y", -128.1), ("z", 16.1), ("z", -16.1)):
        with pytest.raises(ValueError, match=f"{axis} = .* outside"):
            volume.cut(slices, axis, mm)


def grey_at(panel, across: float, up: float) -> int:
    """What a panel of the figure shows at a place given in its own axes, as matplotlib draws it."""
    picture = panel.images[0]
    left, right, bottom, top = picture.get_extent()
    pixels = picture.get_array() if picture.origin == "lower" else picture.get_array()[::-1]
    rows, columns = pixels.shape
    return pixels[int((up - bottom) / (top - bottom) * rows), int((across - left) / (right - left) * columns)]


@pytest.mark.parametrize("size", [64, 256])
def test_a_marked_voxel_appears_where_its_mm_are_in_all_three_directions(size):
    slices = np.zeros((32, size, size), np.uint8)
    row, column = int((25 + 128) * size / 256), int((20 + 128) * size / 256)
    slices[16, row, column] = 200
    panels = {panel.get_title(): panel for panel in volume.reslices(slices, "one voxel").axes}
    axial, middle, beside, front, back = panels.values()
    assert list(panels) == ["axial, z = 0 mm", "sagittal, x = 0 mm", "sagittal, x = 25 mm",
                            "coronal, y = 20 mm", "coronal, y = -30 mm"]  # fmt: skip
    for panel, place in ((axial, (20.5, 25.5)), (beside, (20.5, 0.5)), (front, (25.5, 0.5))):
        assert grey_at(panel, *place) == 200 and (panel.images[0].get_array() > 0).sum() == 1
        assert panel.images[0].get_clim() == (0, 255) and panel.get_aspect() == 1
    assert not middle.images[0].get_array().any() and not back.images[0].get_array().any()


@pytest.mark.parametrize("slices", [8, 20, 32, 48])
def test_the_figure_is_to_scale_and_its_letters_stand_where_the_axes_point(head, slices):
    """Anterior right, left up in the slice, superior up elsewhere; equal mm are equally long in all panels."""
    figure = volume.reslices(small(head, 64, slices), "a phantom")
    figure.draw_without_rendering()
    assert "a phantom" in figure.get_suptitle() and "the person's left" in figure.get_suptitle()
    assert len({round(np.diff(panel.transData.transform([(0, 0), (10, 0)]), axis=0)[0, 0], 3)
                for panel in figure.axes}) == 1  # fmt: skip
    for panel in figure.axes:
        letters = {text.get_text(): text.get_position() for text in panel.texts}
        (left, bottom), (right, top) = panel.transData.inverted().transform(panel.bbox.get_points())
        across, up = panel.get_xlabel() or "as below", panel.get_ylabel()
        assert right > left and up.split(",")[0] in "xz"
        if panel.get_title().startswith("axial"):
            assert letters["A"][0] > letters["P"][0] and across.startswith("y")
            assert letters["L"][1] > letters["R"][1] and top < 0 < bottom  # mm to the right are counted downwards
        else:
            assert letters["S"][1] > letters["I"][1] and np.allclose((bottom, top), (-slices / 2, slices / 2))
            start, end = "LR" if panel.get_title().startswith("coronal") else "PA"
            assert letters[end][0] > letters[start][0]
    boxes = [panel.get_tightbbox() for panel in figure.axes]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    assert all(figure.bbox.contains(*corner) for box in boxes for corner in box.corners())


@pytest.mark.parametrize("size, count", [(64, 32), (256, 32), (64, 20), (64, 48)])
def test_the_gif_goes_up_and_down_once(head, size, count, tmp_path):
    """Frame after frame the slices 0 .. 31 .. 0, within the grey levels it keeps, each with another caption."""
    slices = small(head, size, count)
    volume.write_brain(tmp_path, 0, slices, "a head")
    order = [*range(count), *range(count - 2, -1, -1)]
    zoom, (rows, columns) = 256 // size, sheets.head_box([slices])
    height, width = ((part.stop - part.start) * zoom for part in (rows, columns))
    with Image.open(tmp_path / "brain_000_scroll.gif") as gif:
        frames = [np.asarray(frame.convert("L")).astype(int) for frame in ImageSequence.Iterator(gif)]
        assert gif.info["loop"] == 0
    assert len(frames) == 2 * count - 1 and (tmp_path / "brain_000_scroll.gif").stat().st_size < 2_000_000
    for z, frame in zip(order, frames, strict=True):
        shown = frame[-height - 24 : -24 : zoom, 4 : 4 + width : zoom]
        assert np.abs(shown - slices[z, rows, columns]).max() <= 4
    captions = {frame[-24:].tobytes() for frame in frames}
    assert len(captions) == count
    assert all(np.array_equal(a, b) for a, b in zip(frames, reversed(frames)))


def test_a_folder_may_begin_with_a_tilde(head, tmp_path, monkeypatch):
    """As ~1 of a name: it is no home."""
    monkeypatch.chdir(tmp_path)
    slices = small(head, 64, 20)
    *_, nifti = volume.write_brain(Path("~1"), 0, slices, "a head")
    assert np.array_equal(volume.read_slices(nifti), slices)


@pytest.mark.parametrize("count, seen", [(20, True), (32, True), (48, False)])
def test_write_brain_returns_what_it_wrote(head, count, seen, tmp_path):
    """And so the masks, which are as the slices are: the release's names, and a volume of the same place in mm."""
    slices = small(head, 64, count)
    masks = small(phantom_case(0, 1)[1], 64, count) if seen else None
    files = volume.write_brain(tmp_path / "new", 12, slices, "a head", masks)
    endings = [".png", "_scroll.gif", "_reslices.png", ".nii.gz"] + seen * ["_seg.nii.gz"]
    assert [file.name for file in files] == [f"brain_012{ending}" for ending in endings]
    expected = set()
    for kind, voxels, nifti in (("case", slices, files[3]), ("seg", masks, files[-1]))[: 1 + seen]:
        found = list_slices(tmp_path / "new", "train", kind)
        assert [place[:2] for place in found] == [(12, z) for z in range(count)]
        assert np.array_equal(np.stack([read_png(path) for *_, path in found]), voxels)
        steady = volume.steady(slices, masks) if seen and kind == "case" else voxels
        assert np.array_equal(volume.read_slices(nifti), steady)
        assert np.array_equal(nibabel.load(nifti).affine, volume.affine_of(slices))
        expected |= {*volume.files_of_brain(tmp_path / "new", 12, count, kind)}
    assert expected == {path for path in (tmp_path / "new").rglob("*") if path.is_file()} > set(files)


def test_a_steady_head_is_equally_bright_along_z(head):
    """A planted flicker is gone, from grey matter, which is looked at, and from white, and no pixel is brighter.

    Slices without grey matter follow their neighbours; a head without any stays as it is.
    """
    masks, factors = phantom_case(0, 1)[1].copy(), np.random.default_rng(0).uniform(0.6, 1, len(head))
    flickering, masks[:2] = (head * factors[:, None, None]).round().astype(np.uint8), 0

    def levels(slices: np.ndarray, tissue: int) -> np.ndarray:
        seen = [z for z in range(len(slices)) if (masks[z] == tissue).sum() >= 100]
        return np.array([np.median(slices[z][masks[z] == tissue]) for z in seen])

    before, after = volume.steady(head, masks), volume.steady(flickering, masks)
    assert after.dtype == np.uint8 and (after <= flickering).all()
    assert np.ptp(levels(flickering, 170)) > 20 and np.ptp(levels(after, 170)) <= 1
    planted, left = (levels(a, 255) / levels(b, 255) for a, b in ((flickering, head), (after, before)))
    assert planted.max() / planted.min() > 1.4 and left.max() / left.min() < 1.06
    assert after[0].max() / flickering[0].max() == pytest.approx(after[2].max() / flickering[2].max(), abs=0.01)
    assert np.array_equal(volume.steady(flickering, np.zeros_like(masks)), flickering)
    dark = flickering.copy()
    dark[5][masks[5] == 170] = 0  # its grey matter is black, that of the others stays as it is
    assert np.array_equal(np.delete(volume.steady(dark, masks), 5, 0), np.delete(after, 5, 0))


def test_a_folder_of_samples_is_never_a_mixture(head, tmp_path):
    """More brains of the same weights join those there; for those of others the next folder is taken."""
    slices, out = small(head, 64), Path("run_vis/samples")
    for i in (0, 1):
        assert volume.samples_folder("run", {"weights": "a", "seed": 0}) == out
        volume.Samples(out, {"weights": "a", "seed": 0}).add(i, slices, f"brain {i}", "a head", {"age": str(60 + i)})
        util.disown()
    assert json.loads((out / "samples.json").read_text())["brains"] == {"0": {"age": "60"}, "1": {"age": "61"}}
    before = {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
    assert len(before) == 2 * (4 + 32) + 2 + 1  # and the lock
    for n, other in enumerate("bc", 1):
        with pytest.raises(UserError, match="brains of other weights or settings; choose another --out"):
            volume.Samples(out, {"weights": other, "seed": 0})
        free = volume.samples_folder("folder/run.safetensors", {"weights": other, "seed": 0})
        assert free == out.with_name(f"samples_{n}")
        volume.Samples(free, {"weights": other, "seed": 0}).add(3, slices, "brain 3", "a head")
    assert {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()} == before


def test_no_file_of_anybody_is_touched(head, tmp_path):
    """A folder that holds anything but samples is refused, however it looks; an empty one is not."""
    for file in ("case_000_slice_0.nii.png", "thesis.txt", "inner/.hidden"):
        mine = tmp_path / f"mine_{len(file)}" / file
        mine.parent.mkdir(parents=True)
        mine.write_bytes(b"mine")
        with pytest.raises(UserError, match="no samples of ours; choose another --out"):
            volume.Samples(mine.parents[file.count("/")], {"weights": "a"})
        assert [path for path in (tmp_path / f"mine_{len(file)}").rglob("*") if path.is_file()] == [mine]
    with pytest.raises(UserError, match="no samples of ours"):
        volume.Samples(mine, {"weights": "a"})  # a file
    (tmp_path / "empty").mkdir()
    volume.Samples(tmp_path / "empty", {"weights": "a"})
    Path("samples.json").write_text("[]")
    with pytest.raises(UserError, match="no record of samples"):
        volume.Samples(Path("."), {"weights": "a"})


@pytest.fixture
def people_drawn(head, tmp_path) -> Path:
    """A folder of three new brains of 20 slices of 64 px, two of which are somebody; one is in validate."""
    masks = phantom_case(0, 1)[1][:20, ::4, ::4].copy()
    samples = volume.Samples(tmp_path / "drawn", {"weights": "a"})
    for i, person in enumerate([{"age": "64", "sex": "F", "cdr": "0.5"}, {"age": "20"}, {}]):
        samples.add(i, np.roll(small(head, 64, 20), i, axis=2), f"brain {i}", "a head", person, masks)
    util.disown()
    return tmp_path / "drawn"


def test_samples_are_a_data_folder_and_say_that_they_are_synthetic(people_drawn, head, run_main, capsys):
    """Splits by number, masks, and a table of these people alone, whatever lies above."""
    status, out, _ = run_main(dataset, people_drawn)
    assert status == 0 and "\nsynthetic: drawn by a model" in out and out.endswith("all is well\n")
    dataset.find_data(str(people_drawn))
    assert "synthetic)" in capsys.readouterr().out
    train, held_out = (dataset.load_slices(people_drawn, split, 64, masks=True) for split in ("train", "validate"))
    assert train.case.unique().tolist() == [0, 2] and held_out.case.unique().tolist() == [1]
    assert np.array_equal(held_out.images, np.roll(small(head, 64, 20), 1, axis=2))
    known = [data.people(("age", "sex", "cdr"))[::20].tolist() for data in (train, held_out)]
    assert np.array_equal(known[0], [[64, 0, 0.5], [np.nan] * 3], equal_nan=True)
    assert np.array_equal(known[1], [[20, np.nan, np.nan]], equal_nan=True)
    (people_drawn / PEOPLE_TABLE).rename(people_drawn.parent / PEOPLE_TABLE)
    assert dataset.people_table(people_drawn) is None
    dataset.write_subset(people_drawn, 1, people_drawn.parent / "fewer")
    assert dataset.is_synthetic(people_drawn.parent / "fewer")
    numbers = {split: {i for i in range(200) if volume.split_of(i) == split} for split in ("train", "validate")}
    assert numbers["validate"] == set(range(1, 200, 10)) and len(numbers["train"]) == 180


def test_a_brain_is_missing_unless_it_is_recorded_with_all_its_files(people_drawn):
    """Of masks, all or none: without a scorer there are none."""

    def missing(count: int) -> list[int]:
        try:
            return list(volume.Samples(people_drawn, {"weights": "a"}).missing(range(count), 20, 64))
        finally:
            util.disown()

    assert missing(3) == [] and missing(5) == [3, 4]
    for kind, n in (("case", 0), ("case", 9), ("seg", 0), ("seg", 9)):
        file = volume.files_of_brain(people_drawn, 1, 20, kind)[n]
        file.rename(people_drawn / ".aside")
        assert missing(3) == [1], file
        (people_drawn / ".aside").rename(file)
    for file in volume.files_of_brain(people_drawn, 2, 20, "seg"):
        file.unlink()
    assert missing(3) == []
    record = json.loads((people_drawn / volume.RECORD).read_text())
    del record["brains"]["0"]
    (people_drawn / volume.RECORD).write_text(json.dumps(record))
    assert missing(3) == [0]


@pytest.mark.parametrize("size, count", [(64, 32), (64, 20), (128, 32), (256, 32)])
def test_the_need_of_disk_is_said_within_a_factor_of_two(head, size, count, tmp_path, monkeypatch, capsys):
    """Before the first brain; a disk with less is refused then."""
    masks, out = small(phantom_case(0, 1)[1], size, count), tmp_path / "new"
    samples = volume.Samples(out, {"weights": "a"})
    assert next(samples.missing(range(3), count, size)) == 0
    said = re.match(r"3 of 3 brains are to be drawn, about ([\d,]+) MB in .*new, where ", capsys.readouterr().out)
    samples.add(0, small(head, size, count), "brain 0", "a head", masks=masks)
    files = [file for kind in volume.VOLUMES for file in volume.files_of_brain(out, 0, count, kind)]
    taken = sum(file.stat().st_size for file in files)
    assert 0.5 < int(said[1]) * 1e6 / (3 * taken) < 2
    free = shutil.disk_usage(out)._replace(free=2 * taken)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: free)
    with pytest.raises(UserError, match=r"^5 of 6 .* MB in .*new, where \d+ MB are free; free some space"):
        next(samples.missing(range(6), count, size))


WRONG = ["", "[]", "{}", '{"made_by": 3, "brains": {}}', '{"made_by": {}, "brains": [1]}',
         '{"made_by": {}, "brains": {"one": {}}}', '{"made_by": {}, "brains": {"1": {"age": 64}}}']  # fmt: skip


@pytest.mark.parametrize("text", WRONG)
def test_a_record_that_is_none_is_refused_in_words(tmp_path, text):
    (tmp_path / volume.RECORD).write_text(text)
    with pytest.raises(UserError, match="no record of samples"):
        volume.read_record(tmp_path)
    (tmp_path / volume.RECORD).unlink()
    assert volume.read_record(tmp_path) == {"made_by": {}, "brains": {}}
