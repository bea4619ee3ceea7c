"""Laws of imports.py: every form comes out pixel by pixel, and what is not sound is refused in one line."""

import gzip
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import nibabel
import numpy as np
import pytest
from nibabel.affines import apply_affine
from nibabel.analyze import AnalyzeHeader, AnalyzeImage

import dataset
from heads import imports
from heads.imports import Cut, draw_splits, import_brains, release_split
from heads.layout import SPLITS, list_slices, read_png, write_slices
from heads.people import PEOPLE_TABLE
from pictures.volume import to_nifti
from util import UserError

OFFICIAL = "disc1/OAS1_{0:04d}_MR{1}/{2}/OAS1_{0:04d}_MR{1}_mpr_n4_anon_111_t88_{3}.hdr"
MIDDLE = Cut(32, None)


def bring(source: Path, folder: Path = Path("new"), cut: Cut = MIDDLE, **flags) -> Path:
    import_brains(source, folder, cut, **flags)
    return folder


def brains(folder: Path, kind: str = "case") -> dict[tuple[str, int], np.ndarray]:
    """{(split, case): its slices} of a data folder; masks may be missing."""
    found = {}
    for split in SPLITS:
        if (folder / f"keras_png_slices_{'seg_' * (kind == 'seg')}{split}").is_dir():
            for case, _, path in list_slices(folder, split, kind):
                found.setdefault((split, case), []).append(read_png(path))
    return {key: np.stack(slices) for key, slices in found.items()}


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def ramp(shape: tuple[int, ...], start: int = 0) -> np.ndarray:
    """int16 voxels that differ along every axis, and have another maximum in every plane."""
    i, j, k = np.indices(shape[:3])
    return (start + 3 * i + 5 * j + 7 * k).astype(np.int16).reshape(shape)


def write_analyze(path: Path, voxels: np.ndarray) -> None:
    """As OASIS-1 has it: big-endian, without an orientation or origin."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = AnalyzeHeader(endianness=">")
    header.set_data_dtype(voxels.dtype)
    nibabel.save(AnalyzeImage(voxels, None, header), path)


def write_official(folder: Path, number: int, visit: int = 1) -> tuple[np.ndarray, np.ndarray]:
    voxels = ramp((176, 208, 176, 1), number)
    labels = (voxels % 4).astype(np.uint8)
    write_analyze(folder / OFFICIAL.format(number, visit, "PROCESSED/MPRAGE/T88_111", "gfc"), voxels)
    write_analyze(folder / OFFICIAL.format(number, visit, "FSL_SEG", "masked_gfc_fseg"), labels)
    return voxels[..., 0], labels[..., 0]


def write_nifti(path: Path, voxels: np.ndarray, affine: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = nibabel.Nifti1Image(voxels, np.eye(4) if affine is None else affine).to_bytes()
    path.write_bytes(gzip.compress(content, 1) if path.suffix == ".gz" else content)
    return path


def pack(folder: Path, archive: Path) -> Path:
    """The folder's files as an archive of the kind that its name says."""
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w") as opened:
            for path in sorted(folder.rglob("*")):
                opened.write(path, path.relative_to(folder.parent))
    else:
        with tarfile.open(archive, "w:gz" if archive.suffix == ".gz" else "w") as opened:
            opened.add(folder, folder.name)
    return archive


# ---------------------------------------------------------------------------------------------------------- OASIS-1


@pytest.fixture(scope="module")
def discs(tmp_path_factory) -> tuple[Path, dict[int, tuple[np.ndarray, np.ndarray]]]:
    """Official volumes of the people 1, 73 and 402 with a second visit of 1: (folder, {number: voxels, labels})."""
    folder = tmp_path_factory.mktemp("data") / "discs"
    people = {number: write_official(folder, number) for number in (1, 73, 402)}
    write_official(folder, 1, visit=2)
    (folder / "disc1" / PEOPLE_TABLE).write_text("ID,M/F,Age,CDR\nOAS1_0001_MR1,F,74,0\n")
    return folder, people


