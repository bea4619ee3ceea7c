"""Schematic drawings: a page with boxes, arrows, arrays and small pictures, written as SVG.

One style for all: blue boxes with round corners are networks that learn, grey ones networks that were trained before,
white ones take no part in learning, dashed ones are losses; sheets one behind the other are arrays of numbers.
"""

import base64
import io
import re
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Polygon, Rectangle
from matplotlib.path import Path
from PIL import Image

WIDTH = 840  # of every page, in pixels
BLUE, DARK, ORANGE, GREY, YELLOW = "#cfe0f3", "#1e3a5f", "#b45309", "#6b7280", "#facc15"
KINDS = {
    "network": {"facecolor": BLUE, "edgecolor": DARK, "linewidth": 1.4},
    "frozen": {"facecolor": "#e5e7eb", "edgecolor": DARK, "linewidth": 1.4},
    "plain": {"facecolor": "white", "edgecolor": GREY, "linewidth": 1.0},
    "loss": {"facecolor": "#fff3e0", "edgecolor": ORANGE, "linewidth": 1.2, "linestyle": "--"},
}
# letters as outlines, since a reader's machine may lack the font; the salt makes names inside the file repeatable
STYLE = {"svg.fonttype": "path", "svg.hashsalt": "page", "font.family": "DejaVu Sans", "mathtext.fontset": "dejavusans"}


class Place(NamedTuple):
    """Centre and size, in pixels, of something on a page, and the middles of its sides."""

    x: float
    y: float
    w: float
    h: float

    left = property(lambda self: (self.x - self.w / 2, self.y))
    right = property(lambda self: (self.x + self.w / 2, self.y))
    top = property(lambda self: (self.x, self.y - self.h / 2))
    bottom = property(lambda self: (self.x, self.y + self.h / 2))


class Page:
    """A white page of WIDTH x height pixels; x points right, y down. Things are placed by their centres."""

    def __init__(self, height: float):
        self.height, self.figure = height, Figure(figsize=(WIDTH / 96, height / 96))
        self.axes = self.figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(height, 0))
        self.axes.axis("off")

    def text(self, x: float, y: float, words: str, size: float = 12, **style) -> None:
        """Words, with mathematics between dollars, `size` pixels high. Indices need 13, to be 9 pixels high."""
        style = {"ha": "center", "va": "center", "linespacing": 1.3} | style
        self.axes.text(x, y, words, fontsize=0.75 * size, **style)  # a pixel is 0.75 points

    def title(self, y: float, words: str) -> None:
        self.text(14, y, words, 15, ha="left", color=DARK)

    def box(self, x: float, y: float, w: float, h: float, words: str, kind: str = "network", size: float = 12) -> Place:
        """A box of one of KINDS."""
        corners = f"round,pad=0,rounding_size={9 if kind == 'network' else 2}"
        self.axes.add_patch(FancyBboxPatch((x - w / 2, y - h / 2), w, h, boxstyle=corners, **KINDS[kind]))
        self.text(x, y, words, size)
        return Place(x, y, w, h)

    def sign(self, x: float, y: float, sign: str) -> Place:
        """A sign of arithmetic in a circle."""
        self.axes.add_patch(Circle((x, y), 9, **KINDS["plain"]))
        self.text(x, y, sign, 14)
        return Place(x, y, 18, 18)

    def outline(self, x: float, y: float, w: float, h: float, **style) -> None:
        style = {"facecolor": "none", "edgecolor": "black", "linewidth": 0.8, "zorder": 2} | style
        self.axes.add_patch(Rectangle((x - w / 2, y - h / 2), w, h, **style))

    def area(self, corners: list[tuple[float, float]], colour: str) -> None:
        self.axes.add_patch(Polygon(corners, facecolor=colour))

    def sheets(self, x: float, y: float, w: float, h: float, count: int, inside="", below="", above="") -> Place:
        """`count` sheets one behind the other: an array with one more axis, into the page. The place spans them all."""
        back = 4 * (count - 1)
        for shift in range(back, -1, -4):
            self.outline(x + shift, y - shift, w, h, facecolor="white", zorder=1)
        self.text(x, y, inside, 13)
        self.text(x + back / 2, y + h / 2 + 5, below, 11, va="top")
        self.text(x + back / 2, y - h / 2 - back - 5, above, va="bottom")
        return Place(x + back / 2, y, w + back, h)

    def picture(self, x: float, y: float, w: float, h: float, pixels: np.ndarray, count: int = 1, **words) -> Place:
        """Pixels [H, W] from 0, black, to 1, white, on the first of sheets; in 24 steps, which keeps the file small."""
        place, extent = self.sheets(x, y, w, h, count, **words), (x - w / 2, x + w / 2, y + h / 2, y - h / 2)
        self.axes.imshow(
            np.round(pixels * 23), "gray", vmin=0, vmax=23, interpolation="none", extent=extent, zorder=1.5
        )
        self.axes.set(xlim=(0, WIDTH), ylim=(self.height, 0), aspect="auto")
        return place

    def inset(self, x: float, y: float, w: float, h: float) -> Axes:
        """Axes for curves."""
        bottom = 1 - (y + h / 2) / self.height
        return self.figure.add_axes(((x - w / 2) / WIDTH, bottom, w / WIDTH, h / self.height))

    def line(self, *points: tuple[float, float], style: str = "-", **line) -> None:
        """A line through points; style "-|>" gives it a head."""
        line = {"color": "black", "linewidth": 1.2, "zorder": 3, "fill": style != "-"} | line
        self.axes.add_patch(FancyArrowPatch(path=Path(points), arrowstyle=style, mutation_scale=11, **line))

    def arrow(self, *points: tuple[float, float], words: str = "", **line) -> None:
        """An arrow through points; words stand above the middle of its first part."""
        self.line(*points, style="-|>", **line)
        (x0, y0), (x1, y1) = points[:2]
        self.text((x0 + x1) / 2, (y0 + y1) / 2 - 5, words, 11, va="bottom")

    def chain(self, *places: Place) -> None:
        """Arrows from each place to the next on its right."""
        for one, other in pairwise(places):
            self.arrow(one.right, other.left)

    def enter(self, place: Place, words: str, length: float = 22) -> None:
        """An arrow from words below a place into it."""
        x, y = place.bottom
        self.arrow((x, y + length), (x, y))
        self.text(x, y + length + 3, words, va="top")


