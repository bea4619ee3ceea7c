"""Other forms of the data, turned into the release's layout: python dataset.py --import SOURCE FOLDER.

FORMS, at the end, is the table of what is recognised: a name, the pattern of its files, how a brain is read, and where
its split comes from. All forms share these rules.

- A slice is a plane of voxels as they are, neighbouring slices are neighbouring planes. A picture's row counts voxels
  from the person's left to the right, its column from the back to the front, z from below.
- It lies in the middle of a black square of 256 pixels, or of the next multiple of 256 that holds it.
- Grey is the voxel times 255 over the maximum of that slice, rounded; what is below 0 is black.
- Masks have the release's values, 85 times 0 none, 1 CSF, 2 grey matter, 3 white matter.
- No person is in two splits.

Nothing is unpacked from an archive but the files that the pattern names, and these are removed as soon as they are
read.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, NamedTuple

import nibabel
import numpy as np
from nibabel.affines import obliquity
from nibabel.imageglobals import LoggingOutputSuppressor
from PIL import Image

import util
from heads.layout import MASK_VALUES, RELEASE, SPLITS, has_splits, read_png, write_slices
from heads.people import PEOPLE_TABLE
from util import UserError

RECORD = "import.json"  # in every imported folder: what each brain was made from
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
SIDE = 256  # pixels of a picture
FEWEST_LEVELS = 50  # a label map has fewer different values, an image more
MOST_TILT = 20  # degrees between a volume's axes and those of the body

# The release's split of OASIS-1, by the number of the person. It lacks 73 to 80 and 92 to 150.
RELEASE_NUMBERS = {
    "train": (range(1, 73), range(81, 92), range(151, 402)),
    "validate": (range(402, 441),),
    "test": (range(441, 458),),
}
OFFICIAL_SHAPE = (176, 208, 176)  # voxels of 1 mm: from the right to the left, to the front, up
OFFICIAL_LOWEST = 72  # the plane of slice 0
OFFICIAL_SUMS = {  # sha256 of two of the official files
    "OAS1_0001_MR1_mpr_n4_anon_111_t88_gfc.img": "621279777f3712f66897889be37dd225c86aaab57887d8ca2c9ffcdafa78972a",
    "OAS1_0001_MR1_mpr_n4_anon_111_t88_masked_gfc_fseg.img": (
        "09c8686ae7b7b3d2db34c69ac9cf5c0ef643ad2ad0ab63285c4ccf845a2a0eda"
    ),
}
FAST_TISSUES = np.array(MASK_VALUES, np.uint8)  # fseg: none, CSF, grey matter, white matter
SEG4_TISSUES = np.array([0, 170, 170, 255, 85], np.uint8)  # seg4: none, cortex, deep grey matter, white matter, CSF


class Place(NamedTuple):
    """A file of the source: `name` is its path in an archive, or from the folder that holds `part` on."""

    part: Path  # a folder, an archive, or the file itself
    name: str

    @property
    def file(self) -> Path:
        return self.part.parent / self.name

    def __str__(self) -> str:
        return str(self.part / self.name if is_archive(self.part) else self.file)


class Brain(NamedTuple):
    """A brain to be imported."""

    case: int
    split: str
    name: str  # what the source calls it
    files: dict[str, dict[str, Place]]  # kind ("case" or "seg") and slot (the slice index, or "hdr", "img") of each


class Cut(NamedTuple):
    """Which slices of a volume are taken: `count` from the height `lowest` in mm on; None: those in its middle."""

    count: int
    lowest: float | None


class Pictures(NamedTuple):
    """The slices of a brain, uint8 [N, S, S]."""

    images: np.ndarray
    masks: np.ndarray | None
    voxel: tuple[float, ...] | None  # mm of pixel and slice; None if the source does not say


class Form(NamedTuple):
    """One form of the data; FORMS is the table of them.

    Groups of the pattern: number, of the brain; person, if one has several brains; split; seg, in masks; slot, which
    of several files of one kind.
    """

    name: str
    pattern: str  # of the names of files
    read: Callable[[dict[str, dict[str, Path]], Cut], Pictures] | None
    splits: str = ""  # "release": by number, as the release; "folder": as the folders say; "drawn": at random
    volumes: bool = False  # whether one chooses the slices
    oasis: bool = True  # whether brains have the numbers of OASIS-1, so that its table tells of them
    aside: tuple[str, str] = ("(?!)", "")  # pattern of files that are left out, and what they are; (?!) fits none
    refused: str = ""  # why it cannot be imported, and what to do


# ----------------------------------------------------------------------------------------------- files and archives


def is_archive(path: Path) -> bool:
    """Whether a path, by its name, is an archive of files."""
    return path.name.lower().endswith(ARCHIVES) and not path.is_dir()


def list_places(source: Path) -> list[Place]:
    """All files of a folder, an archive, or a folder with archives in it; hidden ones aside.

    Raises UserError for an archive that is damaged, or has a member whose name leads out of it.
    """
    if not source.exists():
        raise UserError(f"{source} does not exist; give the folder or archive that holds the data")
    source = source.resolve()
    if is_archive(source):
        return _members(source)
    if source.is_file():
        return [Place(source, source.name)]
    paths = (Path(at, name).relative_to(source.parent) for at, _, names in os.walk(source) for name in names)
    places = [Place(source, path.as_posix()) for path in sorted(paths) if _visible(path.parts[1:])]
    archives = [place.file for place in places if is_archive(place.file)]
    for archive in util.progress(archives, "looking into archives", unit="archives"):
        places += _members(archive)
    return places


def _visible(parts: tuple[str, ...]) -> bool:
    return not any(part.startswith(".") or part == "__MACOSX" for part in parts)


@contextlib.contextmanager
def _one_line(path: Path | Place, advice: str) -> Iterator[None]:
    """Whatever the reader of a file may raise becomes a UserError: it is one file that cannot be read."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        words = " ".join(str(error).split())[:100] or type(error).__name__
        raise UserError(f"{path} cannot be read ({words}); {advice}") from None


