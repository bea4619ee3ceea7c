"""Nothing stays behind on the CPU: models and samplers on a GPU that is not there.

Tensors of FakeTensorMode have a device and a shape but no numbers, and torch's rules about devices hold for them as for
real ones. Models are made on "cuda"; then a tensor that the code makes without saying where is on the CPU, and does not
fit the others.
"""

from collections.abc import Callable
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

import model_diffusion
import prestage_train
import stable_diffusion
from heads.people import CONDITIONS
from model_diffusion import RECIPES, SAMPLERS, LatentDiffusion
from model_discriminator import PatchDiscriminator, relativistic_loss
from model_VAE import VAE, VQVAE, VQVAE2
from parts.autoencoder import Autoencoder
from pixelCNN import PixelCNN, PixelCNN2, brain_noise
from scores.scorer import Scorer

CUDA = torch.device("cuda")
Z = 4  # slices of a brain


@contextmanager
def made_on_cuda():
    """What is made in it is on the GPU that is not there."""
    with FakeTensorMode(allow_non_fake_inputs=False) as mode, CUDA:
        yield mode


def can_pretend() -> bool:
    """PyTorch 2.9 asks the driver for the state of the GPU's generator, though there are no numbers to be drawn."""
    try:
        with made_on_cuda():
            torch.empty(2).uniform_()
    except RuntimeError:
        return False
    return True


pytestmark = pytest.mark.skipif(not can_pretend(), reason="this PyTorch needs a driver to pretend")


def on_cuda(*shape: int) -> Tensor:
    return torch.rand(shape, device=CUDA)


def cpu_generator() -> torch.Generator:
    return torch.Generator("cpu").manual_seed(0)


def use_autoencoder(model: Autoencoder) -> list:
    x, z = on_cuda(Z, 1, 64, 64), torch.arange(Z, device=CUDA)
    box, losses = model.train()(x, z)
    out = [box, losses, prestage_train.reconstruction_loss(box, model.crop(x))]
    model.eval()
    for decoder in ("fidelity", "perceptual"):
        model.use_decoder(decoder)
        latent = model.encode(x, z)
        out += [latent, model.decode(latent, z), model.reconstruct(x, z), model.prior_latent(2, cpu_generator())]
        out += [model(x, z)[0], model.draw(latent, z, cpu_generator()), model.channel_weight()]
        out += [model.draw(latent[1:3], z[1:3], cpu_generator(), Z)]
    model.set_latent_statistics([(x, z)])
    if not isinstance(model, VAE):
        idx = model.encode_indices(x, z)
        out += [idx, model.decode_indices(idx, z), model.dequantise(idx)]
    latent = prestage_train.latents_of(model, x, z)
    return [*out, latent, model.faithful(latent, z), model.latent_mean]


def use_discriminator(model: PatchDiscriminator) -> list:
    """What it sees, its logits and all losses. Nothing goes backward without a GPU."""
    x, z = on_cuda(Z, 1, 64, 64), torch.arange(Z, device=CUDA)
    planes = model.planes(x, x.flip(0))
    real, drawn = model.train()(planes, z), model.eval()(planes, z)
    return [planes, real, drawn, relativistic_loss(real, drawn), prestage_train.smooth(x, prestage_train.BLUR)]


def use_recipe(model: LatentDiffusion) -> list:
    latent, z = on_cuda(2 * Z, *model.latent_shape), torch.arange(Z, device=CUDA).repeat(2)
    return [model(latent, z, slices=Z), model.denoise(latent, 1, z, Z), model.draw_times(2)]


def use_diffusion(model: LatentDiffusion) -> list:
    latent, z = on_cuda(2 * Z, *model.latent_shape), torch.arange(Z, device=CUDA).repeat(2)
    people, moves, projections = on_cuda(2 * Z, len(CONDITIONS)), on_cuda(2 * Z, 4), on_cuda(2, 2)
    out = [model.train()(latent, z, slices=Z, people=people, moves=moves, projections=projections)]
    out += [model.eval()(latent, z, slices=1), model.draw_times(3)]
    alpha, sigma, heads = model.alpha, model.sigma, model.minus_mean(latent, 1, z)
    model.calibration.reset(torch.linspace(4, -4, 20, device=CUDA))
    model.calibration.measure_power(heads)
    model.calibration.measure(3, alpha[1].float(), heads, heads)
    draw = stable_diffusion.BrainNoise(model, 0, range(2))
    sampling = stable_diffusion.Sampling(precision="fp32")
    denoise = stable_diffusion.denoiser(model, people[::Z], z, sampling)
    nothing = stable_diffusion.denoiser(model, people[::Z] * torch.nan, z * torch.nan, sampling)
    denoise = model.calibrated(model_diffusion.guide(denoise, nothing, 2.0), z)
    for sampler in SAMPLERS.values():
        out += list(sampler(denoise, draw(), alpha, sigma, 3, draw))
    return [*out, model.calibration.weight, model.calibration.power]