def test_official_volumes_follow_the_rule_pixel_by_pixel(discs, capsys):
    source, people = discs
    with open(source / OFFICIAL.format(1, 1, "PROCESSED/MPRAGE/T88_111", "gfc"), "rb") as header:
        assert header.read(4) == (348).to_bytes(4, "big")  # what the test writes is as OASIS writes it
    new = bring(source)
    images, masks = brains(new), brains(new, "seg")
    assert set(images) == set(masks) == {("train", 1), ("validate", 402)}
    for (_, number), pictures in images.items():
        voxels, labels = people[number]
        assert pictures.shape == (32, 256, 256)
        for z in range(32):
            plane, expected, mask = voxels[:, :, 72 + z].astype(float), np.zeros((256, 256)), np.zeros((256, 256))
            for i in range(176):
                expected[40 + (175 - i), 24:232] = plane[i] * 255 / plane.max()
                mask[40 + (175 - i), 24:232] = 85 * labels[i, :, 72 + z]
            assert np.abs(pictures[z] - expected).max() <= 0.5 + 1e-9
            assert np.array_equal(masks["train" if number == 1 else "validate", number][z], mask)
    out = capsys.readouterr().out
    assert "second visits (MR2) (1)" in out and "people whom the release lacks (1)" in out
    assert "gfc.img: sha256" in out and "but the official file has 621279777f37" in out
    assert (new / PEOPLE_TABLE).is_file() and json.loads((new / imports.RECORD).read_text())["done"] == [1, 402]
    assert set(os.listdir()) == {"new"}


def test_whom_the_release_lacks_comes_when_asked_for(discs):
    assert set(brains(bring(discs[0], everyone=True))) == {("train", 1), ("train", 73), ("validate", 402)}


def test_a_file_of_the_known_checksum_is_said_to_be_official(discs, capsys, monkeypatch):
    name = "OAS1_0001_MR1_mpr_n4_anon_111_t88_gfc.img"
    (path,) = discs[0].rglob(name)
    monkeypatch.setattr(imports, "OFFICIAL_SUMS", {name: imports.hashlib.sha256(path.read_bytes()).hexdigest()})
    bring(discs[0])
    assert re.search(rf"{name}: sha256 \w+, as the official file", capsys.readouterr().out)


@pytest.mark.parametrize("archive", ["disc.tar.gz", "disc.tar", "disc.zip"])
def test_archives_give_the_same_as_folders(discs, archive, tmp_path):
    """Also where images lie in one archive and masks in another, and nothing that was unpacked stays."""
    source, packed = discs[0], tmp_path / "packed"
    packed.mkdir()
    pack(source, packed / archive)
    before, after = everything(bring(source)), everything(bring(packed, Path("other")))
    assert before.pop(imports.RECORD) != after.pop(imports.RECORD)  # it names the source
    after[PEOPLE_TABLE] = before[PEOPLE_TABLE]  # which lies in the archive
    assert before == after and set(os.listdir()) == {"new", "other", "packed"}


def test_an_imported_volume_overlays_what_we_write(tmp_path):
    """A bright voxel of an official volume has the same mm before and after."""
    voxels = ramp((176, 208, 176))
    voxels[30, 150, 80] = 20_000
    write_analyze(tmp_path / "in" / OFFICIAL.format(5, 1, "PROCESSED/MPRAGE/T88_111", "gfc"), voxels)
    pictures = brains(bring(tmp_path / "in"))["train", 5]
    written = to_nifti(pictures)
    (place,) = np.argwhere(np.asanyarray(written.dataobj)[..., 8] == 255)
    (source,) = (tmp_path / "in").rglob("*.img")
    official = nibabel.load(source)
    assert np.allclose(apply_affine(written.affine, (*place, 8)), apply_affine(official.affine, (30, 150, 80)))


def test_the_splits_of_oasis_are_the_releases():
    """354 of the numbers that OASIS-1 has, in three runs; 73 to 80 and 92 to 150 are in none."""
    assert [release_split(n) for n in (1, 72, 81, 91, 151, 401, 402, 440, 441, 457)] == [
        *["train"] * 6, "validate", "validate", "test", "test"]  # fmt: skip
    assert {release_split(n) for n in (0, 73, 80, 92, 150, 458)} == {None}


# ------------------------------------------------------------------------------------------------------ other forms


@pytest.mark.parametrize("form", ["zip", "one level too deep"])
def test_the_release_comes_as_it_is(noise_folder, form, tmp_path):
    source = tmp_path / "deep/keras_png_slices_data/keras_png_slices_data"
    source.parent.mkdir(parents=True)
    noise_folder.rename(source)
    (source / "__MACOSX").mkdir()
    (source / "__MACOSX/case_001_slice_0.nii.png").write_text("rubbish")
    given = pack(source.parent, tmp_path / "r.zip") if form == "zip" else tmp_path / "deep"
    bring(given)
    for kind in ("case", "seg"):
        old, new = brains(source, kind), brains(Path("new"), kind)
        assert set(old) == set(new) == {("train", 1), ("validate", 2), ("test", 3)}
        assert all(np.array_equal(old[key], new[key]) for key in old)


