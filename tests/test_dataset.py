"""Laws of dataset.py: the pixel range, the cache, augmentation, the phantom on disk, and its commands."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from planted import part, plant, save

import dataset
import util
from dataset import load_slices, move, people_table, random_moves, to_float, to_slices, to_uint8
from heads.checkup import check_folder
from heads.layout import read_png, write_slices
from heads.people import PEOPLE_TABLE, read_people
from heads.phantom import phantom_case
from pictures.volume import write_brain
from util import UserError


def test_every_grey_level_survives_the_way_to_float_and_back():
    pixels = torch.arange(256, dtype=torch.uint8)
    x = to_float(pixels)
    assert torch.equal(to_uint8(x), pixels) and x[0] == -1 and x[255] == 1
    assert torch.equal(to_uint8(x.double() + 0.49 / 127.5), pixels)  # rounded, not cut off
    assert to_uint8(torch.tensor([-7.0, 1.2])).tolist() == [0, 255]


def test_new_slices_obey_the_rule_of_the_release(phantom_folder):
    """Each has a pixel of 255 and keeps its proportions; slices that have one already stay as they are."""
    pixels = load_slices(phantom_folder, "validate", 256).images
    x = to_float(pixels)[:, None]
    assert torch.equal(to_slices(x), pixels)
    darker = to_slices((x + 1) * 0.8 - 1)
    assert (darker.amax((1, 2)) == 255).all() and (darker.int() - pixels.int()).abs().max() <= 1
    assert to_slices(torch.full((1, 1, 2, 2), -0.9)).unique().tolist() == [26]  # no picture is made of nothing


def test_slices_are_the_files_pixels_with_their_case_and_z(phantom_folder):
    """At full size nothing is interpolated, and no picture goes under another's name (z = 10 is not before z = 2)."""
    data = load_slices(phantom_folder, "validate", 256, masks=True)
    assert len(data) == 32 and data.case.unique().tolist() == [4] and data.z.tolist() == list(range(32))
    assert data.content_box() == (32, 16, 192, 224)
    for n in (0, 2, 10, 31):
        for pixels, kind, prefix in ((data.images, "", "case"), (data.masks, "seg_", "seg")):
            with Image.open(part(phantom_folder, "validate", kind) / f"{prefix}_004_slice_{n}.nii.png") as picture:
                assert np.array_equal(pixels[n].numpy(), np.asarray(picture))
    x, z, case = data.batch(torch.tensor([31, 2]))
    assert torch.equal(to_uint8(x)[:, 0], data.images[[31, 2]]) and z.tolist() == [31, 2] and case.tolist() == [4, 4]


def test_smaller_masks_keep_their_labels(phantom_folder):
    full, small = (load_slices(phantom_folder, "test", size, masks=True).masks for size in (256, 64))
    labels = full.view(32, 64, 4, 64, 4).permute(0, 1, 3, 2, 4).reshape(32, 64, 64, 16)
    assert (labels == small[..., None]).any(-1).all()


def test_find_data_looks_in_the_order_of_its_promise(tmp_path, monkeypatch, capsys):
    (tmp_path / "data/phantom").mkdir(parents=True)
    assert dataset.find_data(None) == Path("data/phantom") and "OASIS_DATA" in capsys.readouterr().out
    (tmp_path / "data/keras_png_slices_data/keras_png_slices_train").mkdir(parents=True)
    assert dataset.find_data(None) == Path("data/keras_png_slices_data")
    monkeypatch.setenv("OASIS_DATA", "mine")
    assert dataset.find_data(None) == Path("mine") and "$OASIS_DATA" in capsys.readouterr().out
    assert dataset.find_data("other") == Path("other") and "--data" in capsys.readouterr().out
    assert dataset.find_data("data") == Path("data/keras_png_slices_data")  # the folder above will do


