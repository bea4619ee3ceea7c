"""Laws of autoencoder.py and model_VAE.py: the autoencoders against algebra, two decoders, files against memory."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Normal, kl_divergence

import dataset
import model_VAE
import prestage_train
import util
from model_VAE import MODELS, VAE, VQVAE, VQVAE2, latent_digest, load_first_stage
from parts.grain import bend_white
from parts.quantizer import FiniteScalarQuantizer
from training import checkpoints


def slices(count: int, fill_box: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """x [count, 1, 64, 64] in [-1, 1], random in the box of `tiny_sizes` and black around it, and z.

    Noise of another brightness in every 8x8 block, down to black, as blocks of brains have it.
    """
    x = torch.full((count, 1, 64, 64), -1.0)
    if fill_box:
        brightness = F.interpolate(torch.rand(count, 1, 6, 7), scale_factor=8.0)
        x[:, :, 8:56, 4:60] = 2 * brightness * torch.rand(count, 1, 48, 56) - 1
    return x, torch.arange(count) % 32


VARIANTS = {
    "vae": {},
    "vqvae": {"codebook_size": 16},
    "vqvae fsq": {"quantizer": "fsq", "levels": (4, 3, 3, 2)},
    "vqvae sphere": {"codebook_size": 16, "quantizer_options": {"sphere": True, "rotation": True}},
    "vqvae2": {"codebook_size": 16},
    "vqvae2 fsq": {"quantizer": "fsq", "levels": (4, 3, 3, 2)},
}


def quantizers(model) -> list:
    """The quantisers of a model, top first."""
    return [getattr(model, name) for name in ("quantizer_top", "quantizer") if hasattr(model, name)]


@pytest.fixture(params=VARIANTS)
def kwargs(request, tiny_sizes) -> dict:
    """What describes a tiny autoencoder of each kind: its "kind" and its "model_kwargs"."""
    return {"kind": request.param.split()[0], "model_kwargs": tiny_sizes | VARIANTS[request.param]}


@pytest.fixture
def model(kwargs):
    """A tiny autoencoder of each kind as it starts, in evaluation mode."""
    return MODELS[kwargs["kind"]](**kwargs["model_kwargs"]).eval()


@pytest.fixture
def trained(model, awaken):
    """As if trained: every layer speaks, the codes are spread over the data, the latents are scaled."""
    awaken(model)
    x, z = slices(8)
    model.start(x, z)
    model.set_latent_statistics([(x, z)])
    return model


def test_the_weight_of_a_channel_is_how_far_it_moves_a_picture(model):
    """Before the network speaks, one sd of every channel everywhere; the mean weight is 1."""
    x, z = slices(8)
    model.start(x, z)
    model.set_latent_statistics([(x, z)])
    weight, latent = model.channel_weight(), torch.zeros(1, *model.latent_shape)
    assert weight.shape == (len(latent[0]), 1, 1) and torch.isclose(weight.mean(), torch.ones(()), atol=1e-5)
    moved = []
    for channel in range(len(weight)):
        step = torch.zeros_like(latent)
        step[0, channel] = 1
        moved.append(
            model._decode(model._denormalise(latent + step), z[:1]) - model._decode(model._denormalise(latent), z[:1])
        )
    moved = torch.stack(moved).flatten(1).norm(dim=1)
    assert torch.allclose(moved / moved.mean(), weight.flatten(), rtol=1e-3)


# ----------------------------------------------------------------------------- the linear path: how training starts


def klt(x: torch.Tensor, channels: int, f: int = 4) -> torch.Tensor:
    """The box of x [N, 1, 64, 64] from its `channels` strongest block components about black, by singular values."""
    box = x[:, 0, 8:56, 4:60].double() + 1
    blocks = box.view(-1, 48 // f, f, 56 // f, f).transpose(2, 3).reshape(-1, f * f)
    basis = torch.linalg.svd(blocks, full_matrices=False)[2][:channels]
    back = (blocks @ basis.T @ basis).view(-1, 48 // f, 56 // f, f, f).transpose(2, 3)
    return back.reshape(-1, 48, 56) - 1


def test_at_the_start_all_channels_reconstruct_exactly(tiny_sizes):
    model, (x, z) = VAE(**tiny_sizes | {"latent_channels": 16}).eval(), slices(6)
    model.start(x, z)
    model.set_latent_statistics([(x, z)])
    assert torch.allclose(model.decode(model.encode(x, z), z), x, atol=1e-5)


@pytest.mark.parametrize("whiten", [True, False])
@pytest.mark.parametrize("channels", [1, 5])
def test_at_the_start_few_channels_are_the_truncated_klt(tiny_sizes, whiten, channels):
    """Training begins at the linear floor; the components are those about black, so that black costs nothing."""
    model, (x, z) = VAE(**tiny_sizes | {"latent_channels": channels}).eval(), slices(6)
    x[:, :, 20:40] = -1
    model.linear.start(model.crop(x) + 1, whiten=whiten)
    mean, _ = model.posterior(x, z)
    reconstruction = model.decode(model.encode(x, z), z)[:, 0, 8:56, 4:60]
    assert torch.allclose(reconstruction.double(), klt(x, channels).clamp(-1, 1), atol=1e-4)
    lit = x[:, :, 8:56, 4:60].unfold(2, 4, 4).unfold(3, 4, 4).amax((-1, -2)) > -1  # blocks that hold anything
    sd = mean.movedim(1, -1)[lit[:, 0]].std(0)
    assert torch.allclose(sd if whiten else sd.square().mean().sqrt(), torch.ones(()), atol=1e-3)


@pytest.mark.parametrize("variant", ["vqvae", "vqvae fsq", "vqvae sphere"])
def test_the_vqvae_starts_at_its_linear_floor_too(tiny_sizes, variant):
    """Before quantisation; whitened for scalar quantisation, which knows no distances between channels."""
    model, (x, z) = VQVAE(**tiny_sizes | VARIANTS[variant]).eval(), slices(6)
    model.start(x, z)
    vectors = model.vectors(x, z)
    assert torch.allclose(model._decode(vectors, z)[:, 0].double(), klt(x, 4), atol=1e-4)
    sd = vectors.movedim(1, -1).flatten(0, 2).std(0)
    assert torch.allclose(sd, torch.ones(4), atol=1e-3) == (variant == "vqvae fsq")


@pytest.mark.parametrize("variant", ["vqvae2", "vqvae2 fsq"])
def test_the_vqvae2_starts_at_both_linear_floors(tiny_sizes, variant):
    """The top path is the transform of 8x8 blocks, the bottom path that of what the top codes leave over."""
    model, (x, z) = VQVAE2(**tiny_sizes | VARIANTS[variant]).eval(), slices(6)
    model.start(x, z)
    top = model.top_vectors(x, z)
    assert torch.allclose(model.linear_top.decode(top)[:, 0].double() - 1, klt(x, 4, f=8), atol=1e-4)
    quantised = model._quantised_top(x, z)
    known = model.linear_top.decode(quantised)
    left = model.pad(model.crop(x) - known)  # counted from black
    box = model._decode(model._join(quantised, model.bottom_vectors(x, z, quantised)), z)
    assert torch.allclose(box[:, 0].double(), klt(left, 4) + known[:, 0], atol=1e-4)


def test_a_vqvae2_whose_bottom_path_is_whole_reconstructs_exactly(tiny_sizes):
    """Whatever the top codes say, the bottom path codes the rest of it."""
    model = VQVAE2(**tiny_sizes | {"latent_channels": 16, "codebook_size": 8}).eval()
    x, z = slices(6)
    model.start(x, z)
    top = model.quantizer_top.lookup(torch.randint(8, (6, 6, 7)))
    box = model._decode(model._join(top, model.bottom_vectors(x, z, top)), z)
    assert torch.allclose(box, model.crop(x), atol=1e-4)


def test_every_code_is_in_use_at_the_start(tiny_sizes):
    """Of both levels; and of scalar quantisation every level of every channel."""
    x, z = slices(16)
    for variant in ("vqvae", "vqvae2", "vqvae sphere", "vqvae fsq", "vqvae2 fsq"):
        model = MODELS[variant.split()[0]](**tiny_sizes | VARIANTS[variant]).eval()
        model.start(x, z)
        idx = model.encode_indices(x, z)
        for quantizer, level in zip(quantizers(model), idx if model.kind == "vqvae2" else [idx], strict=True):
            if isinstance(quantizer, FiniteScalarQuantizer):
                digits = quantizer.digits(level.unique())
                assert [len(column.unique()) for column in digits.T] == [4, 3, 3, 2]
            else:
                assert len(level.unique()) == 16


def test_black_decodes_to_exactly_black_at_the_start(model):
    """One grey level of offset in the background costs .06 of SSIM."""
    (x, z), (black, _) = slices(6), slices(6, fill_box=False)
    model.start(torch.cat([x, black]), z.repeat(2))
    for quantizer in quantizers(model):
        if not isinstance(quantizer, FiniteScalarQuantizer):
            quantizer.codebook[3] = 0  # k-means comes near it only; the network learns the rest
    assert torch.equal(model.decode(model.encode(black, z), z), black)
    model.set_latent_statistics([(torch.cat([x, black]), z.repeat(2))])
    assert not dataset.to_uint8(model.decode(model.encode(black, z), z)).any()


# --------------------------------------------------------------------------------------------------- both autoencoders


def test_the_outside_of_the_box_is_always_black(trained):
    """Whatever the latent, however loud the network."""
    latent = 30 * torch.randn(4, *trained.latent_shape)
    x = trained.decode(latent, torch.arange(4))
    inside = trained.crop(x).clone()
    assert x.shape == (4, 1, 64, 64) and (inside > -0.9).float().mean() > 0.1 and -1 <= x.min() <= x.max() <= 1
    x[:, :, 8:56, 4:60] = -1
    assert (x == -1).all()
    assert torch.equal(trained.pad(inside)[:, :, 8:56, 4:60], inside)


def test_the_encoder_does_not_see_the_outside_of_the_box(trained):
    (x, z), noise = slices(3), torch.rand(3, 1, 64, 64)
    noise[:, :, 8:56, 4:60] = x[:, :, 8:56, 4:60]
    assert torch.equal(trained.encode(x, z), trained.encode(noise, z))


def test_the_whole_output_depends_on_z(trained):
    """Not only some of its positions: z is the condition of every one, in the encoder and in the decoder."""
    x, z = slices(1)
    latent = trained.encode(x, z)
    a, b = (trained._decode(latent, torch.tensor([i])) for i in (3, 28))
    assert (a != b).float().mean() > 0.99
    if isinstance(trained, VAE):
        assert (trained.encode(x, z + 3) != trained.encode(x, z + 28)).float().mean() > 0.99
    elif isinstance(trained, VQVAE):
        assert (trained.vectors(x, z + 3) != trained.vectors(x, z + 28)).float().mean() > 0.99
    else:
        top, other = (trained.top_vectors(x, z + i) for i in (3, 28))
        assert (top != other).float().mean() > 0.99
        bottom, other = (trained.bottom_vectors(x, z + i, top) for i in (3, 28))
        assert (bottom != other).float().mean() > 0.99


def test_slices_of_a_batch_do_not_see_each_other(trained):
    """The result does not depend on the batch size."""
    x, z = slices(5)
    together = trained.decode(trained.encode(x, z), z)
    alone = torch.cat([trained.decode(trained.encode(x[i : i + 1], z[i : i + 1]), z[i : i + 1]) for i in range(5)])
    assert torch.allclose(together, alone, atol=1e-4)


def test_latents_have_mean_0_and_sd_1_over_the_batches(trained):
    """Over all batches together, unequal as they are; and again after a second call."""
    x, z = slices(12)
    batches = list(zip(x.split(5), z.split(5)))
    for _ in range(2):
        trained.set_latent_statistics(iter(batches))
        latent = torch.cat([trained.encode(a, b) for a, b in batches]).double().movedim(1, 0).flatten(1)
        C = trained.latent_shape[0]
        assert torch.allclose(latent.mean(1), torch.zeros(C).double(), atol=1e-5)
        assert torch.allclose(latent.std(1, unbiased=False), torch.ones(C).double(), atol=1e-5)


def test_the_scale_of_the_latents_changes_no_picture(trained):
    x, z = slices(4)
    before = trained.decode(trained.encode(x, z), z)
    trained.latent_mean.add_(3)
    trained.latent_sd.mul_(5)
    assert torch.allclose(trained.decode(trained.encode(x, z), z), before, atol=1e-5)


def test_decoding_follows_the_latent_between_codes(trained):
    """A latent on its way from one slice's codes to another's is decoded as it is, not as the nearest codes."""
    x, z = slices(6)
    first, last = trained.encode(x[:1], z[:1]), trained.encode(x[5:], z[:1])
    path = [trained.decode(first.lerp(last, share), z[:1]) for share in (0.5, 0.51)]
    assert 0 < (path[0] - path[1]).abs().max() < 0.1


@pytest.mark.parametrize("scale", [None, 0.01, 300.0])
def test_decoding_indices_is_decoding_latents(trained, scale):
    """Of the codes' own latent, with any scale of the latents; and it is what `reconstruct` gives."""
    if isinstance(trained, VAE):
        return
    x, z = slices(6)
    if scale:
        trained.latent_mean.normal_(0, 3)
        trained.latent_sd.fill_(scale)
    idx = trained.encode_indices(x, z)
    grids = ((6, 7), (12, 14)) if isinstance(trained, VQVAE2) else ((12, 14),)
    for level, grid in zip(idx if isinstance(trained, VQVAE2) else (idx,), grids, strict=True):
        assert level.dtype == torch.int64 and level.shape == (6, *grid)
        assert 0 <= level.min() <= level.max() < trained.codebook_size and len(level.unique()) > 10
    codes = trained._lookup(idx) if isinstance(trained, VQVAE2) else trained.quantizer.lookup(idx)
    decoded = trained.decode_indices(idx, z)
    assert torch.allclose(decoded, trained.decode(trained._normalise(codes), z), atol=1e-4)
    assert torch.equal(decoded, trained.reconstruct(x, z))
    assert trained.fixed_bits == pytest.approx(sum(h * w for h, w in grids) * math.log2(trained.codebook_size))