def write_hipmri(folder: Path) -> dict[int, np.ndarray]:
    """Person 4 twice, of whom one visit was put into another split, and person 12: {case: slices}."""
    slices = {}
    for split, person, week in (("train", 4, 0), ("test", 4, 2), ("validate", 12, 0)):
        rng = np.random.default_rng(person)
        slices[person * 10 + week] = voxels = rng.uniform(0, 900, (5, 200, 100)).astype(np.float32)
        for z, plane in enumerate(voxels):
            name = f"{person:03d}_week_{week}_slice_{z}.nii.gz"
            write_nifti(folder / f"keras_slices_{split}/case_{name}", plane)
            write_nifti(folder / f"keras_slices_seg_{split}/seg_{name}", np.full((200, 100), z, np.uint8))
    return slices


def test_hipmri_slices_lie_in_a_square_as_on_disk_and_no_person_is_in_two_splits(tmp_path, capsys):
    slices = write_hipmri(tmp_path / "in")
    found = brains(bring(tmp_path / "in"))
    assert set(found) == {("test", 40), ("test", 42), ("validate", 120)} and not brains(Path("new"), "seg")
    for (_, case), pictures in found.items():
        expected = slices[case] * 255 / slices[case].max((1, 2), keepdims=True)
        assert pictures.shape == (5, 256, 256) and np.abs(pictures[:, 28:228, 78:178] - expected).max() < 0.51
        assert pictures.astype(int).sum() == pictures[:, 28:228, 78:178].astype(int).sum()
    out = capsys.readouterr().out
    assert "masks, whose labels are no tissues of the brain (15)" in out and "in two: brains (1)" in out


@pytest.mark.parametrize("kinds, taken", [(("orig", "norm", "aligned_norm", "aligned_orig"), "aligned_orig"),
                                          (("orig", "aligned_norm"), "aligned_norm"), (("norm",), "norm")])  # fmt: skip
def test_neurite_volumes_are_turned_by_their_header_and_their_tissues_renamed(kinds, taken, tmp_path):
    """They are stored as left, down, front; the best kind there is is taken."""
    affine = np.array([[-1, 0, 0, 30], [0, 0, 1, -20], [0, -1, 0, 25], [0, 0, 0, 1.0]])
    rng, person = np.random.default_rng(0), tmp_path / "in/OASIS_OAS1_0402_MR1"
    voxels = {kind: rng.random((60, 50, 40)).astype(np.float32) for kind in kinds}
    labels = rng.integers(0, 5, (60, 50, 40)).astype(np.int16)
    for kind in kinds:
        write_nifti(person / f"{kind}.nii.gz", voxels[kind], affine)
        write_nifti(person / f"{'aligned_' * kind.startswith('aligned')}seg4.nii.gz", labels, affine)
        write_nifti(person / "seg35.nii.gz", labels, affine)
    new = bring(tmp_path / "in")
    images, masks = brains(new), brains(new, "seg")
    assert set(images) == set(masks) == {("validate", 402)}
    for z in (0, 31):  # of 50 planes, those from 9 on; they count from above
        plane = voxels[taken][::-1, 50 - 1 - (9 + z)]
        expected = np.pad(plane * 255 / plane.max(), ((98, 98), (108, 108)))
        assert np.abs(images["validate", 402][z] - expected).max() < 0.51
        tissues = np.array([0, 170, 170, 255, 85])[labels[::-1, 50 - 1 - (9 + z)]]
        assert np.array_equal(masks["validate", 402][z], np.pad(tissues, ((98, 98), (108, 108))))


