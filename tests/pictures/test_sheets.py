"""Laws of sheets.py: every pixel is where it should be, and every letter is large enough on a page."""

from itertools import combinations

import matplotlib.colors
import numpy as np
import pytest
from PIL import Image, ImageFont

from heads.phantom import phantom_case
from pictures import sheets


def test_sheet_shows_every_pixel_as_it_is():
    rows = [np.random.default_rng(r).integers(0, 256, (3, 8, 8), dtype=np.uint8) for r in range(2)]
    page = np.asarray(sheets.sheet(rows, title="noise", captions=list("abcdef"), row_names=["up", "low"], zoom=2))
    for picture in np.concatenate(rows):
        wanted = picture.repeat(2, 0).repeat(2, 1)
        windows = np.lib.stride_tricks.sliding_window_view(page if page.ndim == 2 else page[..., 0], wanted.shape)
        assert (windows == wanted).all((2, 3)).sum() == 1


@pytest.mark.parametrize("columns, side", [(1, 64), (6, 128), (8, 256), (24, 256)])
def test_letters_are_large_enough_on_a_page_and_words_are_never_cut(columns, side, monkeypatch):
    """At least 9 pixels where the sheet is shrunk to PAGE; long texts go on in the next line, within their place."""
    sizes, load = [], ImageFont.load_default
    monkeypatch.setattr(ImageFont, "load_default", lambda size: sizes.append(size) or load(size))
    row, words = np.zeros((columns, side, side), np.uint8), "a caption of many words " * 3
    names, captions = ["a long name"] * 2, [words] * 2 * columns
    page = sheets.sheet([row, row], title="a title " * 40, row_names=names, captions=captions)
    assert min(sizes) >= 15 and min(sizes) * min(1, sheets.PAGE / page.width) >= 9
    lines = sheets.lines_of(words, load(min(sizes)), side)
    assert " ".join(lines).split() == words.split()
    assert all(load(min(sizes)).getlength(line) <= side or " " not in line for line in lines)
    margins = np.asarray(page)[:, [0, 1, -2, -1]]
    assert (margins == 255).all()


def test_colours_are_told_apart_in_a_grey_print():
    """Their lightness L* (CIE 1976) differs by 10 or more, and from that of white paper by 20."""

    def lightness(colour: str) -> float:
        value = np.array(matplotlib.colors.to_rgb(colour))
        linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
        return 116 * np.cbrt(linear @ (0.2126, 0.7152, 0.0722)) - 16

    found = [lightness(colour) for colour in sheets.COLOURS]
    assert all(abs(a - b) >= 10 for a, b in combinations(found, 2)) and max(found) <= 80
    assert len(sheets.COLOURS) == len(set(sheets.MARKERS))


def test_heads_are_cut_to_their_box_and_nothing_else_is():
    """Also where the background is grey, as in differences, and in colour; a mark outside the box keeps all."""
    head = phantom_case(0, 1)[0][::4]
    assert sheets.head_box([head]) == (slice(32, 224), slice(16, 240))
    assert sheets.head_box([head[:, ::4, ::4]]) == (slice(8, 56), slice(0, 64))
    grey = (128 + head // 4).astype(np.uint8)
    coloured = np.stack([head, grey, head], -1)
    cut = sheets.heads([head, grey, coloured])
    for row, shown in zip((head, grey, coloured), cut, strict=True):
        assert np.array_equal(shown, row[:, 32:224, 16:240])
    other = head.copy()
    other[3, 5, 100] = 1
    assert sheets.head_box([head, other]) == (slice(0, 256), slice(0, 256))


def test_even_positions_have_as_much_change_between_them():
    change = np.random.default_rng(0).random(20) ** 8
    at = sheets.even_positions(change, 30)
    so_far = np.interp(at, np.arange(21), [0, *change.cumsum()])
    assert at[0] == 0 and at[-1] == 20 and np.allclose(np.diff(so_far), change.sum() / 29)
    for still in (np.zeros(3), np.zeros(0)):
        assert len(sheets.even_positions(still, 5)) == 5


@pytest.mark.parametrize("slices", [5, 20, 32, 48])
def test_brain_sheet_shows_all_slices_in_the_order_of_z(slices):
    """In rows of eight, the last of which may be short; each with a caption of its own."""
    brain = np.random.default_rng(0).integers(0, 256, (slices, 128, 128), dtype=np.uint8)
    page = np.asarray(sheets.brain_sheet(brain, "noise"))
    places, captions = [], set()
    for slice_ in brain:
        corners = np.argwhere(page[:-127, :-127] == slice_[0, 0])
        (place,) = [(r, c) for r, c in corners if (page[r : r + 128, c : c + 128] == slice_).all()]
        places.append(place)
        captions.add(page[place[0] + 128 : place[0] + 146, place[1] : place[1] + 60].tobytes())
    assert places == sorted(places) and len(captions) == slices
    assert len({row for row, _ in places}) == -(-slices // 8) and len({column for _, column in places}) == min(
        8, slices
    )


def test_save_gif_keeps_every_frame_and_rests_on_the_last(tmp_path):
    frames = [np.full((8, 8), grey, np.uint8) for grey in (0, 80, 160, 255)]
    sheets.save_gif(tmp_path / "a.gif", frames, seconds=2.0)
    with Image.open(tmp_path / "a.gif") as gif:
        shown = []
        for n in range(gif.n_frames):
            gif.seek(n)
            shown.append((np.asarray(gif.convert("L"))[0, 0], gif.info["duration"]))
        assert gif.info["loop"] == 0
    assert shown == [(0, 500), (80, 500), (160, 500), (255, 2000)]
