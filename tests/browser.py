"""The pages of heads in a real browser without network: they draw, the sliders move them, and nothing complains.

    python -m pytest tests/browser.py --basetemp shots     # screenshots stay in the folder shots, which is made anew

Skipped where there is no Chromium (Debian: apt-get install chromium). No part of `make test`, since Chromium is no
package of Python.
"""

import base64
import fcntl
import gzip
import io
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import util
from heads.phantom import phantom_case
from pictures import sheets, volume
from pictures.page import page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--headless=new", "--no-sandbox", "--remote-debugging-pipe", "--window-size=1000,1000", "--hide-scrollbars",
         "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--host-resolver-rules=MAP * ~NOTFOUND"]  # fmt: skip

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")


class Browser:
    """One tab of Chromium, driven by its debugging protocol over the pipes 3 and 4; events are all that it reported."""

    def __init__(self, folder: Path):
        (their_input, self.input), (self.output, their_output) = os.pipe(), os.pipe()
        theirs = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (their_input, their_output)]  # not 3 or 4 themselves
        connect = f'exec "$0" "$@" 3<&{theirs[0]} 4>&{theirs[1]}'
        self.process = subprocess.Popen(["bash", "-c", connect, CHROMIUM, *FLAGS, f"--user-data-dir={folder}"],
                                        pass_fds=theirs, stderr=subprocess.DEVNULL)  # fmt: skip
        for end in (their_input, their_output, *theirs):
            os.close(end)
        self.events, self.received, self.sent, self.session = [], b"", 0, {}
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()
        os.close(self.input), os.close(self.output)

    def ask(self, method: str, **params) -> dict:
        """The answer to one command."""
        self.sent += 1
        message = {"id": self.sent, "method": method, "params": params, **self.session}
        os.write(self.input, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.received:
                self.received += os.read(self.output, 1 << 20)
            message, _, self.received = self.received.partition(b"\0")
            message = json.loads(message)
            if message.get("id") == self.sent:
                assert "error" not in message, message
                return message["result"]
            self.events.append(message)

    def run(self, script: str):
        """The value of an expression of JavaScript, after its promise."""
        result = self.ask("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def open(self, file: Path) -> None:
        """Loads a page and waits until its heads are shown."""
        self.ask("Page.navigate", url=file.resolve().as_uri())
        until = time.monotonic() + 120
        while not self.run("document.querySelector('output')?.textContent"):
            assert time.monotonic() < until, self.complaints()
            time.sleep(0.2)

    def press(self, element: str, key: str) -> None:
        """Focuses an element and presses a key, as a person does."""
        self.run(f"{element}.focus()")
        code = {"ArrowLeft": 37, "ArrowRight": 39, "Home": 36, "End": 35}[key]
        for kind in ("keyDown", "keyUp"):
            self.ask("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def picture(self, file: Path) -> np.ndarray:
        """A screenshot uint8 [H, W, 3], kept in a file."""
        self.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        file.write_bytes(base64.b64decode(self.ask("Page.captureScreenshot")["data"]))
        return np.asarray(Image.open(io.BytesIO(file.read_bytes())).convert("RGB")).astype(int)

    def complaints(self) -> list[dict]:
        """Warnings and errors of the console, uncaught ones too."""
        bad = ("Runtime.exceptionThrown", "Log.entryAdded")
        return [event for event in self.events if event["method"] in bad or event["method"] ==
                "Runtime.consoleAPICalled" and event["params"]["type"] in ("warning", "error", "assert")]  # fmt: skip

    def loads(self) -> set[str]:
        """How all that was asked for begins: file, data, blob, http."""
        asked = [event["params"]["request"]["url"] for event in self.events
                 if event["method"] == "Network.requestWillBeSent"]  # fmt: skip
        return {url.split(":")[0] for url in asked}


@pytest.fixture
def browser(tmp_path):
    """Closed after the test, in which nothing may have complained, and nothing been asked for but what files hold."""
    browser = Browser(tmp_path / "profile")
    yield browser
    browser.close()
    assert browser.complaints() == [] and browser.loads() <= {"about", "file", "data", "blob"}


def test_sliders_move_heads_slices_and_tissues(browser, tmp_path):
    """Key by key the words and the picture change; the viewer holds the voxels of the brains in the folder."""
    samples, heads = volume.Samples(tmp_path / "samples", {"weights": "a"}), []
    for i in range(3):
        images, masks = (part[:, ::2, ::2].copy() for part in phantom_case(0, i))
        heads.append(images)
        samples.add(i, images, f"brain {i}", "a head", {"age": str(60 + i), "sex": "F"})
        file = tmp_path / "samples" / f"brain_{i:03d}_seg.nii.gz"
        util.write_file(file, gzip.compress(volume.to_nifti(masks).to_bytes()))
    volume.write_index(tmp_path / "samples")
    browser.open(tmp_path / "samples" / "index.html")
    words = "[...document.querySelectorAll('#head, #slice')].map((slider) => slider.previousElementSibling.textContent)"
    seen = [browser.picture(tmp_path / "start.png")]
    assert browser.run(words) == ["0, age 60, sex F", "z = 16"]
    for element, key, wanted in (("slice", "ArrowRight", ["0, age 60, sex F", "z = 17"]),
                                 ("slice", "Home", ["0, age 60, sex F", "z = 0"]),
                                 ("head", "ArrowRight", ["1, age 61, sex F", "z = 0"]),
                                 ("head", "End", ["2, age 62, sex F", "z = 0"]),
                                 ("slice", "End", ["2, age 62, sex F", "z = 31"])):  # fmt: skip
        browser.press(element, key)
        seen.append(browser.picture(tmp_path / f"{len(seen)}_{element}_{key}.png"))
        assert browser.run(words) == wanted
        assert (np.abs(seen[-1] - seen[-2])[:, :500].max(2) > 30).mean() > 0.001
    browser.press("opacity", "Home")
    seen.append(browser.picture(tmp_path / "no_tissues.png"))
    coloured = [(np.ptp(picture[:, :500], axis=2) > 60).mean() for picture in seen]
    assert coloured[-1] < 0.02 and min(coloured[:-1]) > 0.1  # the red cross stays
    rows, columns = sheets.head_box(heads)
    for n, z, y, x in np.random.default_rng(0).integers((3, 32, 60, 60), size=(50, 4)).tolist():
        held = browser.run(f"viewer.volumes[0].getValue({y}, {x}, {z}, {n})")
        assert held == heads[n][z, rows.start + y, columns.start + x]


def test_the_front_is_up_and_the_left_is_left(browser, tmp_path):
    """A bright block at the left front of the upper slices: each plane has it where its letters say."""
    head = np.full((32, 64, 64), 40, np.uint8)
    head[20:, 12:24, 40:52] = 255  # a slice's upper right
    series = volume.to_series([head], (slice(4, 60), slice(4, 60)))
    (tmp_path / "page.html").write_bytes(page("One head", "a block", "head", ["it"], series))
    browser.open(tmp_path / "page.html")
    browser.run("Object.assign(viewer.opts, {crosshairWidth: 0, textHeight: 0})")
    browser.run("viewer.scene.crosshairPos = [14 / 56, 42 / 56, 0.8], viewer.drawScene()")
    x, y, width, height = browser.run(
        "(({x, y, width, height}) => [x, y, width, height])(document.querySelector('canvas').getBoundingClientRect())"
    )
    seen = browser.picture(tmp_path / "block.png").min(2)[int(y) : int(y + height), int(x) : int(x + width)]
    for plane, top, bottom, horizontal, vertical in (("axial", 0, 0.76, 0.25, 0.25), ("coronal", 0.77, 0.88, 0.25, 0.2),
                                                     ("sagittal", 0.89, 1, 0.75, 0.2)):  # fmt: skip
        rows, columns = np.nonzero(seen[int(top * height) : int(bottom * height)] > 250)
        assert abs(columns.mean() / width - horizontal) < 0.05, plane
        assert abs(rows.mean() / ((bottom - top) * height) - vertical) < 0.08, plane