@pytest.mark.parametrize("axes", ["RAS", "LPS", "PIR", "SLA"])
def test_a_volume_is_turned_by_its_affine_and_cut_at_a_height(axes, tmp_path):
    """A mark at a place in mm: left of the middle, in front, and at a height, appears there however it is stored."""
    shape = np.array((60, 80, 50))
    affine = np.array([[1, 0, 0, -30], [0, 1, 0, -40], [0, 0, 1, -10], [0, 0, 0, 1.0]])
    voxels = ramp(tuple(shape))
    voxels[10, 70, 25] = 9000  # 20 mm to the left, 30 mm to the front, 15 mm up
    image = nibabel.Nifti1Image(voxels, affine)
    start, end = (nibabel.orientations.axcodes2ornt(codes) for codes in ("RAS", axes))
    turned = image.as_reoriented(nibabel.orientations.ornt_transform(start, end))
    assert nibabel.aff2axcodes(turned.affine) == tuple(axes)
    write_nifti(tmp_path / "in/a.nii", np.asarray(turned.dataobj), turned.affine)
    pictures = brains(bring(tmp_path / "in", cut=Cut(20, 2.4)))["train", 1]
    assert pictures.shape == (20, 256, 256)
    (place,) = np.argwhere(pictures[15 - 2] == 255)
    assert tuple(place) == (98 + 10, 88 + 70)
    expected = voxels[..., 12] * (255 / voxels[..., 12].max())
    assert np.abs(pictures[0, 98:158, 88:168] - expected).max() < 0.51


def test_pixels_become_square_and_planes_stay(tmp_path):
    """Voxels of 1 x 2 mm become pixels of 1 mm; 3 mm from plane to plane are kept. Large pictures need 512."""
    smooth = np.linspace(0, 1000, 60)[None, :, None] + np.linspace(0, 300, 300)[:, None, None] + np.arange(4)
    write_nifti(tmp_path / "in/a.nii.gz", smooth.astype(np.float32), np.diag([1, 2, 3, 1.0]))
    pictures = brains(bring(tmp_path / "in", cut=Cut(4, None)))["train", 1]
    assert pictures.shape == (4, 512, 512)
    inner = pictures[:, 106:406, 196:316].astype(float)
    assert pictures.sum(dtype=int) == inner.sum() and (inner[:, 5:-5, 5:-5] > 0).all()
    between = (smooth[:, :-1] * 0.75 + smooth[:, 1:] * 0.25).transpose(2, 0, 1)  # linear, a quarter of a voxel on
    expected = between * 255 / smooth.max((0, 1))[:, None, None]
    assert np.abs(inner[:, :, 1:-1:2] - expected).max() < 0.6
    assert json.loads(Path("new/import.json").read_text())["look"] == {"pixels": 512, "mm": [1, 3]}


def test_volumes_are_numbered_by_name_and_split_by_person(tmp_path):
    for person in range(1, 21):
        for run in (1, 2):
            path = tmp_path / f"in/sub-{person:02d}/anat/sub-{person:02d}_run-{run}_T1w.nii"
            write_nifti(path, ramp((20, 20, 4), run))
    cut = Cut(2, None)
    plan = json.loads((bring(tmp_path / "in", cut=cut) / imports.RECORD).read_text())["plan"]["brains"]
    assert [name for _, name in plan.values()] == sorted(name for _, name in plan.values()) and len(plan) == 40
    splits = {split: {re.search(r"sub-\d+", name)[0] for s, name in plan.values() if s == split} for split in SPLITS}
    assert [len(splits[split]) for split in SPLITS] == [17, 2, 1] and len(set.union(*splits.values())) == 20
    other = json.loads((bring(tmp_path / "in", Path("other"), cut, seed=1) / imports.RECORD).read_text())
    assert other["plan"]["brains"] != plan


@pytest.mark.parametrize("count", [1, 2, 3, 10, 100])
def test_drawn_splits_have_everyone_once(count):
    people = [f"sub-{n}" for n in range(count)]
    drawn = draw_splits(people, 3)
    assert sorted(drawn) == sorted(people) and draw_splits(people, 3) == drawn
    sizes = [list(drawn.values()).count(split) for split in SPLITS]
    assert sizes == {1: [1, 0, 0], 2: [1, 1, 0], 3: [1, 1, 1], 10: [8, 1, 1], 100: [85, 10, 5]}[count]


# --------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("file, words", [
    ("Data/Non Demented/OAS1_0001_MR1_mpr-1_100.jpg", ["imagesoasis", "JPEG", "OASIS-1 itself"]),
    ("AD_NC/train/AD/218391_78.jpeg", ["ADNI", "JPEG"]),
    ("OASIS_OAS1_0001_MR1/slice_norm.nii.gz", ["neurite-OASIS 2-D", "one coronal slice"]),
    ("thesis.txt", ["OASIS-1, the official", "keras_png_slices", "HipMRI", "neurite-OASIS 3-D", "NIfTI volumes"]),
])  # fmt: skip
def test_other_forms_are_refused_by_name(run_main, file, words, tmp_path):
    path = tmp_path / "in" / file
    path.parent.mkdir(parents=True)
    path.write_bytes(b"anything")
    status, _, errors = run_main(dataset, "--import", "in", "new")
    assert status == 2 and len(errors.splitlines()) == 1 and all(word in errors for word in words), errors
    assert os.listdir() == ["in"]


