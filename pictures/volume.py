"""A brain as a volume: NIfTI for viewers of medical images, and pictures that cross the slices.

write_brain writes all files of one new brain: sheet, scroll through z, reslices, volume and slices. Where its tissue is
known, the volume is steady: equally bright along z. Samples keeps a folder of new brains, which is a data folder too:
training reads its slices, masks and table of people. write_index writes a page that shows the brains.

Space: mm, RAS+ (x to the right, y to the front, z up). Slices of S x S pixels cover 256 mm, so a voxel is 256 / S mm
wide; it is 1 mm high, as neighbouring slices lie 1 mm apart. The origin is the middle of the volume. So at 256 px and
with 32 slices x = row - 127.5, y = column - 127.5 and z = slice index - 15.5. OASIS-1's own volumes (T88_111) have
their origin in the middle too, and the release has the middle slices of these: a new brain overlays them.

The top of a slice is the person's LEFT, the right of it the front. Of subject OAS1_0001 the release's slices are slices
of the official volume with voxels A[x, y, z] turned so that a picture's row is 40 + 175 - x and its column 24 + y, and
there x runs to the left and y to the front; the marker capsule at the left forehead (Marcus et al. 2007) agrees. So
row 40 holds the voxels farthest to the left.
"""

import gzip
import itertools
import json
import shutil
import time
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import nibabel
import numpy as np

import util
from heads.layout import MASK_VALUES, RELEASE, files_of_case, write_slices
from heads.people import CONDITIONS, PEOPLE_TABLE, write_people
from pictures import sheets
from pictures.page import page
from util import UserError

FIELD = 256  # mm, the side of a slice
RECORD = "samples.json"  # in every folder of samples: what they come from
DESCRIPTION = b"synthetic: drawn by a generative model, in whole or in part"  # at most 79 bytes
PICTURES, VOLUMES = (".png", "_scroll.gif", "_reslices.png"), {"case": ".nii.gz", "seg": "_seg.nii.gz"}
BYTES_PER_SLICE, BYTES_PER_PIXEL = 20_000, 2  # of all files of a brain, and its part of the page
GREY_LEAST = 100  # pixels of grey matter whose median tells how bright a slice is
PAGE_HEADS = 40  # on one page at most, about a megabyte each
SAGITTAL, CORONAL, AXIAL = (0, 25), (20, -30), 0  # where reslices cuts, mm


def affine_of(slices: np.ndarray) -> np.ndarray:
    """float64 [4, 4]: voxel (row, column, z) of slices uint8 [N, S, S] to RAS+ mm, the voxel's centre."""
    size = slices.shape[1]
    pixel = FIELD / size
    affine = np.diag([pixel, pixel, 1.0, 1.0])
    affine[:3, 3] = -pixel * (size - 1) / 2, -pixel * (size - 1) / 2, -(len(slices) - 1) / 2
    return affine