def test_a_latent_is_what_is_rounded_to_codes(trained):
    """No code itself, but nearest to the code that encode_indices gives; below the top, given the top unrounded."""
    if isinstance(trained, VAE):
        return
    x, z = slices(6)
    latent = trained._denormalise(trained.encode(x, z))
    if isinstance(trained, VQVAE2):
        top, bottom = trained._split(latent)
        assert torch.equal(model_VAE.quantise(trained.quantizer_top, top), trained.encode_indices(x, z)[0])
        assert torch.allclose(bottom, trained.quantizer.unrounded(trained.bottom_vectors(x, z, top)), atol=1e-4)
    else:
        idx = trained.encode_indices(x, z)
        assert torch.equal(model_VAE.quantise(trained.quantizer, latent), idx)
        assert (latent - trained.quantizer.lookup(idx)).abs().mean() > 1e-3


@pytest.mark.parametrize("variant", ["vqvae", "vqvae fsq", "vqvae sphere", "vqvae2", "vqvae2 fsq"])
def test_every_code_survives_the_scaling(tiny_sizes, variant):
    """Any grid of codes, not only what the encoder gives, is found again in its scaled latent."""
    model = MODELS[variant.split()[0]](**tiny_sizes | VARIANTS[variant]).eval()
    model.latent_mean.normal_(0, 2)
    model.latent_sd.uniform_(0.1, 5)
    grids = model.grids if isinstance(model, VQVAE2) else (model.latent_shape[1:],)
    idx = tuple(torch.randint(model.codebook_size, (9, *grid)) for grid in grids)
    assert all(len(level.unique()) == model.codebook_size for level in idx)
    if isinstance(model, VQVAE2):
        latents = model._split(model._denormalise(model._normalise(model._lookup(idx))))
    else:
        latents = (model._denormalise(model._normalise(model.quantizer.lookup(idx[0]))),)
    for level, quantizer, latent in zip(idx, quantizers(model), latents, strict=True):
        assert torch.equal(model_VAE.quantise(quantizer, latent), level)


