"""Laws of card.py: README.md of a folder of samples says what is in there, and after evaluate.py what was found."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from test_cards import front_matter
from test_samples import Z, save_scorer

import dataset
import evaluate
import pixelCNN
import stable_diffusion
import util
from heads.phantom import phantom_case
from pictures import volume
from scores.card import WORDS, write_card
from scores.metrics import with_interval
from scores.page import sample_table
from training.checkpoints import RELEASED
from training.settings import describe_samples
from util import UserError

PEOPLE = ({"age": "64", "sex": "F", "cdr": "0.5"}, {"age": "20", "sex": "M"}, {"age": "71", "sex": "F"}, {})


@pytest.fixture(autouse=True)
def slices_alone(monkeypatch):
    """Brains without the pictures beside their slices, which take most of the time."""

    def write_brain(out: Path, i: int, slices: np.ndarray, title: str, masks: np.ndarray) -> list[Path]:
        for kind, voxels in (("case", slices), ("seg", masks)):
            dataset.write_slices(volume.folder_of_slices(out, i, kind), i, voxels, kind)
        return []

    monkeypatch.setattr(volume, "write_brain", write_brain)


def head(case: int) -> tuple[np.ndarray, np.ndarray]:
    """Slices and masks uint8 [Z, 64, 64] of a phantom."""
    images, masks = phantom_case(7, case, Z)
    return images.reshape(Z, 64, 4, 64, 4).mean((2, 4)).round().astype(np.uint8), masks[:, ::4, ::4].copy()


def draw(script, people: tuple[dict, ...], *flags, **more: str) -> Path:
    """A folder "new" of the brains that a script would record with these flags, one for each of the people."""
    declared, out = script.flags(), Path("new")
    Path("weights").write_bytes(b"w")
    args, _ = declared.parse([*map(str, flags)])
    trained_on = {"data": {"folder": "/home/me", "cases": 267, "digest": "63707daf"}}
    samples = volume.Samples(out, describe_samples(declared, Path("weights"), args, trained_on, scorer="abc", **more))
    for i, person in enumerate(people):
        slices, masks = head(i)
        samples.add(i, slices, f"brain {i}", "a head", person, masks)
    write_card(out)
    util.disown()
    return out


def command_of(card: str) -> list[str]:
    """The words of the command that a card gives."""
    return shlex.split(card.split("```")[1])


def test_the_card_names_people_splits_seed_digest_and_the_command(tmp_path):
    card = (draw(stable_diffusion, PEOPLE, "--seed", 5, "--sex", "F") / "README.md").read_text()
    parsed = front_matter(card)
    top = {key: value for depth, key, value in parsed if depth == 0}
    assert top["license"] == "other" and {"license_name", "license_link", "tags", "configs"} <= top.keys()
    assert (0, "", "synthetic") in parsed or (1, "", "synthetic") in parsed
    splits = [(key, value) for _, key, value in parsed if key in ("split", "path")]
    folders = [f"keras_png_slices_{split}/*.png" for split in ("train", "validate")]
    assert splits == [("split", "train"), ("path", folders[0]), ("split", "validate"), ("path", folders[1])]
    assert all(len(list(Path("new").glob(folder))) == Z * n for folder, n in zip(folders, (3, 1)))
    for words in (
        f"| train | 3 | {3 * Z} | {3 * Z} |",
        f"| validate | 1 | {Z} | {Z} |",
        "| age in years | - | 20 to 71, median 64, not known: 1 |",
        "| sex | F | F: 2, M: 1, not known: 1 |",
        "| Clinical Dementia Rating | - | 0.5: 1, not known: 3 |",
        "heard ages with noise of 7 years",
        "64 x 64 pixels",
        "The seed is 5",
        util.commit_of_code(),
        "digest of its numbers `abc`",
        "267 brains (digest of the slices `63707daf`)",
    ):
        assert words in card, words
    record = json.loads(Path("new/samples.json").read_text())
    assert f"digest `{record['made_by']['weights']}`" in card and "/home/me" not in card
    _, script, *flags = command_of(card)
    args, typed = stable_diffusion.flags().parse(flags)
    assert script == "stable_diffusion.py" and args.sample and args.brains == 4 and args.name == "WEIGHTS"
    known = record["made_by"]["settings"]
    assert {name: typed.get(name) for name in known} == known  # nothing is left to a default
    assert "Nobody scored them" in card and "not for diagnosis" in card.replace("Nothing here is", "not")


def test_terms_are_those_of_the_released_weights():
    """The words that OASIS asks for, and the paper to cite."""
    words, terms = (RELEASED / "README.md").read_text(), WORDS.read_text().split("## Terms")[1]
    (quote,) = (line for line in terms.splitlines() if line.startswith(">"))
    cited = terms[terms.index("cites Marcus") : terms.index(", acknowledges")]
    assert quote in words.splitlines() and cited in words


def test_who_is_not_known_is_not_told(tmp_path):
    """A PixelCNN has nobody; a completed brain is the model's in part only."""
    card = (draw(pixelCNN, ({}, {}), "--temperature", 0.5) / "README.md").read_text()
    assert "age, sex and CDR of these brains are not known" in card and "a model drew every slice" in card
    assert command_of(card)[1] == "pixelCNN.py" and "--temperature 0.5" in card
    assert not Path("new/oasis_cross-sectional.csv").exists()
    Path("new").rename("pixelcnn")
    card = (draw(stable_diffusion, ({"given": "0 4 8", "sex": "F"},), given="d") / "README.md").read_text()
    assert "a model drew every slice" not in card and "some slices were given" in card and "with noise" not in card
    args, _ = stable_diffusion.flags().parse(command_of(card)[2:])
    assert args.complete == Path("GIVEN") and "brains" not in card.split("```")[1]


