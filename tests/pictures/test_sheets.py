"""Laws of sheets.py: every pixel is where it should be."""

import numpy as np
import pytest
from PIL import Image

from pictures import sheets


def test_sheet_shows_every_pixel_as_it_is():
    rows = [np.random.default_rng(r).integers(0, 256, (3, 8, 8), dtype=np.uint8) for r in range(2)]
    page = np.asarray(sheets.sheet(rows, title="noise", captions=list("abcdef"), row_names=["up", "low"], zoom=2))
    for picture in np.concatenate(rows):
        wanted = picture.repeat(2, 0).repeat(2, 1)
        windows = np.lib.stride_tricks.sliding_window_view(page if page.ndim == 2 else page[..., 0], wanted.shape)
        assert (windows == wanted).all((2, 3)).sum() == 1


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