def test_bottom_codes_depend_on_the_top(tiny_sizes, awaken):
    """They say what the top codes leave open; the latent has the top codes first, doubled, then the bottom codes."""
    model, (x, z) = awaken(VQVAE2(**tiny_sizes, codebook_size=16)).eval(), slices(4)
    model.start(x, z)
    top, bottom = model.encode_indices(x, z)
    other = model.bottom_vectors(x, z, model.quantizer_top.lookup((top + 1) % 16))
    assert (model_VAE.quantise(model.quantizer, other) != bottom).float().mean() > 0.2
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


def test_the_kl_is_that_of_torch_distributions_in_bits(tiny_sizes, awaken):
    """Per image: summed over the latent, averaged over the batch."""
    model, (x, z) = awaken(VAE(**tiny_sizes), 0.2), slices(5)
    mean, log_variance = model.posterior(x, z)
    nats = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(0.0, 1.0)).sum((1, 2, 3)).mean()
    assert torch.isclose(model(x, z)[1]["kl"], nats / torch.log(torch.tensor(2.0)), rtol=1e-4)


def test_the_posterior_sample_has_its_mean_and_variance(tiny_sizes, awaken, monkeypatch):
    """forward decodes mean + sd * noise; encode returns the mean, not a sample."""
    model, (x, z) = awaken(VAE(**tiny_sizes), 0.2).eval(), slices(3)
    mean, log_variance = model.posterior(x, z)
    noise = torch.randn_like(mean)
    monkeypatch.setattr(torch, "randn_like", lambda tensor: noise)
    expected = model._decode(mean + (log_variance / 2).exp() * noise, z)
    assert torch.allclose(model(x, z)[0], expected, atol=1e-5)
    model.set_latent_statistics([(x, z)])
    assert torch.allclose(model._denormalise(model.encode(x, z)), mean, atol=1e-4)


