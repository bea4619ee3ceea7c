"""Laws of page.py and volume.write_index: a page holds the heads voxel by voxel, and is one file that loads nothing."""

import base64
import gzip
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import nibabel
import numpy as np
import pytest

import util
from heads.phantom import phantom_case
from pictures import page, sheets, volume
from util import UserError


class Elements(HTMLParser):
    """The tags of an HTML file with their attributes, and the text of its scripts."""

    def __init__(self, html: bytes):
        super().__init__()
        self.tags, self.scripts, self.inside = [], [], ""
        self.feed(html.decode())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts[-1] += data


def data_of(html: bytes) -> dict:
    """What the page was made of; heads and masks as volumes."""
    data = json.loads(Elements(html).scripts[1])
    for name in ("heads", "masks"):
        letters = data[name] and gzip.decompress(base64.b64decode(data[name]))
        data[name] = letters and nibabel.Nifti1Image.from_bytes(letters)
    return data


@pytest.fixture(scope="module")
def brain() -> tuple[np.ndarray, np.ndarray]:
    """Slices and masks uint8 [32, 256, 256] of a phantom. Read only."""
    return phantom_case(0, 1)


def sample(folder: Path, i: int, slices: np.ndarray, person: dict) -> None:
    """Adds a brain to a folder of samples, and writes its page."""
    volume.Samples(folder, {"weights": "a"}).add(i, slices, f"brain {i}", "a head", person)
    volume.write_index(folder)
    util.disown()


def test_the_page_holds_every_brain_of_the_folder_at_its_place_in_mm(brain, tmp_path):
    """Cut to where heads are; masks where there are any; people, and links to what is beside. All in any order."""
    images, masks = (part[:, ::4, ::4].copy() for part in brain)
    heads = {i: np.roll(images, i, axis=0) for i in (10, 2, 0)}
    for i, slices in heads.items():
        sample(tmp_path, i, slices, {"age": str(60 + i), "cdr": "0.5"} if i else {})
    data, order = data_of((tmp_path / "index.html").read_bytes()), [0, 2, 10]
    rows, columns = sheets.head_box(list(heads.values()))
    assert data["names"] == ["0", "2, age 62, cdr 0.5", "10, age 70, cdr 0.5"] and data["masks"] is None
    voxels = np.asanyarray(data["heads"].dataobj)
    assert voxels.dtype == np.uint8 and voxels.size < sum(slices.size for slices in heads.values())
    for n, i in enumerate(order):
        assert np.array_equal(voxels[..., n].transpose(2, 0, 1), heads[i][:, rows, columns])
        assert not np.delete(np.delete(heads[i], np.r_[rows], 1), np.r_[columns], 2).any()
    whole = volume.to_nifti(images).affine
    assert np.allclose(data["heads"].affine @ (5, 7, 9, 1), whole @ (5 + rows.start, 7 + columns.start, 9, 1))
    assert data["links"] == [["weights and settings", "samples.json"]]

    util.write_file(tmp_path / "brain_002_seg.nii.gz", gzip.compress(volume.to_nifti(masks).to_bytes()))
    (tmp_path / "samples_validate.md").write_text("scores")
    (tmp_path / "brain_000.nii.gz").unlink()
    volume.write_index(tmp_path)
    data = data_of((tmp_path / "index.html").read_bytes())
    labels = np.asanyarray(data["masks"].dataobj)
    assert [name.split(",")[0] for name in data["names"]] == ["2", "10"] and "first 2 of 3" in data["note"]
    rows, columns = sheets.head_box([heads[2], heads[10]])
    assert np.array_equal(labels[..., 0].transpose(2, 0, 1), masks[:, rows, columns]) and not labels[..., 1].any()
    assert ["scores beside the real brains of validate", "samples_validate.md"] in data["links"]

    (tmp_path / "brain_010.nii.gz").write_bytes(b"damaged")
    with pytest.raises(UserError, match="brain_010.nii.gz is no volume of a brain"):
        volume.write_index(tmp_path)


def test_one_file_that_loads_nothing_and_shows_names_as_they_are(brain):
    """Equal brains give equal bytes; no element names another file but for links, and the browser is told to refuse."""
    series = volume.to_series([brain[0][:, ::4, ::4]], (slice(64), slice(64)))
    name = "</script><script>alert(1)</script><!--<script> VIEWER & DATA \u2028 'é"
    html = page.page(name, name, name, [name], series, links={name: "a.md"})
    assert html == page.page(name, name, name, [name], series, links={name: "a.md"})
    elements, data = Elements(html), data_of(html)
    assert [data[key] for key in ("title", "note", "kind", "names", "links")] == [name] * 3 + [[name], [[name, "a.md"]]]
    assert len(elements.scripts) == 3
    assert [tag for tag, attributes in elements.tags if {"src", "href", "data", "srcset"} & attributes.keys()] == ["a"]
    assert not {"link", "iframe", "object", "base"} & {tag for tag, _ in elements.tags}
    (rule,) = (attributes["content"] for _, attributes in elements.tags if "http-equiv" in attributes)
    assert rule.startswith("default-src 'none';") and "http" not in rule


def test_the_viewer_is_the_published_file_and_carries_its_licence(brain):
    licence, viewer = (
        (page.HERE / "niivue" / file).read_text(encoding="utf-8") for file in ("LICENSE", "niivue.umd.js")
    )
    (published,) = re.findall(r"sha256 ([0-9a-f]{64})", licence)
    assert hashlib.sha256(viewer.encode()).hexdigest() == published and len(viewer) < 1_000_000
    series = volume.to_series([brain[0][:, ::4, ::4]], (slice(64), slice(64)))
    script = Elements(page.page("", "", "", [""], series)).scripts[0]
    assert licence in script and script.endswith(viewer)


def test_eight_heads_are_small_enough_to_send(brain):
    """The viewer, and eight times a head of 256 px with its mask: below 12 MB."""
    series, labels = (volume.to_series([part], sheets.head_box([brain[0]])) for part in brain)
    one = len(page.page("", "", "", [""], series, labels))
    viewer = one - sum(len(page.in_letters(part)) for part in (series, labels))
    assert 0 < viewer < 0.8e6 and viewer + 8 * (one - viewer) < 12e6
