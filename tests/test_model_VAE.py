"""Laws of model_VAE.py and parts/autoencoder.py: the autoencoders against algebra, and their two decoders."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Normal, kl_divergence

from model_VAE import MODELS, VAE, VQVAE, VQVAE2, quantise
from parts.quantizer import FiniteScalarQuantizer
from parts.texture import noise_of_slices


def slices(count: int, fill_box: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """x [count, 1, 64, 64], noise of another brightness in each 8x8 block of `tiny_sizes`' box, black around; and z."""
    x = torch.full((count, 1, 64, 64), -1.0)
    if fill_box:
        brightness = F.interpolate(torch.rand(count, 1, 6, 7), scale_factor=8.0)
        x[:, :, 8:56, 4:60] = 2 * brightness * torch.rand(count, 1, 48, 56) - 1
    return x, torch.arange(count) % 32


VARIANTS = {
    "vae": {},
    "vqvae": {"codebook_size": 16},
    "vqvae fsq": {"levels": (4, 3, 3, 2)},
    "vqvae2": {"codebook_size": 16},
    "vqvae2 fsq": {"levels": (4, 3, 3, 2)},
}
WITH_CODES = [variant for variant in VARIANTS if variant != "vae"]


def build(variant: str, sizes: dict, **changes):
    """A tiny autoencoder before training, in evaluation mode."""
    return MODELS[variant.split()[0]](**sizes | VARIANTS[variant] | changes).eval()


def quantizers(model) -> list:
    """The quantisers of a model, top first."""
    return [getattr(model, name) for name in ("quantizer_top", "quantizer") if hasattr(model, name)]


def levels_of(idx) -> tuple:
    return idx if isinstance(idx, tuple) else (idx,)


