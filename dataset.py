"""The OASIS slices: where they are, the decoded cache that training reads, and the check-up of a folder.

    python dataset.py FOLDER              counts, sizes, splits, brightness; one page and a contact sheet
    python dataset.py FOLDER --phantom    writes generated heads into FOLDER, in the same layout
    python dataset.py FOLDER --take 100 --into NEW    writes a folder with fewer training brains
    python dataset.py --import SOURCE FOLDER          writes volumes, or an archive of slices, in that layout

heads/layout.py says how slices lie on disk, heads/imports.py what can be imported, heads/checkup.py what is checked.
The table oasis_cross-sectional.csv, in FOLDER or one folder up, says who case_NNN is: row OAS1_0NNN_MR1. This file
alone knows the pixel range.
"""

import contextlib
import hashlib
import itertools
import math
import os
import shutil
import signal
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import util
from heads import imports, layout
from heads.checkup import check_folder
from heads.layout import MASK_VALUES, MOST_SLICES, SPLITS, has_splits, list_slices, read_slice, write_slices
from heads.people import PEOPLE_TABLE, read_people
from heads.phantom import phantom_case
from pictures import sheets, volume
from util import UserError

CACHE, CACHE_GB = Path("data/cache"), 20  # decoded slices, latents, measures: all can be made again
PHANTOM = Path("data/phantom")
PHANTOM_CASES = {"train": 64, "validate": 8, "test": 8}


# -------------------------------------------------------------------------------------------------------- pixel range


def to_float(pixels: Tensor) -> Tensor:
    """uint8 0..255 to float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """Floating x, clamped to [-1, 1], to uint8 0..255, rounded to the nearest grey level."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def to_slices(x: Tensor) -> Tensor:
    """Floating x [N, 1, S, S] in [-1, 1] to uint8 [N, S, S] by the release's rule: the brightest pixel of each is 255.

    What is nowhere brighter than half grey is made twice as bright, and no more.
    """
    white = (x.float() + 1).amax((1, 2, 3), keepdim=True)
    return to_uint8((x.float() + 1) * (2 / white.clamp(min=1)) - 1)[:, 0]


# ------------------------------------------------------------------------------------------------------------ folders


def locate_data(flag: str | None) -> tuple[Path, str]:
    """(data folder, where its name is from): --data, else $OASIS_DATA, else the usual place, else the phantom."""
    usual = Path("data") / layout.RELEASE_FOLDER
    named = [(flag, "--data"), (os.environ.get("OASIS_DATA") or None, "$OASIS_DATA"),
             (usual if usual.is_dir() else None, "the usual place")]  # fmt: skip
    for folder, source in named:
        if folder is not None:  # an empty --data is a mistake, and not the phantom
            return layout.release_folder(Path(folder)), source
    return PHANTOM, "the built-in phantom"


def find_data(flag: str | None, naming: str = "--data FOLDER") -> Path:
    """The data folder of locate_data. Prints its name, and writes the phantom if it is needed and not there yet.

    `naming` is how the script's command line names the folder.
    Raises UserError where it is not divided into splits: any split of a folder of bare slices would be the same slices.
    """
    folder, source = locate_data(flag)
    print(f"data: {folder} ({source}{', synthetic' if is_synthetic(folder) else ''})")
    if folder == PHANTOM:
        print(f"for real brains put OASIS at data/keras_png_slices_data, or use {naming} or $OASIS_DATA")
        with util.alone(folder.parent):  # two processes that start at once draw it once
            if not folder.exists():
                write_phantom(folder, PHANTOM_CASES)
    elif folder.is_dir() and not has_splits(folder):
        if has_splits(above := folder.resolve().parent):
            raise UserError(f"{folder} is one split ({source}); give the folder above it, {above}")
        raise UserError(f"{folder} has no folder keras_png_slices_train ({source}); give the one that has")
    return folder


def is_phantom(folder: Path) -> bool:
    """Whether write_phantom made the folder."""
    return folder == PHANTOM or (folder / "PHANTOM.txt").is_file()


def is_synthetic(folder: Path) -> bool:
    """Whether a model drew the brains of the folder, in whole or in part: it is a folder of samples."""
    return (folder / volume.RECORD).is_file()


