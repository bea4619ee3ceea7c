"""How much memory a training step needs, counted before the first one with tensors that have shapes but no numbers."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

COPIES = 5  # of what is trained: weights, their average, gradients, Adam's two moments


def activation_bytes(model: nn.Module, args: tuple, kwargs: dict, autocast: Callable) -> int:
    """Bytes that a forward pass of these arguments keeps for the backward pass.

    The model runs in evaluation mode, since in training a codebook would look at numbers that are not there.
    """
    mode = FakeTensorMode()
    fake = {name: mode.from_tensor(tensor) for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    args, kwargs = tree_map_only(Tensor, mode.from_tensor, (args, kwargs))
    weights = {tensor.untyped_storage()._cdata for tensor in fake.values()}
    kept: dict[int, int] = {}
    alive = []  # a storage that was freed could lend its address to another

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
            alive.append(tensor)
        return tensor

    training = {module: module.training for module in model.modules()}
    try:
        with mode, autocast(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            torch.func.functional_call(model.eval(), fake, args, kwargs)
    finally:
        for module, was in training.items():
            module.training = was
    return sum(kept.values())


def step_bytes(model: nn.Module, args: tuple, kwargs: dict, autocast: Callable) -> int:
    """Bytes at the peak of a training step: weights, averages, gradients, Adam's moments, and kept activations."""
    moving = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    resting = sum(t.numel() * t.element_size() for t in model.state_dict().values()) - moving
    return COPIES * moving + 2 * resting + activation_bytes(model, args, kwargs, autocast)


def in_words(count: int) -> str:
    """Such as "3.1 GB"."""
    power = min(3, int(math.log(max(count, 1), 1000)))
    return f"{count / 1000**power:.{0 if power < 2 else 1}f} {('bytes', 'kB', 'MB', 'GB')[power]}"
