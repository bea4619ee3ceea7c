"""Can a reader tell real slices from reconstructed and new ones?

    python playground/guess.py --first-stage vqvae --samples diffusion_vis/samples      # pages to guess from
    python playground/guess.py --first-stage vqvae --samples diffusion_vis/samples --answers answers.json

Pages guess_1.png and so on show slices in random order, one pixel of the slice to one of the screen: real ones of
held-out people; those of others after stage one, with texture where there is any; and new ones. The three kinds have
the same z's, and every brain is shown once. guess_key.json says what each number is: look at it last. Answers are
{"1": "real", "2": "reconstructed", "3": "new", ...}, or "not real" where one wants to say no more. The same flags with
--answers count what is right, and draw guess.png: the slices by kind, each with its answer.
"""

import argparse
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import util
from dataset import Slices, find_data, load_slices, to_slices
from parts.autoencoder import Autoencoder
from pictures import sheets
from scores.samples import load_samples
from training.stages import load_first_stage
from util import UserError

KINDS = ("real", "reconstructed", "new")
COLUMNS, ROWS = 3, 4  # of a page: slices of 224 px fit on the width of a page on GitHub
FRAME = 8  # pixels


def flags() -> argparse.ArgumentParser:
    """This script's command line."""
    parser = util.plain_parser(__doc__)
    add = parser.add_argument
    add("--first-stage", default="vqvae", metavar="RUN", help="reconstructs (default: %(default)s)")
    add("--samples", default="diffusion", metavar="FOLDER", help="new brains, or the run that drew them (default: "
        "%(default)s)")  # fmt: skip
    add("--data", metavar="FOLDER", help="as in training")
    add("--each", type=util.positive_int, default=8, metavar="N", help="slices of each kind (default: %(default)s)")
    add("--seed", type=util.seed, default=0, help="of people, z's and order (default: %(default)s)")
    add("--answers", type=Path, metavar="FILE", help="a reader's answers as JSON, to be scored")
    add("--out", type=Path, default=Path("playground_vis/guess"), help="folder (default: %(default)s)")
    return parser


