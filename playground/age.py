"""Does a requested age change the brain as age does? One head from 20 to 90, and the CSF of many heads against age.

    python playground/age.py --run diffusion            # a run trained with --conditions age ..., or a weights file

Left: one head, the same noise, only the requested age differs; three of its slices, anterior right. Right: the area of
cerebrospinal fluid, mean over the 32 slices, against age, of the real validation cases and of as many sampled heads,
each with the age, sex and CDR of one of those cases and a noise of its own. Both are measured by scorer.py's network,
which knows no age. Printed: Pearson's correlation of either, with 95 % intervals by bootstrap over heads. With
--heads-to DIR, evaluate.py --samples DIR then scores heads of the very people that they are compared with.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import stable_diffusion
import util
from dataset import SLICES_PER_CASE, find_data, load_slices, people_table, write_slices
from heads.people import read_people
from model_diffusion import LatentDiffusion
from model_VAE import load_second_stage
from pictures import sheets
from scores.scorer import csf_area, find_scorer
from stable_diffusion import decode_brain, sample_latents
from util import UserError

AGES = range(20, 91, 10)
SHOWN = (6, 16, 26)


def correlation(age: np.ndarray, area: np.ndarray, resamples: int = 2000, seed: int = 0) -> tuple[float, list[float]]:
    """Pearson's r of two [N], and its 95 % interval by bootstrap over heads."""
    picks = np.random.default_rng(seed).integers(len(age), size=(resamples, len(age)))
    draws = [np.corrcoef(age[pick], area[pick])[0, 1] for pick in picks]
    return float(np.corrcoef(age, area)[0, 1]), np.nanpercentile(draws, (2.5, 97.5)).tolist()


def main() -> None:
    parser = util.plain_parser(__doc__)
    add = parser.add_argument
    add("--run", default="diffusion", help="second stage: run name, folder or weights file (default: %(default)s)")
    add("--data", metavar="FOLDER", help="as in training")
    add("--heads", type=util.positive_int, default=35, help="to sample at most (default: %(default)s)")
    add("--seed", type=util.seed, default=0, help="of the noise (default: %(default)s)")
    add("--sample-steps", type=util.positive_int, default=20, help="of the sampler dpm (default: %(default)s)")
    add("--guidance", type=float, default=1.0, help="as in stable_diffusion.py (default: %(default)s, off)")
    util.add_decoder_flag(parser, None, "perceptual where there is one")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    add("--heads-to", type=Path, metavar="DIR", help="write the sampled heads of the right-hand plot there as slices")
    add("--out", type=Path, default=Path("playground_vis/age.png"), help="picture (default: %(default)s)")
    args = parser.parse_args()
    if args.heads_to and args.heads_to.is_dir() and any(args.heads_to.iterdir()):
        raise UserError(f"--heads-to {args.heads_to} is not empty: heads would mix; choose another folder")
    device, folder = util.pick_device(args.device), find_data(args.data)
    table = people_table(folder)
    if table is None:
        raise UserError(f"the ages of the cases in {folder} are not known; put oasis_cross-sectional.csv into it")
    model, first_stage, description = load_second_stage(args.run, LatentDiffusion, device, args.decoder)
    if "age" not in model.conditions:
        raise UserError(f"{args.run} was trained without ages; train one with: stable_diffusion.py --conditions age")
    scorer = find_scorer()[0].to(device)
    data, people = load_slices(folder, "validate", first_stage.image_size), read_people(table)
    whole = data.case.unique(return_counts=True)
    cases = [int(case) for case, count in zip(*whole, strict=True) if count == SLICES_PER_CASE and int(case) in people]
    cases = cases[: args.heads]
    age = np.array([people[case]["age"] for case in cases])

    settings = stable_diffusion.flags().parse_args([])  # the defaults of sampling
    settings.seed, settings.sample_steps, settings.guidance = args.seed, args.sample_steps, args.guidance

    def sample(number: int, person: dict[str, float]) -> torch.Tensor:
        """uint8 [32, S, S]: head `number` of a person."""
        latent = sample_latents(model, range(number, number + 1), settings, device, person=person)[-1]
        return torch.from_numpy(decode_brain(first_stage, latent, args.seed, number))

    def area(slices: torch.Tensor) -> float:
        return float(csf_area(scorer, slices).mean())

    youngest, oldest = description["people"]["age"]
    ages = [years for years in AGES if youngest <= years <= oldest]
    head = [sample(0, {"age": years}) for years in tqdm(ages, desc="one head", disable=None)]
    sampled = []
    for n, case in enumerate(tqdm(cases, desc="heads", disable=None)):
        slices = sample(1 + n, people[case])
        sampled.append(area(slices))
        if args.heads_to:
            write_slices(args.heads_to, n, slices.numpy())
    real = [area(data.images[data.case == case].cpu()) for case in cases]
    groups = {"real": np.array(real), "sampled": np.array(sampled)}

    figure = plt.figure(figsize=(15, 4), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(2.1, 1))
    for row, z in zip(left.subplots(len(SHOWN), len(ages)), SHOWN, strict=True):
        for cell, years, slices in zip(row, ages, head, strict=True):
            cell.imshow(slices[z, 40:216, 24:232] if slices.shape[-1] == 256 else slices[z], "gray", vmin=0, vmax=255)
            cell.set(xticks=[], yticks=[])
            if z == SHOWN[0]:
                cell.set_title(f"{years} years\nCSF {area(slices):.0f} mm$^2$", fontsize=9)
        row[0].set_ylabel(f"z = {z}")
    left.suptitle(f"one head, one noise, the age alone differs; {description['step']:,} steps, seed {args.seed}")
    axis = right.subplots()
    for (name, areas), colour in zip(groups.items(), ("black", "C3"), strict=True):
        r, (low, high) = correlation(age, areas)
        print(f"{name:8s} correlation of CSF area with age {r:.3f} [{low:.3f}, {high:.3f}] over {len(age)} heads, "
              f"CSF {areas.mean():.0f} mm^2, sd {areas.std():.0f}")  # fmt: skip
        axis.scatter(age, areas, color=colour, s=16, label=f"{name}: r = {r:.2f} [{low:.2f}, {high:.2f}]")
        axis.plot(np.sort(age), np.polyval(np.polyfit(age, areas, 1), np.sort(age)), color=colour)
    axis.set(xlabel="age, years", ylabel="CSF per slice, mm$^2$", title=f"{len(age)} people of validate")
    axis.legend()
    axis.grid(alpha=0.3)
    sheets.save_picture(args.out, figure)
    print(f"picture: {args.out}")


if __name__ == "__main__":
    util.command(main)
