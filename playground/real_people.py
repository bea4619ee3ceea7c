"""Would real people reach the targets set for samples?

    python playground/real_people.py

evaluate.py compares samples with up to 64 training brains, and divides each distance by that of as many held-out
brains, the floor. Here as many training brains as there are held-out ones take the place of the samples, drawn at
random from those outside the 64, again and again. Printed: median, 5th and 95th percentile of each distance, and of
their MS-SSIM, over the floor, and how many draws exceed 1.5 of it. A floor that happens to be low makes a target that
even people miss.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import util
from dataset import find_data, load_slices
from realism import REFERENCE, SAMPLE_SCORES, measure_real, spread_evenly, statistics_of, whole_cases
from scorer import TISSUES, find_scorer
from util import UserError

# those that are never negative, and how alike brains are
COMPARED = [name for name, (_, _, group) in SAMPLE_SCORES.items() if group == "distance" and "mmd2" not in name]
COMPARED.append("diversity")
LIMIT = 1.5


def main() -> None:
    parser = util.plain_parser(__doc__)
    add = parser.add_argument
    add("--data", metavar="FOLDER", help="as in training")
    add("--image-size", type=int, choices=(64, 128, 256), default=256, help="pixels a side (default: %(default)s)")
    add("--draws", type=util.positive_int, default=400, help="of real people (default: %(default)s)")
    add("--seed", type=util.seed, default=0, help="of the draws (default: %(default)s)")
    args = parser.parse_args()
    folder = find_data(args.data)
    train, held_out = (load_slices(folder, split, args.image_size) for split in ("train", "validate"))
    scorer, description = find_scorer()
    known, new = whole_cases(train), whole_cases(held_out)
    chosen = spread_evenly(known, REFERENCE)
    rest = known[~torch.isin(known, chosen)]
    if len(rest) < len(new):
        raise UserError(
            f"{folder} has {len(rest)} whole training cases outside the {len(chosen)} that are compared with; "
            f"{len(new)} are needed, as many as are held out"
        )
    parts = ((train, chosen), (train, rest), (held_out, new))
    reference, people, real = (measure_real(data, cases, scorer, description["digest"]) for data, cases in parts)
    of_people, of_real = statistics_of(people, reference), statistics_of(real, reference)

    generator = torch.Generator().manual_seed(args.seed)
    draws = [torch.randperm(len(rest), generator=generator)[: len(new)] for _ in range(args.draws)]
    print(f"{args.draws} draws of {len(new)} out of {len(rest)} training brains, over {len(new)} held-out ones:")
    over = {}
    for name in COMPARED:
        floor = of_real[name][0](torch.arange(len(new)))
        over[name] = torch.tensor([of_people[name][0](draw) for draw in draws]) / floor
        low, median, high = over[name].quantile(torch.tensor([0.05, 0.5, 0.95])).tolist()
        share = (over[name] > LIMIT).float().mean()
        print(
            f"{SAMPLE_SCORES[name][0]}: {median:.2f} [{low:.2f}, {high:.2f}], above {LIMIT:g} in {share:.0%}",
            flush=True,
        )
    areas = torch.stack([over[f"{tissue}_wasserstein"] for tissue in TISSUES])
    print(f"one tissue or another above {LIMIT:g}: {(areas > LIMIT).any(0).float().mean():.0%} of the draws")


if __name__ == "__main__":
    util.command(main)
