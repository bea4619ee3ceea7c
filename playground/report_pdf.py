"""How does report.md become report.pdf? Pandoc turns it into Typst, and Typst sets the pages.

    make report                                              # installs what it needs first
    python playground/report_pdf.py                          # after pip install -r playground/requirements-report.txt

A picture with an italic paragraph below it becomes a figure with that caption. GIFs do not move on paper and are left
out. Large pictures go in as JPEG, since a PDF stays in the history of a repository for ever.
"""

import argparse
import json
import re
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from PIL import Image

import util
from util import UserError

LARGE, WIDEST = 200_000, 1500  # bytes of a picture that becomes JPEG, and its pixels then
# pandoc's reader of this kind gives headings the anchors of GitHub
READER = "gfm+tex_math_dollars"
PAGE = {"papersize": "a4", "fontsize": "10pt", "margin": {"x": "2cm", "y": "2cm"}, "linkcolor": "1f4e79"}
STYLE = """
#set par(justify: false)
#show figure: set block(breakable: true)
#show figure.caption: set text(size: 8.5pt)
#show figure.caption: set align(left)
#show figure.where(kind: table): set align(left)
#show table: set text(size: 8pt)
#show table: set par(justify: false)
#show table.cell: set align(left)
#set table(inset: (x: 4pt, y: 3pt), stroke: (x, y) => (bottom: .3pt + luma(180)))
#show raw.where(block: false): set text(size: .9em)
#show raw.where(block: true): set text(size: 7.5pt)
"""
# pandoc.walk goes through lists of blocks, so a picture sees the paragraph that follows it
FILTER = """
local function pictures(block)
  if not block or (block.t ~= 'Para' and block.t ~= 'Figure') then return nil end
  local found, other = pandoc.List(), false
  if block.t == 'Figure' then block = block.content[1] end
  for _, part in ipairs(block.content) do
    if part.t == 'Image' then
      if not part.src:match('%.gif$') then found:insert(part) end
    elseif part.t ~= 'Space' and part.t ~= 'SoftBreak' then other = true end
  end
  if other then return nil end
  return found
end

function Blocks(blocks)
  local out, i = pandoc.List(), 1
  while i <= #blocks do
    local found = pictures(blocks[i])
    if not found then
      out:insert(blocks[i])
    elseif #found > 0 then
      local below, caption = blocks[i + 1], found[1].caption
      if below and below.t == 'Para' and below.content[1].t == 'Emph' then
        caption, i = below.content, i + 1
        if #caption == 1 then caption = caption[1].content end
      end
      for _, image in ipairs(found) do image.caption = {} end
      out:insert(pandoc.Figure({pandoc.Plain(found)}, {long = {pandoc.Plain(caption)}}))
    end
    i = i + 1
  end
  return out
end
"""


def to_typst(source: Path) -> str:
    """The whole document in Typst's language, with its contents, headings one level up, and pictures as figures."""
    import pypandoc

    with TemporaryDirectory() as folder:
        lua, style, page = Path(folder, "figures.lua"), Path(folder, "style.typ"), Path(folder, "page.json")
        lua.write_text(FILTER)
        style.write_text(STYLE)
        page.write_text(json.dumps(PAGE))
        options = ["--standalone", "--toc", "--toc-depth=2", "--shift-heading-level-by=-1"]
        options += [f"--lua-filter={lua}", f"--include-in-header={style}", f"--metadata-file={page}"]
        return pypandoc.convert_file(str(source), "typst", format=READER, extra_args=options)


def pictures_beside(text: str, source: Path, folder: Path) -> str:
    """The text with its pictures, named from the folder of `source`, copied into `folder`, large ones as JPEG."""
    for name in sorted(set(re.findall(r'image\("([^"]+)"', text))):
        picture, copy = source.parent / name, folder / Path(name).name
        if picture.suffix == ".png" and picture.stat().st_size > LARGE:
            copy = copy.with_suffix(".jpg")
            with Image.open(picture) as opened:
                small = opened.convert("RGB")
                small.thumbnail((WIDEST, 2 * WIDEST))
                small.save(copy, quality=85)
        else:
            shutil.copyfile(picture, copy)
        text = text.replace(f'image("{name}"', f'image("{copy.name}"')
    return text


def flags() -> argparse.ArgumentParser:
    """This script's command line."""
    parser = util.plain_parser(__doc__)
    parser.add_argument("--source", type=Path, default=ROOT / "report.md", help="Markdown (default: report.md)")
    parser.add_argument("--out", type=Path, help="PDF to write; default: beside the source, .pdf")
    return parser


def main() -> None:
    args = flags().parse_args()
    try:
        import typst
    except ImportError:
        raise UserError("typst is not installed; run pip install -r playground/requirements-report.txt") from None
    if not args.source.is_file():
        raise UserError(f"{args.source} is not there; give a Markdown file by --source")
    out = args.out or args.source.with_suffix(".pdf")
    with TemporaryDirectory() as folder:
        between = Path(folder, "report.typ")
        between.write_text(pictures_beside(to_typst(args.source), args.source, Path(folder)))
        pages = typst.compile(str(between))
    util.write_file(out, pages)
    print(f"report: {out}, {len(pages) / 1e6:.1f} MB")


if __name__ == "__main__":
    util.command(main)
