"""The OASIS slices: their folders, the check-up of a folder, and the decoded cache that training reads.

    python dataset.py FOLDER              counts, sizes, splits, brightness; one page and a contact sheet
    python dataset.py FOLDER --phantom    writes generated heads into FOLDER, in the same layout

Layout (keras_png_slices_data, OASIS-1 as released for teaching):
    keras_png_slices_{train,validate,test}/case_NNN_slice_Z.nii.png        8-bit grey, 256x256, Z = 0..31
    keras_png_slices_seg_{train,validate,test}/seg_NNN_slice_Z.nii.png     0, 85, 170, 255: none, CSF, grey, white
    oasis_cross-sectional.csv, here or one folder up, if at hand           who case_NNN is: row OAS1_0NNN_MR1

This file alone knows the pixel range and where the head lies.
"""

import hashlib
import itertools
import math
import os
import re
import shutil
import signal
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import util
from heads.people import PEOPLE_TABLE, read_people
from heads.phantom import phantom_case
from pictures import sheets
from util import UserError

SPLITS = ("train", "validate", "test")
SLICES_PER_CASE = 32
MASK_VALUES = (0, 85, 170, 255)
PHANTOM = Path("data/phantom")
PHANTOM_CASES = {"train": 64, "validate": 8, "test": 8}
# Rows and columns of the 256x256 picture that hold every head of the release, [40:216, 24:232], and a margin of 8
# pixels around them for augmentation; at 64 and 128 pixels the same box scaled down.
CONTENT_BOX = (32, 16, 192, 224)  # top, left, height, width
NAME = re.compile(r"(case|seg)_(\d+)_slice_(\d+)\.nii\.png")


# -------------------------------------------------------------------------------------------------------- pixel range


def to_float(pixels: Tensor) -> Tensor:
    """uint8 0..255 to float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """Floating x, clamped to [-1, 1], to uint8 0..255, rounded to the nearest grey level."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


# ------------------------------------------------------------------------------------------------------------ folders


def locate_data(flag: str | None) -> tuple[Path, str]:
    """(folder, what named it) of --data, else $OASIS_DATA, else data/keras_png_slices_data, else the phantom."""
    named = [(flag, "--data"), (os.environ.get("OASIS_DATA"), "$OASIS_DATA")]
    for folder, source in named:
        if folder:
            return _inner(Path(folder)), source
    usual = Path("data/keras_png_slices_data")
    return (usual, "the usual place") if usual.is_dir() else (PHANTOM, "the built-in phantom")


def find_data(flag: str | None) -> Path:
    """The data folder of locate_data; says which it is, and draws the phantom if that is asked and not there yet."""
    folder, source = locate_data(flag)
    print(f"data: {folder} ({source})")
    if folder == PHANTOM:
        print("for real brains put OASIS at data/keras_png_slices_data, or use --data FOLDER or $OASIS_DATA")
        if not folder.is_dir():
            write_phantom(folder, PHANTOM_CASES)
    return folder


def is_phantom(folder: Path) -> bool:
    """Whether write_phantom made the folder."""
    return folder == PHANTOM or (folder / "PHANTOM.txt").is_file()


def _inner(folder: Path) -> Path:
    """Accepts the folder that holds keras_png_slices_data as well as that folder itself."""
    inner = folder / "keras_png_slices_data"
    return inner if inner.is_dir() else folder


def list_slices(folder: Path, split: str, kind: str = "case") -> list[tuple[int, int, Path]]:
    """Sorted (case, z, file) of a split's images, or of its masks with kind "seg". Raises UserError if there are none.

    A folder of bare slices, as --sample --out writes, counts as any split.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; give the one that holds keras_png_slices_{split}, e.g. --data FOLDER")
    part = folder / (f"keras_png_slices_{split}" if kind == "case" else f"keras_png_slices_seg_{split}")
    if not part.is_dir() and not any(folder.glob("keras_png_slices_*")):
        part = folder
    matches = [(NAME.fullmatch(path.name), path) for path in part.glob("*.png")]
    slices = sorted((int(m[2]), int(m[3]), path) for m, path in matches if m and m[1] == kind)
    if not slices:
        raise UserError(f"{part} has no {kind}_NNN_slice_Z.nii.png; python dataset.py {folder} tells what is there")
    return slices


def people_table(folder: Path) -> Path | None:
    """The table of people that belongs to a data folder, in it or one folder up; the phantom's must be in it."""
    places = [folder] if is_phantom(folder) else [folder, folder.resolve().parent]
    return next((place / PEOPLE_TABLE for place in places if (place / PEOPLE_TABLE).is_file()), None)