def test_every_way_to_name_a_folder_leads_to_its_splits_and_one_split_is_refused(noise_folder, monkeypatch, tmp_path):
    """One folder too many, two, or one too few; so training never takes one folder for all of its splits."""
    deep = tmp_path / "oasis/keras_png_slices_data"
    shutil.move(noise_folder, deep / "keras_png_slices_data")
    splits = deep / "keras_png_slices_data"
    for folder in (tmp_path / "oasis", deep, splits):
        assert dataset.find_data(str(folder)) == splits
        monkeypatch.setenv("OASIS_DATA", str(folder))
        assert dataset.find_data(None) == splits
    with pytest.raises(UserError, match="is one split .*give the folder above it"):
        dataset.find_data(str(splits / "keras_png_slices_train"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no folder keras_png_slices_train"):
        dataset.find_data(str(tmp_path / "empty"))


def test_black_slices_alone_are_refused(tmp_path):
    dataset.write_slices(tmp_path / "keras_png_slices_train", 1, np.zeros((4, 64, 64), np.uint8))
    with pytest.raises(UserError, match="all slices of train in .* are black"):
        load_slices(tmp_path, "train", 64)


def test_write_phantom_leaves_all_or_nothing(tmp_path, phantom_folder):
    with pytest.raises(ValueError):
        dataset.write_phantom(tmp_path / "phantom", {"train": 1}, seed=-1)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="mine"):
        dataset.write_phantom(tmp_path / "mine", {"train": 1})
    assert [p.name for p in tmp_path.iterdir()] == ["mine"] and (tmp_path / "mine" / "thesis.txt").exists()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes as Linux lists them")
def test_workers_end_with_the_process_that_began_them(tmp_path):
    """Even if that is killed, and cannot tell them."""
    command = [sys.executable, dataset.__file__, str(tmp_path / "many"), "--phantom", "--cases", "999", "1", "1"]

    def alive(group: int) -> list[int]:
        fields = [path.read_text().rpartition(")")[2].split() for path in stats() if path.exists()]
        return [f for f in fields if int(f[2]) == group and f[0] != "Z"]

    def stats() -> list[Path]:
        return list(Path("/proc").glob("[0-9]*/stat"))

    with subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True) as parent:
        until(lambda: len(alive(parent.pid)) >= 3)
        parent.kill()
    until(lambda: not alive(parent.pid))


def until(happens, seconds: float = 60) -> None:
    """Waits for something."""
    end = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < end
        time.sleep(0.2)


@pytest.mark.parametrize("slices", [20, 48])
def test_brains_of_any_number_of_slices_go_to_disk_and_back(slices, tmp_path):
    """A phantom from write_phantom to Slices, from there to write_brain, and back again: the same pixels."""
    dataset.write_phantom(tmp_path / "phantom", {"train": 1, "validate": 1}, slices=slices)
    data = load_slices(tmp_path / "phantom", "validate", 256, masks=True)
    images, masks = phantom_case(0, 2, slices)
    assert np.array_equal(data.images, images) and np.array_equal(data.masks, masks)
    assert data.slices_per_brain == slices and np.array_equal(data.whole_brains()[0], images)
    data.check_whole_cases("--slices 8")
    small = load_slices(tmp_path / "phantom", "validate", 64)
    write_brain(tmp_path / "new", 2, small.whole_brains()[0].numpy(), "a phantom")
    assert load_slices(tmp_path / "new", "train", 64).digest == small.digest
    report, problems = check_folder(tmp_path / "phantom", None)
    assert problems == [] and f"most brains have {slices} slices" in report[0]