def _members(archive: Path) -> list[Place]:
    """The regular files of an archive, in its order."""
    with _one_line(archive, "it is damaged or cut off, so copy or download it again"):
        if archive.name.lower().endswith(".zip"):
            with zipfile.ZipFile(archive) as opened:
                members = [(member.filename, not member.is_dir()) for member in opened.infolist()]
        else:
            with tarfile.open(archive) as opened:
                members = [(member.name, member.isreg()) for member in opened]
    for name, _ in members:
        path = PureWindowsPath(name)  # which knows both separators, and drives
        if path.drive or path.root or ".." in path.parts:
            raise UserError(f"{archive} has a member {name}, which leads out of it; take another archive")
    files = [PurePosixPath(name) for name, regular in members if regular]  # no links, no devices
    return [Place(archive, str(path)) for path in files if _visible(path.parts)]


def _open_members(archive: Path, wanted: set[str]) -> Iterator[tuple[str, IO[bytes]]]:
    """Reads an archive once, from its beginning to its end, and opens the wanted members in that order."""
    if archive.name.lower().endswith(".zip"):
        with zipfile.ZipFile(archive) as opened:
            for member in opened.infolist():
                if (name := str(PurePosixPath(member.filename))) in wanted:
                    with opened.open(member) as file:
                        yield name, file
    else:
        with tarfile.open(archive, "r|*") as opened:
            for member in opened:
                if (name := str(PurePosixPath(member.name))) in wanted and (file := opened.extractfile(member)):
                    yield name, file