def has_masks(folder: Path, split: str) -> bool:
    """Whether the split has tissue masks; says so if not, since brain scores then are left out."""
    try:
        return bool(list_slices(folder, split, "seg"))
    except UserError:
        print(f"{split}: no masks, so no brain SSIM")
        return False


def read_png(path: Path) -> np.ndarray:
    """uint8 [H, W] of an 8-bit grey PNG. Raises UserError naming the file when it is damaged or of another kind."""
    try:
        with Image.open(path) as picture:
            if picture.mode != "L":
                kind = {"I;16": "16-bit grey", "I": "32-bit grey", "RGB": "colour"}.get(picture.mode, picture.mode)
                raise UserError(f"{path} is {kind}, not 8-bit grey; convert it to one 8-bit channel")
            return np.asarray(picture)
    except (OSError, SyntaxError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(f"{path} cannot be read as PNG ({error}); copy it again from the release") from None


def write_slices(folder: Path, case: int, images: np.ndarray, kind: str = "case") -> None:
    """Writes uint8 [N, H, W] as {kind}_{case}_slice_{0..N-1}.nii.png, the form that this file reads."""
    folder.mkdir(parents=True, exist_ok=True)
    for z, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{kind}_{case:03d}_slice_{z}.nii.png", compress_level=1)


def write_phantom(folder: Path, cases: dict[str, int], seed: int = 0, processes: int = 2) -> None:
    """Writes phantom heads and masks for {split: number of cases} in the release's layout. All of it or nothing."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    count = sum(cases.values())
    print(
        f"phantom: drawing {count} heads of {SLICES_PER_CASE} slices, about {count * 0.4 / processes:.0f} s", flush=True
    )
    jobs, first = [], 1
    for split, number in cases.items():
        jobs += [(temporary, split, seed, case) for case in range(first, first + number)]
        first += number
    try:
        temporary.mkdir(parents=True)
        # on Ctrl-C this process cleans up; the workers need not complain too
        with ProcessPoolExecutor(
            processes, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)
        ) as pool:
            list(pool.map(_write_phantom_case, jobs, chunksize=4))
        (temporary / "PHANTOM.txt").write_text(f"Generated heads, no real brains. Seed {seed}, cases {cases}.\n")
        try:
            temporary.rename(folder)
        except OSError:
            if not (folder / "PHANTOM.txt").is_file():  # else another process finished first, with the same pictures
                raise UserError(f"{folder} exists already; remove it or name a new folder for the phantom") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_phantom_case(job: tuple[Path, str, int, int]) -> None:
    folder, split, seed, case = job
    images, masks = phantom_case(seed, case)
    write_slices(folder / f"keras_png_slices_{split}", case, images)
    write_slices(folder / f"keras_png_slices_seg_{split}", case, masks, "seg")


# ------------------------------------------------------------------------------------------- the slices that train


@dataclass
class Slices:
    """One split in memory. images uint8 [N, S, S]; z and case int64 [N]; masks uint8 [N, S, S] or None."""

    images: Tensor
    z: Tensor
    case: Tensor
    masks: Tensor | None
    folder: Path
    split: str
    digest: str

    def __len__(self) -> int:
        return len(self.images)

    def batch(
        self, index: Tensor, device: torch.device | str = "cpu", augment: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x float32 [B, 1, S, S] in [-1, 1], z int64 [B], case int64 [B] of the given positions, on `device`.

        With a (CPU) generator every slice is turned, scaled and shifted a little; never mirrored, since left and right
        differ in real brains.
        """
        index = index.to(self.images.device)
        x = to_float(self.images[index].to(device, non_blocking=True))[:, None]
        if augment is not None:
            x = move(x, random_moves(len(x), augment))
        return x, self.z[index.cpu()].to(device), self.case[index.cpu()].to(device)

    def describe(self) -> dict:
        """What run.json records of the split."""
        return {
            "folder": str(self.folder),
            "split": self.split,
            "slices": len(self),
            "cases": len(self.case.unique()),
            "image_size": self.images.shape[-1],
            "digest": self.digest,
        }

    def people(self, names: tuple[str, ...]) -> Tensor:
        """float32 [N, len(names)]: of "age", "sex" and "cdr" those named, for each slice's case; NaN if unknown."""
        table = people_table(self.folder)
        known = read_people(table) if table else {}
        return torch.tensor([[known.get(c, {}).get(name, math.nan) for name in names] for c in self.case.tolist()])

    def whole_cases(self) -> Tensor:
        """int64 [n, 32]: where the slices of each case lie that has all of them, in the order of z."""
        cases, counts = self.case.unique(return_counts=True)
        whole = torch.isin(self.case, cases[counts == SLICES_PER_CASE])  # slices are sorted by case and z
        return whole.nonzero()[:, 0].view(-1, SLICES_PER_CASE)

    def whole_brains(self) -> Tensor:
        """uint8 [n, 32, S, S], on the CPU: the cases that have all their slices, in the order of z."""
        return self.images[self.whole_cases().to(self.images.device)].cpu()

    def check_whole_cases(self, flag: str) -> None:
        """Raises UserError naming the flag that needs it unless position i is slice i % 32 of case i // 32."""
        z = torch.arange(len(self)) % SLICES_PER_CASE
        if len(self) != SLICES_PER_CASE * len(self.case.unique()) or not torch.equal(self.z, z):
            raise UserError(
                f"{flag} needs all {SLICES_PER_CASE} slices of every case in {self.split}; "
                f"python dataset.py {self.folder} lists what is missing"
            )

    def content_box(self) -> tuple[int, int, int, int]:
        """(top, left, height, width) that a model has to code: CONTENT_BOX if every head fits in it, else all."""
        size = self.images.shape[-1]
        top, left, height, width = (side * size // 256 for side in CONTENT_BOX)
        reached = self.images.amax(0) > 0
        reached[top : top + height, left : left + width] = False
        return (0, 0, size, size) if reached.any() else (top, left, height, width)


def load_slices(
    folder: Path, split: str, image_size: int, device: torch.device | str = "cpu", masks: bool = False
) -> Slices:
    """A split, decoded once into a memory-mapped cache and, on a GPU with room, moved there whole."""
    files = list_slices(folder, split)
    images = torch.from_numpy(_cached(folder, split, "case", files, image_size))
    digest = hashlib.blake2b(images.numpy(), digest_size=8).hexdigest()
    labels = None
    if masks:
        seg_files = list_slices(folder, split, "seg")
        if [f[:2] for f in seg_files] != [f[:2] for f in files]:
            raise UserError(
                f"masks and images of {split} in {folder} are not of the same slices; "
                f"python dataset.py {folder} lists what is missing"
            )
        labels = torch.from_numpy(_cached(folder, split, "seg", seg_files, image_size))
    device = torch.device(device)
    if device.type == "cuda" and images.nbytes < torch.cuda.mem_get_info(device)[0] / 8:
        images = images.to(device)
    case, z = (torch.tensor([f[i] for f in files]) for i in (0, 1))
    if not 0 <= int(z.min()) <= int(z.max()) < SLICES_PER_CASE:
        raise UserError(f"slices of {split} in {folder} are numbered up to {int(z.max())}; 0..31 is expected")
    print(f"{split}: {len(files)} slices of {len(case.unique())} cases at {image_size} px, digest {digest}")
    return Slices(images, z, case, labels, folder, split, digest)


def _cached(folder: Path, split: str, kind: str, files: list[tuple[int, int, Path]], image_size: int) -> np.ndarray:
    """The decoded split, uint8 [N, image_size, image_size], mapped from data/cache; made there if it is not yet.

    The key holds every file's name, size and time, so a changed folder is decoded anew. Two processes that start at
    once both write, each to a name of its own, and the last rename wins with the same bytes.
    """
    key = hashlib.blake2b(f"{folder.resolve()} {kind}".encode(), digest_size=8)
    for _, _, path in files:
        stat = path.stat()
        key.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}".encode())
    cache = Path("data/cache") / f"{split}_{kind}_{image_size}_{key.hexdigest()}.npy"
    if not cache.exists():
        cache.parent.mkdir(parents=True, exist_ok=True)
        temporary = cache.with_suffix(f".{os.getpid()}.npy")
        try:
            header = {"descr": "|u1", "fortran_order": False, "shape": (len(files), image_size, image_size)}
            resize = _area_resize if kind == "case" else _centre_resize
            with open(
                temporary, "wb"
            ) as file:  # in sequence: a full disk is an error here, and a crash in a memory map
                np.lib.format.write_array_header_1_0(file, header)
                for _, _, path in files:
                    file.write(resize(read_png(path), image_size, path).tobytes())
            _refuse_swapped(np.load(temporary, mmap_mode="r"), kind, folder)
            os.replace(temporary, cache)
        finally:
            temporary.unlink(missing_ok=True)
    return np.load(cache, mmap_mode="c")  # copy on write: torch wants a writable buffer, the file stays as it is


def _factor(image: np.ndarray, size: int, path: Path) -> int:
    height, width = image.shape
    if height != width or height % size:
        raise UserError(
            f"{path} is {width}x{height}; a square of {size} or a multiple is expected: "
            "choose another --image-size or mend the file"
        )
    return height // size


def _area_resize(image: np.ndarray, size: int, path: Path) -> np.ndarray:
    """Mean over k x k pixels, rounded."""
    k = _factor(image, size, path)
    if k == 1:
        return image
    return (image.reshape(size, k, size, k).mean((1, 3)) + 0.5).astype(np.uint8)


def _centre_resize(mask: np.ndarray, size: int, path: Path) -> np.ndarray:
    """Every k-th label, since labels have no mean."""
    k = _factor(mask, size, path)
    return mask[k // 2 :: k, k // 2 :: k]


def _refuse_swapped(pixels: np.ndarray, kind: str, folder: Path) -> None:
    """Training on the masks by mistake is common; a few pictures tell."""
    labelled = np.isin(pixels[:: max(1, len(pixels) // 16)], MASK_VALUES).all()
    if kind == "case" and labelled and pixels.any():
        raise UserError(
            f"the images in {folder} hold only 0, 85, 170 and 255: these are the masks (keras_png_slices_seg_*)"
            " under the images' names; put the images there"
        )
    if kind == "seg" and not labelled:
        raise UserError(f"the masks in {folder} hold more than 0, 85, 170 and 255; are they the images?")


def random_moves(count: int, generator: torch.Generator) -> Tensor:
    """float32 [count, 4], even in [-1, 1]: how far `move` turns, scales and shifts pictures, 0 is not at all."""
    return (2 * torch.rand(4, count, generator=generator) - 1).T


def move(
    x: Tensor, moves: Tensor, degrees: float = 4, scale: float = 0.04, shift: float = 0.012, mode: str = "bilinear"
) -> Tensor:
    """Turns by up to `degrees`, scales by up to 1 +- `scale`, shifts by up to `shift` of the side; x [B, C, H, W].

    moves [B, 4] says how far of that: turn, shrink, shift up and left. `mode` is grid_sample's: bilinear smooths a
    little, bicubic less, and may leave [-1, 1].
    """
    turn, shrink, up, left = moves.T.to(x.device)
    angle, shrink = turn * degrees * np.pi / 180, 1 + shrink * scale
    cos, sin = angle.cos() * shrink, angle.sin() * shrink
    matrix = torch.stack([torch.stack([cos, -sin, 2 * shift * left], 1), torch.stack([sin, cos, 2 * shift * up], 1)], 1)
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
    return F.grid_sample(x + 1, grid, mode=mode, align_corners=False) - 1  # outside is black, which is -1


# ------------------------------------------------------------------------------------------------------- the check-up


def check_folder(folder: Path) -> tuple[list[str], list[str]]:
    """Reads every file once. Returns (report lines, problems); no problems means the folder can be trained on."""
    report, problems, cases_of, seen_pictures = [], [], {}, {}
    for split in _splits(folder):
        try:
            files = list_slices(folder, split)
        except UserError:
            (problems if split != "test" else report).append(f"{split}: no images")
            continue
        cases_of[split] = {case for case, _, _ in files}
        seen = Counter((case, z) for case, z, _ in files)
        missing = [
            f"case {c} slice {z}" for c in sorted(cases_of[split]) for z in range(SLICES_PER_CASE) if (c, z) not in seen
        ]
        extra = [f"case {c} slice {z}" for (c, z), n in sorted(seen.items()) if n > 1 or not 0 <= z < SLICES_PER_CASE]
        readable, unreadable = _read_all(files)
        images = [image for image, _ in readable]
        sizes = Counter(f"{i.shape[1]}x{i.shape[0]}" for i in images)
        lit = [i for i in images if i.any()]
        copies = _identical(readable, seen_pictures)
        report.append(
            f"{split}: {len(files)} images of {len(cases_of[split])} cases, {dict(sizes)}, 8-bit grey, "
            f"{len(files) / len(cases_of[split]):.1f} slices per case"
        )
        if images:
            count, grey = sum(np.bincount(i.ravel(), minlength=256) for i in images), np.arange(256)
            mean = float((count * grey).sum() / count.sum())
            sd = float((count * (grey - mean) ** 2).sum() / count.sum()) ** 0.5
            report.append(
                f"  brightness: mean {mean:.1f}, sd {sd:.1f}, black {count[0] / count.sum():.0%}, "
                f"maximum 255 in {np.mean([i.max() == 255 for i in images]):.0%} of the slices"
            )
            if lit and all(np.isin(i, MASK_VALUES).all() for i in lit[:: max(1, len(lit) // 32)]):
                problems.append(
                    f"{split}: the images hold only 0, 85, 170, 255; these are masks under the images' names"
                )
            if len(lit) < len(images):
                problems.append(f"{split}: {len(images) - len(lit)} images are entirely black")
            if len(sizes) > 1 or images[0].shape[0] != images[0].shape[1]:
                problems.append(f"{split}: images should be squares of one size, not {dict(sizes)}")
        problems += _some(f"{split}: missing", missing) + _some(f"{split}: double or out of 0..31", extra)
        problems += _some(f"{split}: unreadable", unreadable) + _some(f"{split}: identical pictures", copies)
        report_masks, problem_masks = _check_masks(folder, split, files)
        report += report_masks
        problems += problem_masks
    for (a, in_a), (b, in_b) in itertools.combinations(cases_of.items(), 2):
        problems += _some(f"cases in both {a} and {b}", [str(c) for c in sorted(in_a & in_b)])
    return report, problems


def _splits(folder: Path) -> tuple[str, ...]:
    """The splits to look for; a folder of bare slices, such as samples, counts as one."""
    return SPLITS if any(folder.glob("keras_png_slices_*")) else ("train",)


def _check_masks(folder: Path, split: str, files: list) -> tuple[list[str], list[str]]:
    try:
        seg_files = list_slices(folder, split, "seg")
    except UserError:
        return [f"  {split}: no masks (brain scores need them, training does not)"], []
    readable, unreadable = _read_all(seg_files)
    masks = [mask for mask, _ in readable]
    wrong = [path.name for mask, path in readable if not np.isin(mask, MASK_VALUES).all()]
    orphans = [f"case {c} slice {z}" for c, z in sorted({f[:2] for f in files} ^ {f[:2] for f in seg_files})]
    brain = np.mean([np.mean(m > 0) for m in masks]) if masks else 0
    return (
        [f"  masks: {len(seg_files)}, brain is {brain:.0%} of the picture"],
        _some(f"{split}: unreadable masks", unreadable)
        + _some(f"{split}: masks with other values", wrong)
        + _some(f"{split}: image without mask or mask without image", orphans),
    )


def _read_all(files: list[tuple[int, int, Path]]) -> tuple[list[tuple[np.ndarray, Path]], list[str]]:
    """(picture, file) of those that can be read, and what is wrong with the others."""
    readable, unreadable = [], []
    for _, _, path in files:
        try:
            readable.append((read_png(path), path))
        except UserError as error:
            unreadable.append(str(error).split(";")[0])
    return readable, unreadable


def _identical(readable: list[tuple[np.ndarray, Path]], seen: dict[bytes, Path]) -> list[str]:
    """Pairs of equal pictures; `seen` goes from split to split, since a copy across splits is the worst kind."""
    return [
        f"{path.name} = {kept.name if kept.parent == path.parent else f'{kept.parent.name}/{kept.name}'}"
        for image, path in readable
        if (kept := seen.setdefault(hashlib.blake2b(image, digest_size=16).digest(), path)) is not path
    ]


def _some(what: str, items: list[str]) -> list[str]:
    """One line for any number of findings."""
    more = f" and {len(items) - 4} more" if len(items) > 4 else ""
    return [f"{what} ({len(items)}): {', '.join(items[:4])}{more}"] if items else []


def contact_sheet(folder: Path) -> Image.Image:
    """A row for each of up to six cases, spread over the splits, at z = 0, 5, .. 30; anterior is to the right."""
    rows, names, wanted = [], [], range(0, SLICES_PER_CASE, 5)
    for split in _splits(folder):
        try:
            at = {(case, z): path for case, z, path in list_slices(folder, split)}
        except UserError:
            continue
        cases = sorted({case for case, _ in at})
        for case in [cases[0], cases[len(cases) // 2]][: len(cases)]:
            row = [read_png(at[case, z]) if (case, z) in at else None for z in wanted]
            shape = next((image.shape for image in row if image is not None), None)
            if shape is None:
                continue
            rows.append(np.stack([np.zeros(shape, np.uint8) if image is None else image for image in row]))
            names.append(f"{split} {case}")
    if not rows:
        raise UserError("there is no slice to show")
    captions = [f"z = {z}" for _ in rows for z in wanted]
    return sheets.sheet(
        rows,
        title=f"{folder.name}: cases down, slice index z across; anterior is right, grey 0..255",
        row_names=names,
        captions=captions,
    )


def main() -> None:
    parser = util.plain_parser(__doc__)
    parser.add_argument("folder", type=Path, nargs="?", help="holds keras_png_slices_train and its fellows; "
                        "default: the data that training would take")  # fmt: skip
    parser.add_argument("--phantom", action="store_true", help="write generated heads into FOLDER, which must be new")
    parser.add_argument(
        "--cases",
        type=util.positive_int,
        nargs=3,
        metavar="N",
        default=list(PHANTOM_CASES.values()),
        help="phantom cases in train, validate and test (default: %(default)s)",
    )
    parser.add_argument("--seed", type=util.seed, default=0, help="of the phantom (default: %(default)s)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("check_vis/contact_sheet.png"),
        help="where the contact sheet goes (default: %(default)s)",
    )
    args = parser.parse_args()
    if args.phantom:
        if args.folder is None:
            raise UserError("--phantom needs a folder to write to, which must be new")
        if args.folder.exists():
            raise UserError(f"{args.folder} exists already; name a new folder for the phantom")
        write_phantom(args.folder, dict(zip(SPLITS, args.cases)), args.seed)
    folder = _inner(args.folder) if args.folder else find_data(None)
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; give the one that holds keras_png_slices_train")
    print(f"check-up of {folder}{' (the phantom)' if is_phantom(folder) else ''}: reading every file ...", flush=True)
    report, problems = check_folder(folder)
    print("\n".join(report))
    try:
        sheets.save_picture(args.out, contact_sheet(folder))
        print(f"contact sheet: {args.out}")
    except (UserError, ValueError) as error:
        problems.append(f"no contact sheet: {error}")
    print("\n".join(f"PROBLEM  {problem}" for problem in problems) or "all is well")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    util.command(main)