def steady(slices: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Slices uint8 [N, S, S], darkened so that grey matter is as bright in all as in the darkest of them.

    Each slice is scaled to its own maximum, as in the release, so brightness flickers along z. Grey matter has one
    brightness in a head. Slices with little of it, by masks uint8 [N, S, S], are darkened as their neighbours are.
    """
    known = {}
    for z, grey in enumerate(masks == MASK_VALUES[2]):
        if grey.sum() >= GREY_LEAST and (median := np.median(slices[z][grey])) > 0:  # nothing is made black
            known[z] = median
    if not known:
        return slices
    medians = np.interp(np.arange(len(slices)), [*known], [*known.values()])
    return (slices * (medians.min() / medians)[:, None, None]).round().astype(np.uint8)


def to_nifti(slices: np.ndarray) -> nibabel.Nifti1Image:
    """NIfTI-1 of slices uint8 [N, S, S]: voxels uint8 [S, S, N] along right, anterior, superior.

    Voxel (i, j, k) is row i, column j of slice k. The header has mm, both transforms, grey 0..255 and "synthetic".
    """
    if slices.dtype != np.uint8 or slices.ndim != 3 or slices.shape[1] != slices.shape[2]:
        raise ValueError(f"slices must be uint8 [N, S, S], not {slices.dtype} {list(slices.shape)}")
    affine = affine_of(slices)
    image = nibabel.Nifti1Image(slices.transpose(1, 2, 0), affine)
    image.set_sform(affine, code="aligned")  # to an atlas, in the release; viewers ignore transforms of code 0
    image.set_qform(affine, code="aligned")
    image.header.set_xyzt_units("mm")
    image.header["descrip"], image.header["cal_min"], image.header["cal_max"] = DESCRIPTION, 0, 255
    return image


def to_series(heads: list[np.ndarray], box: tuple[slice, slice]) -> nibabel.Nifti1Image:
    """NIfTI-1 of heads uint8 [N, S, S], one behind the other, cut to rows and columns: voxels uint8 [h, w, N, heads].

    Every voxel stays at the place in mm that to_nifti gives it.
    """
    voxels = np.stack([head[(slice(None), *box)].transpose(1, 2, 0) for head in heads], axis=-1)
    one = to_nifti(heads[0]).slicer[box]
    return nibabel.Nifti1Image(voxels, one.affine, one.header)


def cut(slices: np.ndarray, axis: str, mm: float) -> np.ndarray:
    """The plane of slices uint8 [N, S, S] in which a coordinate is `mm`, as a picture in rows and columns.

    axis: "x" gives a sagittal picture [z, y], "y" a coronal one [z, x], "z" the slice itself, [x, y].
    Raises ValueError outside the volume.
    """
    a = "xyz".index(axis)
    affine = affine_of(slices)
    n = int(np.floor((mm - affine[a, 3]) / affine[a, a] + 0.5))
    along = (1, 2, 0)[a]
    if not 0 <= n < slices.shape[along]:
        raise ValueError(f"{axis} = {mm} mm is outside the volume")
    return slices.take(n, axis=along)


def reslices(slices: np.ndarray, title: str):
    """A matplotlib figure of slices uint8 [N, S, S]: one axial, two sagittal and two coronal cuts, all at one scale.

    Dashed lines show where the other cuts lie: blue for sagittal, orange for coronal, green for axial cuts.
    """
    from matplotlib.figure import Figure
    from matplotlib.patheffects import withStroke

    pixel = FIELD / slices.shape[1]
    x_range, y_range = (
        (part.start * pixel - FIELD / 2, part.stop * pixel - FIELD / 2) for part in sheets.head_box([slices])
    )
    shown = {"x": x_range, "y": y_range, "z": (-len(slices) / 2, len(slices) / 2)}
    whole = {**dict.fromkeys("xy", (-FIELD / 2, FIELD / 2)), "z": shown["z"]}
    long, wide, high = (shown[axis][1] - shown[axis][0] for axis in "yxz")
    names = {"x": "x, mm (left to right)", "y": "y, mm (posterior to anterior)", "z": "z, mm"}
    outline = withStroke(linewidth=2, foreground="black")
    colors = {"x": "C0", "y": "C1", "z": "C2"}
    cuts = [("z", AXIAL), *(("x", mm) for mm in SAGITTAL), *(("y", mm) for mm in CORONAL)]

    # inches: the axial slice on the left, the other cuts one below the other on the right
    left_edge, wide_panel, low, gap = 0.7, 4.25, 0.6, 0.72
    right_edge, scale = 2 * left_edge + wide_panel, wide_panel / long
    column = (len(cuts) - 1) * (high * scale + gap) - gap
    tall = max(column, wide * scale)
    size = (right_edge + wide_panel + 0.15, low + tall + 0.95)
    figure = Figure(figsize=size)
    note = "dashed: where the other cuts lie; the top of an axial slice is the person's left"
    figure.suptitle(f"{title}\n{note}", fontsize=11)
    for n, (axis, mm) in enumerate(cuts):
        across, up = {"x": "yz", "y": "xz", "z": "yx"}[axis]
        ends = {"x": "PAIS", "y": "LRIS", "z": "PARL"}[axis]  # left, right, bottom, top of the panel
        turn = -1 if axis == "z" else 1  # row 0 is the top of a slice, and the bottom of the other cuts
        width, height = (scale * (shown[name][1] - shown[name][0]) for name in (across, up))
        if axis == "z":
            left, bottom = left_edge, low + (tall - height) / 2
        else:
            left, bottom = right_edge, low + (tall + column) / 2 + gap - n * (height + gap)
        panel = figure.add_axes((left / size[0], bottom / size[1], width / size[0], height / size[1]))
        origin, extent = "upper" if axis == "z" else "lower", (*whole[across], *whole[up][::turn])
        picture = cut(slices, axis, mm)
        panel.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest", origin=origin, extent=extent)
        panel.set(xlim=shown[across], ylim=shown[up][::turn], ylabel=names[up])
        if n + 1 == len(cuts) or cuts[n + 1][0] != axis:  # cuts along one axis share the name under the last of them
            panel.set_xlabel(names[across])
        kind = {"x": "sagittal", "y": "coronal", "z": "axial"}[axis]
        panel.set_title(f"{kind}, {axis} = {mm} mm", color=colors[axis], fontsize=11, pad=3)
        for end, x, y in zip(ends, (0.02, 0.98, 0.5, 0.5), (0.5, 0.5, 0.02, 0.98), strict=True):
            panel.text(x, y, end, color="yellow", transform=panel.transAxes, fontweight="bold", path_effects=[outline],
                       ha={0.02: "left", 0.98: "right"}.get(x, "center"),
                       va={0.02: "bottom", 0.98: "top"}.get(y, "center"))  # fmt: skip
        for other, at in cuts:
            if (axis == "z") != (other == "z"):
                line = panel.axvline if other == across else panel.axhline
                line(at, color=colors[other], linewidth=1, linestyle="--")
    return figure


def scroll(slices: np.ndarray, name: str) -> list[np.ndarray]:
    """2 N - 1 frames, uint8 [H, W], of slices uint8 [N, S, S]: from the lowest to the highest, and down again.

    Each says its slice index z.
    """
    order = [*range(len(slices)), *range(len(slices) - 2, -1, -1)]
    (shown,) = sheets.heads([slices])
    title, captions = f"{name}\nanterior right, left up", [f"z = {z}" for z in order]
    return sheets.frames(shown[order], title, captions, width=FIELD)


def split_of(i: int) -> str:
    """The split of new brain i: 1, 11, 21 and so on are to validate, all others to train. So two brains are enough."""
    return "validate" if i % 10 == 1 else "train"


def folder_of_slices(out: Path, i: int, kind: str = "case") -> Path:
    """Where the slices of new brain i are in a folder of samples, or with kind "seg" its masks."""
    return out / RELEASE.folders[kind].format(split=split_of(i))


def files_of_brain(out: Path, i: int, count: int, kind: str = "case") -> list[Path]:
    """The files that write_brain writes of a brain of `count` slices, or with kind "seg" those of its masks."""
    endings = (*(PICTURES if kind == "case" else ()), VOLUMES[kind])
    beside = [out / f"brain_{i:03d}{ending}" for ending in endings]
    return beside + files_of_case(folder_of_slices(out, i, kind), i, count, kind)


def write_brain(out: Path, i: int, slices: np.ndarray, title: str, masks: np.ndarray | None = None) -> list[Path]:
    """Writes all files of new brain i into the folder `out`. Equal slices give equal bytes.

    The files of brain 0 are brain_000.png, the sheet; brain_000_scroll.gif, up and down through z;
    brain_000_reslices.png; brain_000.nii.gz; and the slices, case_000_slice_0.nii.png and so on, in the folder of the
    release's layout for split_of(0). With masks also brain_000_seg.nii.gz, and seg_000_slice_0.nii.png and so on; and
    the volume and the two pictures that cross the slices are steady.

    Args:
        slices: uint8 [N, S, S] in the order of z.
        title: of the pictures.
        masks: the same of their tissues, with the values that masks have in heads/layout.py.
    Returns the paths of all but the slices, in this order.
    """
    files = [out / f"brain_{i:03d}{ending}" for ending in PICTURES]
    sheet, gif, across = files
    head = slices if masks is None else steady(slices, masks)
    for kind, pictures, voxels in (("case", slices, head), ("seg", masks, masks)):
        if voxels is not None:
            write_slices(folder_of_slices(out, i, kind), i, pictures, kind)
            files.append(out / f"brain_{i:03d}{VOLUMES[kind]}")
            util.write_file(files[-1], gzip.compress(to_nifti(voxels).to_bytes(), mtime=0))  # no clock in the file
    sheets.save_picture(sheet, sheets.brain_sheet(slices, title))
    sheets.save_gif(gif, scroll(head, f"synthetic brain {i}"), seconds=6)
    sheets.save_picture(across, reslices(head, title))
    return files


def read_record(folder: Path) -> dict[str, dict]:
    """What a folder of samples records: {"made_by": weights and settings, "brains": {number: person}}, all in text.

    Both are empty where nothing is recorded. Raises UserError where the file says something else.
    """
    file = folder / RECORD
    if not file.is_file():
        return {"made_by": {}, "brains": {}}
    try:
        record = json.loads(file.read_text())
        texts = [text for i, person in record["brains"].items() for text in (str(int(i)), *person.values())]
        if not isinstance(record["made_by"], dict) or not all(isinstance(text, str) for text in texts):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{file} is no record of samples; move it elsewhere, or give another folder") from None
    return record


def takes(folder: Path, made_by: dict) -> bool:
    """Whether brains of `made_by` may go into a folder: it is not there, empty, or holds others of the same."""
    if not (folder / RECORD).is_file():
        return not folder.exists() or folder.is_dir() and not util.holds_anything(folder)
    return read_record(folder)["made_by"] == made_by


def samples_folder(name: str, made_by: dict) -> Path:
    """Where new brains of a run go by default: the first of NAME_vis/samples, samples_1, ... that takes them."""
    usual = Path(f"{Path(name).stem}_vis") / "samples"
    numbered = (usual.with_name(f"samples_{n}") for n in itertools.count(1))
    return next(folder for folder in itertools.chain([usual], numbered) if takes(folder, made_by))


class Samples:
    """A folder of new brains that all come from the same weights and settings; its samples.json records them.

    Nothing else is written into, over or away: so no file of anybody is lost, and no score is of a mixture. It is a
    data folder: people of whom anything is known stand in its table of people. A brain is recorded when all its files
    are written, so a killed process goes on with the brain at which it was.

    Args:
        out: the folder; new, empty, or with brains of the same weights and settings.
        made_by: the weights and settings, as JSON values; with a brain's number they decide how it looks.
    Raises UserError where the folder holds anything else, or while another process writes into it.
    """

    def __init__(self, out: Path, made_by: dict):
        self.out, self.file, made_by = out, out / RECORD, json.loads(json.dumps(made_by))
        if not takes(out, made_by):
            what = "brains of other weights or settings" if self.file.is_file() else "files that are no samples of ours"
            raise UserError(f"{out} holds {what}; choose another --out")
        util.own(out, "another --out")
        self.record = {"made_by": made_by, "brains": read_record(out)["brains"]}
        self.record |= {"commit": util.commit_of_code(), "versions": util.versions()}
        self._write()

    def _write(self) -> None:
        util.write_file(self.file, json.dumps(self.record, indent=2).encode())
        people = {int(i): person for i, person in self.record["brains"].items()}
        if any(CONDITIONS.keys() & person.keys() for person in people.values()):
            write_people(self.out / PEOPLE_TABLE, people)

    def has(self, i: int, count: int) -> bool:
        """Whether brain i of `count` slices is recorded, and all of its files are there; of masks all or none."""
        case, seg = ([file.is_file() for file in files_of_brain(self.out, i, count, kind)] for kind in VOLUMES)
        return str(i) in self.record["brains"] and all(case) and all(seg) == any(seg)

    def missing(self, numbers: Iterable[int], count: int, size: int) -> Iterator[int]:
        """The numbers of the brains that are not there yet, to be drawn and added one after the other.

        Says first how much of the disk they need, and before each how long they still take.

        Args:
            numbers: of all brains that shall be there in the end.
            count, size: of slices in a brain, and of pixels a side.
        Raises UserError where the disk has not enough room.
        """
        numbers = list(numbers)
        missing = [i for i in numbers if not self.has(i, count)]
        need = len(missing) * count * (BYTES_PER_SLICE + BYTES_PER_PIXEL * size**2) / 1e6
        free = shutil.disk_usage(self.out).free / 1e6
        words = f"{len(missing)} of {len(numbers)} brains are to be drawn, about {need:,.0f} MB in {self.out}"
        if need > free:
            raise UserError(f"{words}, where {free:,.0f} MB are free; free some space, or choose an --out elsewhere")
        print(f"{words}, where {free:,.0f} MB are free", flush=True)
        began = time.monotonic()
        for done, i in enumerate(missing):
            if done:
                left = (time.monotonic() - began) / done * (len(missing) - done)
                print(f"brains to go: {len(missing) - done}, about {util.duration(left)}", flush=True)
            yield i

    def add(self, i: int, slices: np.ndarray, name: str, how: str, known: dict | None = None,
            masks: np.ndarray | None = None) -> None:  # fmt: skip
        """Writes brain i with write_brain, records what is known of the person, and prints the files' names.

        Args:
            slices: uint8 [N, S, S] in the order of z.
            name, how: what the brain is called, and how it was sampled; the pictures' title says both.
            known: the person's age, sex and CDR as text, as far as the model was told them.
            masks: of the slices' tissues, as in write_brain.
        """
        files = [file.name for file in write_brain(self.out, i, slices, f"sampled {name}: {how}", masks)]
        for kind in ("case", *(() if masks is None else ("seg",))):
            files.append(f"{folder_of_slices(self.out, i, kind).name}/{kind}_{i:03d}_slice_*.nii.png")
        self.record["brains"][str(i)] = known or {}
        self._write()
        print(f"{name}, in {self.out}: {', '.join(files)}", flush=True)


# ------------------------------------------------------------------------------------------------- the page of a folder


def read_slices(file: Path) -> np.ndarray:
    """Slices uint8 [N, S, S] of a volume that to_nifti made. Raises UserError where the file is no such volume."""
    try:
        voxels = np.asanyarray(nibabel.load(file.absolute()).dataobj)  # it takes a first "~" for a home
        if voxels.dtype != np.uint8 or voxels.ndim != 3:
            raise ValueError(f"{voxels.dtype} {list(voxels.shape)}, not uint8 of 3 axes")
    except (nibabel.filebasedimages.ImageFileError, ValueError, OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file} is no volume of a brain ({error}); delete it, and sample again") from None
    return voxels.transpose(2, 0, 1)


def links_of(folder: Path) -> dict[str, str]:
    """{words: file} of what a folder of samples has beside its brains."""
    links = {"weights and settings": RECORD}
    for split in ("validate", "test"):
        if (folder / f"samples_{split}.md").is_file():  # of evaluate.py
            links[f"scores beside the real brains of {split}"] = f"samples_{split}.md"
            links[f"the scores of {split} as a plot"] = f"samples_{split}.png"
    return links


def write_index(folder: Path) -> None:
    """Writes index.html of a folder of samples from what is in it, and says so: a page of its first PAGE_HEADS brains.

    Masks lie over them where brain_000_seg.nii.gz and so on are there. Raises UserError where a file is no volume.
    """
    people = read_record(folder)["brains"]
    volumes = {i: folder / f"brain_{i:0>3}.nii.gz" for i in sorted(people, key=lambda i: (len(i), i))}
    shown = [i for i, file in volumes.items() if file.is_file()][:PAGE_HEADS]
    if not shown:
        return
    heads = [read_slices(volumes[i]) for i in shown]
    box = sheets.head_box(heads)
    files = [folder / f"brain_{i:0>3}_seg.nii.gz" for i in shown]
    masks = [read_slices(file) if file.is_file() else np.zeros_like(heads[0]) for file in files]
    html = page(
        title="New brains",
        note="Synthetic: drawn by a generative model, in whole or in part."
        + (f" The first {len(shown)} of {len(people)}." if len(shown) < len(people) else ""),
        kind="brain",
        names=[", ".join([i, *(f"{name} {value}" for name, value in people[i].items())]) for i in shown],
        heads=to_series(heads, box),
        masks=to_series(masks, box) if any(map(np.any, masks)) else None,
        links=links_of(folder),
    )
    util.write_file(folder / "index.html", html)
    print(f"brains in three planes, for a browser: {folder}/index.html")