@torch.no_grad()
def slices_by_kind(data: Slices, first_stage: Autoencoder, brains: Tensor, each: int, seed: int) -> np.ndarray:
    """Slices uint8 [kinds, each, S, S]; slice i of every kind has the same z, and z rises with i.

    Args:
        data: held-out people; nobody gives more than one slice.
        brains: new ones, uint8 [n, Z, S, S]; none gives more than one slice.
    Raises UserError where people, new brains or z's are too few, or sizes differ.
    """
    people, Z, size = data.whole_cases(), data.slices_per_brain, data.images.shape[-1]
    if brains.shape[1:3] != (Z, size):
        raise UserError(f"new brains have {brains.shape[1]} slices of {brains.shape[2]} px, {data.split} has {Z} of "
                        f"{size} px; give a first stage, samples and data that belong together")  # fmt: skip
    if each > (most := min(len(people) // 2, len(brains), Z)):
        raise UserError(f"--each {each}: {len(people)} held-out brains, half of them for each kind, {len(brains)} new "
                        f"brains and {Z} slices a brain allow at most {most}")  # fmt: skip
    generator = torch.Generator().manual_seed(util.mix_seed(seed, "guess"))
    z, some, new = (torch.randperm(n, generator=generator) for n in (Z, len(people), len(brains)))
    z = z[:each].sort().values
    at = people[some[: 2 * each]].gather(1, z.repeat(2)[:, None])[:, 0]
    x, _, case = data.batch(at[each:])
    drawn = []
    for picture, height, number in zip(x.split(1), z.split(1), case.tolist()):
        texture = util.brain_generator(seed, number, "texture")
        drawn.append(to_slices(first_stage.draw(first_stage.encode(picture, height), height, texture, Z)))
    return torch.stack([data.images[at[:each]], torch.cat(drawn), brains[new[:each], z]]).numpy()


def binomial_interval(right: int, count: int) -> tuple[float, float]:
    """Exact 95 % interval of a share of which `right` of `count` were seen (Clopper and Pearson 1934)."""
    share = np.linspace(0, 1, 10_001)

    def tail(least: int) -> np.ndarray:
        """The chance of `least` or more, which grows with the share."""
        some = range(least, count + 1)
        return sum((math.comb(count, k) * share**k * (1 - share) ** (count - k) for k in some), 0 * share)

    return float(np.interp(0.025, tail(right), share)), float(np.interp(0.975, tail(right + 1), share))


def fits(answer: str, kind: str) -> bool:
    """Whether an answer is right: the kind itself, or "not real" of what is not."""
    return answer == kind or (answer == "not real" and kind != "real")


def read_answers(path: Path, count: int) -> list[str]:
    """The answers to numbers 1 to count. Raises UserError where one is missing, or is no kind."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        answers = [found[str(number)] for number in range(1, count + 1)]
    except (ValueError, KeyError, TypeError):
        answers = [None]
    if not all(answer in (*KINDS, "not real") for answer in answers):
        raise UserError(f'{path} must have an answer to each of the numbers 1 to {count}: {{"1": "real", ...}}, '
                        'or "reconstructed", "new" or "not real"')  # fmt: skip
    return answers


def scores_of(key: list[str], answers: list[str]) -> dict[str, str]:
    """{each kind, and "all": its score in words}. Chance is what the same answers in random order have right."""
    lines = {}
    for kind in (*KINDS, "all"):
        at = [n for n, truth in enumerate(key) if kind in (truth, "all")]
        said, right = [answers[n] for n in at], sum(fits(answers[n], key[n]) for n in at)
        chance = sum(fits(answer, key[n]) for n in at for answer in answers) / len(at) / len(answers)
        low, high = binomial_interval(right, len(at))
        words = ", ".join(f"{answer} {said.count(answer)}" for answer in dict.fromkeys((*KINDS, *said)))
        lines[kind] = (f"{right} of {len(at)} right, {right / len(at):.0%} [{low:.0%}, {high:.0%}], by chance "
                       f"{chance:.0%}; said: {words}")  # fmt: skip
    return lines


def pages(slices: np.ndarray) -> list[Image.Image]:
    """Slices uint8 [n, H, W] with their numbers, from 1 on."""
    made, on_page = [], COLUMNS * ROWS
    for first in range(0, len(slices), on_page):
        shown = slices[first : first + on_page]
        title = f"Real, reconstructed or new? {first + 1} to {first + len(shown)} of {len(slices)}, as many of each"
        rows = [shown[at : at + COLUMNS] for at in range(0, len(shown), COLUMNS)]
        made.append(sheets.sheet(rows, title=title, captions=[f"{first + n}" for n in range(1, len(shown) + 1)]))
    return made


def answers_sheet(slices: np.ndarray, numbers: np.ndarray, answers: list[str]) -> Image.Image:
    """Slices uint8 [kinds, each, H, W] with number (numbers: [kinds, each]) and answer; wrong ones have a frame."""
    rows, captions = slices.copy(), []
    for (k, i), number in np.ndenumerate(numbers):
        answer = answers[number - 1]
        right = fits(answer, KINDS[k])
        captions.append(f"{number}: right" if right else f"{number}: wrong, said {answer}")
        if not right:
            rows[k, i] = np.pad(rows[k, i, FRAME:-FRAME, FRAME:-FRAME], FRAME, constant_values=150)
    title = "Answers of a reader who saw these slices without labels, in random order; grey frame: wrong"
    return sheets.sheet(list(rows), title=title, row_names=list(KINDS), captions=captions)


def main() -> None:
    args = flags().parse_args()
    first_stage = load_first_stage(args.first_stage, decoder=None)
    print(f"first stage: {args.first_stage}, {first_stage.decoder_in_use} decoder, on the CPU")
    data = load_slices(find_data(args.data), "validate", first_stage.image_size)
    brains, _, folder = load_samples(args.samples)
    print(f"new brains: {len(brains)} of {folder}")
    slices = np.stack(sheets.heads(list(slices_by_kind(data, first_stage, brains, args.each, args.seed))))
    order = torch.randperm(len(KINDS) * args.each, generator=util.brain_generator(args.seed, 0, "order")).numpy()
    key = {f"{number}": KINDS[at // args.each] for number, at in enumerate(order, 1)}
    key_file = args.out / "guess_key.json"
    if args.answers is None:
        for n, page in enumerate(pages(np.concatenate(slices)[order]), 1):
            sheets.save_picture(args.out / f"guess_{n}.png", page)
            print(f"page: {args.out / f'guess_{n}.png'}")
        util.write_file(key_file, json.dumps(key, indent=1).encode())
        print(f"key, to look at last: {key_file}")
        return
    answers = read_answers(args.answers, len(key))
    if not key_file.is_file() or json.loads(key_file.read_text()) != key:
        raise UserError(f"{key_file} is not of these pages; give --out, --seed and --each that they were drawn with")
    for kind, line in scores_of(list(key.values()), answers).items():
        print(f"{kind}: {line}")
    numbers = order.argsort().reshape(len(KINDS), args.each) + 1
    sheets.save_picture(args.out / "guess.png", answers_sheet(slices, numbers, answers))
    print(f"picture: {args.out / 'guess.png'}")


if __name__ == "__main__":
    util.command(main)