def people_table(folder: Path) -> Path | None:
    """The table of people in a data folder or one folder up, or None.

    For the phantom, for samples, and for what was imported, only the folder itself counts: other people may have the
    same numbers.
    """
    itself = is_phantom(folder) or is_synthetic(folder) or (folder / imports.RECORD).is_file()
    places = [folder] if itself else [folder, folder.resolve().parent]
    return next((place / PEOPLE_TABLE for place in places if (place / PEOPLE_TABLE).is_file()), None)


def has_masks(folder: Path, split: str) -> bool:
    """Whether the split has tissue masks. Prints a line if it has none, since brain scores then are left out.

    Raises UserError where there are no slices.
    """
    list_slices(folder, split)  # without slices nothing is to be said of masks
    try:
        return bool(list_slices(folder, split, "seg"))
    except UserError:
        print(f"{split}: no masks, so no brain SSIM")
        return False


def write_phantom(folder: Path, cases: dict[str, int], seed: int = 0, processes: int = 2, slices: int = 32) -> None:
    """Writes phantom brains of so many slices, with masks, in the release's layout: all of it or nothing.

    Args:
        folder: must be new.
        cases: {split: number of brains}.
    Raises UserError if the folder exists, or another process is drawing it.
    """
    count = sum(cases.values())
    seconds = count * slices / 32 * 0.4 / processes
    with util.new_folder(folder) as making:
        print(f"phantom: drawing {count} heads of {slices} slices, about {seconds:.0f} s", flush=True)
        jobs, first = [], 1
        for split, number in cases.items():
            jobs += [(making, split, seed, case, slices) for case in range(first, first + number)]
            first += number
        with ProcessPoolExecutor(processes, initializer=_stay_with, initargs=(os.getpid(),)) as pool:
            done = pool.map(_write_phantom_case, jobs, chunksize=4)
            list(util.progress(done, "phantom", total=count, unit="heads"))
        text = f"Generated heads, no real brains. Seed {seed}, cases {cases}, {slices} slices each.\n"
        (making / "PHANTOM.txt").write_text(text)


