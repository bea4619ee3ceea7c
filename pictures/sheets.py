"""Sheets of slices with titles and captions, PNG and GIF files."""

import io
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from util import write_file


def sheet(
    rows: list[np.ndarray],
    *,
    title: str,
    row_names: list[str] | None = None,
    captions: list[str] | None = None,
    zoom: int = 1,
) -> Image.Image:
    """Lays pictures out in rows under a title, with a name per row and a caption per picture if they are given.

    Args:
        rows: each uint8 [columns, H, W] or [columns, H, W, 3]; all pictures have one size, rows may differ in length.
        captions: one per picture, in reading order; drawn under the pictures.
        zoom: every pixel becomes zoom x zoom pixels.
    """
    font, gap = ImageFont.load_default(15), 4
    columns, (height, width) = max(len(row) for row in rows), (n * zoom for n in rows[0].shape[1:3])
    height = height + (18 if captions else 0)
    left = gap + (max(int(font.getlength(name)) for name in row_names) + 8 if row_names else 0)
    size = (max(left + columns * (width + gap), int(font.getlength(title)) + 2 * gap), 26 + len(rows) * (height + gap))
    mode = "RGB" if any(row.ndim == 4 for row in rows) else "L"
    page = Image.new(mode, size, "white")
    draw, words = ImageDraw.Draw(page), iter(captions or [])
    draw.text((gap, 4), title, "black", font)
    for r, row in enumerate(rows):
        top = 26 + r * (height + gap)
        if row_names:
            draw.text((gap, top + height // 2 - 8), row_names[r], "black", font)
        for c, picture in enumerate(row):
            at = (left + c * (width + gap), top)
            picture = Image.fromarray(picture).convert(mode)
            page.paste(picture.resize((width, picture.height * zoom), Image.Resampling.NEAREST), at)
            if captions:
                draw.text((at[0], at[1] + height - 17), next(words), "black", ImageFont.load_default(12))
    return page


def brain_sheet(slices: np.ndarray, title: str) -> Image.Image:
    """The slices of one brain, uint8 [N, S, S], in rows of 8 in the order of z; anterior is right."""
    rows = [slices[first : first + 8] for first in range(0, len(slices), 8)]
    zoom = max(1, 128 // slices.shape[1])
    return sheet(rows, title=title, captions=[f"z = {z}" for z in range(len(slices))], zoom=zoom)


def save_picture(path: Path, picture) -> None:
    """Writes a PIL image or a matplotlib figure as PNG, whole or not at all."""
    buffer = io.BytesIO()
    if isinstance(picture, Image.Image):
        picture.save(buffer, "PNG")
    else:
        picture.savefig(buffer, format="png", dpi=110)
    write_file(path, buffer.getvalue())


def save_gif(path: Path, frames: list[np.ndarray], seconds: float) -> None:
    """Writes frames, uint8 [H, W] each, as a GIF of so many seconds that loops for ever; the last frame stays 2 s."""
    # one frame is a picture, for which Pillow takes no list
    duration = [1000 * seconds / len(frames)] * (len(frames) - 1) + [2000] if len(frames) > 1 else 2000
    buffer = io.BytesIO()
    imageio.imwrite(buffer, np.stack(frames), extension=".gif", duration=duration, loop=0)
    write_file(path, buffer.getvalue())
