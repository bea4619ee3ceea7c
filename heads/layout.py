"""The layout of slices on disk: folders, names, reading and writing, and what every picture has in common.

The release, keras_png_slices_data (OASIS-1 as released for teaching), is the first entry of LAYOUTS:

    keras_png_slices_{train,validate,test}/case_NNN_slice_Z.nii.png        8-bit grey, Z from 0, the lowest slice
    keras_png_slices_seg_{train,validate,test}/seg_NNN_slice_Z.nii.png     0, 85, 170, 255: none, CSF, grey, white

NNN, the case, is the number of a brain. A folder without such subfolders may hold the files themselves and counts as
any split. Slices in another layout need one more entry of LAYOUTS, and its reader, in this file.
"""

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from util import UserError

SPLITS = ("train", "validate", "test")
RELEASE_FOLDER = "keras_png_slices_data"
MOST_SLICES = 256  # of a brain; a larger z in a file's name is a slip
MASK_VALUES = (0, 85, 170, 255)  # no brain, cerebrospinal fluid, grey matter, white matter
# Rows and columns of the 256x256 picture that hold every head of the release, [40:216, 24:232], and a margin of 8
# pixels around them for augmentation.
CONTENT_BOX = (32, 16, 192, 224)  # top, left, height, width


def read_png(path: Path) -> np.ndarray:
    """uint8 [H, W] of an 8-bit grey PNG. Raises UserError naming the file when it is damaged or of another kind."""
    try:
        with Image.open(path) as picture:
            if picture.mode != "L":
                kind = {"I;16": "16-bit grey", "I": "32-bit grey", "RGB": "colour"}.get(picture.mode, picture.mode)
                raise UserError(f"{path} is {kind}, not 8-bit grey; convert it to one 8-bit channel")
            return np.asarray(picture)
    except UserError:
        raise
    except Exception as error:  # whatever a decoder may find in a file: it is one file that cannot be read
        if isinstance(error, OSError) and error.errno is not None:
            error.filename = str(path)
            raise
        words = " ".join(str(error).split())[:100]
        raise UserError(f"{path} cannot be read as PNG ({words}); copy it again, or make it again") from None


class Layout(NamedTuple):
    """One way to store slices. The keys "case" and "seg" stand for images and masks."""

    folders: dict[str, str]  # the folder of a split, with {split} in its name
    names: dict[str, str]  # pattern of a file's name: group 1 is the case, group 2 the slice index z
    read: Callable[[Path], np.ndarray]  # a file's pixels, uint8 [H, W]


RELEASE = Layout(
    folders={"case": "keras_png_slices_{split}", "seg": "keras_png_slices_seg_{split}"},
    names={kind: rf"{kind}_(\d+)_slice_(\d+)\.nii\.png" for kind in ("case", "seg")},
    read=read_png,
)
LAYOUTS = [RELEASE]  # those that list_slices looks for


def release_folder(folder: Path) -> Path:
    """Where the splits lie: `folder`, or a folder keras_png_slices_data inside it, or inside that one."""
    for place in (folder, folder / RELEASE_FOLDER, folder / RELEASE_FOLDER / RELEASE_FOLDER):
        if has_splits(place):
            return place
    return folder


def has_splits(folder: Path) -> bool:
    """Whether the folder is divided into splits; else it holds the slices themselves."""
    names = (name for layout in LAYOUTS for name in layout.folders.values())
    return any((folder / name.format(split=split)).is_dir() for name in names for split in SPLITS)


def list_slices(folder: Path, split: str, kind: str = "case") -> list[tuple[int, int, Path]]:
    """(case, z, file) of a split's images, or with kind "seg" of its masks; sorted by case and z.

    Raises UserError where there is no such folder, or no slice in it.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; give the one that holds keras_png_slices_{split}, e.g. --data FOLDER")
    divided = has_splits(folder)
    parts = [folder / layout.folders[kind].format(split=split) if divided else folder for layout in LAYOUTS]
    for layout, part in zip(LAYOUTS, parts):
        matches = [(re.fullmatch(layout.names[kind], path.name), path) for path in part.glob("*")]
        if slices := sorted((int(match[1]), int(match[2]), path) for match, path in matches if match):
            return slices
    raise UserError(f"{parts[0]} has no {kind}_NNN_slice_Z.nii.png; python dataset.py {folder} tells what is there")


def slices_of_splits(folder: Path) -> dict[str, list[tuple[int, int, Path]]]:
    """{split: its (case, z, file), perhaps none}; a folder of bare slices counts as "train"."""
    files = {}
    for split in SPLITS if has_splits(folder) else SPLITS[:1]:
        try:
            files[split] = list_slices(folder, split)
        except UserError:
            files[split] = []
    return files


def slices_of_most_brains(files_of: dict[str, list[tuple[int, int, Path]]]) -> int:
    """The number of slices, 1 + the largest z, of most brains of all splits; of two equally frequent the larger.

    files_of: as slices_of_splits gives it. Returns 0 where there is no slice.
    """
    last = {(split, case): z for split, files in files_of.items() for case, z, _ in files}  # files are sorted by z
    counts = Counter(min(z + 1, MOST_SLICES) for z in last.values())
    return max(counts, key=lambda n: (counts[n], n), default=0)


def other_names(folder: Path, split: str, kind: str = "case") -> list[str]:
    """The files in the folders of a split that list_slices does not take, hidden ones aside."""
    divided, found = has_splits(folder), []
    for layout in LAYOUTS if divided else ():  # beside bare slices there may be anything
        part = folder / layout.folders[kind].format(split=split)
        names = (path.name for path in sorted(part.glob("[!.]*")))
        found += [name for name in names if not re.fullmatch(layout.names[kind], name)]
    return found


def read_slice(path: Path) -> np.ndarray:
    """uint8 [H, W] of a file that list_slices found. Raises UserError naming the file if it cannot be read."""
    names = ((layout, name) for layout in LAYOUTS for name in layout.names.values())
    return next(layout for layout, name in names if re.fullmatch(name, path.name)).read(path)


def files_of_case(folder: Path, case: int, count: int, kind: str = "case") -> list[Path]:
    """The files that write_slices writes of one brain of `count` slices, in the order of z."""
    return [folder / f"{kind}_{case:03d}_slice_{z}.nii.png" for z in range(count)]


def write_slices(folder: Path, case: int, images: np.ndarray, kind: str = "case") -> None:
    """Writes one brain, uint8 [N, H, W], in the release's layout: {kind}_{case}_slice_{0..N-1}.nii.png."""
    folder.mkdir(parents=True, exist_ok=True)
    for image, file in zip(images, files_of_case(folder, case, len(images), kind), strict=True):
        Image.fromarray(image).save(file, compress_level=1)


def content_box(seen: np.ndarray) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the part of a picture that holds every head.

    Args:
        seen: bool [S, S], True at every pixel that is not black in some slice.
    Returns CONTENT_BOX at the size of the picture, its sides rounded up to multiples of 16, as the models' levels need.
    Returns the whole picture, (0, 0, S, S), if a head lies outside that box, or where it would not fit.
    """
    size = len(seen)
    top, left, height, width = (side * size // 256 for side in CONTENT_BOX)
    height, width = (-(-side // 16) * 16 for side in (height, width))
    top, left = (max(0, min(start, size - side)) for start, side in ((top, height), (left, width)))
    outside = seen.copy()
    outside[top : top + height, left : left + width] = False
    fits = not outside.any() and max(height, width) <= size
    return (top, left, height, width) if fits else (0, 0, size, size)