def decoded_box(model, latent: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """The box of an unnormalised latent, not clamped."""
    return model._decode(latent, z)[0]


@pytest.fixture(params=VARIANTS)
def model(request, tiny_sizes):
    return build(request.param, tiny_sizes)


def as_if_trained(model, awaken):
    """Every layer speaks, the codes are spread over the data, the latents are scaled."""
    awaken(model)
    x, z = slices(8)
    model.fit(x, z)
    model.set_latent_statistics([(x, z)])
    return model


@pytest.fixture
def trained(model, awaken):
    return as_if_trained(model, awaken)


@pytest.fixture(params=WITH_CODES)
def coded(request, tiny_sizes, awaken):
    return as_if_trained(build(request.param, tiny_sizes), awaken)


@pytest.fixture
def double(request, tiny_sizes, awaken, model):
    """A tiny autoencoder of each kind with texture, as if trained."""
    sizes = tiny_sizes | {"perceptual": True}
    return as_if_trained(build(request.node.callspec.params["model"], sizes), awaken)


def klt(x: torch.Tensor, channels: int, f: int = 4) -> torch.Tensor:
    """The box of x [N, 1, 64, 64] from its `channels` strongest block components about black, by singular values."""
    box = x[:, 0, 8:56, 4:60].double() + 1
    blocks = box.view(-1, 48 // f, f, 56 // f, f).transpose(2, 3).reshape(-1, f * f)
    basis = torch.linalg.svd(blocks, full_matrices=False)[2][:channels]
    back = (blocks @ basis.T @ basis).view(-1, 48 // f, 56 // f, f, f).transpose(2, 3)
    return back.reshape(-1, 48, 56) - 1


@pytest.mark.parametrize("whiten", [True, False])
@pytest.mark.parametrize("channels", [1, 5, 16])
def test_before_training_few_channels_are_the_truncated_klt(tiny_sizes, whiten, channels):
    """Training begins at the linear floor; the components are those about black, so that black costs nothing."""
    model, (x, z) = VAE(**tiny_sizes | {"latent_channels": channels}).eval(), slices(6)
    x[:, :, 20:40] = -1
    model.linear.fit(model.crop(x) + 1, whiten=whiten)
    mean, _ = model.posterior(x, z)
    reconstruction = model.decode(model.encode(x, z), z)[:, 0, 8:56, 4:60]
    assert torch.allclose(reconstruction.double(), klt(x, channels).clamp(-1, 1), atol=1e-4)
    lit = x[:, :, 8:56, 4:60].unfold(2, 4, 4).unfold(3, 4, 4).amax((-1, -2)) > -1  # blocks that hold anything
    sd = mean.movedim(1, -1)[lit[:, 0]].std(0)
    assert torch.allclose(sd if whiten else sd.square().mean().sqrt(), torch.ones(()), atol=1e-3)


@pytest.mark.parametrize("variant", ["vqvae", "vqvae fsq"])
def test_the_vqvae_begins_at_its_linear_floor_too(tiny_sizes, variant):
    """Before quantisation; whitened for scalar quantisation, which knows no distances between channels."""
    model, (x, z) = build(variant, tiny_sizes), slices(6)
    model.fit(x, z)
    vectors = model.vectors(x, z)
    assert torch.allclose(decoded_box(model, vectors, z)[:, 0].double(), klt(x, 4), atol=1e-4)
    sd = vectors.movedim(1, -1).flatten(0, 2).std(0)
    assert torch.allclose(sd, torch.ones(4), atol=1e-3) == (variant == "vqvae fsq")


@pytest.mark.parametrize("variant", ["vqvae2", "vqvae2 fsq"])
def test_the_vqvae2_begins_at_both_linear_floors(tiny_sizes, variant):
    """The top path is the transform of 8x8 blocks, the bottom path that of the difference from the top codes."""
    model, (x, z) = build(variant, tiny_sizes), slices(6)
    model.fit(x, z)
    top = model.top_vectors(x, z)
    assert torch.allclose(model.linear_top.decode(top)[:, 0].double() - 1, klt(x, 4, f=8), atol=1e-4)
    quantised = model._quantised_top(x, z)
    known = model.linear_top.decode(quantised)
    left = model.pad(model.crop(x) - known)  # counted from black
    box = decoded_box(model, model._join(quantised, model.bottom_vectors(x, z, quantised)), z)
    assert torch.allclose(box[:, 0].double(), klt(left, 4) + known[:, 0], atol=1e-4)


def test_black_decodes_to_exactly_black_before_training(model):
    """One grey level of offset in the background costs .06 of SSIM."""
    (x, z), (black, _) = slices(6), slices(6, fill_box=False)
    model.fit(torch.cat([x, black]), z.repeat(2))
    for quantizer in quantizers(model):
        if not isinstance(quantizer, FiniteScalarQuantizer):
            quantizer.codebook[3] = 0  # k-means comes near it only; the network learns the rest
    assert torch.equal(model.decode(model.encode(black, z), z), black)
    model.set_latent_statistics([(torch.cat([x, black]), z.repeat(2))])
    assert model.decode(model.encode(black, z), z).max() < -1 + 1e-3


def test_the_outside_of_the_box_is_always_black_and_never_seen(trained):
    """Whatever the latent, however loud the network."""
    (x, z), noise = slices(3), torch.rand(3, 1, 64, 64)
    noise[:, :, 8:56, 4:60] = x[:, :, 8:56, 4:60]
    assert torch.equal(trained.encode(x, z), trained.encode(noise, z))
    latent = 30 * torch.randn(4, *trained.latent_shape)
    x = trained.decode(latent, torch.arange(4))
    inside = trained.crop(x).clone()
    assert x.shape == (4, 1, 64, 64) and (inside > -0.9).float().mean() > 0.1 and -1 <= x.min() <= x.max() <= 1
    x[:, :, 8:56, 4:60] = -1
    assert (x == -1).all()
    assert torch.equal(trained.pad(inside)[:, :, 8:56, 4:60], inside)


def test_the_whole_output_depends_on_z(trained):
    """Not only some of its positions: z is the condition of every one, in the encoders and in the decoder."""
    x, z = slices(1)
    latent, at = trained.encode(x, z), torch.tensor([[3], [28]])
    pairs = [[decoded_box(trained, latent, z) for z in at]]
    if isinstance(trained, VQVAE2):
        top = trained.top_vectors(x, z)
        pairs += [[trained.top_vectors(x, z) for z in at], [trained.bottom_vectors(x, z, top) for z in at]]
    else:
        encode = trained.vectors if isinstance(trained, VQVAE) else trained.encode
        pairs += [[encode(x, z) for z in at]]
    assert all((a != b).float().mean() > 0.99 for a, b in pairs)


def test_slices_of_a_batch_do_not_see_each_other(trained):
    """The result does not depend on the batch size."""
    x, z = slices(5)
    batch = trained.decode(trained.encode(x, z), z)
    alone = torch.cat([trained.decode(trained.encode(x[i : i + 1], z[i : i + 1]), z[i : i + 1]) for i in range(5)])
    assert torch.allclose(batch, alone, atol=1e-4)


def test_latents_have_mean_0_and_sd_1_over_the_batches(trained):
    """Over all batches, unequal as they are; and again after a second call. Their scale changes no picture."""
    x, z = slices(12)
    batches = list(zip(x.split(5), z.split(5)))
    for _ in range(2):
        trained.set_latent_statistics(iter(batches))
        latent = torch.cat([trained.encode(a, b) for a, b in batches]).double().movedim(1, 0).flatten(1)
        C = trained.latent_shape[0]
        assert torch.allclose(latent.mean(1), torch.zeros(C).double(), atol=1e-5)
        assert torch.allclose(latent.std(1, unbiased=False), torch.ones(C).double(), atol=1e-5)
    before = trained.decode(trained.encode(x, z), z)
    trained.latent_mean.add_(3)
    trained.latent_sd.mul_(5)
    assert torch.allclose(trained.decode(trained.encode(x, z), z), before, atol=1e-5)


def test_the_weight_of_a_channel_is_how_far_it_moves_a_picture(model):
    """Before the network speaks, one sd of every channel everywhere; the mean weight is 1."""
    x, z = slices(8)
    model.fit(x, z)
    model.set_latent_statistics([(x, z)])
    weight, nothing = model.channel_weight(), torch.zeros(1, *model.latent_shape)
    assert weight.shape == (len(nothing[0]), 1, 1) and torch.isclose(weight.mean(), torch.ones(()), atol=1e-5)
    moved = []
    for channel in range(len(weight)):
        step = torch.zeros_like(nothing)
        step[0, channel] = 1
        boxes = (decoded_box(model, model._denormalise(latent), z[:1]) for latent in (step, nothing))
        moved.append(next(boxes) - next(boxes))
    moved = torch.stack(moved).flatten(1).norm(dim=1)
    assert torch.allclose(moved / moved.mean(), weight.flatten(), rtol=1e-3)


def test_decoding_follows_the_latent_between_codes(trained):
    """A latent on its way from one slice's codes to another's is decoded as it is, not as the nearest codes."""
    x, z = slices(6)
    first, last = trained.encode(x[:1], z[:1]), trained.encode(x[5:], z[:1])
    path = [trained.decode(first.lerp(last, share), z[:1]) for share in (0.5, 0.51)]
    assert 0 < (path[0] - path[1]).abs().max() < 0.1


@pytest.mark.parametrize("scale", [None, 0.01, 300.0])
def test_decoding_indices_is_decoding_latents(coded, scale):
    """Of the codes' own latent, with any scale of the latents; and `reconstruct` gives the same."""
    x, z = slices(6)
    if scale:
        coded.latent_mean.normal_(0, 3)
        coded.latent_sd.fill_(scale)
    idx = coded.encode_indices(x, z)
    for level, grid in zip(levels_of(idx), coded.grids, strict=True):
        assert level.dtype == torch.int64 and level.shape == (6, *grid)
        assert 0 <= level.min() <= level.max() < coded.codebook_size and len(level.unique()) > 10
    decoded = coded.decode_indices(idx, z)
    assert torch.allclose(decoded, coded.decode(coded.dequantise(idx), z), atol=1e-4)
    assert torch.equal(decoded, coded.reconstruct(x, z))
    numbers = 12 * 14 + (6 * 7 if isinstance(coded, VQVAE2) else 0)
    assert coded.fixed_bits == pytest.approx(numbers * math.log2(coded.codebook_size))


def test_a_latent_is_rounded_to_the_codes(coded):
    """It is no code itself, but nearest to the one that encode_indices gives; below, given the top before rounding."""
    x, z = slices(6)
    latent, idx = coded._denormalise(coded.encode(x, z)), levels_of(coded.encode_indices(x, z))
    top = coded._split(latent)[0] if isinstance(coded, VQVAE2) else latent
    same = quantise(quantizers(coded)[0], top) == idx[0]
    assert same.float().mean() > 0.99 and (latent - coded._lookup(coded.encode_indices(x, z))).abs().mean() > 1e-3
    if isinstance(coded, VQVAE2):
        bottom = coded.quantizer.clamp(coded.bottom_vectors(x, z, top))
        assert torch.allclose(coded._split(latent)[1], bottom, atol=1e-4)


@pytest.mark.parametrize("variant", WITH_CODES)
def test_every_code_survives_the_scaling(tiny_sizes, variant):
    """Any grid of codes, not only those that the encoder gives, is found again in its scaled latent."""
    model = build(variant, tiny_sizes)
    model.latent_mean.normal_(0, 2)
    model.latent_sd.uniform_(0.1, 5)
    idx = tuple(torch.randint(model.codebook_size, (9, *grid)) for grid in model.grids)
    assert all(len(level.unique()) == model.codebook_size for level in idx)
    latent = model._denormalise(model.dequantise(idx if len(idx) > 1 else idx[0]))
    latents = model._split(latent) if isinstance(model, VQVAE2) else (latent,)
    for level, quantizer, latent in zip(idx, quantizers(model), latents, strict=True):
        assert torch.equal(quantise(quantizer, latent), level)


def test_bottom_codes_depend_on_the_top(tiny_sizes, awaken):
    """They say what the top codes leave open; the latent has the top codes first, doubled, then the bottom codes."""
    model, (x, z) = awaken(VQVAE2(**tiny_sizes, codebook_size=16)).eval(), slices(4)
    model.fit(x, z)
    top, bottom = model.encode_indices(x, z)
    other = model.bottom_vectors(x, z, model.quantizer_top.lookup((top + 1) % 16))
    assert (quantise(model.quantizer, other) != bottom).float().mean() > 0.2
    with torch.no_grad():  # through the network too, not only because the linear path codes the difference
        model.linear.analysis.weight.zero_()
    silent, other = (model.bottom_vectors(x, z, model.quantizer_top.lookup(t)) for t in (top, (top + 1) % 16))
    assert (silent != other).float().mean() > 0.9
    latent = model._lookup((top, bottom))
    assert latent.shape == (4, 8, 12, 14)
    assert torch.equal(latent[:, :4, ::2, ::2], model.quantizer_top.lookup(top))
    assert torch.equal(latent[:, :4, 1::2, 1::2], latent[:, :4, ::2, ::2])
    assert torch.equal(latent[:, 4:], model.quantizer.lookup(bottom))
    a, b = (model.decode_indices((t, bottom), z) for t in (top, (top + 1) % 16))
    assert not torch.equal(a, b) and not torch.equal(a, model.decode_indices((top, (bottom + 1) % 16), z))


def test_the_posterior_has_its_kl_and_its_sample_its_mean_and_variance(tiny_sizes, awaken, monkeypatch):
    """In bits per image, summed over the latent, as of torch.distributions. encode returns the mean, not a sample."""
    model, (x, z) = awaken(VAE(**tiny_sizes), 0.2).eval(), slices(5)
    mean, log_variance = model.posterior(x, z)
    sd, noise = (log_variance / 2).exp(), torch.randn_like(mean)
    nats = kl_divergence(Normal(mean, sd), Normal(0.0, 1.0)).sum((1, 2, 3)).mean()
    monkeypatch.setattr(torch, "randn_like", lambda tensor: noise)
    box, losses = model(x, z)
    assert torch.isclose(losses["kl"], nats / torch.log(torch.tensor(2.0)), rtol=1e-4)
    assert torch.allclose(box, decoded_box(model, mean + sd * noise, z), atol=1e-5)
    model.set_latent_statistics([(x, z)])
    assert torch.allclose(model._denormalise(model.encode(x, z)), mean, atol=1e-4)
    with torch.no_grad():
        model.encoder.out[-1].bias[4:] = 1e6  # the log variance is clamped
    assert model.posterior(x, z)[1].max() == 20 and torch.isfinite(model(x, z)[1]["kl"])


def test_draws_from_the_prior_follow_it(trained):
    """A VAE's is N(0, 1) before scaling; learned codes are drawn as often as training used them, others alike."""
    first, second = (trained.prior_latent(50, torch.Generator().manual_seed(s)) for s in (1, 1))
    assert torch.equal(first, second) and first.shape == (50, *trained.latent_shape)
    if isinstance(trained, VAE):
        numbers = trained._denormalise(first)
        assert abs(numbers.mean()) < 0.02 and abs(numbers.std() - 1) < 0.02
        return
    learned = [quantizer for quantizer in quantizers(trained) if not isinstance(quantizer, FiniteScalarQuantizer)]
    for quantizer in learned:
        quantizer.count.copy_(F.one_hot(torch.tensor(3), 16) * 3.0 + F.one_hot(torch.tensor(7), 16))
    latent = trained._denormalise(trained.prior_latent(50))
    latents = trained._split(latent) if isinstance(trained, VQVAE2) else (latent,)
    for quantizer, level in zip(quantizers(trained), latents, strict=True):
        codes = {3, 7} if quantizer in learned else set(range(quantizer.codebook_size))
        assert set(quantise(quantizer, level).unique().tolist()) == codes


def test_wrong_shapes_are_refused_by_name(trained):
    """A latent of the wrong size would otherwise become a picture of the wrong size."""
    x, z = slices(3)
    latent, wrong = trained.encode(x, z), (x[..., 1:], x[:, 0], x.expand(-1, 3, -1, -1), F.interpolate(x, 128))
    for bad_x, bad_z in (*((picture, z) for picture in wrong), (x, z[:2]), (x, z[:, None])):
        for encode in (trained.encode, getattr(trained, "encode_indices", trained.encode)):
            with pytest.raises(ValueError, match="x must be"):
                encode(bad_x, bad_z)
    for bad_latent, bad_z in ((latent[:, 1:], z), (latent[..., 1:, :], z), (latent[0], z[0]), (latent, z[:2])):
        with pytest.raises(ValueError, match="latent"):
            trained.decode(bad_latent, bad_z)
    if isinstance(trained, VAE):
        return
    idx = trained.encode_indices(x, z)
    if isinstance(trained, VQVAE2):
        top, bottom = idx
        wrong = [(grids, z) for grids in ((top[:, 1:], bottom), (bottom, bottom), (top, top), (top, bottom[:2]))]
    else:
        wrong = [(idx[:, 1:], z), (idx[0], z[0])]
    for bad_idx, bad_z in [*wrong, (idx, z[:2])]:
        with pytest.raises(ValueError, match="idx"):
            trained.decode_indices(bad_idx, bad_z)


def test_models_that_cannot_be_built_are_refused(tiny_sizes):
    """A box that the factor does not divide, more numbers than the pixels they stand for, codes of no or two kinds."""
    with pytest.raises(ValueError, match="factor 4"):
        VAE(**tiny_sizes | {"box": (8, 4, 46, 56)})
    with pytest.raises(ValueError, match="17 latent channels"):
        VAE(**tiny_sizes | {"latent_channels": 17})
    with pytest.raises(ValueError, match="cannot be halved"):
        VQVAE2(**tiny_sizes | {"box": (8, 4, 44, 56)}, codebook_size=8)
    with pytest.raises(ValueError, match="3 levels do not fit 4"):
        VQVAE(**tiny_sizes, levels=(8, 8, 8))
    for codes in ({}, {"codebook_size": 8, "levels": (4, 3, 3, 2)}):
        with pytest.raises(ValueError, match="either codebook_size.*or levels"):
            VQVAE(**tiny_sizes, **codes)


def test_training_the_codec_leaves_the_texture_alone(double):
    """And a loss of the texture leaves the codec alone, to the last bit, codebooks and counts too."""
    (x, z), before = slices(3), copy.deepcopy(double.state_dict())
    x_hat, losses = double.train()(x, z)
    ((x_hat - double.crop(x)).abs().mean() + sum(losses.values())).backward()
    assert all((parameter.grad is None) == name.startswith("texture.") for name, parameter in double.named_parameters())
    double.eval().zero_grad()
    double.load_state_dict(before)
    faithful, features = double.faithful(double.encode(x, z), z)
    assert not faithful.requires_grad and not features.requires_grad
    double.texture(faithful, features, torch.randn_like(faithful), z).sum().backward()
    assert all((parameter.grad is None) != name.startswith("texture.") for name, parameter in double.named_parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in double.state_dict().items())


def test_before_training_both_decoders_are_one(tiny_sizes):
    model, (x, z) = build("vae", tiny_sizes, perceptual=True), slices(2)
    latent = model.encode(x, z)
    model.use_decoder("perceptual")
    assert torch.equal(model.draw(latent, z, torch.Generator()), model.decode(latent, z))


def test_texture_changes_no_weight_of_the_codec(tiny_sizes):
    """Built from one seed, with and without it; also all that is drawn later is the same."""
    drawn, weights = [], []
    for perceptual in (False, True):
        torch.manual_seed(3)
        weights.append(build("vqvae2", tiny_sizes, perceptual=perceptual).state_dict())
        drawn.append(torch.rand(4))
    assert torch.equal(*drawn) and all(torch.equal(weights[1][name], w) for name, w in weights[0].items())
    more = weights[1].keys() - weights[0].keys()
    assert more and all(name.startswith("texture.") for name in more)


def test_texture_is_drawn_by_the_generator_over_the_faithful_picture(double):
    """From noise of neighbouring slices; `decode` stays faithful, whichever decoder is in use."""
    x, z = slices(3)
    latent = double.encode(x, z)
    faithful = double.decode(latent, z)

    def draw(seed: int = 5, some=(0, 1, 2), **more) -> torch.Tensor:
        return double.draw(latent[list(some)], z[list(some)], torch.Generator().manual_seed(seed), **more)

    assert torch.equal(draw(), faithful)
    double.use_decoder("perceptual")
    assert torch.equal(double.decode(latent, z), faithful) and torch.equal(draw(), draw())
    assert (draw() - draw(6)).abs().max() > 1e-3 and not torch.equal(draw(), faithful)
    box, features = double.faithful(latent, z)
    white = noise_of_slices(3, *double.box[2:], torch.Generator().manual_seed(5))
    assert torch.equal(double.pad(box), faithful)
    assert torch.allclose(draw(), double.pad(double.texture(box, features, white, z).clamp(-1, 1)), atol=1e-5)
    assert torch.allclose(draw(some=(2, 0), slices_per_brain=3), draw()[[2, 0]], atol=1e-4)
    assert draw().amin() >= -1 and draw().amax() <= 1


def test_decoders_that_do_not_exist_are_refused(model, double):
    for ask, words in (
        (lambda: double.use_decoder("sharp"), "neither fidelity nor perceptual"),
        (lambda: model.use_decoder("perceptual"), "no perceptual decoder"),
    ):
        with pytest.raises(ValueError, match=words):
            ask()
    assert model.decoder_in_use == double.decoder_in_use == "fidelity"
    with pytest.raises(ValueError, match="latent must be"):
        double.use_decoder("perceptual")
        double.draw(torch.zeros(2, 4, 3, 3), torch.arange(2), torch.Generator())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pictures_and_losses_are_float32_and_finite_in_half_precision(double, dtype):
    x, z = slices(3)
    double.use_decoder("perceptual")
    with torch.autocast("cpu", dtype):
        x_hat, losses = double(x, z)
        latent = double.encode(x, z)
        pictures = x_hat, double.decode(latent, z), double.draw(latent, z, torch.Generator())
    for tensor in (*pictures, *losses.values()):
        assert tensor.dtype == torch.float32 and tensor.isfinite().all()
