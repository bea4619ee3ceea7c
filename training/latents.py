"""Latents to train diffusion on: every slice of a split, encoded once by the first stage, and windows of neighbours.

Heads may be moved: turned, scaled and shifted a little as a whole, and then encoded too.
"""

import argparse
import hashlib

import numpy as np
import torch
from torch import Tensor

import util
from dataset import Slices, move, random_moves
from heads.people import count_people, describe_people
from model_diffusion import MOVES, LatentDiffusion
from parts.autoencoder import Autoencoder
from training.checkpoints import cached


@torch.no_grad()
def encode_all(first_stage: Autoencoder, data: Slices, precision: str, moves: Tensor | None = None) -> Tensor:
    """Latents float32 [N, C, h, w] of a whole split, kept on the device; of slices moved by moves [N, 4].

    They are kept in data/cache too, in half precision, to which they are rounded: a run that goes on does not encode
    again. `precision` is as the flag --precision.
    """
    device = first_stage.latent_mean.device
    made_of = f"{first_stage.description['digest']} {data.digest} {util.autocast_dtype(device, precision)}".encode()
    key = hashlib.blake2b(made_of + (b"" if moves is None else moves.numpy().tobytes()), digest_size=8).hexdigest()

    def encode() -> dict[str, Tensor]:
        latents = []
        for index in util.progress(torch.arange(len(data)).split(64), f"encode {data.split}", unit="batch"):
            x, z, _ = data.batch(index, device)
            if moves is not None:
                x = move(x, moves[index], mode="bicubic").clamp(-1, 1)
            with util.autocast(device, precision):
                latents.append(first_stage.encode(x, z).half())
        return {"latents": torch.cat(latents)}

    name = f"{data.split}_latents_{data.images.shape[-1]}px_{key}"
    return cached(name, encode)["latents"].to(device).float()


def head_moves(data: Slices, copies: int, seed: int) -> list[Tensor]:
    """How far each of so many copies of a split is moved, float32 [N, 4] as in dataset.move, a head as a whole."""
    cases, case = data.case.unique(return_inverse=True)
    generators = (torch.Generator().manual_seed(util.mix_seed(seed, "moves", copy)) for copy in range(copies))
    return [random_moves(len(cases), generator)[case] for generator in generators]


def window_starts(data: Slices, slices: int) -> Tensor:
    """Positions int64 [n] where training windows of `slices` neighbouring slices begin, in data ordered by case and z.

    A window that would reach beyond an end of its brain is moved inwards; so the slices at the ends are seen as often
    as all others. Raises UserError when windows are asked for and a brain lacks slices.
    """
    if slices == 1:
        return torch.arange(len(data))
    data.check_whole_cases(f"--slices {slices}")
    Z = data.slices_per_brain
    offset = torch.arange(1 - slices, Z).clamp(0, Z - slices)
    return (torch.arange(0, len(data), Z)[:, None] + offset).flatten()


class TrainingLatents:
    """The training set as latents: every slice once as it is, and once more for each time that heads are moved.

    Args:
        conditions: what is known of people, of heads.people.CONDITIONS.
        args: a trainer's: its precision and slices; add_moved takes its moved_heads and seed.
    Attributes: latents [copies N, C, h, w], z [N], people [N, K] as numbers, Z (the slices of a brain), whole [n, Z]
    (where whole brains lie), starts {slices of a window: where windows begin in all copies}, moves [copies N, 4],
    projections [copies N / Z, modes] or None, described (of the people, for the file of weights).
    """

    def __init__(self, data: Slices, first_stage: Autoencoder, conditions: list[str], args: argparse.Namespace):
        device = first_stage.latent_mean.device
        self.latents = encode_all(first_stage, data, args.precision)
        self.z, self.people = data.z.to(device), data.people(conditions).to(device)
        self.whole, self.Z = data.whole_cases().to(device), data.slices_per_brain
        self.starts = {slices: window_starts(data, slices) for slices in (1, args.slices)}
        self.moves = torch.zeros(len(self.z), MOVES, device=device)
        self.projections = None
        first = torch.from_numpy(np.unique(data.case.numpy(), return_index=True)[1])
        self.described = {"people": describe_people(self.people, conditions),
                          "people_counts": count_people(self.people[first], conditions)}  # fmt: skip

    def add_moved(self, data: Slices, first_stage: Autoencoder, args: argparse.Namespace) -> None:
        """Encodes every head args.moved_heads times more."""
        moves, N = head_moves(data, args.moved_heads, args.seed), len(self.z)
        moved = [encode_all(first_stage, data, args.precision, by) for by in moves]
        self.latents = torch.cat([self.latents, *moved])
        self.moves = torch.cat([self.moves, *(by.to(self.moves.device) for by in moves)])
        for slices, starts in self.starts.items():
            self.starts[slices] = torch.cat([starts + copy * N for copy in range(1 + args.moved_heads)])

    def project(self, model: LatentDiffusion) -> None:
        """What a prior with modes sees of the brain around every window."""
        if len(model.gaussian.modes):
            brains = self.latents.unflatten(0, (-1, self.Z)).split(16)
            self.projections = torch.cat([model.gaussian.project(part) for part in brains])

    def batch(self, windows: Tensor, slices: int) -> dict[str, Tensor]:
        """The arguments of LatentDiffusion.forward for some windows, int64 [n] positions in starts[slices]."""
        first = self.starts[slices][windows].to(self.latents.device)
        index = (first[:, None] + torch.arange(slices, device=first.device)).flatten()
        slice_ = index % len(self.z)  # copies of the split follow each other
        return {
            "latent": self.latents[index],
            "z": self.z[slice_],
            "slices": slices,
            "people": self.people[slice_],
            "moves": self.moves[index],
            "projections": None if self.projections is None else self.projections[first // self.Z],
        }
