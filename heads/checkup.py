"""The check-up of a data folder: python dataset.py FOLDER. Every file is read, and what is wrong with it is named."""

import hashlib
import itertools
from collections import Counter
from pathlib import Path

import numpy as np

import util
from heads.layout import MASK_VALUES, list_slices, other_names, read_slice, slices_of_most_brains, slices_of_splits
from heads.people import read_people
from util import UserError


def check_folder(folder: Path, table: Path | None) -> tuple[list[str], list[str]]:
    """Reads every file once. Returns (report lines, problems); no problems means the folder can be trained on.

    table: the file that tells of the people, or None.
    """
    report, problems, files_of, seen_pictures = [], [], slices_of_splits(folder), {}
    per_brain = slices_of_most_brains(files_of)
    if per_brain:
        report.append(f"most brains have {per_brain} slices, z = 0..{per_brain - 1}")
    for split, files in files_of.items():
        problems += _some(f"{split}: files whose names are not case_NNN_slice_Z.nii.png", other_names(folder, split))
        if not files:
            (problems if split != "test" else report).append(f"{split}: no images")
            continue
        cases = sorted({case for case, _, _ in files})
        seen = Counter((case, z) for case, z, _ in files)
        missing = [f"case {c} slice {z}" for c in cases for z in range(per_brain) if (c, z) not in seen]
        extra = [f"case {c} slice {z}" for (c, z), n in sorted(seen.items()) if n > 1 or z >= per_brain]
        looks = Looks(files, f"reading {split}", seen_pictures)
        report.append(
            f"{split}: {len(files)} images of {len(cases)} brains, {dict(looks.sizes)}, 8-bit grey, "
            f"{len(files) / len(cases):.1f} slices per brain"
        )
        if looks.read:
            report.append("  " + looks.brightness())
            problems += [f"{split}: {problem}" for problem in looks.problems()]
        problems += _some(f"{split}: missing", missing)
        problems += _some(f"{split}: double or out of 0..{per_brain - 1}", extra)
        problems += _some(f"{split}: unreadable", looks.unreadable)
        problems += _some(f"{split}: identical pictures", looks.copies)
        report_masks, problem_masks = _check_masks(folder, split, files)
        report += report_masks
        problems += problem_masks
    for a, b in itertools.combinations(files_of, 2):
        both = {case for case, _, _ in files_of[a]} & {case for case, _, _ in files_of[b]}
        problems += _some(f"cases in both {a} and {b}", [str(case) for case in sorted(both)])
    if table:
        try:
            report.append(f"people: {table} tells of {len(read_people(table))}")
        except UserError as error:
            problems.append(str(error))
    return report, problems


class Looks:
    """What pictures look like, of files (case, z, path), read one by one, so that memory stays small.

    Attributes: read, how many could be; sizes {"WxH": how many}; grey [256], how many pixels have each grey level;
    maxima [256], how many pictures have each as their brightest; wrong, the names of those with other than mask values;
    unreadable and copies, a line on each. `seen` is kept from split to split: copies across splits are the worst.
    """

    def __init__(self, files: list[tuple[int, int, Path]], title: str, seen: dict[bytes, Path] | None = None):
        self.sizes, self.unreadable, self.copies, self.wrong = Counter(), [], [], []
        self.grey, self.maxima, self.read = np.zeros(256, np.int64), np.zeros(256, np.int64), 0
        for _, _, path in util.progress(files, title, unit="slices"):
            try:
                image = read_slice(path)
            except UserError as error:
                self.unreadable.append(str(error).split(";")[0])
                continue
            self.read += 1
            count = np.bincount(image.ravel(), minlength=256)
            self.sizes[f"{image.shape[1]}x{image.shape[0]}"] += 1
            self.grey += count
            self.maxima[count.nonzero()[0].max(initial=0)] += 1
            if count.sum() > count[list(MASK_VALUES)].sum():
                self.wrong.append(path.name)
            if seen is not None:
                kept = seen.setdefault(hashlib.blake2b(image, digest_size=16).digest(), path)
                if kept is not path:
                    place = kept.name if kept.parent == path.parent else f"{kept.parent.name}/{kept.name}"
                    self.copies.append(f"{path.name} = {place}")

    def brightness(self) -> str:
        """A line of numbers."""
        level = np.arange(256)
        mean = float((self.grey * level).sum() / self.grey.sum())
        sd = float((self.grey * (level - mean) ** 2).sum() / self.grey.sum()) ** 0.5
        return (
            f"brightness: mean {mean:.1f}, sd {sd:.1f}, black {self.grey[0] / self.grey.sum():.0%}, "
            f"maximum 255 in {self.maxima[255] / self.read:.0%} of the slices"
        )

    def problems(self) -> list[str]:
        """What is wrong with images; as many grey levels as 8 bits have, and black exactly black, are right."""
        found, brightest = [], int(self.maxima.nonzero()[0].max())
        if black := int(self.maxima[0]):
            found.append(f"{black} images are entirely black")
        if brightest and not self.wrong:
            found.append("the images hold only 0, 85, 170, 255; these are masks under the images' names")
        elif 0 < brightest < 64:
            found.append(f"no pixel is brighter than {brightest} of 255: were grey levels scaled to 0..{brightest}?")
        if self.grey[1:5].sum() > 0.1 * self.grey.sum():
            found.append(f"{self.grey[1:5].sum() / self.grey.sum():.0%} of the pixels have grey 1 to 4, as after JPEG "
                         "compression: the background should be exactly 0")  # fmt: skip
        width, _, height = next(iter(self.sizes)).partition("x")
        if len(self.sizes) > 1 or width != height:
            found.append(f"images should be squares of one size, not {dict(self.sizes)}")
        return found


def _check_masks(folder: Path, split: str, files: list) -> tuple[list[str], list[str]]:
    try:
        seg_files = list_slices(folder, split, "seg")
    except UserError:
        return [f"  {split}: no masks (brain scores need them, training does not)"], []
    looks = Looks(seg_files, f"reading masks of {split}")
    orphans = [f"case {c} slice {z}" for c, z in sorted({f[:2] for f in files} ^ {f[:2] for f in seg_files})]
    brain = looks.grey[1:].sum() / max(1, looks.grey.sum())
    names = other_names(folder, split, "seg")
    return (
        [f"  masks: {len(seg_files)}, brain is {brain:.0%} of the picture"],
        _some(f"{split}: unreadable masks", looks.unreadable)
        + _some(f"{split}: masks with values other than {', '.join(map(str, MASK_VALUES))}", looks.wrong)
        + _some(f"{split}: image without mask or mask without image", orphans)
        + _some(f"{split}: files whose names are not seg_NNN_slice_Z.nii.png", names)
        + ([f"{split}: all masks are empty"] if looks.read and not brain else []),
    )


def _some(what: str, items: list[str]) -> list[str]:
    """One line for any number of findings."""
    more = f" and {len(items) - 4} more" if len(items) > 4 else ""
    return [f"{what} ({len(items)}): {', '.join(items[:4])}{more}"] if items else []
