"""Would real people reach the targets set for samples?

    python playground/real_people.py

evaluate.py compares samples with all training brains, and divides each distance by that of as many held-out brains,
the floor. Here as many training brains as there are held-out ones take the place of the samples, drawn at random, again
and again, and are compared with all the others. Printed: median, 5th and 95th percentile of each distance, and of their
MS-SSIM, over the floor, and how many draws exceed 1.5 of it. A floor that happens to be low makes a target that even
people miss.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

import util
from dataset import find_data, load_slices
from scores.samples import SAMPLE_SCORES, check_slices, measure_real, statistics_of, whole_brains
from scores.scorer import TISSUES, find_scorer
from util import UserError

# distances that are never negative, and how alike brains are
DISTANCES = [name for name, score in SAMPLE_SCORES.items() if score.group == "distance" and not score.signed]
COMPARED = [*DISTANCES, "diversity"]
LIMIT = 1.5


def flags() -> argparse.ArgumentParser:
    """This script's command line."""
    parser = util.plain_parser(__doc__)
    add = parser.add_argument
    add("--data", metavar="FOLDER", help="as in training")
    add("--image-size", type=util.positive_int, default=256, help="pixels a side (default: %(default)s)")
    add("--draws", type=util.positive_int, default=100, help="of real people (default: %(default)s)")
    add("--seed", type=util.seed, default=0, help="of the draws (default: %(default)s)")
    return parser


def scores_of(brains: dict[str, Tensor], reference: dict[str, Tensor]) -> dict[str, float]:
    """The scores COMPARED of measured brains, each against the reference."""
    scores = statistics_of(brains, reference)
    return {name: scores[name][0](torch.arange(scores[name][1])) for name in COMPARED}


def main() -> None:
    args = flags().parse_args()
    folder, (scorer, description) = find_data(args.data), find_scorer()
    splits = [load_slices(folder, split, args.image_size) for split in ("train", "validate")]
    check_slices(splits[1].slices_per_brain, splits, scorer)
    known, new = (whole_brains(data) for data in splits)
    if len(known) < 2 * len(new):
        raise UserError(f"{folder} has {len(known)} whole training brains; {2 * len(new)} are needed, two a held-out")
    people, real = (measure_real(data, positions, scorer, description["digest"])
                    for data, positions in zip(splits, (known, new), strict=True))  # fmt: skip
    floor, drawn = scores_of(real, people), []
    generator = torch.Generator().manual_seed(args.seed)
    for _ in util.progress(range(args.draws), "draws"):
        order = torch.randperm(len(known), generator=generator)
        some, others = ({name: values[i] for name, values in people.items()} for i in order.tensor_split([len(new)]))
        drawn.append(scores_of(some, others))
    print(f"{args.draws} draws of {len(new)} out of {len(known)} training brains, over {len(new)} held-out ones:")
    over = {name: torch.tensor([one[name] for one in drawn]) / floor[name] for name in COMPARED}
    for name, ratio in over.items():
        low, median, high = ratio.quantile(torch.tensor([0.05, 0.5, 0.95])).tolist()
        share = (ratio > LIMIT).float().mean()
        print(f"{SAMPLE_SCORES[name].title}: {median:.2f} [{low:.2f}, {high:.2f}], above {LIMIT:g} in {share:.0%}")
    areas = torch.stack([over[f"{tissue}_wasserstein"] for tissue in TISSUES])
    print(f"one tissue or another above {LIMIT:g}: {(areas > LIMIT).any(0).float().mean():.0%} of the draws")


if __name__ == "__main__":
    util.command(main)