def at_hand(brains: list[Brain], unpacked: Path) -> Iterator[tuple[Brain, dict[str, dict[str, Path]]]]:
    """Each brain with the paths of its files, as soon as all are on disk; those in `unpacked` are removed afterwards.

    Brains of folders come first, then those of archives in the order of their files.
    """

    def path_of(place: Place) -> Path:
        return Path(unpacked, *place.part.parts[1:], place.name) if is_archive(place.part) else place.file

    def files_of(brain: Brain) -> dict[str, dict[str, Path]]:
        return {kind: {slot: path_of(place) for slot, place in slots.items()} for kind, slots in brain.files.items()}

    packed = {brain.case: {place for slots in brain.files.values() for place in slots.values()
                           if is_archive(place.part)} for brain in brains}  # fmt: skip
    brain_of = {place: brain for brain in brains for place in packed[brain.case]}
    missing = {case: set(places) for case, places in packed.items()}
    yield from ((brain, files_of(brain)) for brain in brains if not missing[brain.case])
    for archive in sorted({place.part for place in brain_of}):
        wanted = {place.name for place in brain_of if place.part == archive}
        members = _open_members(archive, wanted)
        while True:
            with _one_line(archive, "it is damaged or cut off, so copy or download it again"):
                name, file = next(members, (None, None))
                if name is None:
                    break
                place = Place(archive, name)
                path_of(place).parent.mkdir(parents=True, exist_ok=True)
                with open(path_of(place), "wb") as copy:
                    shutil.copyfileobj(file, copy)
            brain = brain_of[place]
            missing[brain.case].discard(place)
            if not missing[brain.case]:
                yield brain, files_of(brain)
                for place in packed[brain.case]:
                    path_of(place).unlink()


# -------------------------------------------------------------------------------------------------- reading volumes


def _load(path: Path) -> nibabel.spatialimages.SpatialImage:
    """The header of a volume. Raises UserError if it is no volume of three axes and plain numbers."""
    with _one_line(path, "copy it again"), LoggingOutputSuppressor():
        image = nibabel.load(path.absolute())  # it takes a first "~" for a home
    if any(n != 1 for n in image.shape[3:]):
        size = "x".join(map(str, image.shape))
        raise UserError(f"{path} has {len(image.shape)} axes, {size}; a brain has 3: give one volume of it")
    if image.get_data_dtype().kind not in "iuf":
        raise UserError(f"{path} holds {image.get_data_dtype()}, no plain numbers; convert it to 16-bit grey")
    return image


def _numbers(path: Path, image: nibabel.spatialimages.SpatialImage, scaled: bool = True) -> np.ndarray:
    """The voxels, at most three axes. Raises UserError if they cannot be read or some are no number."""
    with _one_line(path, "copy it again"), LoggingOutputSuppressor():
        proxy = image.dataobj
        voxels = np.asanyarray(proxy) if scaled else np.asarray(proxy.get_unscaled())
    voxels = voxels.reshape(voxels.shape[:3])
    if wrong := int((~np.isfinite(voxels)).sum()):
        raise UserError(f"{path} has {wrong} voxels that are no number (NaN or infinite); mend it, or leave it out")
    return voxels


def grey(path: Path | str, slices: np.ndarray) -> np.ndarray:
    """uint8 [N, H, W] of voxels [N, H, W]: 255 is the maximum of each slice. Raises UserError for a label map."""
    if (levels := len(np.unique(slices))) < FEWEST_LEVELS:
        raise UserError(f"{path} holds {levels} different values here: it is a label map or empty, no image; "
                        "move it elsewhere")  # fmt: skip
    slices = np.clip(slices.astype(np.float64), 0, None)
    maximum = slices.max((1, 2), keepdims=True)
    return np.floor(slices * 255 / np.where(maximum > 0, maximum, 1) + 0.5).astype(np.uint8)


def tissue(path: Path | str, slices: np.ndarray, tissues: np.ndarray) -> np.ndarray:
    """uint8 [N, H, W], the release's mask values, of labels [N, H, W]; label n is tissues[n]."""
    labels = slices.astype(np.int64)
    if (labels != slices).any() or labels.min() < 0 or labels.max() >= len(tissues):
        raise UserError(f"{path} is no label map of 0 to {len(tissues) - 1}; copy it again, or move it elsewhere")
    return tissues[labels]