def svg_of(drawing: Callable[[], Page]) -> str:
    """The page of a drawing as SVG, the same on every day; texts are outlines, and comments for those who search."""
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        drawing().figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return _shorter(buffer.getvalue())


def _shorter(svg: str) -> str:
    """The same drawing in half as many bytes, most of which are pictures and the outlines of letters."""

    def use(found: re.Match) -> str:
        x, y = round(float(found[2])), round(float(found[3]))
        return f'<use href="{found[1]}" x="{x}"' + (f' y="{y}"/>' if y else "/>")

    def letter(found: re.Match) -> str:
        outline = re.sub(r"-?\d+", lambda number: str(round(int(number[0]) / 16)), found[2])
        return f'{found[1]}{outline}" transform="scale(0.25)"'

    def grey_png(found: re.Match) -> str:
        buffer = io.BytesIO()
        Image.open(io.BytesIO(base64.b64decode(found[1]))).convert("L").save(buffer, "PNG", optimize=True)
        return f'base64,{base64.b64encode(buffer.getvalue()).decode()}"'

    svg = re.sub(r' clip-path="url\(#\w+\)"|; stroke-linejoin: miter', "", svg)
    svg = re.sub(r"DejaVuSans(\w*)-(Oblique-)?", r"g\1\2", svg)
    svg = re.sub(r'<use xlink:href="(#g[\w-]+)" transform="translate\(([-\d.]+) ([-\d.]+)\)"/>', use, svg)
    for space in re.findall(r'<path id="(g[\w-]+)" transform', svg):
        svg = re.sub(f'<use href="#{space}" [^>]+>', "", svg)
    svg = re.sub(r'(<path id="g[\w-]+" d=")([^"]+)" transform="scale\(0.015625\)"', letter, svg)
    svg = re.sub(r' d="[^"]+"', lambda path: re.sub(r"\s*([MLQCz])\s*", r"\1", path[0]), svg)
    svg = re.sub(r'base64,([^"]+)"', grey_png, svg)
    return re.sub(r"\s*\n\s*", "\n", svg)