def test_no_card_is_written_into_folders_of_others(tmp_path):
    for folder in ("bare", "data/keras_png_slices_train"):
        dataset.write_slices(Path(folder), 0, head(0)[0])
    for folder in ("bare", "data"):
        Path(folder, "README.md").write_text("mine")
        write_card(Path(folder))
        assert Path(folder, "README.md").read_text() == "mine"


def test_scores_and_copies_are_on_the_card_after_evaluation(run_main, tmp_path):
    """Of all brains, though fewer people are held out; and they stay there when the card is written again."""
    folder = draw(stable_diffusion, PEOPLE)
    for split, cases in (("train", range(100, 104)), ("validate", range(200, 203))):
        for case in cases:
            dataset.write_slices(tmp_path / f"oasis/keras_png_slices_{split}", case, head(case)[0])
    dataset.write_slices(tmp_path / "oasis/keras_png_slices_train", 104, head(2)[0])  # learned by heart
    save_scorer(tmp_path / "net.safetensors")
    flags = ("--samples", "new", "--data", "oasis", "--scorer", "net.safetensors", "--device", "cpu")
    status, _, errors = run_main(evaluate, *flags)
    assert status == 0, errors
    card, report = (folder / "README.md").read_text(), json.loads((folder / "samples_validate.json").read_text())
    assert sample_table(report) in card and "Nobody scored them" not in card
    assert "4 brains were compared with 5 training brains" in card and "3 brains stand beside" in card
    assert "1 of the new brains are nearer to one of them than any held-out person" in card
    copies = [with_interval(report["result"][part], "copies", ".2%") for part in ("samples", "real")]
    assert f"| {copies[0]} | {copies[1]} |" in card
    pairs = report["nearest"]
    assert pairs[0]["case"] == 2 and pairs[0]["training_case"] == 104 and pairs[0]["relative_distance"] < 0.01
    rows = [line.split(" | ") for line in card.splitlines() if line.startswith("| 2, z = ")]
    assert rows[0][:2] == [f"| 2, z = {pairs[0]['z']}", f"104, z = {pairs[0]['training_z']}"]
    assert [float(cell.strip(" |")) for cell in rows[0][3:]] == pytest.approx(
        [pairs[0]["relative_distance"], report["nearest_real"][0]], abs=6e-4
    )
    assert report["nearest_real"] == sorted(report["nearest_real"]) and len(report["nearest_real"]) == 3
    before = (folder / "README.md").read_bytes()
    write_card(folder)
    assert (folder / "README.md").read_bytes() == before
    others, own = "not exactly those that the weights learned from", "the very ones that the weights learned from"
    record = json.loads((folder / volume.RECORD).read_text())
    record["made_by"]["data"]["digest"] = report["data"]["train"]["digest"]
    (folder / volume.RECORD).write_text(json.dumps(record))
    assert others in card and own not in card
    write_card(folder)
    assert others not in (folder / "README.md").read_text() and own in (folder / "README.md").read_text()
    (folder / "samples_validate.json").write_text('{"result": {}}')
    with pytest.raises(UserError, match="is not as it was written; delete the latter"):
        write_card(folder)