def _stay_with(parent: int) -> None:
    """Begins a worker process: it leaves Ctrl-C to its parent, which cleans up, and ends when that is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _write_phantom_case(job: tuple[Path, str, int, int, int]) -> None:
    folder, split, seed, case, slices = job
    images, masks = phantom_case(seed, case, slices)
    for kind, pictures in (("case", images), ("seg", masks)):
        write_slices(folder / layout.RELEASE.folders[kind].format(split=split), case, pictures, kind)


def write_subset(folder: Path, count: int, out: Path) -> None:
    """Writes a data folder `out`, which must be new, with the `count` training brains of the lowest numbers.

    Their masks, the other splits, the table of people and the record of samples come with them. Files are hard links
    where that is possible.
    Raises UserError if there are no splits or fewer brains, or `out` exists.
    """
    if not has_splits(folder):
        raise UserError(f"{folder} has no folder keras_png_slices_train; give the one that has")
    cases = sorted({case for case, _, _ in list_slices(folder, "train")})
    if count > len(cases):
        raise UserError(f"--take {count}: {folder} has {len(cases)} training brains; take at most so many")
    beside = (people_table(folder), folder / "PHANTOM.txt", folder / volume.RECORD)
    files = [file for file in beside if file and file.is_file()]
    pairs = [(file, Path(file.name)) for file in files]
    for split, kind in itertools.product(SPLITS, ("case", "seg")):
        with contextlib.suppress(UserError):  # not every folder has masks, or a test split
            found = list_slices(folder, split, kind)
            taken = [file for case, _, file in found if split != "train" or case in cases[:count]]
            pairs += [(file, Path(file.parent.name) / file.name) for file in taken]
    with util.new_folder(out) as making:
        for source, target in util.progress(pairs, "subset", unit="file"):
            (making / target).parent.mkdir(exist_ok=True)
            try:
                os.link(source.resolve(), making / target)
            except OSError:
                shutil.copyfile(source, making / target)


# ------------------------------------------------------------------------------------------- the slices that train


@dataclass
class Slices:
    """One split in memory: N slices, sorted by case and z."""

    images: Tensor  # uint8 [N, S, S]
    z: Tensor  # int64 [N], the slice index
    case: Tensor  # int64 [N], the number of the brain
    masks: Tensor | None  # uint8 [N, S, S]
    folder: Path
    split: str
    digest: str  # of the images

    def __len__(self) -> int:
        return len(self.images)

    @property
    def slices_per_brain(self) -> int:
        """1 + the largest z of the split."""
        return int(self.z.max()) + 1

    def batch(
        self, index: Tensor, device: torch.device | str = "cpu", moves: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x float32 [B, 1, S, S] in [-1, 1], z int64 [B] and case int64 [B] of the slices at index [B], on `device`.

        With moves [B, 4], see `move`, every slice is turned, scaled and shifted a little. It is never mirrored, since
        left and right differ in real brains.
        """
        index = index.to(self.images.device)
        x = to_float(self.images[index].to(device))[:, None]
        if moves is not None:
            x = move(x, moves)
        return x, self.z[index.cpu()].to(device), self.case[index.cpu()].to(device)

    def describe(self) -> dict:
        """The split's folder, name, counts, image size and digest, for run.json."""
        return {
            "folder": str(self.folder),
            "split": self.split,
            "slices": len(self),
            "cases": len(self.case.unique()),
            "slices_per_brain": self.slices_per_brain,
            "image_size": self.images.shape[-1],
            "digest": self.digest,
        }

    def people(self, names: tuple[str, ...]) -> Tensor:
        """float32 [N, len(names)]: each slice's person. names are of "age", "sex" and "cdr"; NaN is unknown."""
        table = people_table(self.folder)
        known = read_people(table) if table else {}
        return torch.tensor([[known.get(c, {}).get(name, math.nan) for name in names] for c in self.case.tolist()])

    def whole_cases(self) -> Tensor:
        """int64 [n, slices_per_brain]: the positions of the slices of each brain that has all, in the order of z."""
        cases, counts = self.case.unique(return_counts=True)
        whole = torch.isin(self.case, cases[counts == self.slices_per_brain])
        return whole.nonzero()[:, 0].view(-1, self.slices_per_brain)

    def whole_brains(self) -> Tensor:
        """uint8 [n, slices_per_brain, S, S], on the CPU: the brains that have all their slices, in the order of z."""
        return self.images[self.whole_cases().to(self.images.device)].cpu()

    def check_whole_cases(self, flag: str) -> None:
        """Raises UserError, which names the flag that needs whole brains, if any brain lacks a slice."""
        n = self.slices_per_brain
        if len(self) != n * len(self.case.unique()) or not torch.equal(self.z, torch.arange(len(self)) % n):
            raise UserError(
                f"{flag} needs all {n} slices of every brain in {self.split}; "
                f"python dataset.py {self.folder} lists what is missing; --slices 1 goes without"
            )

    def content_box(self) -> tuple[int, int, int, int]:
        """(top, left, height, width) of the part of the pictures that a model has to code, see layout.content_box."""
        return layout.content_box(self.images.amax(0).cpu().numpy() > 0)


def load_slices(
    folder: Path, split: str, image_size: int, device: torch.device | str = "cpu", masks: bool = False
) -> Slices:
    """One split at image_size x image_size pixels, with its masks if asked for.

    It is decoded once, into data/cache, and mapped into memory from there; a GPU with room for it holds its images.
    Raises UserError if a file is missing, cannot be read, or is no square that can be reduced by an integer factor.
    """
    files = list_slices(folder, split)
    images, digest = _cached(folder, split, "case", files, image_size)
    if not images.any():
        raise UserError(f"all slices of {split} in {folder} are black; python dataset.py {folder} looks at each")
    labels = None
    if masks:
        seg_files = list_slices(folder, split, "seg")
        if [f[:2] for f in seg_files] != [f[:2] for f in files]:
            raise UserError(
                f"masks and images of {split} in {folder} are not of the same slices; "
                f"python dataset.py {folder} lists what is missing"
            )
        labels, _ = _cached(folder, split, "seg", seg_files, image_size)
    device = torch.device(device)
    if device.type == "cuda" and images.nbytes < torch.cuda.mem_get_info(device)[0] / 8:
        images = images.to(device)
    case, z = (torch.tensor([f[i] for f in files]) for i in (0, 1))
    if int(z.max()) >= MOST_SLICES:
        raise UserError(
            f"slices of {split} in {folder} are numbered up to {int(z.max())}, above {MOST_SLICES - 1}; "
            "rename such files, or move them elsewhere"
        )
    print(f"{split}: {len(files)} slices of {len(case.unique())} brains at {image_size} px, digest {digest}")
    return Slices(images, z, case, labels, folder, split, digest)


