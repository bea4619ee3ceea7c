"""A page that shows heads as volumes in three planes: one HTML file with the heads in it, no server, no network.

The viewer is NiiVue (https://niivue.com), in the folder niivue with its licence; page.html is the page around it.
"""

import base64
import gzip
import json
from pathlib import Path

import nibabel

HERE = Path(__file__).parent


def in_letters(volume: nibabel.Nifti1Image) -> str:
    """The volume's file .nii.gz in base64. Equal volumes give equal letters."""
    return base64.b64encode(gzip.compress(volume.to_bytes(), 6, mtime=0)).decode()


def page(
    title: str,
    note: str,
    kind: str,
    names: list[str],
    heads: nibabel.Nifti1Image,
    masks: nibabel.Nifti1Image | None = None,
    links: dict[str, str] | None = None,
) -> bytes:
    """The HTML file. A slider, called `kind`, chooses the head, another one the slice.

    Args:
        title, note: above the heads.
        kind, names: what heads differ in, such as "age", and the words for each of n heads.
        heads: uint8 [x, y, z, n], the heads one behind the other.
        masks: the same of their tissues, with the values of heads/layout.py, or None.
        links: {words: file beside the page}.
    """
    data = {"title": title, "note": note, "kind": kind, "names": names, "links": list((links or {}).items())}
    data |= {"heads": in_letters(heads), "masks": masks and in_letters(masks)}
    files = ("page.html", "niivue/LICENSE", "niivue/niivue.umd.js")
    html, licence, viewer = ((HERE / file).read_text(encoding="utf-8") for file in files)
    letters = json.dumps(data).replace("<", "\\u003c")  # so that no name ends the element that it stands in
    return html.replace("DATA", letters).replace("VIEWER", f"/*\n{licence}*/\n{viewer}", 1).encode()
