"""What pages say of the released weights is what the weights say, or a score that was saved; the citation is whole."""

import json
import re
import runpy
import shlex
from pathlib import Path

import pytest

from playground import release
from scores.scorer import TISSUES
from scores.utility import utility_table
from training.checkpoints import RELEASED, load_weights

ROOT = RELEASED.parent
REPORT = (ROOT / "report.md").read_text()
CARD = (RELEASED / "README.md").read_text()
FILES = sorted(RELEASED.glob("*.safetensors"))
DESCRIBED = {path.stem: load_weights(path)[1] for path in FILES}
SCORES = {path.stem: json.loads(path.read_text()) for path in sorted(RELEASED.glob("cards/*.json"))}
DECIMALS = {"ssim": 4, "brain_ssim": 4, "ms_ssim": 4, "psnr": 2}


def front_matter(card: str) -> list[tuple[int, str, str]]:
    """(depth, key, value) of each line between a card's first two `---`, which keep to a plain part of YAML."""
    lines = card.split("---\n")[1].splitlines()
    form = re.compile(r"((?:  )*)((?:- )?)(?:([\w-]+):(?: (\S.*))?|(\S+))$")
    assert card.startswith("---\n") and all(form.match(line) for line in lines)
    found = (form.match(line).groups() for line in lines)
    return [(len(indent + dash) // 2, key or "", value or item or "") for indent, dash, key, value, item in found]


def test_a_release_made_again_is_compared_with_what_the_cards_say():
    """Of every first stage and of the scorer; `make release` prints these figures beside its own."""
    expected = json.loads((RELEASED / "expected" / "full.json").read_text())
    for name, saved in SCORES.items():
        assert expected[f"{name}, SSIM"] == saved["result"]["ssim"], name
        assert expected[f"{name}, brain SSIM"] == saved["result"]["brain_ssim"], name
    for tissue in ("csf", "grey", "white"):
        assert expected[f"scorer, {tissue}, Dice"] == DESCRIBED["scorer"]["accuracy"]["validate"][f"dice_{tissue}"]
    assert {"stable_diffusion, loss", "samples at 64 px, judge", "vqvae_f8 under pixelcnn, bits"} <= expected.keys()


def test_the_use_of_new_brains_is_what_was_measured():
    assert utility_table(json.loads((ROOT / "figures" / "utility_validate.json").read_text())) in REPORT


def test_the_front_matter_names_licence_data_and_scores():
    parsed = front_matter(CARD)
    top = {key: value for depth, key, value in parsed if depth == 0}
    assert top["license"] == "other" and top["license_link"].startswith("https://")
    assert {"license_name", "library_name", "tags", "datasets", "metrics", "model-index"} <= top.keys()
    assert len(top) == len([key for depth, key, _ in parsed if depth == 0])  # no key twice
    names = [n for n, (depth, key, _) in enumerate(parsed) if (depth, key) == (1, "name")]
    assert {parsed[n][2] for n in names} == SCORES.keys()
    for n, end in zip(names, [*names[1:], len(parsed)]):
        said = [(key, value) for _, key, value in parsed[n:end]]
        metrics = [value for key, value in said if key == "type"][2:]  # after those of task and data
        result = SCORES[said[0][1]]["result"]
        expected = [f"{result[metric]:.{DECIMALS[metric]}f}" for metric in metrics]
        assert metrics == list(DECIMALS) and [value for key, value in said if key == "value"] == expected


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_tables_of_files_and_of_training_are_those_of_the_files(path):
    """Bytes, digest, weights, price; commit, seed, steps, device, minutes, version."""
    lines = CARD.splitlines()
    assert release.FILE_COLUMNS in lines and release.TRAINING_COLUMNS in lines
    assert release.file_row(path) in lines and release.training_row(path) in lines


def test_all_were_trained_on_the_data_that_the_card_names():
    for described in DESCRIBED.values():
        data = described["data"]
        for words in (f"{data['cases']} training brains", f"{data['slices']:,} slices", f"digest `{data['digest']}`"):
            assert words in CARD


def test_the_commands_are_those_in_the_records():
    """Every typed flag has the recorded value."""
    rows = re.findall(r"^\| `(\w+)` \| (`python .*) \|$", CARD, re.MULTILINE)
    assert len(rows) == 7 and len(dict(rows)) == 7
    for name, cell in rows:
        commands = re.findall(r"`python ([^`]+)`", cell)
        runs = release.training_runs(DESCRIBED[name])
        for command, run in zip(commands, runs, strict=True):
            script, *words = shlex.split(command)
            typed = {}
            for word in words:
                typed.setdefault(word, []) if word.startswith("--") else typed[list(typed)[-1]].append(word)
            assert script == run["script"] and typed
            for flag, values in typed.items():
                recorded = run["settings"][flag.lstrip("-").replace("-", "_")]
                recorded = recorded if isinstance(recorded, list) else [recorded]
                assert [as_number(value) for value in values] == [as_number(value) for value in recorded], flag
            if "--precision" not in typed:
                assert run["settings"]["precision"] == "auto"


def as_number(value) -> float | str:
    try:
        return float(value)
    except ValueError:
        return value


def test_scores_of_reconstructions_are_the_saved_ones():
    """And these are of the released files, with their fidelity decoder, on one split."""
    first_stages = {name for name, described in DESCRIBED.items() if described["kind"] in release.MODELS}
    assert SCORES.keys() == first_stages
    for name, saved in SCORES.items():
        result, data = saved["result"], saved["data"]
        assert Path(saved["weights"]).stem == name and saved["decoder"] == "fidelity" and data["split"] == "validate"
        assert f"{data['cases']} brains ({data['slices']:,} slices, digest `{data['digest']}`)" in CARD
        price = release.file_row(RELEASED / f"{name}.safetensors").split(" | ")[-1].removesuffix(" |")
        cells = []
        for score, places in DECIMALS.items():
            low, high = (f"{end:.{places}f}" for end in result[f"{score}_interval"])
            cells.append(f"{result[score]:.{places}f} [{low}, {high}]")
        assert f"| `{name}` | {price} | {' | '.join(cells)} |" in CARD.splitlines()
        assert not re.search(r'"/\w', json.dumps(saved))  # folders of somebody's machine
        if "prior_bits" in result:
            priced, low, high = (f"{bits:,.0f}" for bits in (result["prior_bits"], *result["prior_bits_interval"]))
            assert f"{priced} bits a slice, [{low}, {high}], instead of {result['fixed_bits']:,.0f}" in CARD


def test_scores_of_the_scorer_are_those_in_its_file():
    for pictures, name in (("256 px", "validate"), ("reduced to 64 px", "validate at 64 px")):
        read = DESCRIBED["scorer"]["accuracy"][name]
        dice = ", ".join(f"{read[f'dice_{tissue}']:.3f}".lstrip("0") for tissue in TISSUES)
        areas = ", ".join(f"{100 * read[f'area_error_{tissue}']:.1f} %" for tissue in TISSUES)
        assert f"| {pictures} | {dice} | {areas} | {read['z_error']:.2f} slices |" in CARD.splitlines()


def test_the_code_of_the_card_runs(tmp_path, monkeypatch):
    """As it stands; only in one step of sampling."""
    code = "\n".join(re.findall(r"```python\n(.*?)```", CARD, re.DOTALL))
    assert "Sampling(age" in code
    (tmp_path / "code.py").write_text(code.replace("Sampling(age", "Sampling(steps=1, age"))
    monkeypatch.chdir(ROOT)
    known = runpy.run_path(str(tmp_path / "code.py"))
    assert known["x_hat"].shape == (2, 1, 256, 256) and known["idx"].shape == (2, 24, 28)
    assert known["slices"].shape == (32, 256, 256) and known["person"]["age"] == 75


def test_the_citation_has_what_its_form_asks_for():
    """Citation File Format 1.2.0: the keys it requires, and the data that the licence of OASIS asks to cite."""
    text = (ROOT / "CITATION.cff").read_text()
    keys = re.findall(r"^([\w-]+):", text, re.MULTILINE)
    assert {"cff-version", "message", "title", "authors"} <= set(keys) and len(keys) == len(set(keys))
    assert "cff-version: 1.2.0\n" in text and "license: MIT\n" in text
    assert re.search(r"doi: (\S+)", text)[1] in CARD


@pytest.mark.parametrize("name", SCORES)
def test_tables_of_readme_and_report_have_the_saved_scores(name):
    """Rows of the README, and both ledgers of the report."""
    result, minutes = (
        SCORES[name]["result"],
        [round(run["seconds"] / 60) for run in release.training_runs(DESCRIBED[name])],
    )
    bits = result.get("fixed_bits")
    price = f"{bits:,.0f} bits" if bits else f"{result['numbers']:,} numbers"
    cells = [f"{result[score]:.{places}f} [{low:.{places}f}, {high:.{places}f}]"
             for score, places in DECIMALS.items() for low, high in [result[f"{score}_interval"]]]  # fmt: skip
    report, readme = REPORT, (ROOT / "README.md").read_text()
    (row,) = re.findall(rf"^\| \*\*`{name}`\*\*.*", report, re.MULTILINE)
    assert row.endswith(f"| {price} | {' | '.join(cells)} |")
    (row,) = re.findall(rf"^\| `{name}` \| [\d,-].*", report.partition("| file | zero-order")[2], re.MULTILINE)
    found = [cell.strip() for cell in row.split("|")][2:-1]
    assert found[0] == (f"{result['entropy_bits']:,.0f}" if "entropy_bits" in result else "-")
    assert found[2] == (f"{result['kl_bits']:,.0f}" if "kl_bits" in result else "-")
    assert found[4].startswith(f"{result['ssim_shuffled_z']:.4f} ")
    spectrum = dict(zip((f"{f:.2f}" for f in result["spectrum"]["frequency"]), result["spectrum"]["power_ratio"]))
    assert found[5] == " / ".join(f"{spectrum[f]:.2f}" for f in ("0.11", "0.20", "0.30"))
    (row,) = re.findall(rf"^\| `{name}` \| [\d,]+ (?:bits|real numbers) .*", readme, re.MULTILINE)
    ssim, brain = (f"{result[score]:.4f}".lstrip("0") for score in ("ssim", "brain_ssim"))
    assert f"| {price.replace('numbers', 'real numbers')} | SSIM {ssim}, brain SSIM {brain} | {minutes[0]} min" in row
    assert all(f"{time} min" in row for time in minutes if time > 1)