def test_pictures_of_another_size_are_reduced_by_an_integer_factor(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 240, 240), np.uint8)
    write_slices(tmp_path / "mine", 7, pixels)
    for size in (240, 120, 80):
        k = 240 // size
        sums = pixels.astype(int).reshape(3, size, k, size, k).sum((2, 4))
        data = load_slices(tmp_path / "mine", "train", size)
        assert np.array_equal(data.images, (2 * sums + k * k) // (2 * k * k))  # rounded half up
        assert data.content_box() == (0, 0, size, size)
    for size in (64, 256):
        with pytest.raises(UserError, match="240x240.*another --image-size"):
            load_slices(tmp_path / "mine", "train", size)


def test_the_second_load_reads_the_cache_and_decodes_what_changed(noise_folder, monkeypatch):
    """Also where a file keeps its size and name."""
    first = load_slices(noise_folder, "train", 64, masks=True)
    images = first.images.clone()
    first.images.zero_()  # nobody can spoil the cache by writing to what was loaded
    with monkeypatch.context() as patch:
        patch.setattr(dataset, "read_slice", lambda path: pytest.fail("decoded again"))
        second = load_slices(noise_folder, "train", 64, masks=True)
    assert torch.equal(second.images, images) and torch.equal(second.masks, first.masks)
    assert second.digest == first.digest and images.any()
    path = part(noise_folder, "train") / "case_001_slice_7.nii.png"
    save(path, 255 - read_png(path))
    os.utime(path, ns=(1, 1))
    third = load_slices(noise_folder, "train", 64)
    assert (third.images != images).flatten(1).any(1).nonzero().tolist() == [[7]] and third.digest != first.digest
    assert torch.equal(third.images[7], 255 - images[7])


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "text"])
def test_a_damaged_cache_is_decoded_again(noise_folder, damage, capsys):
    """Wherever the damage is: a flipped bit in the last pixel is one too."""
    images = load_slices(noise_folder, "train", 64).images.clone()
    (path,) = dataset.CACHE.glob("*.npy")
    whole = path.read_bytes()
    last = len(whole) - 17  # the digest has 16 letters
    flipped = whole[:last] + bytes([whole[last] ^ 1]) + whole[last + 1 :]
    path.write_bytes({"cut": whole[:-1], "flipped": flipped, "empty": b"", "text": b"hello"}[damage])
    capsys.readouterr()
    assert torch.equal(load_slices(noise_folder, "train", 64).images, images) and path.read_bytes() == whole
    assert "damaged: decoding train again" in capsys.readouterr().out


