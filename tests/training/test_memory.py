"""Laws of training/memory.py: what is predicted of a step is what a real one keeps."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn

import util
from model_diffusion import LatentDiffusion
from model_VAE import VAE, VQVAE, VQVAE2
from pixelCNN import PixelCNN
from training.memory import COPIES, activation_bytes, step_bytes


def pictures() -> tuple:
    return torch.rand(4, 1, 64, 64), torch.arange(4)


DIFFUSION = {"latent_shape": (4, 6, 7), "widths": (8, 16), "blocks": 1, "slices": 2, "slices_per_brain": 4, "modes": 2}
LATENTS = {"latent": torch.randn(4, 4, 6, 7), "z": torch.arange(4), "slices": 2, "people": None}
LATENTS["projections"] = torch.randn(2, 2)
CODES = {"codebook_size": 16, "grid": (6, 7), "channels": 8, "layers": 2, "dropout": 0.0}
MODELS = {  # of the sizes of autoencoders: the model and what it is called with
    "vae": lambda sizes: (VAE(**sizes), pictures(), {}),
    "vqvae": lambda sizes: (VQVAE(**sizes, codebook_size=16), pictures(), {}),
    "fsq": lambda sizes: (VQVAE(**sizes, levels=(3, 3, 3, 3)), pictures(), {}),
    "vqvae2": lambda sizes: (VQVAE2(**sizes, codebook_size=16), pictures(), {}),
    "diffusion": lambda sizes: (LatentDiffusion(**DIFFUSION), (), LATENTS),
    "pixelcnn": lambda sizes: (PixelCNN(**CODES), (torch.randint(16, (4, 6, 7)), torch.arange(4)), {}),
}


def kept_by_a_real_forward(model: nn.Module, args: tuple, kwargs: dict, autocast) -> int:
    """Bytes of all storages that autograd keeps, weights and inputs but for the model's own left out."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept, alive = {}, []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with autocast(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model.eval()(*args, **kwargs)  # noqa: F841, the graph lives as long as the loss
    return sum(kept.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_predicted_activations_are_those_of_a_real_forward(tiny_sizes, name, precision):
    """To the byte in float32; in bfloat16 a CPU keeps some statistics in float32. It leaves no trace."""
    model, args, kwargs = MODELS[name](tiny_sizes)
    autocast = partial(util.autocast, torch.device("cpu"), precision)
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(5)
    predicted = activation_bytes(model, args, kwargs, autocast)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3)) and all(module.training for module in model.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    real = kept_by_a_real_forward(model, args, kwargs, autocast)
    assert predicted == (real if precision == "fp32" else pytest.approx(real, rel=0.01)) and real > 10_000


def test_a_step_needs_copies_of_what_moves_and_two_of_what_rests():
    """Adam keeps two moments of each weight; what is frozen has only its average beside it."""
    model = nn.Sequential(nn.Linear(10, 20, bias=False), nn.Linear(20, 30, bias=False))
    model[0].requires_grad_(False)
    args = (torch.rand(5, 10),)
    activations = activation_bytes(model, args, {}, nullcontext)
    assert step_bytes(model, args, {}, nullcontext) == 4 * (COPIES * 600 + 2 * 200) + activations
    assert activations == 4 * 5 * 20  # the input of the layer that learns
