"""Are labelled synthetic heads of use? A network that finds tissue learns from them, and is tested on real heads.

The network is a Scorer, a small U-Net, trained for tissue alone: on n synthetic heads with their masks, on n real ones
with theirs, and on both, 2 n heads. All three take the same number of steps with the same number of slices, so none is
better for having been trained longer. This is done for several seeds; a seed decides the first weights, the order of
slices, and which real heads are taken. The test is Dice on all held-out heads at 256 px.

A finished training is kept in data/cache: after an interruption the same command goes on with the next one.
"""

import hashlib
import json
import time
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import util
from dataset import CACHE, Slices, find_data, load_slices, to_float
from heads.layout import MASK_VALUES, list_slices, read_slice, release_folder
from scores.metrics import with_interval
from scores.page import markdown_table
from scores.samples import digest_of_code, with_intervals
from scores.scorer import SIZE, TISSUES, Scorer, overlaps
from training.checkpoints import cached
from training.optimizer import new_optimizers
from training.run import learning_rate_factor
from util import UserError

SETS = {"synthetic": ("synthetic",), "real": ("real",), "both": ("synthetic", "real")}  # what networks learn from
HEADS, SEEDS = 64, 3  # of each kind, at most; trainings on each set
STEPS, BATCH, RATE = 400, 16, 3e-3
CODE = ("util.py", "module.py", "dataset.py", "training/optimizer.py", "training/run.py", "scores/scorer.py",
        "scores/utility.py")  # which trains and tests  # fmt: skip
DRAW = "python stable_diffusion.py --sample --brains 71 --out NEW"  # HEADS of them are in train


# --------------------------------------------------------------------------------------------------------------- heads


def load_labelled(folder: Path, split: str, advice: str) -> Slices:
    """A split at 256 px with masks and at least one whole brain; a folder of bare slices counts as any split.

    Raises UserError, with this advice at its end, where it is anything else; and as load_slices.
    """
    side = len(read_slice(list_slices(folder, split)[0][2]))
    if side % SIZE:
        raise UserError(f"{folder}: slices of {split} have {side} px, but the network reads {SIZE} px; {advice}")
    try:
        list_slices(folder, split, "seg")
    except UserError:
        raise UserError(f"{folder}: {split} has no masks, seg_NNN_slice_Z.nii.png; {advice}") from None
    data = load_slices(folder, split, SIZE, masks=True)
    if not len(data.whole_cases()):
        raise UserError(f"{folder}: {split} has no brain with all {data.slices_per_brain} slices; {advice}")
    return data


def load_heads(samples: Path, data: str | None, split: str) -> tuple[Slices, Slices, Slices]:
    """(synthetic, real, held-out) slices with masks, of a folder of samples and of the data folder of --data.

    A folder of samples holds bare slices or has the release's layout, of which `train` is taken. Raises UserError as
    load_labelled, and where the samples are the data themselves.
    """
    if not samples.is_dir():
        raise UserError(f"--utility {samples}: there is no such folder; mend the path, or draw heads with: {DRAW}")
    synthetic = load_labelled(release_folder(samples), "train", f"draw others with: {DRAW}")
    folder = find_data(data)
    need = "give data that have some with --data"
    real, held_out = (load_labelled(folder, name, need) for name in ("train", split))
    if synthetic.digest in (real.digest, held_out.digest):
        raise UserError(f"--utility {samples}: these are the slices of {folder}; give a folder of new heads")
    return synthetic, real, held_out


def choose(name: str, synthetic: Slices, real: Slices, n: int, seed: int) -> list[tuple[Slices, Tensor]]:
    """What is learned from for a name of SETS: slices, and the positions int64 [n Z] there of those of n heads.

    These are the first n synthetic heads, and n real ones that the seed draws.
    """
    generator, whole = torch.Generator().manual_seed(util.mix_seed(seed, "real heads")), real.whole_cases()
    drawn = whole[torch.randperm(len(whole), generator=generator)[:n]]
    heads = {"synthetic": (synthetic, synthetic.whole_cases()[:n].flatten()), "real": (real, drawn.flatten())}
    return [heads[kind] for kind in SETS[name]]


# ------------------------------------------------------------------------------------------------- training and testing


def precision_of(device: torch.device) -> str:
    """As --precision: auto, but no float16, in which small gradients would be 0."""
    return "fp32" if util.autocast_dtype(device, "auto") == torch.float16 else "auto"