def test_two_processes_that_start_at_once_share_a_cache(noise_folder, tmp_path):
    """As under torchrun: both load the same slices, one file is left, nothing temporary."""
    script = f"import sys; sys.path.insert(0, {str(Path(dataset.__file__).parent)!r}); import dataset, pathlib; "
    script += "dataset.tidy_cache = lambda: print('decoded'); "
    script += f"print(dataset.load_slices(pathlib.Path({str(noise_folder)!r}), 'train', 64).images.sum().item())"
    begin = [sys.executable, "-c", script]
    both = [subprocess.Popen(begin, cwd=tmp_path, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate()[0].splitlines() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert said[0][-2:] == said[1][-2:] and int(said[0][-1]) > 0
    assert len([path for path in (tmp_path / "data/cache").iterdir() if path.name != util.LOCK]) == 1
    assert (said[0] + said[1]).count("decoded") == 1


def test_augmentation_is_a_pure_function_and_keeps_the_outside_exactly_black(phantom_folder):
    """One grey level of background costs .06 of SSIM. The scaled box with its margin holds what moved."""
    data, index = load_slices(phantom_folder, "validate", 64), torch.tensor([3, 0, 1])
    before, torch_state = data.images.clone(), torch.get_rng_state()

    def moves(seed: int) -> torch.Tensor:
        return random_moves(3, torch.Generator().manual_seed(seed))

    first, again, other = (data.batch(index, moves=moves(seed))[0] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch_state, torch.get_rng_state()) and torch.equal(before, data.images)
    top, left, height, width = 10, 6, 44, 52  # every head at 64 px
    x = torch.full((64, 1, 64, 64), -1.0)
    x[:, :, top : top + height, left : left + width] = 1
    moved = move(x, random_moves(64, torch.Generator().manual_seed(0)))
    assert moved.min() == -1 and moved.max() <= 1 + 8 * torch.finfo().eps  # four weights of 2, rounded
    x[:] = -1
    assert torch.equal(move(x, random_moves(64, torch.Generator().manual_seed(0))), x)


def test_augmentation_never_mirrors_and_moves_only_a_little():
    row, column = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    for r, c in ((12.0, 16.0), (12.0, 48.0), (52.0, 16.0), (32.0, 8.0)):
        spot = torch.exp(-((row - r) ** 2 + (column - c) ** 2) / 8)
        moved = move(2 * spot.expand(100, 1, 64, 64) - 1, random_moves(100, torch.Generator().manual_seed(3)))[:, 0] + 1
        at = torch.stack([(moved * g).sum((1, 2)) / moved.sum((1, 2)) for g in (row, column)], 1)
        distance = (at - torch.tensor([r, c])).norm(dim=1)
        assert distance.max() < 5 and distance.std() > 0.2
        assert (at - torch.tensor([r, c])).mean(0).abs().max() < 0.5  # no preferred direction


def test_the_check_up_reports_by_exit_status_and_contact_sheet(run_main, run_script, noise_folder, tmp_path):
    status, out, _ = run_main(dataset, noise_folder)
    assert status == 0 and "all is well" in out and (tmp_path / "check_vis/contact_sheet.png").is_file()
    plant(noise_folder, "missing slice")
    status, out, _ = run_main(dataset, noise_folder, "--out", "sheet.png")
    assert status == 1 and "PROBLEM  train: missing (1): case 1 slice 7" in out and (tmp_path / "sheet.png").is_file()
    (tmp_path / "data").mkdir()
    noise_folder.rename(tmp_path / "data/keras_png_slices_data")
    status, out, _ = run_main(dataset)  # no folder: the data that training would take
    assert status == 1 and "case 1 slice 7" in out
    done = run_script("dataset.py", tmp_path / "nowhere")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "nowhere" in done.stderr


def test_the_check_up_writes_a_phantom_only_into_a_new_folder(run_main, tmp_path):
    status, _, _ = run_main(dataset, "new", "--phantom", "--cases", 1, 1, 1, "--seed", 3, "--slices", 20)
    assert status == 0 and dataset.is_phantom(tmp_path / "new")
    images, _ = phantom_case(3, 2, slices=20)
    assert np.array_equal(read_png(tmp_path / "new/keras_png_slices_validate/case_002_slice_19.nii.png"), images[19])
    for flags in (["new", "--phantom"], ["newer", "--phantom", "--slices", 1], ["newer", "--phantom", "--slices", 999]):
        status, _, errors = run_main(dataset, *flags)
        assert status == 2 and len(errors.splitlines()) == 1
    assert not (tmp_path / "newer").exists()


def test_a_subset_has_fewer_training_brains_and_all_else(run_main, refused, people_folder, tmp_path):
    """The lowest numbers, with their people; nothing is written over, and more than there are is refused."""
    for file in (people_folder / "keras_png_slices_train").iterdir():
        shutil.copy(file, file.with_name(file.name.replace("case_001", "case_017")))
    new, data = tmp_path / "few", load_slices(people_folder, "train", 64)
    _, out, _ = run_main(dataset, people_folder, "--take", 1, "--into", new)
    few = load_slices(new, "train", 64)
    assert f"check-up of {new}" in out and data.case.unique().tolist() == [1, 17] and few.case.unique().tolist() == [1]
    assert torch.equal(few.images, data.images[:32])
    assert torch.equal(few.people(["age"]), data.people(["age"])[:32]) and (few.people(["age"]) == 74).all()
    for split in ("validate", "test"):
        assert torch.equal(load_slices(new, split, 64).images, load_slices(people_folder, split, 64).images)
    before = sorted(new.rglob("*"))
    refused(dataset, people_folder, "--take", 1, "--into", new, names=["few", "exists"])
    refused(dataset, people_folder, "--take", 3, "--into", "many", names=["--take 3", "2 training brains"])
    refused(dataset, people_folder, "--take", 1, names=["--into"])
    refused(dataset, new / "keras_png_slices_train", "--take", 1, "--into", "many", names=["give the one that has"])
    assert sorted(new.rglob("*")) == before and not (tmp_path / "many").exists()


FAULTS = ["missing folder", "empty folder", "truncated PNG", "16 bits", "colour", "odd number"]
FAULTS += ["wrong size in training", "swapped"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_folder_is_refused_in_one_line(noise_folder, tmp_path, fault):
    finding = plant(noise_folder, fault)
    with pytest.raises(UserError) as refusal:
        for split in ("train", "validate"):
            load_slices(noise_folder, split, 64)
    assert finding in str(refusal.value) and "\n" not in str(refusal.value)
    assert not list(tmp_path.glob("data/cache/.*.making"))


@pytest.mark.parametrize("size", [64, 32])  # reduced masks have other values too
def test_masks_in_place_of_images_are_refused_at_every_size(noise_folder, size):
    plant(noise_folder, "swapped")
    with pytest.raises(UserError, match="keras_png_slices_train hold only 0, 85, 170 and 255"):
        load_slices(noise_folder, "train", size)


def test_without_slices_nothing_is_said_of_masks(tmp_path, capsys):
    with pytest.raises(UserError, match="nowhere is no folder"):
        dataset.has_masks(tmp_path / "nowhere", "validate")
    assert "masks" not in capsys.readouterr().out


def test_the_table_of_people_is_read_with_its_gaps(people_folder):
    """First visits only; what is empty is NaN, and so is a case that the table does not know."""
    people = read_people(people_folder / PEOPLE_TABLE)
    assert people[1] == {"age": 74, "sex": 0, "cdr": 0.5} and set(people) == {1, 2, 3}
    assert people[2]["age"] == 20 and people[2]["sex"] == 1 and np.isnan(people[2]["cdr"])
    data = load_slices(people_folder, "validate", 64)
    known = data.people(("cdr", "age"))
    assert known.shape == (32, 2) and known.dtype == torch.float32
    assert known[:, 0].isnan().all() and (known[:, 1] == 20).all() and data.people(()).shape == (32, 0)
    (people_folder / PEOPLE_TABLE).write_text("ID,M/F,Age,CDR\nOAS1_0009_MR1,F,30,0\n")
    assert data.people(("age",)).isnan().all()


def test_the_table_lies_beside_the_splits_or_one_folder_up(people_folder):
    """But never above the phantom, whose heads are nobody's."""
    table = people_folder / PEOPLE_TABLE
    assert people_table(people_folder) == table
    above = table.rename(people_folder.parent / PEOPLE_TABLE)
    assert people_table(people_folder).read_bytes() == above.read_bytes()
    (people_folder / "PHANTOM.txt").touch()
    assert people_table(people_folder) is None
    above.rename(table)
    assert people_table(people_folder) == table
    table.unlink()
    assert people_table(people_folder) is None


def test_whole_brains_are_those_with_all_slices(noise_folder):
    """In the order of case and z; a brain that lacks one is left out, and refused where all are needed."""
    write_slices(part(noise_folder, "train"), 9, np.random.default_rng(9).integers(0, 256, (32, 64, 64), np.uint8))
    data = load_slices(noise_folder, "train", 64)
    assert torch.equal(data.whole_brains().flatten(0, 1), data.images)
    data.check_whole_cases("--slices 8")
    (noise_folder / "keras_png_slices_train/case_001_slice_31.nii.png").unlink()
    data = load_slices(noise_folder, "train", 64)
    assert data.slices_per_brain == 32 and torch.equal(data.whole_brains()[0], data.images[31:])
    assert data.whole_cases().tolist() == [list(range(31, 63))]
    with pytest.raises(UserError, match="--slices 8 needs.*train"):
        data.check_whole_cases("--slices 8")
