"""Sheets of slices with titles and captions, PNG and GIF files, and what all pictures have in common.

Pages on GitHub show a picture at most PAGE pixels wide, so text of a wider one shrinks: sheets choose their letters for
that, and plots are at most 10.5 inches wide with letters of 9 points or more.
"""

import io
import math
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from heads.layout import content_box, read_slice, slices_of_most_brains, slices_of_splits
from util import UserError, write_file

PAGE = 840  # pixels, the width of a page on GitHub
LETTERS = 11  # pixels, the size of a sheet's letters on such a page
COLOURS = ("#0d0887", "#7401a8", "#bd3786", "#e56b5d", "#fba238")  # of curves; as greys they go from dark to light
MARKERS = "osD^v"  # and the marker of each


def head_box(rows: list[np.ndarray]) -> tuple[slice, slice]:
    """Rows and columns of the layout's content_box around what differs from the background, a picture's corner.

    rows: each uint8 [n, S, S] or [n, S, S, 3].
    """
    seen = sum((row != row[:, :1, :1]).reshape(*row.shape[:3], -1).any((0, 3)) for row in rows) > 0
    top, left, height, width = content_box(seen)
    return slice(top, top + height), slice(left, left + width)


def heads(rows: list[np.ndarray]) -> list[np.ndarray]:
    """The rows, each uint8 [n, S, S] or [n, S, S, 3], cut to their head_box."""
    rows_shown, columns_shown = head_box(rows)
    return [row[:, rows_shown, columns_shown] for row in rows]