def unsafe(kind: str, name: str) -> bytes:
    """An archive with a sound file and one whose name leads out of it."""
    buffer, files = io.BytesIO(), {"a.nii": b"anything", name: b"evil"}
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w") as archive:
            for at, content in files.items():
                archive.writestr(at, content)
    else:
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for at, content in files.items():
                member = tarfile.TarInfo(at)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def plant(defect: str, folder: Path) -> list[str]:
    """Writes a source with a defect into the folder; returns the words that have to be said."""
    gfc = OFFICIAL.format(1, 1, "PROCESSED/MPRAGE/T88_111", "gfc")
    volume, (good, zero) = ramp((20, 20, 40)), (ramp((20, 20, 40)), np.zeros((20, 20, 40), np.int16))
    match defect:
        case "official of another shape":
            write_analyze(folder / gfc, ramp((176, 176, 208)))
            return ["gfc.img is 176x176x208", "176x208x176"]
        case "official without voxels":
            write_analyze(folder / gfc, ramp((176, 208, 176)))
            (folder / gfc).with_suffix(".img").unlink()
            return ["gfc.hdr lacks its file .img"]
        case "official cut off":
            write_analyze(folder / gfc, ramp((176, 208, 176)))
            os.truncate((folder / gfc).with_suffix(".img"), 5_000_000)
            return ["gfc.img cannot be read"]
        case "official that was turned":
            header = nibabel.Nifti1Pair(ramp((176, 208, 176)), np.eye(4))
            (folder / gfc).parent.mkdir(parents=True)
            nibabel.save(header, folder / gfc)
            return ["gfc.img was turned"]
        case "two of one number":
            for disc in ("a", "b"):
                write_nifti(folder / f"{disc}/OASIS_OAS1_0001_MR1/orig.nii.gz", volume)
            return ["a/OASIS_OAS1_0001_MR1", "b/OASIS_OAS1_0001_MR1", "same of brain 1"]
        case "a case in two splits":
            for split in ("train", "test"):
                write_slices(folder / f"keras_png_slices_{split}", 7, np.arange(64, dtype=np.uint8).reshape(1, 8, 8))
            return ["keras_png_slices_train/case_007_slice_0", "same of brain 7"]
        case "a slice is missing":
            write_slices(folder / "keras_png_slices_train", 7, np.ones((3, 8, 8), np.uint8))
            (folder / "keras_png_slices_train/case_007_slice_1.nii.png").unlink()
            return ["lack slice 1"]
        case "four axes":
            write_nifti(folder / "a.nii.gz", np.zeros((8, 8, 8, 5), np.int16))
            return ["a.nii.gz has 4 axes, 8x8x8x5"]
        case "colours":
            colours = np.zeros((8, 8, 40), np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))
            write_nifti(folder / "a.nii.gz", colours)
            return ["a.nii.gz holds", "no plain numbers"]
        case "NaN":
            bad = good.astype(np.float32)
            bad[3, 4, 5:7] = np.nan, np.inf
            write_nifti(folder / "a.nii.gz", bad)
            return ["a.nii.gz has 2 voxels that are no number"]
        case "label map":
            write_nifti(folder / "a.nii.gz", good % 36)
            return ["36 different values", "label map"]
        case "empty":
            write_nifti(folder / "a.nii.gz", zero)
            return ["1 different values", "empty"]
        case "images as masks":
            for name in ("orig", "seg4"):
                write_nifti(folder / f"OASIS_OAS1_0001_MR1/{name}.nii.gz", good)
            return ["seg4.nii.gz is no label map of 0 to 4"]
        case "mask elsewhere":
            write_nifti(folder / "OASIS_OAS1_0001_MR1/orig.nii.gz", good)
            write_nifti(folder / "OASIS_OAS1_0001_MR1/seg4.nii.gz", good % 5, np.diag([1, 1, 2, 1.0]))
            return ["does not lie where its image lies"]
        case "few planes":
            write_nifti(folder / "a.nii.gz", ramp((20, 20, 24)))
            return ["has 24 planes", "--slices 24"]
        case "askew":
            turn = nibabel.eulerangles.euler2mat(x=0.6)
            write_nifti(folder / "a.nii.gz", good, nibabel.affines.from_matvec(turn, (0, 0, 0)))
            return ["askew by 34 degrees"]
        case "no orientation":
            image = nibabel.Nifti1Image(good, None)
            nibabel.save(image, folder / "a.nii")
            return ["does not say in its header how the head lies"]
        case "two sizes of voxels":
            write_nifti(folder / "a.nii.gz", good)
            write_nifti(folder / "b.nii.gz", good, np.diag([0.8, 0.8, 1, 1]))
            return ["b.nii.gz gives slices of 256x256 pixels of 0.8 mm", "1 brains are done"]
        case "no NIfTI":
            (folder / "a.nii.gz").write_bytes(b"anything")
            return ["a.nii.gz cannot be read"]
        case "one slice":
            write_nifti(folder / "a.nii.gz", good[..., 0])
            return ["a.nii.gz is one slice"]
        case "cut off NIfTI":
            path = write_nifti(folder / "a.nii.gz", np.random.default_rng(0).integers(0, 999, (40, 40, 40), np.int16))
            path.write_bytes(path.read_bytes()[:-9000])
            return ["a.nii.gz cannot be read"]
        case "cut off archive":
            write_nifti(folder / "in/a.nii", np.random.default_rng(0).integers(0, 999, (40, 40, 40), np.int16))
            path = pack(folder / "in", folder / "disc.tar.gz")
            path.write_bytes(path.read_bytes()[:-9000])
            return ["disc.tar.gz cannot be read", "damaged or cut off"]
        case "cut off zip":
            (folder / "disc.zip").write_bytes(unsafe("zip", "b.nii")[:-30])
            return ["disc.zip cannot be read"]
        case "nobody of the release":
            write_nifti(folder / "OASIS_OAS1_0092_MR1/orig.nii.gz", good)
            return ["no brain to import", "--everyone"]
        case _:
            kind, name = defect.split(" ")
            (folder / f"a.{kind}").write_bytes(unsafe(kind, name))
            return [f"a.{kind} has a member", "leads out of it"]