def fit(
    images: Tensor,
    masks: Tensor,
    seed: int,
    box: tuple[int, int, int, int],
    device: torch.device,
    *,
    steps: int,
    title: str = "trial",
    before: int = 0,
    total: int | None = None,
) -> Scorer:
    """A Scorer trained by cross-entropy to find the tissues of slices uint8 [N, 256, 256], whose masks are the same.

    Args:
        seed: of first weights and order.
        box: of Scorer.
        title, before, total: of the progress; steps of other trainings before it, and of all together.
    """
    torch.manual_seed(seed)
    scorer = Scorer(box=box).to(device, memory_format=torch.channels_last)
    optimizers, values = new_optimizers(scorer, RATE, matrices=scorer.matrices()), torch.tensor(MASK_VALUES)
    loss = torch.tensor(torch.nan)
    shown = util.progress(range(steps), title, total or steps, "step", before, lambda: f"loss {loss.item():.3g}")
    for step in shown:
        index = util.batch_index(seed, step, BATCH, len(images))
        with util.autocast(device, precision_of(device)):
            logits = scorer(to_float(images[index].to(device))[:, None])[0]
        loss = F.cross_entropy(logits.float(), torch.searchsorted(values, masks[index].long()).to(device))
        scorer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(scorer.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = RATE * learning_rate_factor(step, steps, warm_up=1 + steps // 10)
            optimizer.step()
    return scorer.eval()


@torch.no_grad()
def read(scorer: Scorer, held_out: Slices, device: torch.device) -> dict[str, Tensor]:
    """{"common", "sizes"}: float32 [brains, 3], sums of scorer.overlaps over the slices of each held-out brain."""
    owner, sums = held_out.case.unique(return_inverse=True)[1], []
    for index in torch.arange(len(held_out)).split(2 * BATCH):
        with util.autocast(device, precision_of(device)):
            logits = scorer(held_out.batch(index, device)[0])[0]
        sums.append(torch.stack(overlaps(logits.cpu(), held_out.masks[index])))
    common, sizes = torch.zeros(2, int(owner.max()) + 1, len(TISSUES)).index_add(1, owner, torch.cat(sums, 1))
    return {"common": common, "sizes": sizes}


def measure_utility(
    synthetic: Slices, real: Slices, held_out: Slices, n: int, device: torch.device
) -> dict[str, dict[str, Tensor]]:
    """{set of SETS: {"common", "sizes": float32 [SEEDS, brains, 3] of `read`}} of all trainings on n heads of a kind.

    Those that were finished before come from data/cache; says how long the others will take.
    """
    box = max((data.content_box() for data in (synthetic, real, held_out)), key=lambda box: box[2] * box[3])
    digests = {id(data): f"{data.digest} {digest_of(data.masks)}" for data in (synthetic, real, held_out)}
    settings, files = f"{digests[id(held_out)]} {box} {STEPS} {BATCH} {RATE} {digest_of_code(files=CODE)}", {}
    for seed, name in product(range(SEEDS), SETS):
        heads = [(digests[id(data)], at.tolist()) for data, at in choose(name, synthetic, real, n, seed)]
        key = hashlib.blake2b(f"{heads} {seed} {settings}".encode(), digest_size=8).hexdigest()
        files[name, seed] = f"{held_out.split}_utility_{key}"
    if waiting := sum(not (CACHE / f"{file}.safetensors").is_file() for file in files.values()):
        say_how_long(waiting, synthetic, held_out, box, device)
    found = {name: [] for name in SETS}
    for number, ((name, seed), file) in enumerate(files.items()):

        def train_and_read(name=name, seed=seed, before=number * STEPS) -> dict[str, Tensor]:
            heads = choose(name, synthetic, real, n, seed)
            images, masks = (torch.cat([getattr(data, part)[at] for data, at in heads]) for part in ("images", "masks"))
            shown = {"title": f"{name}, seed {seed}", "before": before, "total": len(files) * STEPS}
            return read(fit(images, masks, seed, box, device, steps=STEPS, **shown), held_out, device)

        found[name].append(cached(file, train_and_read))
    return {name: {key: torch.stack([one[key] for one in parts]) for key in parts[0]} for name, parts in found.items()}


def digest_of(pixels: Tensor) -> str:
    """16 hexadecimal digits of a tensor uint8 on the CPU."""
    return hashlib.blake2b(pixels.numpy(), digest_size=8).hexdigest()


def say_how_long(
    trainings: int, data: Slices, held_out: Slices, box: tuple[int, int, int, int], device: torch.device
) -> None:
    """Prints how long so many trainings with their tests will take, as two steps do; the very first is slower."""
    for count in (1, 2):
        began = time.monotonic()
        fit(data.images[:BATCH], data.masks[:BATCH], 0, box, device, steps=count)
    steps = STEPS + len(held_out) / BATCH * 2 / 3  # a test has no way back, the longer part of a step
    words = util.duration(trainings * steps * (time.monotonic() - began) / 2)
    print(f"{trainings} trainings of {STEPS} steps on {util.describe_device(device)}: about {words}", flush=True)


# ------------------------------------------------------------------------------------------------------------- results


def score_utility(part: dict[str, Tensor], real: dict[str, Tensor]) -> dict:
    """Scores of what measure_utility found of one set, and of the set "real".

    Dice is taken over all pixels of all brains together, and averaged over seeds. Returns {"dice_csf", "dice_grey",
    "dice_white", "dice": their mean, "ratio": that over the one of "real", each with its _interval over held-out
    brains; "seeds": the mean of each seed}.
    """

    def dice(x: dict[str, Tensor], i: Tensor) -> Tensor:  # [SEEDS, 3]
        return x["common"][:, i].sum(1) / x["sizes"][:, i].sum(1)

    brains = part["sizes"].shape[1]
    statistics = {"dice": lambda i: float(dice(part, i).mean()),
                  "ratio": lambda i: float(dice(part, i).mean() / dice(real, i).mean())}  # fmt: skip
    for k, tissue in enumerate(TISSUES):
        statistics[f"dice_{tissue}"] = lambda i, k=k: float(dice(part, i)[:, k].mean())
    scores = with_intervals({name: (statistic, brains) for name, statistic in statistics.items()}, 200)
    return scores | {"seeds": dice(part, torch.arange(brains)).mean(1).tolist()}


def utility_table(report: dict) -> str:
    """The result of a report of write_utility as a table in Markdown."""
    rows, n = [], report["heads"]
    for name, scores in report["result"].items():
        cells = [name, str(n * len(SETS[name]))]
        cells += [with_interval(scores, score, ".3f") for score in (*(f"dice_{tissue}" for tissue in TISSUES), "dice")]
        cells += [", ".join(f"{dice:.3f}" for dice in scores["seeds"])]
        rows.append([*cells, "1" if name == "real" else with_interval(scores, "ratio", ".3f")])
    return markdown_table(["learned from", "heads", *TISSUES, "mean Dice", "each seed", "mean over real"], rows)


def page(report: dict) -> str:
    """The page: what was done, and the table."""
    held_out = report["data"]["held_out"]
    return f"""# Are these heads of use?

A small network learned to find tissue in slices: from {report["heads"]} synthetic heads of `{report["samples"]}` with
their masks, from {report["heads"]} real training heads with theirs, and from both. Each training had {report["steps"]}
steps of {report["batch_size"]} slices. Then the network read all {held_out["cases"]} real heads of
`{held_out["split"]}` at {SIZE} px. Dice is twice the common area of what was read and of the mask, over the sum of both
areas; it is averaged over {len(report["result"]["real"]["seeds"])} trainings with other seeds.

{utility_table(report)}

Brackets hold 95 % intervals over the heads of `{held_out["split"]}`; what a seed changes stands beside them. Masks of
new heads are those that came with them. If the scorer drew these masks, it learned that from real ones.
"""


def write_utility(
    samples: Path, splits: tuple[Slices, Slices, Slices], out: Path, n: int, device: torch.device
) -> dict:
    """Measures the use of samples, and writes out/utility_SPLIT.json and .md.

    Args:
        samples: their folder, for the page.
        splits: from load_heads.
        n: heads of a kind to learn from, or as many as there are.
    Returns what the JSON file holds.
    """
    synthetic, real, held_out = splits
    n = min(n, len(synthetic.whole_cases()), len(real.whole_cases()))
    print(f"to learn from: {n} synthetic heads, {n} real ones, and both")
    found = measure_utility(synthetic, real, held_out, n, device)
    report = {"samples": str(samples), "heads": n, "steps": STEPS, "batch_size": BATCH, "size": SIZE}
    report |= {"data": {"synthetic": synthetic.describe(), "train": real.describe(), "held_out": held_out.describe()}}
    report["result"] = {name: score_utility(part, found["real"]) for name, part in found.items()}
    report |= {"commit": util.commit_of_code(), "versions": util.versions()}
    name = f"utility_{held_out.split}"
    util.write_file(out / f"{name}.json", json.dumps(report, indent=2, allow_nan=False).encode())
    util.write_file(out / f"{name}.md", page(report).encode())
    return report