def in_a_square(slices: np.ndarray) -> np.ndarray:
    """Slices [N, H, W] in the middle of black squares, whose side is the smallest multiple of 256 that holds them."""
    height, width = slices.shape[1:]
    side = -(-max(height, width) // SIDE) * SIDE
    top, left = (side - height) // 2, (side - width) // 2
    return np.pad(slices, ((0, 0), (top, side - height - top), (left, side - width - left)))


def read_official(files: dict[str, dict[str, Path]], cut: Cut) -> Pictures:
    """OASIS-1 as it is: with voxels A[i, j, k] as on disk, slice z is k = 72 + z, its row 40 + 175 - i, column 24 + j.

    i runs to the person's left. An Analyze header, as OASIS has it, says nothing of that; one of NIfTI has to agree.
    """
    found = {"case": None, "seg": None}
    for kind, pair in files.items():
        if missing := {"hdr", "img"} - set(pair):
            (path,), ending = pair.values(), missing.pop()
            raise UserError(f"{path} lacks its file .{ending}; copy both")
        _compare_sum(pair["img"])
        path, image = pair["img"], _load(pair["hdr"])
        if image.shape[:3] != OFFICIAL_SHAPE:
            size, wanted = ("x".join(map(str, shape)) for shape in (image.shape, OFFICIAL_SHAPE))
            raise UserError(f"{path} is {size}, but OASIS-1 has {wanted}; copy it again, as OASIS has it")
        if isinstance(image, nibabel.Nifti1Pair) and nibabel.aff2axcodes(image.affine) != ("L", "A", "S"):
            raise UserError(f"{path} was turned since OASIS wrote it; copy it again, as OASIS has it")
        planes = _numbers(path, image, scaled=False)[::-1, :, OFFICIAL_LOWEST : OFFICIAL_LOWEST + cut.count]
        slices = planes.transpose(2, 0, 1)
        found[kind] = in_a_square(grey(path, slices) if kind == "case" else tissue(path, slices, FAST_TISSUES))
    return Pictures(found["case"], found["seg"], (1.0, 1.0))


def _compare_sum(path: Path) -> None:
    """Says whether a file of which the checksum is known is the official one."""
    if wanted := OFFICIAL_SUMS.get(path.name):
        with open(path, "rb") as file:
            digest = hashlib.sha256()
            for block in iter(lambda: file.read(1 << 20), b""):
                digest.update(block)
        found = digest.hexdigest()
        words = "as the official file" if found == wanted else f"but the official file has {wanted[:12]}"
        print(f"{path.name}: sha256 {found[:12]}, {words}", flush=True)


def read_nifti(files: dict[str, dict[str, Path]], cut: Cut) -> Pictures:
    """A volume whose header says where its voxels lie: its axes are turned to right, front and up.

    Voxels stay as they are, at their own spacing, if they are square from above within 1 %; otherwise the longer side
    is resampled to the shorter one. Slices are the volume's own planes.
    """
    found, affines = {"case": None, "seg": None}, []
    for kind, slots in files.items():
        (path,) = slots.values()
        image = _load(path)
        if len(image.shape) < 3:
            raise UserError(f"{path} is one slice; give volumes")
        if (tilt := np.degrees(obliquity(image.affine)).max()) > MOST_TILT:
            raise UserError(f"{path} lies askew by {tilt:.0f} degrees; resample it along the axes of the body first")
        if not image.header["qform_code"] and not image.header["sform_code"]:
            raise UserError(f"{path} does not say in its header how the head lies; give volumes that do")
        with _one_line(path, "copy it again"), LoggingOutputSuppressor():
            image = nibabel.as_closest_canonical(nibabel.squeeze_image(image))
        first = _lowest_plane(path, image, cut)
        planes = _numbers(path, image)[:, :, first : first + cut.count].transpose(2, 0, 1)
        voxel = nibabel.affines.voxel_sizes(image.affine)
        affines.append((image.affine, image.shape))
        if kind == "case":
            slices = square_pixels(planes.astype(np.float32), voxel[:2], Image.Resampling.BILINEAR)
            found[kind] = in_a_square(grey(path, slices))
        else:
            labels = tissue(path, planes, SEG4_TISSUES)
            found[kind] = in_a_square(square_pixels(labels, voxel[:2], Image.Resampling.NEAREST))
    if any(shape != affines[0][1] or not np.allclose(affine, affines[0][0], atol=0.01) for affine, shape in affines):
        raise UserError(f"{path} does not lie where its image lies; copy both again")
    return Pictures(found["case"], found["seg"], (float(voxel[:2].min()), float(voxel[2])))


def _lowest_plane(path: Path, image: nibabel.spatialimages.SpatialImage, cut: Cut) -> int:
    """The plane of slice 0 of a volume whose axes are right, front and up: the one nearest to cut.lowest, in mm."""
    planes, step = image.shape[2], image.affine[2, 2]
    middle = image.affine @ [*((n - 1) / 2 for n in image.shape[:2]), 0, 1]  # of the lowest plane
    if planes < cut.count:
        raise UserError(f"{path} has {planes} planes; choose --slices {planes} or fewer")
    first = (planes - cut.count) // 2 if cut.lowest is None else round((cut.lowest - middle[2]) / step)
    if not 0 <= first <= planes - cut.count:
        highest = middle[2] + (planes - cut.count) * step
        raise UserError(f"{path} has no {cut.count} planes from {cut.lowest:g} mm on; choose --lowest between "
                        f"{np.ceil(middle[2]):g} and {np.floor(highest):g}")  # fmt: skip
    return first


def square_pixels(slices: np.ndarray, mm: np.ndarray, how: Image.Resampling) -> np.ndarray:
    """Slices [N, H, W] of pixels mm[0] x mm[1], resampled to squares of the shorter side. Squares within 1 % stay."""
    if max(mm) <= 1.01 * min(mm):
        return slices
    height, width = (round(n * side / min(mm)) for n, side in zip(slices.shape[1:], mm))
    return np.stack([np.asarray(Image.fromarray(plane).resize((width, height), how)) for plane in slices])


def _in_order(slots: dict[str, Path]) -> list[Path]:
    """The files of slices 0, 1, ... of a brain. Raises UserError if one is missing."""
    path_of = {int(slot or 0): path for slot, path in slots.items()}  # without leading zeros
    if missing := set(range(max(path_of))) - set(path_of):
        lowest = min(path_of)
        raise UserError(f"{path_of[lowest]} and its fellows lack slice {min(missing)}; copy the whole brain, or none")
    return [path_of[z] for z in sorted(path_of)]


def _stack(paths: list[Path], read: Callable[[Path], np.ndarray]) -> np.ndarray:
    """[N, H, W]. Raises UserError if the slices are not of one size."""
    slices = [read(path) for path in paths]
    if len({picture.shape for picture in slices}) > 1:
        raise UserError(f"{paths[0]} and its fellows are not of one size; copy them again")
    return np.stack(slices)


def read_release(files: dict[str, dict[str, Path]], cut: Cut) -> Pictures:
    """The release's slices as they are."""
    found = {kind: _stack(_in_order(slots), read_png) for kind, slots in files.items()}
    return Pictures(found["case"], found.get("seg"), None)


def read_nifti_slices(files: dict[str, dict[str, Path]], cut: Cut) -> Pictures:
    """Slices that are NIfTI files with two axes, rows and columns as they lie on disk."""

    def read(path: Path) -> np.ndarray:
        voxels = _numbers(path, _load(path))
        if voxels.size != np.prod(voxels.shape[:2]):
            raise UserError(f"{path} is a volume, no slice; copy it again")
        return voxels.reshape(voxels.shape[:2])

    paths = _in_order(files["case"])
    return Pictures(in_a_square(grey(paths[0], _stack(paths, read))), None, None)


# ----------------------------------------------------------------------------------------------- the plan of brains


def release_split(number: int) -> str | None:
    """The release's split of a person of OASIS-1, or None if the release lacks that person."""
    return next((split for split, parts in RELEASE_NUMBERS.items() if any(number in part for part in parts)), None)


def draw_splits(people: list[str], seed: int) -> dict[str, str]:
    """{person: split}: about 85 % train, 10 % validate, 5 % test; of two people or more, one at least to validate."""
    n, order = len(people), np.random.default_rng(seed).permutation(len(people))
    validate = max(1, round(n / 10)) if n > 1 else 0
    test = max(1, round(n / 20)) if n > 2 else 0
    names = ["validate"] * validate + ["test"] * test + ["train"] * (n - validate - test)
    return {people[i]: name for i, name in zip(order, names)}


def recognise(source: Path, places: list[Place]) -> Form:
    """The first entry of FORMS that has an image here. Raises UserError if there is none, or it cannot be imported."""

    def fits(form: Form) -> bool:
        matches = (re.search(form.pattern, place.name) for place in places)
        return any(match and not match.groupdict().get("seg") for match in matches)

    form = next(filter(fits, FORMS), None)
    if form is None:
        names = "; ".join(form.name for form in FORMS if form.read)
        raise UserError(f"{source} is in no form that can be imported, which are: {names}; give one of these")
    if form.refused:
        raise UserError(f"{source} is {form.name}: {form.refused}")
    return form


class Found(NamedTuple):
    """The files of one brain, before it has a split."""

    files: dict[str, dict[str, Place]]
    person: str
    splits: set[str]  # in which its files lie


def sort_files(form: Form, places: list[Place]) -> dict[int | str, Found]:
    """The brains by their numbers, or, where numbers are to be given, by their names, in this order.

    Raises UserError if two files are the same slice or volume of one brain.
    """
    brains = {}
    for place in places:
        if match := re.search(form.pattern, place.name):
            groups = match.groupdict()
            key = groups["number"] if form.splits == "drawn" else int("".join(re.findall(r"\d", groups["number"])))
            brain = brains.setdefault(key, Found({}, groups.get("person") or str(key), set()))
            kind, slot = "seg" if groups.get("seg") else "case", groups.get("slot") or ""
            other = brain.files.setdefault(kind, {}).setdefault(slot.lstrip("0"), place)
            if other is not place:
                raise UserError(f"{other} and {place} are the same of brain {key}; move one of them elsewhere")
            brain.splits.add(groups.get("split") or "train")
    return dict(sorted(brains.items()))


def plan_brains(form: Form, places: list[Place], everyone: bool, seed: int) -> tuple[list[Brain], list[str]]:
    """(the brains to import, what was left out, in words). Raises UserError if there are none, or as sort_files."""
    found, said = sort_files(form, places), []
    brains = {key: brain for key, brain in found.items() if "case" in brain.files}
    if bare := len(found) - len(brains):
        said.append(f"left out: people without an image of this kind ({bare})")
    if aside := sum(bool(re.search(form.aside[0], place.name)) for place in places):
        said.append(f"left out: {form.aside[1]} ({aside})")
    if form.splits == "drawn":
        split_of = draw_splits(sorted({brain.person for brain in brains.values()}), seed)
    elif form.splits == "folder":
        split_of = {}
        for brain in brains.values():  # who is in several splits goes to that which is most held out
            splits = brain.splits | {split_of.get(brain.person, SPLITS[0])}
            split_of[brain.person] = max(splits, key=SPLITS.index)
        if moved := sum(brain.splits != {split_of[brain.person]} for brain in brains.values()):
            said.append(f"moved to another split, so that no person is in two: brains ({moved})")
    else:
        split_of = {str(key): release_split(key) or "train" for key in brains}
        if beyond := [key for key in brains if release_split(key) is None]:
            words = "taken into train" if everyone else "left out (--everyone takes them into train)"
            said.append(f"{words}: people whom the release lacks ({len(beyond)})")
            brains = {key: brain for key, brain in brains.items() if everyone or key not in beyond}
    if not brains:
        raise UserError(f"of {form.name} there is no brain to import ({'; '.join(said)}); give other data")
    numbers = range(1, len(brains) + 1) if form.splits == "drawn" else brains
    return [
        Brain(number, split_of[brain.person], next(iter(brain.files["case"].values())).name, brain.files)
        for number, brain in zip(numbers, brains.values())
    ], said


# ------------------------------------------------------------------------------------------------------- the import


def import_brains(source: Path, folder: Path, cut: Cut, everyone: bool = False, seed: int = 0) -> None:
    """Writes all brains of `source` into `folder`, in the release's layout, with the table of people if it has one.

    The folder appears when it is complete. Until then its brains lie beside it under a hidden name; after an error or
    a kill the same call goes on with those that are missing.

    Args:
        source: a folder, an archive, or a folder of archives; FORMS says of what.
        folder: must be new.
        cut: which slices, where the source has volumes with an orientation.
        everyone: of OASIS-1 also the people whom the release lacks, into train.
        seed: of the splits, where they are drawn.
    Raises UserError if the folder exists, if the source is not recognised, or at the first file that is wrong.
    """
    if folder.exists():
        raise UserError(f"{folder} exists already; name a new folder for the import")
    if not has_splits(source) and has_splits(above := source.resolve().parent):
        raise UserError(f"{source} is one split; give the folder above it, {above}")
    places = list_places(source)
    form = recognise(source, places)
    if not form.volumes and cut != Cut(32, None):
        raise UserError(f"{source} is {form.name}, whose slices are given; leave out --slices and --lowest")
    brains, said = plan_brains(form, places, everyone, seed)
    counts = ", ".join(f"{sum(brain.split == split for brain in brains)} {split}" for split in SPLITS)
    print("\n".join([f"{source}: {form.name}; {len(brains)} brains: {counts}", *said]), flush=True)
    tables = [place.file for place in places if not is_archive(place.part)]
    tables += [path.resolve().with_name(PEOPLE_TABLE) for path in (source, folder)]
    table = next((table for table in tables if table.name == PEOPLE_TABLE and table.is_file()), None)
    if form.oasis and not table:
        print(f"no {PEOPLE_TABLE} in {source} or beside it; put it into {folder} afterwards, for age, sex and CDR")

    plan = {"source": str(source.resolve()), "form": form.name, "slices": cut.count, "lowest": cut.lowest, "seed": seed,
            "brains": {str(brain.case): [brain.split, brain.name] for brain in brains}}  # fmt: skip
    with _unfinished(folder, plan) as (making, record):
        unpacked = making / f".unpacked{util.MAKING}"
        shutil.rmtree(unpacked, ignore_errors=True)  # of a process that was killed
        left = [brain for brain in brains if brain.case not in record["done"]]
        if len(left) < len(brains):
            print(f"goes on after {len(brains) - len(left)} brains", flush=True)
        try:
            start = len(record["done"])
            for brain, files in util.progress(at_hand(left, unpacked), "import", len(brains), "brains", start):
                _write_brain(making, record, brain, form.read(files, cut))
        except UserError as error:
            kept = f"; {len(record['done'])} brains are done, and the same command goes on" if record["done"] else ""
            raise UserError(str(error).replace(str(unpacked), "") + kept) from None
        finally:
            shutil.rmtree(unpacked, ignore_errors=True)
        if form.oasis and table:
            shutil.copyfile(table, making / PEOPLE_TABLE)


def _write_brain(making: Path, record: dict, brain: Brain, pictures: Pictures) -> None:
    """Writes one brain and records it. Raises UserError if its pictures are not like those before it."""
    look = {"pixels": pictures.images.shape[1], "mm": pictures.voxel}
    before = record.setdefault("look", look)
    same = look["mm"] == before["mm"] or np.allclose(look["mm"], before["mm"], rtol=0.01)
    if look["pixels"] != before["pixels"] or not same:
        raise UserError(f"{brain.name} gives slices of {_words(look)}, the brains before it of {_words(before)}; "
                        "resample the volumes to one size first")  # fmt: skip
    if pictures.masks is not None and pictures.masks.shape != pictures.images.shape:
        raise UserError(f"{brain.name} and its mask differ in size or number of slices; copy both again")
    _record(making, record)  # before the first slice, so that the folder says whose it is
    for kind, slices in (("case", pictures.images), ("seg", pictures.masks)):
        if slices is not None:
            write_slices(making / RELEASE.folders[kind].format(split=brain.split), brain.case, slices, kind)
    record["done"].append(brain.case)
    _record(making, record)


def _words(look: dict) -> str:
    size = f"{look['pixels']}x{look['pixels']} pixels"
    return size if look["mm"] is None else f"{size} of {look['mm'][0]:.3g} mm, {look['mm'][1]:.3g} mm apart"


def _record(making: Path, record: dict) -> None:
    util.write_file(making / RECORD, json.dumps(record, indent=2).encode())


@contextlib.contextmanager
def _unfinished(folder: Path, plan: dict) -> Iterator[tuple[Path, dict]]:
    """As util.new_folder, but what an earlier import has done by the same plan is kept: (its folder, its record)."""
    making = folder.with_name(f".{folder.name}{util.MAKING}")
    making.mkdir(parents=True, exist_ok=True)
    util.own(making, "another folder")
    record, file = {"plan": plan, "done": []}, making / RECORD
    try:
        if file.is_file():
            record = json.loads(file.read_text())
        old, done = record["plan"], map(str, record["done"])
        same = old | {"brains": plan["brains"]} == plan
        same = same and all(old["brains"][case] == plan["brains"].get(case) for case in done)
        if not same or not file.is_file() and util.holds_anything(making):
            raise UserError(f"{making} holds an unfinished import of other data or flags; finish that one, remove it, "
                            "or name another folder")  # fmt: skip
        record["plan"] = plan  # what is not done may have been left out since, or added
        yield making, record
        _record(making, {"plan": plan, "done": sorted(record["done"]), "look": record["look"]})
    finally:
        util.disown(making)  # which removes it if nothing was done
    (making / util.LOCK).unlink(missing_ok=True)
    making.rename(folder)


# ------------------------------------------------------------------------------------------------ the table of forms

_SPLIT = rf"(?P<split>{'|'.join(SPLITS)})"
_OASIS_SITE = "https://sites.wustl.edu/oasisbrains/"

FORMS = (
    Form(
        "OASIS-1, the official volumes",
        r"OAS1_(?P<number>\d{4})_MR1_mpr_n\d_anon_111_t88_(?:gfc|(?P<seg>masked_gfc_fseg))\.(?P<slot>hdr|img)$",
        read_official,
        "release",
        aside=(r"OAS1_\d{4}_MR2_mpr_n\d_anon_111_t88_gfc\.hdr$", "second visits (MR2)"),
    ),
    Form(
        "the release, keras_png_slices",
        rf"keras_png_slices_(?:seg_)?{_SPLIT}/(?:case|(?P<seg>seg))_(?P<number>\d+)_slice_(?P<slot>\d+)\.nii\.png$",
        read_release,
        "folder",
    ),
    Form(
        "HipMRI, keras_slices of NIfTI",  # case 4 of week 0 becomes case 40
        rf"keras_slices_{_SPLIT}/case_(?P<number>(?P<person>\d+)_week_\d)_slice_(?P<slot>\d+)\.nii(?:\.gz)?$",
        read_nifti_slices,
        "folder",
        oasis=False,
        aside=(r"keras_slices_seg_\w+/seg_.*\.nii(?:\.gz)?$", "masks, whose labels are no tissues of the brain"),
    ),
    *(
        Form(  # in aligned volumes heads lie alike, so these come first
            f"neurite-OASIS 3-D, {prefix}{kind}{' (without skull)' * (kind == 'norm')}",
            rf"OASIS_OAS1_(?P<number>\d{{4}})_MR1/{prefix}(?:{kind}|(?P<seg>seg4))\.nii\.gz$",
            read_nifti,
            "release",
            volumes=True,
        )
        for prefix in ("aligned_", "")
        for kind in ("orig", "norm")
    ),
    Form(
        "neurite-OASIS 2-D",
        r"OASIS_OAS1_\d{4}_MR1/slice_(?:orig|norm)\.nii\.gz$",
        None,
        refused="it has one coronal slice of each person, and no brain of slices; give neurite-OASIS 3-D",
    ),
    Form(
        "a folder of NIfTI volumes",  # files of one sub-NAME, as BIDS writes it, are of one person
        r"^(?P<number>(?:.*?(?P<person>sub-[A-Za-z0-9]+))?.*?)\.nii(?:\.gz)?$",
        read_nifti,
        "drawn",
        volumes=True,
        oasis=False,
    ),
    Form(
        "Kaggle's imagesoasis",
        r"OAS1_\d{4}_MR\d_mpr-\d_\d+\.jpe?g$",
        None,
        refused="raw scans in no common position, stretched to 496x248, with the noise of JPEG; "
        f"give OASIS-1 itself, from {_OASIS_SITE}",
    ),
    Form(
        "ADNI as JPEG, AD_NC",
        r"(?:AD|NC)/\d+_\d+\.jpe?g$",
        None,
        refused="other people, of whom it has 20 slices each with the noise of JPEG; "
        f"give volumes as NIfTI, or OASIS-1, from {_OASIS_SITE}",
    ),
)