DEFECTS = ["official of another shape", "official without voxels", "official cut off"]
DEFECTS += ["official that was turned", "two of one number"]
DEFECTS += ["a case in two splits", "a slice is missing", "four axes", "colours", "NaN", "label map", "empty"]
DEFECTS += ["images as masks", "mask elsewhere", "few planes", "askew", "no orientation", "two sizes of voxels"]
DEFECTS += ["no NIfTI", "one slice", "cut off NIfTI", "cut off archive", "cut off zip", "nobody of the release"]
DEFECTS += ["zip ../evil.nii", "tar a/../../evil.nii", "tar /evil.nii", "zip C:\\evil.nii", "tar ..\\evil.nii"]


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_is_told_in_one_line_and_nothing_is_left_half_written(run_main, defect, tmp_path):
    (tmp_path / "in").mkdir()
    words = plant(defect, tmp_path / "in")
    status, _, errors = run_main(dataset, "--import", "in", "new")
    assert status == 2 and len(errors.splitlines()) == 1 and all(word in errors for word in words), errors
    left = {"in", ".new.making"} if "brains are done" in errors else {"in"}
    assert set(os.listdir()) == left and "unpacked" not in errors and not Path("../evil.nii").exists()


def test_links_in_archives_lead_nowhere(tmp_path):
    """A link of a wanted name is no file of the archive."""
    secret = write_nifti(tmp_path / "secret.nii", ramp((20, 20, 40)))
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(secret, "a.nii")
        link = tarfile.TarInfo("b.nii")
        link.type, link.linkname = tarfile.SYMTYPE, str(secret)
        archive.addfile(link)
    assert list(brains(bring(tmp_path / "a.tar", cut=Cut(2, None)))) == [("train", 1)]