def _cached(
    folder: Path, split: str, kind: str, files: list[tuple[int, int, Path]], image_size: int
) -> tuple[Tensor, str]:
    """The decoded split, uint8 [N, image_size, image_size], mapped from data/cache, and the digest of its pixels.

    The file's name depends on every slice's name, size and time, so a changed folder is decoded anew. The digest ends
    the file, so a damaged one is too.
    """
    key = hashlib.blake2b(f"{folder.resolve()} {kind}".encode(), digest_size=8)
    for _, _, path in files:
        stat = path.stat()
        key.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}".encode())
    path = CACHE / f"{split}_{kind}_{image_size}px_{key.hexdigest()}.npy"
    shape = len(files), image_size, image_size
    with util.alone(CACHE):
        if path.exists():
            try:
                return _mapped(path, shape)
            except (ValueError, EOFError):
                print(f"{path} is damaged: decoding {split} again")
        _refuse_swapped(files, kind)
        digest, resize = hashlib.blake2b(digest_size=8), _area_resize if kind == "case" else _centre_resize
        # a full disk is an error here, in a memory map it would be a crash
        with util.whole(path) as making, open(making, "wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for _, _, slice_ in util.progress(files, f"decoding {split}", unit="slices"):
                pixels = resize(read_slice(slice_), image_size, slice_).tobytes()
                digest.update(pixels)
                file.write(pixels)
            file.write(digest.hexdigest().encode())
        tidy_cache()
        return _mapped(path, shape)


def _mapped(path: Path, shape: tuple[int, ...]) -> tuple[Tensor, str]:
    pixels = np.load(path, mmap_mode="c")  # copy on write: torch wants a writable buffer, the file stays as it is
    digest = hashlib.blake2b(pixels, digest_size=8).hexdigest()
    with open(path, "rb") as file:
        file.seek(-len(digest), os.SEEK_END)
        if pixels.shape != shape or file.read() != digest.encode():
            raise ValueError("damaged")
    os.utime(path)  # for tidy_cache
    return torch.from_numpy(pixels), digest


def tidy_cache() -> None:
    """Removes from data/cache what was not used for longest, but nothing of today, until it is within CACHE_GB."""
    files = sorted((path for path in CACHE.iterdir() if path.is_file()), key=lambda path: path.stat().st_mtime)
    size = sum(path.stat().st_size for path in files)
    for path in files:
        if size > CACHE_GB * 1e9 and time.time() - path.stat().st_mtime > 24 * 3600:
            size -= path.stat().st_size
            path.unlink()
            print(f"cache: {path} was removed, unused for longest, as {CACHE} is above {CACHE_GB} GB")


def _factor(image: np.ndarray, size: int, path: Path) -> int:
    height, width = image.shape
    if height != width or height % size:
        raise UserError(
            f"{path} is {width}x{height}; a square of {size} or a multiple is expected: mend the file, give other "
            "slices with --data, or train a first stage of another --image-size"
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


def _refuse_swapped(files: list[tuple[int, int, Path]], kind: str) -> None:
    """Raises UserError where masks stand for images, or images for masks; about 16 of the pictures decide."""
    # as they are on disk: reduced masks have other values too
    pictures = [read_slice(path) for _, _, path in files[:: max(1, len(files) // 16)]]
    labelled, folder = all(np.isin(picture, MASK_VALUES).all() for picture in pictures), files[0][2].parent
    if kind == "case" and labelled and any(picture.any() for picture in pictures):
        raise UserError(
            f"the images in {folder} hold only 0, 85, 170 and 255: these are the masks (keras_png_slices_seg_*)"
            " under the images' names; put the images there"
        )
    if kind == "seg" and not labelled:
        raise UserError(
            f"the masks in {folder} hold more than 0, 85, 170 and 255; put masks there, or move the folder elsewhere"
        )


def random_moves(count: int, generator: torch.Generator) -> Tensor:
    """float32 [count, 4], uniform in [-1, 1]: the `moves` of `move`."""
    return (2 * torch.rand(4, count, generator=generator) - 1).T


def move(
    x: Tensor, moves: Tensor, degrees: float = 4, scale: float = 0.04, shift: float = 0.012, mode: str = "bilinear"
) -> Tensor:
    """x [B, C, H, W] turned, scaled and shifted a little.

    Args:
        moves: [B, 4] in [-1, 1], the parts of the four limits to go: turn, shrink, shift up, shift left.
        degrees, scale, shift: these limits; shift is a part of the picture's side.
        mode: of grid_sample. "bilinear" smooths a little, "bicubic" less, but its values may leave [-1, 1].
    """
    turn, shrink, up, left = moves.T.to(x.device)
    angle, shrink = turn * degrees * np.pi / 180, 1 + shrink * scale
    cos, sin = angle.cos() * shrink, angle.sin() * shrink
    matrix = torch.stack([torch.stack([cos, -sin, 2 * shift * left], 1), torch.stack([sin, cos, 2 * shift * up], 1)], 1)
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
    return F.grid_sample(x + 1, grid, mode=mode, align_corners=False) - 1  # outside is black, which is -1


# -------------------------------------------------------------------------------------------------- the command line


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
        help="phantom brains in train, validate and test (default: %(default)s)",
    )
    parser.add_argument("--slices", type=util.positive_int, default=32, help="of a phantom's brain, or to be taken "
                        "from an imported volume (default: %(default)s)")  # fmt: skip
    parser.add_argument("--seed", type=util.seed, default=0, help="of the phantom, or of the splits of imported "
                        "volumes (default: %(default)s)")  # fmt: skip
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("check_vis/contact_sheet.png"),
        help="where the contact sheet goes (default: %(default)s)",
    )
    parser.add_argument("--take", type=util.positive_int, metavar="N", help="write a folder with N training brains of "
                        "FOLDER, those of the lowest numbers, and all of its other splits")  # fmt: skip
    parser.add_argument("--into", type=Path, metavar="NEW", help="that folder, which must be new")
    parser.add_argument("--import", type=Path, metavar="SOURCE", dest="source", help="write into FOLDER, which must be "
                        "new, the brains of a folder or archive: OASIS-1, its release, NIfTI volumes and others; the "
                        "same command goes on after an interruption")  # fmt: skip
    parser.add_argument("--lowest", type=util.number, metavar="MM", help="height of the lowest slice to be taken "
                        "from an imported volume, as its header counts (default: the middle slices)")  # fmt: skip
    parser.add_argument("--everyone", action="store_true", help="of OASIS-1, import also those whom the release "
                        "lacks, into train")  # fmt: skip
    args = parser.parse_args()
    if (args.phantom or args.source) and not 2 <= args.slices <= MOST_SLICES:
        raise UserError(f"--slices {args.slices}: a brain has 2 to {MOST_SLICES} slices")
    if args.source:
        if args.folder is None or args.phantom:
            raise UserError("--import SOURCE needs a new folder to write to, and goes without --phantom")
        cut = imports.Cut(args.slices, args.lowest)
        imports.import_brains(args.source, args.folder, cut, args.everyone, args.seed)
    elif args.everyone or args.lowest is not None:
        raise UserError("--everyone and --lowest belong to --import SOURCE; add it, or leave them out")
    if args.phantom:
        if args.folder is None:
            raise UserError("--phantom needs a folder to write to, which must be new")
        if args.folder.exists():
            raise UserError(f"{args.folder} exists already; name a new folder for the phantom")
        write_phantom(args.folder, dict(zip(SPLITS, args.cases)), args.seed, slices=args.slices)
    folder = layout.release_folder(args.folder) if args.folder else find_data(None, "FOLDER")
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; give the one that holds keras_png_slices_train")
    if args.take or args.into:
        if not (args.take and args.into):
            raise UserError("--take N and --into NEW belong together: how many training brains, and where they go")
        write_subset(folder, args.take, args.into)
        folder = args.into
    print(f"check-up of {folder}{' (the phantom)' if is_phantom(folder) else ''}: reading every file ...", flush=True)
    report, problems = check_folder(folder, people_table(folder))
    if is_synthetic(folder):
        report.insert(0, f"synthetic: drawn by a model, in whole or in part, as {folder / volume.RECORD} says")
    print("\n".join(report))
    try:
        sheets.save_picture(args.out, sheets.contact_sheet(folder))
        print(f"contact sheet: {args.out}")
    except (UserError, ValueError) as error:
        problems.append(f"no contact sheet: {error}")
    print("\n".join(f"PROBLEM  {problem}" for problem in problems) or "all is well")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    util.command(main)
