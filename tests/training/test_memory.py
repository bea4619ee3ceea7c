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
from training.memory import COPIES, activation_bytes, in_words, step_bytes


def autoencoder(kind: type, **more):
    def build(sizes: dict) -> tuple[nn.Module, callable]:
        return kind(**sizes, **more), lambda B: ((torch.rand(B, 1, 64, 64), torch.arange(B)), {})

    return build


def diffusion(sizes: dict) -> tuple[nn.Module, callable]:
    model = LatentDiffusion(latent_shape=(4, 6, 7), widths=(8, 16), blocks=1, slices=2, slices_per_brain=4, modes=2)

    def batch(B: int) -> tuple[tuple, dict]:
        visible = torch.arange(0, B, 4).repeat_interleave(2) + torch.arange(2).repeat(B // 4)
        return (), {"latent": torch.randn(B, 4, 6, 7), "z": torch.arange(4).repeat(B // 4), "slices": 4,
                    "visible": visible, "people": None}  # fmt: skip

    return model, batch


def pixelcnn(sizes: dict) -> tuple[nn.Module, callable]:
    model = PixelCNN(codebook_size=16, grid=(6, 7), channels=8, layers=2, dropout=0.0)
    return model, lambda B: ((torch.randint(16, (B, 6, 7)), torch.arange(B)), {})


MODELS = {
    "vae": autoencoder(VAE),
    "vqvae": autoencoder(VQVAE, codebook_size=16),
    "fsq": autoencoder(VQVAE, levels=(3, 3, 3, 3)),
    "vqvae2": autoencoder(VQVAE2, codebook_size=16),
    "diffusion": diffusion,
    "pixelcnn": pixelcnn,
}


@pytest.fixture(params=MODELS)
def model_and_batch(request, tiny_sizes):
    return MODELS[request.param](tiny_sizes)


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
def test_predicted_activations_are_those_of_a_real_forward(model_and_batch, precision):
    """To the byte in float32, counted from outside. In bfloat16 a CPU keeps some statistics in float32: within 1 %.

    The prediction leaves no trace, neither in the model nor in randomness.
    """
    model, batch = model_and_batch
    args, kwargs = batch(4)
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


def test_activations_grow_linearly_with_the_batch(model_and_batch):
    """Three batch sizes lie on a line that begins near zero."""
    model, batch = model_and_batch
    small, middle, large = (activation_bytes(model, *batch(B), nullcontext) for B in (4, 8, 12))
    assert large - middle == pytest.approx(middle - small, rel=0.02) and middle == pytest.approx(2 * small, rel=0.1)


def test_a_step_needs_copies_of_what_moves_and_two_of_what_rests():
    """Adam keeps two moments of each weight; what is frozen has only its average beside it."""
    model = nn.Sequential(nn.Linear(10, 20, bias=False), nn.Linear(20, 30, bias=False))
    model[0].requires_grad_(False)
    args = (torch.rand(5, 10),)
    activations = activation_bytes(model, args, {}, nullcontext)
    assert step_bytes(model, args, {}, nullcontext) == 4 * (COPIES * 600 + 2 * 200) + activations
    assert activations == 4 * 5 * 20  # the input of the layer that learns


def test_bytes_in_words():
    words = [in_words(count) for count in (0, 999, 1500, 3_100_000, 3_140_000_000, 2_500_000_000_000)]
    assert words == ["0 bytes", "999 bytes", "2 kB", "3.1 MB", "3.1 GB", "2500.0 GB"]