@pytest.mark.parametrize("flags, words", [
    (["--import", "in"], "--import SOURCE needs a new folder"),
    (["--import", "in", "in"], "in exists already"),
    (["--import", "nowhere", "new"], "nowhere does not exist"),
    (["--import", "in", "new", "--slices", "1"], "--slices 1: a brain has 2 to 256"),
    (["--import", "in", "new", "--slices", "9", "--lowest", "35"], "choose --lowest between 0 and 31"),
    (["in", "--lowest", "3"], "belong to --import"),
    (["in", "--everyone"], "belong to --import"),
])  # fmt: skip
def test_flags_that_do_not_fit_are_refused(refused, flags, words, tmp_path):
    write_nifti(tmp_path / "in/a.nii", ramp((20, 20, 40)))
    refused(dataset, *flags, names=[words])
    assert os.listdir() == ["in"]


def test_one_split_is_not_the_whole(noise_folder):
    """Its masks, the other splits and the table of people lie beside it."""
    for split in noise_folder.glob("keras_png_slices_*"):
        with pytest.raises(UserError, match="is one split; give the folder above it"):
            bring(split)


def test_slices_that_are_given_cannot_be_chosen(noise_folder):
    with pytest.raises(UserError, match="whose slices are given; leave out --slices"):
        bring(noise_folder, cut=Cut(20, None))


# --------------------------------------------------------------------------------------------------- kill and go on

KILLED = """
import os, signal, sys
from pathlib import Path
from heads import imports
written, write_slices = [], imports.write_slices
def dying(folder, case, images, kind="case"):
    written.append(case)
    if len(written) == 3:
        write_slices(folder, case, images[:1], kind)
        os.kill(os.getpid(), signal.SIGKILL)
    write_slices(folder, case, images, kind)
imports.write_slices = dying
imports.import_brains(Path("in.tar"), Path("new"), imports.Cut(4, None))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGKILL")
def test_a_killed_import_goes_on_and_ends_as_if_nothing_had_happened(run_main, tmp_path):
    for n in range(5):
        write_nifti(tmp_path / f"in/head_{n}.nii", ramp((20, 20, 40), n))
    source, cut = pack(tmp_path / "in", tmp_path / "in.tar"), Cut(4, None)
    whole = everything(bring(source, Path("straight"), cut))
    root = Path(imports.__file__).parents[1]
    command = [sys.executable, "-c", KILLED]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}, check=False)
    assert done.returncode == -signal.SIGKILL and not Path("new").exists() and Path(".new.making").is_dir()
    assert len(json.loads(Path(f".new.making/{imports.RECORD}").read_text())["done"]) == 2
    status, _, errors = run_main(dataset, "--import", "in.tar", "new", "--slices", 5)
    assert status == 2 and "unfinished import of other data or flags" in errors and not Path("new").exists()
    _, out, _ = run_main(dataset, "--import", "in.tar", "new", "--slices", 4)
    assert "goes on after 2 brains" in out and "check-up of new" in out
    assert everything(Path("new")) == whole and set(os.listdir()) >= {"new", "straight"}
    assert not Path(".new.making").exists()
    status, _, errors = run_main(dataset, "--import", "in.tar", "new", "--slices", 4)
    assert status == 2 and "new exists already" in errors and everything(Path("new")) == whole


@pytest.mark.parametrize("remedy", ["mended", "left out"])
def test_after_an_error_the_brains_that_are_done_stay(run_main, remedy, tmp_path):
    heads = [tmp_path / f"in/OASIS_OAS1_000{n}_MR1/orig.nii.gz" for n in (1, 2, 3)]
    for n, path in enumerate(heads):
        write_nifti(path, ramp((20, 20, 40), n))
    sound = heads[2].read_bytes()
    heads[2].write_bytes(sound[:1000])
    status, _, errors = run_main(dataset, "--import", "in", "new", "--slices", 4)
    assert status == 2 and "MR1/orig.nii.gz cannot be read" in errors and "2 brains are done" in errors
    heads[2].write_bytes(sound) if remedy == "mended" else heads[2].unlink()
    _, out, _ = run_main(dataset, "--import", "in", "new", "--slices", 4)
    assert "goes on after 2 brains" in out and len(brains(Path("new"))) == (3 if remedy == "mended" else 2)


def test_an_imported_folder_takes_no_table_from_above(tmp_path):
    """Its people are others than those of the same numbers in OASIS-1."""
    (tmp_path / PEOPLE_TABLE).write_text("ID,M/F,Age,CDR\nOAS1_0001_MR1,F,74,0\n")
    write_nifti(tmp_path / "in/a.nii", ramp((20, 20, 40)))
    bring(tmp_path / "in", cut=Cut(4, None))
    assert dataset.people_table(Path("new")) is None