def test_the_log_variance_is_clamped(tiny_sizes):
    model, (x, z) = VAE(**tiny_sizes), slices(2)
    with torch.no_grad():
        model.encoder.out[-1].bias[4:] = 1e6
    assert model.posterior(x, z)[1].max() == 20 and torch.isfinite(model(x, z)[1]["kl"])


def test_draws_from_the_prior_follow_it(trained):
    """A VAE's is N(0, 1) before scaling; learned codes are drawn as often as training used them, others alike."""
    first, second = (trained.prior_latent(50, torch.Generator().manual_seed(s)) for s in (1, 1))
    assert torch.equal(first, second) and first.shape == (50, *trained.latent_shape)
    if isinstance(trained, VAE):
        numbers = trained._denormalise(first)
        assert abs(numbers.mean()) < 0.02 and abs(numbers.std() - 1) < 0.02
        return
    for quantizer in quantizers(trained):
        if not isinstance(quantizer, FiniteScalarQuantizer):
            quantizer.count.copy_(F.one_hot(torch.tensor(3), 16) * 3.0 + F.one_hot(torch.tensor(7), 16))
    latent = trained._denormalise(trained.prior_latent(50))
    for quantizer, level in zip(
        quantizers(trained), trained._split(latent) if isinstance(trained, VQVAE2) else (latent,), strict=True
    ):
        idx = model_VAE.quantise(quantizer, level)
        if isinstance(quantizer, FiniteScalarQuantizer):  # it has no memory of training: all codes alike
            assert len(idx.unique()) == quantizer.codebook_size
        else:
            assert set(idx.unique().tolist()) == {3, 7} and abs((idx == 3).float().mean() - 0.75) < 0.05