def use_pixelcnn(model: PixelCNN | PixelCNN2) -> list:
    z = torch.arange(Z, device=CUDA)
    idx = tuple(torch.randint(16, (Z, *grid), device=CUDA) for grid in model.grids)
    idx = idx if isinstance(model, PixelCNN2) else idx[0]
    noise = brain_noise(model, 0, 0)
    noise = tuple(part.to(CUDA) for part in noise) if isinstance(noise, tuple) else noise.to(CUDA)
    return [model(idx, z), model.bits(idx, z), model.sample(z, noise, 0.9, 0.8)]


SIZES = {"image_size": 64, "box": (8, 4, 48, 56), "patch": 2, "widths": (8, 16), "blocks": 1, "latent_channels": 4}
SIZES |= {"perceptual": True}
DIFFUSION = {"latent_shape": (4, 6, 7), "widths": (4, 8), "blocks": 1, "slices": 2, "slices_per_brain": Z, "modes": 2}
DIFFUSION |= {"conditions": tuple(CONDITIONS), "moved": True, "T": 3}
CODES = {"codebook_size": 16, "channels": 8, "layers": 2, "slices_per_brain": Z}
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], list]]] = {
    "vae": (lambda: VAE(**SIZES), use_autoencoder),
    "vqvae": (lambda: VQVAE(**SIZES, codebook_size=16), use_autoencoder),
    "fsq": (lambda: VQVAE(**SIZES, levels=(3, 3, 3, 3)), use_autoencoder),
    "vqvae2": (lambda: VQVAE2(**SIZES, codebook_size=16), use_autoencoder),
    "discriminator": (lambda: PatchDiscriminator(channels=(8, 8, 8)), use_discriminator),
    "diffusion": (lambda: LatentDiffusion(**DIFFUSION), use_diffusion),
    **{name: (lambda name=name: LatentDiffusion(**DIFFUSION, recipe=name), use_recipe) for name in RECIPES},
    "pixelcnn": (lambda: PixelCNN(**CODES, grid=(4, 6)), use_pixelcnn),
    "pixelcnn of digits": (lambda: PixelCNN(**CODES, grid=(4, 6), levels=(4, 4)), use_pixelcnn),
    "pixelcnn2": (lambda: PixelCNN2(**CODES, grids=((2, 3), (4, 6))), use_pixelcnn),
    "scorer": (Scorer, lambda model: [model(on_cuda(2, 1, size, size)) for size in (64, 256)]),
}


@pytest.fixture(autouse=True)
def times(monkeypatch):
    """Samplers look at numbers once, to choose their times; here these are given."""
    monkeypatch.setattr(model_diffusion, "sampling_times", lambda alpha, sigma, steps: [2, 1, 0])


@pytest.mark.parametrize("name", MODELS)
def test_all_that_a_model_gives_is_on_its_device(name):
    make, use = MODELS[name]
    with made_on_cuda() as mode:
        model = make()
    with mode:
        out = [leaf for leaf in tree_leaves(use(model)) if isinstance(leaf, Tensor)]
    assert len(out) > 2 and {tensor.device.type for tensor in out} == {"cuda"}
    assert {tensor.device.type for tensor in [*model.parameters(), *model.buffers()]} == {"cuda"}


def left_on_the_cpu(name: str, tensor: str) -> bool:
    """Whether a model with one tensor on the CPU fails, by torch's rules about devices."""
    make, use = MODELS[name]
    with made_on_cuda() as mode:
        model = make()
    with mode:
        path, _, last = tensor.rpartition(".")
        module = model.get_submodule(path)
        moved = getattr(module, last).detach().to("cpu")
        setattr(module, last, nn.Parameter(moved) if last in module._parameters else moved)
        try:
            use(model)
        except RuntimeError as error:
            assert "device" in str(error).lower() and "cpu" in str(error).lower(), error
            return True
    return False


@pytest.mark.parametrize("name", ["vae", "vqvae", "fsq", "vqvae2", "diffusion"])
def test_a_buffer_left_on_the_cpu_is_found(name):
    """Whichever it is: the test above can fail. Only single numbers fit tensors of any device."""
    with made_on_cuda():
        buffers = [buffer for buffer, tensor in MODELS[name][0]().named_buffers() if tensor.ndim]
    assert buffers and [buffer for buffer in buffers if not left_on_the_cpu(name, buffer)] == []


@pytest.mark.parametrize("name, weight", [("pixelcnn", "position"), ("pixelcnn2", "bottom.layers.1.down.weight"),
                                          ("vae", "texture.read.weight"), ("discriminator", "project.weight"),
                                          ("scorer", "stem.weight")])  # fmt: skip
def test_a_weight_left_on_the_cpu_is_found(name, weight):
    assert left_on_the_cpu(name, weight)