def lines_of(text: str, font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    """The text in lines of at most so many pixels, unless a word is longer; its own line breaks stay."""
    lines = []
    for part in text.split("\n"):
        lines.append("")
        for word in part.split(" "):
            longer = f"{lines[-1]} {word}".strip()
            if lines[-1] and font.getlength(longer) > width:
                lines.append(word)
            else:
                lines[-1] = longer
    return lines


def sheet(
    rows: list[np.ndarray],
    *,
    title: str,
    row_names: list[str] | None = None,
    captions: list[str] | None = None,
    zoom: int = 1,
) -> Image.Image:
    """Lays pictures out in rows under a title, with a name per row and a caption per picture if they are given.

    Text is as wide as there is room and goes on in the next line.

    Args:
        rows: each uint8 [columns, H, W] or [columns, H, W, 3]; all pictures have one size, rows may differ in length.
        captions: one per picture, in reading order; drawn under the pictures.
        zoom: every pixel becomes zoom x zoom pixels.
    """
    gap, columns, (height, width) = 4, max(len(row) for row in rows), (n * zoom for n in rows[0].shape[1:3])
    across, name_width = gap + columns * (width + gap), 7 * bool(row_names)  # pixels, and widths of letters
    size = max(15, round(LETTERS * across / (PAGE - LETTERS * name_width)))
    font, line = ImageFont.load_default(size), 4 * size // 3
    names = [lines_of(name, font, name_width * size) for name in row_names or []]
    left = gap + max([int(font.getlength(words)) + 8 for name in names for words in name], default=0)
    page_width = left - gap + across
    heading = lines_of(title, font, page_width - 2 * gap)
    below = [lines_of(words, font, width) for words in captions or []]
    first, height = 6 + len(heading) * line, height + max(map(len, below), default=0) * line
    mode = "RGB" if any(row.ndim == 4 for row in rows) else "L"
    page = Image.new(mode, (page_width, first + len(rows) * (height + gap)), "white")
    draw, below = ImageDraw.Draw(page), iter(below)

    def write(lines: list[str], x: int, y: int) -> None:
        for n, words in enumerate(lines):
            draw.text((x, y + n * line), words, "black", font)

    write(heading, gap, 4)
    for r, row in enumerate(rows):
        top = first + r * (height + gap)
        if names:
            write(names[r], gap, top + (height - len(names[r]) * line) // 2)
        for c, picture in enumerate(row):
            at = (left + c * (width + gap), top)
            picture = Image.fromarray(picture).convert(mode)
            picture = picture.resize((width, picture.height * zoom), Image.Resampling.NEAREST)
            page.paste(picture, at)
            if captions:
                write(next(below), at[0], top + picture.height)
    return page


def brain_sheet(slices: np.ndarray, title: str) -> Image.Image:
    """The slices of one brain, uint8 [N, S, S], in rows of 8 in the order of z; anterior is right."""
    rows = heads([slices[first : first + 8] for first in range(0, len(slices), 8)])
    zoom = max(1, 128 // slices.shape[1])
    return sheet(rows, title=title, captions=[f"z = {z}" for z in range(len(slices))], zoom=zoom)


def contact_sheet(folder: Path) -> Image.Image:
    """A row for each of up to six brains of a data folder, over its splits, with about seven z; anterior is right.

    Raises UserError where there is no slice.
    """
    files_of = slices_of_splits(folder)
    per_brain = max(1, slices_of_most_brains(files_of))
    rows, names, wanted = [], [], range(0, per_brain, math.ceil(per_brain / 7))
    for split, files in files_of.items():
        at = {(case, z): path for case, z, path in files}
        cases = sorted({case for case, _ in at})
        for case in sorted({*cases[:1], *cases[len(cases) // 2 :][:1]}):
            row = [read_slice(at[case, z]) if (case, z) in at else None for z in wanted]
            shape = next((image.shape for image in row if image is not None), None)
            if shape is None:
                continue
            rows.append(np.stack([np.zeros(shape, np.uint8) if image is None else image for image in row]))
            names.append(f"{split} {case}")
    if not rows:
        raise UserError("there is no slice to show")
    captions = [f"z = {z}" for _ in rows for z in wanted]
    return sheet(
        heads(rows),
        title=f"{folder.name}: brains down, slice index z across; anterior is right, grey 0..255",
        row_names=names,
        captions=captions,
    )


def save_picture(path: Path, picture) -> None:
    """Writes a PIL image or a matplotlib figure as PNG, whole or not at all, and closes the figure."""
    buffer = io.BytesIO()
    if isinstance(picture, Image.Image):
        picture.save(buffer, "PNG")
    else:
        import matplotlib.pyplot as plt

        picture.savefig(buffer, format="png", dpi=110)
        plt.close(picture)  # it would be kept for ever
    write_file(path, buffer.getvalue())


def even_positions(change: np.ndarray, count: int) -> np.ndarray:
    """When to look at something that changes unevenly: as much changes from each look to the next.

    Args:
        change: [n], how much changes from moment i to i + 1.
        count: of looks.
    Returns float64 [count] from 0 to n. Where nothing changes nobody looks.
    """
    so_far = np.concatenate([[0.0], np.cumsum(change)])
    return np.interp(np.linspace(0, so_far[-1], count), so_far, np.arange(len(so_far)))


def frames(pictures: np.ndarray, title: str, captions: list[str], width: int = 448) -> list[np.ndarray]:
    """Pictures uint8 [n, H, W] under one title, each above its caption, as frames uint8 [H', W'] for save_gif.

    Pixels are repeated as long as a picture stays within so many pixels of width.

    Frames have 64 grey levels, which halves the GIF.
    """
    zoom = max(1, width // pictures.shape[2])
    coarse = ((pictures >> 2) * np.uint16(255) // 63).astype(np.uint8)
    return [
        np.asarray(sheet([picture[None]], title=title, captions=[caption], zoom=zoom))
        for picture, caption in zip(coarse, captions, strict=True)
    ]


def save_gif(path: Path, frames: list[np.ndarray], seconds: float) -> None:
    """Writes frames, uint8 [H, W] each, as a GIF of so many seconds that loops for ever; the last frame stays 2 s."""
    # one frame is a picture, for which Pillow takes no list
    duration = [1000 * seconds / len(frames)] * (len(frames) - 1) + [2000] if len(frames) > 1 else 2000
    buffer = io.BytesIO()
    imageio.imwrite(buffer, np.stack(frames), extension=".gif", duration=duration, loop=0)
    write_file(path, buffer.getvalue())