def test_wrong_shapes_are_refused_by_name(trained):
    """A latent of the wrong size would otherwise become a picture of the wrong size."""
    x, z = slices(3)
    for bad_x, bad_z in (
        (x[..., 1:], z),
        (x[:, 0], z),
        (x.expand(-1, 3, -1, -1), z),
        (x, z[:2]),
        (x, z[:, None]),
        (F.interpolate(x, 128), z),
    ):
        for encode in (trained.encode, getattr(trained, "encode_indices", trained.encode)):
            with pytest.raises(ValueError, match="x must be"):
                encode(bad_x, bad_z)
    latent = trained.encode(x, z)
    for bad_latent, bad_z in ((latent[:, 1:], z), (latent[..., 1:, :], z), (latent[0], z[0]), (latent, z[:2])):
        with pytest.raises(ValueError, match="latent"):
            trained.decode(bad_latent, bad_z)
    if isinstance(trained, VQVAE):
        idx = trained.encode_indices(x, z)
        for bad_idx, bad_z in ((idx[:, 1:], z), (idx[0], z[0]), (idx, z[:2])):
            with pytest.raises(ValueError, match="idx"):
                trained.decode_indices(bad_idx, bad_z)
    if isinstance(trained, VQVAE2):
        top, bottom = trained.encode_indices(x, z)
        for bad_idx, bad_z, name in (
            ((top[:, 1:], bottom), z, "top idx"),
            ((bottom, bottom), z, "top idx"),
            ((top, top), z, "bottom idx"),
            ((top, bottom), z[:2], "idx"),
            ((top, bottom[:2]), z, "bottom idx"),
        ):
            with pytest.raises(ValueError, match=name):
                trained.decode_indices(bad_idx, bad_z)


def test_what_cannot_be_built_is_refused(tiny_sizes):
    """A box that the factor does not divide, and more numbers than the pixels they stand for."""
    with pytest.raises(ValueError, match="factor 4"):
        VAE(**tiny_sizes | {"box": (8, 4, 46, 56)})
    with pytest.raises(ValueError, match="17 latent channels"):
        VAE(**tiny_sizes | {"latent_channels": 17})
    with pytest.raises(ValueError, match="cannot be halved"):
        VQVAE2(**tiny_sizes | {"box": (8, 4, 44, 56)}, codebook_size=8)
    with pytest.raises(ValueError, match="3 levels do not fit 4"):
        VQVAE(**tiny_sizes, quantizer="fsq", levels=(8, 8, 8))
    with pytest.raises(ValueError, match="neither vq nor fsq"):
        VQVAE(**tiny_sizes, quantizer="lfq")


@pytest.mark.parametrize("preset", util.PRESET_NAMES)
@pytest.mark.parametrize("kind", sorted(MODELS))
def test_every_preset_builds_its_model(preset, kind):
    """On the content box and on the whole frame, which data that leave the box need."""
    args, _ = util.parse_flags(prestage_train.flags(), ["--model", kind])
    vars(args).update(util.preset_settings("prestage_train.py", preset))
    size = args.image_size
    for box in (tuple(side * size // 256 for side in dataset.CONTENT_BOX), (0, 0, size, size)):
        with torch.device("meta"):
            model, kwargs = prestage_train.build(args, box)
            embedding = model.embed_z(torch.zeros(1))
            seen = model.encoder.stem[1].in_channels // args.patch**2  # the bottom encoder has two inputs
            h = model.encoder(torch.zeros(1, seen, *box[2:]), embedding)
            assert h.shape[2:] == model.latent_shape[1:] and kwargs["box"] == box
            assert model.decoder(torch.zeros(1, *model.latent_shape), embedding).shape == (1, 1, *box[2:])


# --------------------------------------------------------------------------------------------- two decoders, one latent


@pytest.fixture
def double(kwargs, awaken):
    """A tiny autoencoder of each kind with two decoders, as if trained until the perceptual one begins."""
    kwargs["model_kwargs"] |= {"perceptual": True, "grain": True}
    model, (x, z) = awaken(MODELS[kwargs["kind"]](**kwargs["model_kwargs"])), slices(8)
    model.start(x, z)
    model.set_latent_statistics([(x, z)])
    return model


def train_perceptual(model, steps: int = 3) -> None:
    """Steps of an optimiser over all that may change, as prestage_train takes them."""
    model.start_perceptual()
    model.eval()
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    for _ in range(steps):
        x, z = slices(3)
        x_hat, losses = model(x, z, x)
        loss = (x_hat - model.crop(x)).abs().mean() + losses["grain"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_the_perceptual_decoder_begins_as_the_fidelity_decoder(double):
    x, z = slices(2)
    latent = double.encode(x, z)
    faithful = double.decode(latent, z)
    double.use_decoder("perceptual")
    assert not torch.equal(double.decode(latent, z), faithful)
    double.start_perceptual()
    assert torch.equal(double.decode(latent, z), faithful) and double.decoder_in_use == "perceptual"
    copied = double.perceptual.state_dict()
    assert all(torch.equal(tensor, copied[name]) for name, tensor in double.decoder.state_dict().items())
    assert all(a is not b for a, b in zip(double.perceptual.parameters(), double.decoder.parameters()))


def test_training_the_perceptual_decoder_changes_nothing_else(double):
    """Parameters, codebooks, counts and scale stay to the last bit, so both decoders read the same latents."""
    x, z = slices(2)
    latent = double.eval().encode(x, z)
    faithful = double.decode(latent, z)
    before = copy.deepcopy(double.state_dict())
    train_perceptual(double)
    changed = {name for name, tensor in double.state_dict().items() if not torch.equal(tensor, before[name])}
    begun = {f"perceptual.{name}": tensor for name, tensor in double.decoder.state_dict().items()}
    assert changed and all(name.startswith("perceptual.") for name in changed)
    assert all(not torch.equal(double.state_dict()[name], tensor) for name, tensor in begun.items())  # every layer
    assert torch.equal(double.encode(x, z), latent)
    sharp = double.decode(latent, z)
    double.use_decoder("fidelity")
    assert torch.equal(double.decode(latent, z), faithful) and not torch.equal(sharp, faithful)


def test_only_the_decoder_in_use_and_what_belongs_to_it_can_be_trained(double):
    """The fidelity decoder trains with encoder and codes; the perceptual one alone."""
    x, z = slices(2)
    for decoder in ("fidelity", "perceptual", "fidelity"):
        double.use_decoder(decoder)
        free = {name for name, parameter in double.named_parameters() if parameter.requires_grad}
        assert free == {
            name for name, _ in double.named_parameters() if name.startswith("perceptual.") == (decoder == "perceptual")
        }
        double.zero_grad()
        double.train()(x, z)[0].sum().backward()
        reached = {name for name, parameter in double.named_parameters() if parameter.grad is not None}
        assert reached and reached <= free and {"linear.analysis.weight"} & reached == {"linear.analysis.weight"} & free


def test_grain_is_drawn_over_the_picture_of_the_perceptual_decoder(double):
    """Another for every noise; without noise always the same picture, and the fidelity decoder has none."""
    x, z = slices(3)
    latent, one, other = double.eval().encode(x, z), *torch.randn(2, 3, 1, *double.box[2:])
    with pytest.raises(ValueError, match="takes no noise"):
        double.decode(latent, z, one)
    assert double.draw_grain(3) is None and double(x, z)[0].shape[0] == 3
    train_perceptual(double)
    picture, drawn, again = (double.decode(latent, z, noise) for noise in (None, one, other))
    assert torch.equal(double.decode(latent, z), picture) and torch.equal(double.decode(latent, z, one), drawn)
    assert (drawn - picture).abs().max() > 1e-3 < (drawn - again).abs().max()
    inside = picture < 1  # what is cut off there is bent here
    assert torch.allclose(double.decode(latent, z, 0 * one)[inside], bend_white(picture)[inside], atol=1e-6)
    with pytest.raises(ValueError, match="noise must be"):
        double.decode(latent, z, one[:1])
    x_hat, losses = double(x, z)
    if double.kind != "vae":  # a VAE trains on a sample of the posterior, the others on codes and latents by turns
        trained_on = double.pad(x_hat.clamp(-1, 1))
        assert torch.allclose(trained_on[1::2], picture[1::2], atol=1e-5)
        assert torch.allclose(trained_on[::2], double.reconstruct(x, z)[::2], atol=1e-5)
        assert not torch.allclose(trained_on[::2], picture[::2], atol=1e-3)
        assert not torch.equal(double.reconstruct(x, z, one), double.reconstruct(x, z))
    assert "grain" not in losses and double(x, z, x)[1]["grain"].isfinite()


def test_the_grain_learns_from_slices_as_they_are(double):
    """Whatever is done to those that the decoder learns from, and the decoder learns nothing of it."""
    (x, z), double = slices(3), double.eval()
    assert "grain" not in double(x, z, x)[1]  # the fidelity decoder draws none
    double.start_perceptual()

    def loss(turned: torch.Tensor, still: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        return double(turned, z, still)[1]["grain"]

    assert torch.equal(loss(x, x), loss(x.mT, x)) and not torch.equal(loss(x, x), loss(x, x.mT))
    loss(x, x).backward()
    assert {name for name, p in double.named_parameters() if p.grad is not None} == {
        name for name, _ in double.named_parameters() if ".grain." in name
    }


def test_the_grain_of_a_brain_follows_its_generator(double):
    double.use_decoder("perceptual")
    grain, again = (double.draw_grain(32, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(grain, again) and grain.shape == (32, 1, *double.box[2:])


def test_the_digest_of_latents_ignores_decoders(double):
    """Whoever learned the latents of one first stage can decode with another that differs in its decoders only."""
    before = latent_digest(double.state_dict())
    train_perceptual(double)
    double.decoder.stem.weight.data += 1
    assert latent_digest(double.state_dict()) == before
    double.encoder.stem[1].weight.data += 1
    assert latent_digest(double.state_dict()) != before


def test_weights_without_an_encoder_make_a_first_stage_that_only_decodes(trained, kwargs, tmp_path):
    """It decodes as before; asked to encode, it says what is missing."""
    x, z = slices(3)
    latent = trained.encode(x, z)
    trained.to(memory_format=torch.channels_last)
    weights = {name: w for name, w in trained.state_dict().items() if not name.startswith(("encoder.", "encoder_top."))}
    path = tmp_path / "model.safetensors"
    checkpoints.save_weights(path, weights, described(kwargs))
    half = load_first_stage(path)
    assert torch.equal(half.decode(latent, z), trained.decode(latent, z))
    with pytest.raises(ValueError, match="only decodes"):
        half.encode(x, z)


def test_a_decoder_that_does_not_exist_is_refused(model, double):
    for decoder in ("sharp", ""):
        with pytest.raises(ValueError, match="neither fidelity nor perceptual"):
            double.use_decoder(decoder)
    for ask in (lambda: model.use_decoder("perceptual"), model.start_perceptual):
        with pytest.raises(ValueError, match="no perceptual decoder"):
            ask()
    assert model.decoder_in_use == double.decoder_in_use == "fidelity"


def test_a_file_gives_either_of_its_decoders(double, model, kwargs, tmp_path):
    """One file, one latent, two pictures; a file without a perceptual decoder says so."""
    x, z = slices(2)
    train_perceptual(double)
    path = tmp_path / "model.safetensors"
    checkpoints.save_weights(path, double.state_dict(), described(kwargs))
    faithful, sharp = (load_first_stage(path, decoder=decoder) for decoder in ("fidelity", "perceptual"))
    assert load_first_stage(path).decoder_in_use == "fidelity"
    assert load_first_stage(path, decoder=None).decoder_in_use == "perceptual"
    untrained = tmp_path / "untrained.safetensors"
    checkpoints.save_weights(untrained, double.state_dict(), described(kwargs) | {"perceptual_steps": 0})
    assert load_first_stage(untrained, decoder=None).decoder_in_use == "fidelity"
    latent = faithful.encode(x, z)
    assert torch.equal(sharp.encode(x, z), latent)
    assert not torch.allclose(sharp.decode(latent, z), faithful.decode(latent, z), atol=1e-3)
    assert torch.allclose(sharp.decode(latent, z), double.decode(latent, z), atol=1e-4)
    assert not any(parameter.requires_grad for parameter in sharp.parameters()) and not sharp.training

    single = described(kwargs) | {"model_kwargs": kwargs["model_kwargs"] | {"perceptual": False}}
    checkpoints.save_weights(path, MODELS[kwargs["kind"]](**single["model_kwargs"]).state_dict(), single)
    assert load_first_stage(path, decoder=None).perceptual is None
    with pytest.raises(util.UserError, match="no perceptual decoder"):
        load_first_stage(path, decoder="perceptual")


# --------------------------------------------------------------------------------------------------------------- files


def described(kwargs: dict) -> dict:
    return kwargs | {"step": 3}


def test_a_saved_model_gives_identical_outputs(trained, kwargs, tmp_path):
    """To the last bit in the memory format of training; frozen, in evaluation mode, its scale included."""
    x, z = slices(3)
    digest = latent_digest(trained.state_dict())
    trained.to(memory_format=torch.channels_last)  # another format sums in another order
    latent = trained.encode(x, z)
    path = tmp_path / "model.safetensors"
    checkpoints.save_weights(path, trained.state_dict(), described(kwargs))
    for run in (path, str(tmp_path)):
        loaded = load_first_stage(run)
        assert torch.equal(loaded.encode(x, z), latent)
        assert torch.equal(loaded.decode(latent, z), trained.decode(latent, z))
        assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
        assert loaded.description["step"] == 3 and loaded.description["digest"] == digest


def test_a_file_of_another_kind_or_shape_is_refused(trained, kwargs, tmp_path):
    path = tmp_path / "model.safetensors"
    description = described(kwargs)
    checkpoints.save_weights(path, trained.state_dict(), description | {"kind": "diffusion"})
    with pytest.raises(util.UserError, match="diffusion"):
        load_first_stage(path)
    other = {"channels": 16} if isinstance(trained, VAE) else {"codebook_size": 9, "quantizer": "vq"}
    other = kwargs["model_kwargs"] | other
    checkpoints.save_weights(path, trained.state_dict(), description | {"model_kwargs": other})
    with pytest.raises(util.UserError, match="another model"):
        load_first_stage(path)


class Prior(torch.nn.Linear):
    """Stands for a second stage."""

    kind, script = "prior", "prior.py"


def test_a_second_stage_carries_its_first(trained, kwargs, tmp_path):
    """Sampling needs one path: what comes back is the same prior, first stage and description."""
    trained.to(memory_format=torch.channels_last)
    checkpoints.save_weights(tmp_path / "first.safetensors", trained.state_dict(), described(kwargs))
    first_stage = load_first_stage(tmp_path / "first.safetensors")
    prior, sizes, path = Prior(3, 2), {"in_features": 3, "out_features": 2}, tmp_path / "second.safetensors"
    model_VAE.save_second_stage(path, prior, first_stage, {"model_kwargs": sizes})
    prior_back, first_back, description = model_VAE.load_second_stage(path, Prior, "cpu")
    x, z = slices(2)
    assert torch.equal(prior_back.weight, prior.weight) and torch.equal(first_back.encode(x, z), trained.encode(x, z))
    assert description["first_stage"]["digest"] == first_stage.description["digest"]
    assert first_back.description == first_stage.description
    with pytest.raises(util.UserError, match="no first stage"):
        load_first_stage(path)
    with pytest.raises(util.UserError, match=r"prior\.py --name nobody"):
        model_VAE.load_second_stage("nobody", Prior, "cpu")
    with pytest.raises(util.UserError, match=trained.kind):
        model_VAE.load_second_stage(tmp_path / "first.safetensors", Prior, "cpu")
