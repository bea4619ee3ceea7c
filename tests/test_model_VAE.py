"""Laws of model_VAE.py: the quantiser against brute force, both autoencoders against algebra, files against memory."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Normal, kl_divergence

import dataset
import model_VAE
import prestage_train
import util
from model_VAE import VAE, VQVAE, VectorQuantizer, load_first_stage


def to_latent(vectors: torch.Tensor) -> torch.Tensor:
    """Vectors [N, dim] as a latent [1, dim, 1, N]."""
    return vectors.T[None, :, None]


def slices(count: int, fill_box: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """x [count, 1, 64, 64] in [-1, 1], random in the box of `tiny_sizes` and black around it, and z."""
    x = torch.full((count, 1, 64, 64), -1.0)
    if fill_box:
        x[:, :, 8:56, 4:60] = 2 * torch.rand(count, 1, 48, 56) - 1
    return x, torch.arange(count) % 32


@pytest.fixture(params=["vae", "vqvae"])
def model(request, tiny_sizes):
    """A tiny autoencoder of either kind as it starts, in evaluation mode."""
    sizes = tiny_sizes | ({"codebook_size": 16} if request.param == "vqvae" else {})
    return model_VAE.MODELS[request.param](**sizes).eval()


@pytest.fixture
def trained(model, awaken):
    """As if trained: every layer speaks, the codebook is spread over the data, the latents are scaled."""
    awaken(model)
    x, z = slices(8)
    model.start_linear_path(x, whiten=True)
    if isinstance(model, VQVAE):
        with torch.no_grad():
            model.quantizer.start(model.vectors(x, z).movedim(1, -1).reshape(-1, 4))
    model.set_latent_statistics([(x, z)])
    return model


# ------------------------------------------------------------------------------------------------------- the quantiser


@pytest.mark.parametrize("ema", [True, False])
def test_codes_are_the_nearest_by_brute_force(ema):
    quantizer = VectorQuantizer(37, 5, ema=ema).eval()
    latent = torch.randn(2, 5, 6, 7)
    quantised, idx, _ = quantizer(latent)
    for b, i, j in ((0, 0, 0), (1, 5, 6), (1, 2, 3), (0, 4, 1)):
        distance = [(latent[b, :, i, j] - code).norm().item() for code in quantizer.codebook]
        assert idx[b, i, j] == min(range(37), key=distance.__getitem__)
    exact = torch.cdist(latent.movedim(1, -1).reshape(-1, 5), quantizer.codebook).argmin(1)
    assert torch.equal(idx.flatten(), exact)
    assert torch.allclose(quantised, quantizer.lookup(idx), atol=1e-6)


def test_the_gradient_passes_straight_through():
    quantizer, latent = VectorQuantizer(8, 3).eval(), torch.randn(2, 3, 4, 4, requires_grad=True)
    quantised, _, _ = quantizer(latent)
    weight = torch.randn_like(quantised)
    (quantised * weight).sum().backward()
    assert torch.equal(latent.grad, weight)


@pytest.mark.parametrize("commitment", [0.25, 2.0])
def test_the_commitment_weight_is_on_the_commitment_term(commitment):
    """beta pulls the encoder; the codebook's own pull is 1 whatever beta (a popular code base has it the other way)."""
    latent = torch.randn(1, 3, 1, 5, requires_grad=True)
    quantizer = VectorQuantizer(4, 3, commitment, ema=False).eval()
    _, idx, loss = quantizer(latent)
    codes = quantizer.codebook.detach()[idx[0, 0]]
    vectors = latent.detach()[0, :, 0].T
    loss.backward()
    assert torch.allclose(latent.grad[0, :, 0].T, commitment * 2 * (vectors - codes) / 15, atol=1e-6)
    pull = torch.zeros(4, 3).index_add_(0, idx[0, 0], 2 * (codes - vectors) / 15)
    assert torch.allclose(quantizer.codebook.grad, pull, atol=1e-6)
    quantizer_ema = VectorQuantizer(4, 3, commitment, ema=True).eval()
    quantizer_ema.codebook.copy_(quantizer.codebook)
    assert torch.allclose(quantizer_ema(latent)[2], commitment * (vectors - codes).square().mean())


def test_quantisation_is_float32_under_autocast():
    """bf16 has 8 bits: it chooses other codes."""
    quantizer, latent = VectorQuantizer(256, 8).eval(), torch.randn(4, 8, 16, 16)
    for given in (latent, latent.bfloat16()):
        with torch.autocast("cpu", torch.bfloat16):
            quantised, idx, loss = quantizer(given)
            alone = quantizer.nearest(given.movedim(1, -1).reshape(-1, 8)).view_as(idx)
        assert quantised.dtype == loss.dtype == torch.float32 and torch.equal(idx, quantizer(given.float())[1])
        assert torch.equal(alone, idx)


def test_the_ema_codebook_converges_to_the_cluster_means():
    centres = torch.tensor([[5.0, 0.0], [-5.0, 1.0], [0.0, 7.0]])
    vectors = centres.repeat(50, 1) + 0.5 * torch.randn(150, 2)
    quantizer = VectorQuantizer(3, 2, decay=0.9).train()
    quantizer.codebook.copy_(centres + 1)
    quantizer.total.copy_(quantizer.codebook)
    for _ in range(200):
        quantizer(to_latent(vectors))
    assert torch.allclose(quantizer.codebook, vectors.view(50, 3, 2).mean(0), atol=1e-4)
    assert torch.allclose(quantizer.count, torch.full((3,), 50.0), atol=1e-3)


def test_evaluation_does_not_move_the_codebook():
    quantizer, latent = VectorQuantizer(8, 3).eval(), torch.randn(1, 3, 8, 8)
    before = {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}
    quantizer(latent)
    assert all(torch.equal(before[name], tensor) for name, tensor in quantizer.state_dict().items())
    quantizer.train()(latent)
    assert not all(torch.equal(before[name], tensor) for name, tensor in quantizer.state_dict().items())


@pytest.mark.parametrize("ema", [True, False])
def test_a_revived_code_survives_the_next_update(ema):
    """Its averages start anew with it; left as they were they would draw it back at once."""
    quantizer = VectorQuantizer(4, 2, ema=ema, decay=0.9).train()
    with torch.no_grad():
        quantizer.codebook.copy_(torch.tensor([[0.0, 0.0], [1.0, 0.0], [50.0, 50.0], [-50.0, 50.0]]))
    quantizer.total.copy_(quantizer.codebook)
    vectors = torch.rand(40, 2)
    for _ in range(20):
        quantizer(to_latent(vectors))
        if quantizer.codebook.abs().max() < 2:
            break
    revived = quantizer.codebook[2:].detach().clone()
    assert revived.abs().max() <= 1  # both are among the data now
    quantizer(to_latent(quantizer.codebook[:1].detach().expand(40, 2)))  # all choose another code
    assert torch.allclose(quantizer.codebook[2:], revived, atol=1e-5)


def test_the_k_means_start_finds_k_points_however_unequal():
    """Half of all vectors are the black background; drawn blindly it would take half of the codes."""
    points = torch.randn(16, 4)
    vectors = torch.cat([points, points[:1].expand(500, 4), points[1:3].repeat(50, 1)])
    quantizer = VectorQuantizer(16, 4)
    quantizer.start(vectors[torch.randperm(len(vectors))])
    assert torch.cdist(points, quantizer.codebook).amin(1).max() < 1e-5
    assert len(quantizer.nearest(vectors).unique()) == 16


def test_the_k_means_start_uses_every_code_and_lowers_the_error():
    clusters = 3 * torch.randn(32, 4)
    vectors = torch.cat([clusters.repeat(20, 1) + 0.1 * torch.randn(640, 4), torch.zeros(640, 4)])
    quantizer = VectorQuantizer(32, 4)

    def error():
        return torch.cdist(vectors, quantizer.codebook).amin(1).square().mean()

    quantizer.start(vectors, iterations=0)
    drawn = error()
    torch.manual_seed(0)
    quantizer.start(vectors)
    assert len(quantizer.nearest(vectors).unique()) == 32 and error() < 0.9 * drawn
    with pytest.raises(ValueError, match="31 vectors"):
        quantizer.start(vectors[:31])


def test_processes_keep_one_codebook(tmp_path):
    """Under torchrun each process has vectors of its own; revived codes too must be the same everywhere."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    script = f"""
import sys; sys.path.insert(0, {str(Path(model_VAE.__file__).parent)!r})
import torch, torch.distributed as dist
from model_VAE import VectorQuantizer
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="tcp://localhost:{port}", rank=rank, world_size=2)
for ema in (True, False):
    torch.manual_seed(0)
    quantizer = VectorQuantizer(16, 3, ema=ema, decay=0.5).train()
    with torch.no_grad():
        quantizer.codebook[:8] += 100
    torch.manual_seed(rank)
    for _ in range(4):
        quantizer(torch.randn(1, 3, 4, 4))
    print(quantizer.codebook.abs().max().item() < 50, quantizer.codebook.sum().item(), quantizer.count.sum().item())
"""
    begin = [sys.executable, "-c", script]
    both = [subprocess.Popen([*begin, str(rank)], cwd=tmp_path, stdout=subprocess.PIPE, text=True) for rank in (0, 1)]
    said = [process.communicate(timeout=60)[0].splitlines() for process in both]
    assert [line.split()[0] for line in said[0]] == ["True", "True"]  # codes were revived
    assert said[0] == said[1]


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
    model.start_linear_path(x, whiten=True)
    model.set_latent_statistics([(x, z)])
    assert torch.allclose(model.decode(model.encode(x, z), z), x, atol=1e-5)


@pytest.mark.parametrize("whiten", [True, False])
@pytest.mark.parametrize("channels", [1, 5])
def test_at_the_start_few_channels_are_the_truncated_klt(tiny_sizes, whiten, channels):
    """Training begins at the linear floor; the components are those about black, so that black costs nothing."""
    model, (x, z) = VAE(**tiny_sizes | {"latent_channels": channels}).eval(), slices(6)
    x[:, :, 20:40] = -1
    model.start_linear_path(x, whiten=whiten)
    mean, _ = model.posterior(x, z)
    reconstruction = model.decode(model.encode(x, z), z)[:, 0, 8:56, 4:60]
    assert torch.allclose(reconstruction.double(), klt(x, channels).clamp(-1, 1), atol=1e-4)
    lit = x[:, :, 8:56, 4:60].unfold(2, 4, 4).unfold(3, 4, 4).amax((-1, -2)) > -1  # blocks that hold anything
    sd = mean.movedim(1, -1)[lit[:, 0]].std(0)
    assert torch.allclose(sd if whiten else sd.square().mean().sqrt(), torch.ones(()), atol=1e-3)


def test_the_vqvae_starts_at_its_linear_floor_too(tiny_sizes):
    model, (x, z) = VQVAE(**tiny_sizes, codebook_size=8).eval(), slices(6)
    model.start_linear_path(x, whiten=False)
    box = model._decode(model.vectors(x, z), z)[:, 0]
    assert torch.allclose(box.double(), klt(x, 4), atol=1e-4)


def test_black_decodes_to_exactly_black_at_the_start(model):
    """One grey level of offset in the background costs .06 of SSIM."""
    (x, z), (black, _) = slices(6), slices(6, fill_box=False)
    model.start_linear_path(x, whiten=True)
    if isinstance(model, VQVAE):
        with torch.no_grad():
            vectors = model.vectors(torch.cat([x, black]), z.repeat(2))
        assert not vectors[6:].any()
        distinct = torch.cat([torch.zeros(1, 4), vectors[:6].movedim(1, -1).reshape(-1, 4)[:15]])
        model.quantizer.start(torch.cat([distinct, torch.zeros(20, 4)]))
    assert torch.equal(model.decode(model.encode(black, z), z), black)
    model.set_latent_statistics([(torch.cat([x, black]), z.repeat(2))])
    assert not dataset.to_uint8(model.decode(model.encode(black, z), z)).any()


# --------------------------------------------------------------------------------------------------- both autoencoders


def test_the_outside_of_the_box_is_always_black(trained):
    """Whatever the latent, however loud the network."""
    latent = 30 * torch.randn(4, *trained.latent_shape)
    x = trained.decode(latent, torch.arange(4))
    inside = trained.crop(x).clone()
    assert x.shape == (4, 1, 64, 64) and inside.max() > 0 and -1 <= x.min() <= x.max() <= 1
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
    else:
        assert (trained.vectors(x, z + 3) != trained.vectors(x, z + 28)).float().mean() > 0.99


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
        assert torch.allclose(latent.mean(1), torch.zeros(4).double(), atol=1e-5)
        assert torch.allclose(latent.std(1, unbiased=False), torch.ones(4).double(), atol=1e-5)


def test_the_scale_of_the_latents_changes_no_picture(trained):
    x, z = slices(4)
    before = trained.decode(trained.encode(x, z), z)
    trained.latent_mean.add_(3)
    trained.latent_sd.mul_(5)
    assert torch.allclose(trained.decode(trained.encode(x, z), z), before, atol=1e-5)


def test_decoding_indices_is_decoding_latents(tiny_sizes, awaken):
    """decode_indices(encode_indices(x)) == decode(encode(x)), exactly, with any scale of the latents."""
    model, (x, z) = awaken(VQVAE(**tiny_sizes, codebook_size=64)).eval(), slices(6)
    model.set_latent_statistics([(x, z)])
    idx = model.encode_indices(x, z)
    assert idx.dtype == torch.int64 and idx.shape == (6, 12, 14) and 0 <= idx.min() <= idx.max() < 64
    assert len(idx.unique()) > 10
    assert torch.equal(model.decode_indices(idx, z), model.decode(model.encode(x, z), z))
    every_code = torch.arange(64).repeat(3)[: 12 * 14].view(1, 12, 14)
    latent = model._normalise(model.quantizer.lookup(every_code))
    assert torch.equal(model.nearest(model._denormalise(latent)), every_code)
    assert model.fixed_bits == 12 * 14 * 6


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
    """A VAE's is N(0, 1) before scaling; a VQ-VAE's draws each code as often as training used it."""
    first, second = (trained.prior_latent(50, torch.Generator().manual_seed(s)) for s in (1, 1))
    assert torch.equal(first, second) and first.shape == (50, *trained.latent_shape)
    if isinstance(trained, VAE):
        numbers = trained._denormalise(first)
        assert abs(numbers.mean()) < 0.02 and abs(numbers.std() - 1) < 0.02
    else:
        trained.quantizer.count.copy_(F.one_hot(torch.tensor(3), 16) * 3.0 + F.one_hot(torch.tensor(7), 16))
        idx = trained.nearest(trained._denormalise(trained.prior_latent(50)))
        assert set(idx.unique().tolist()) == {3, 7} and abs((idx == 3).float().mean() - 0.75) < 0.02


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


def test_what_cannot_be_built_is_refused(tiny_sizes):
    """A box that the factor does not divide, and more numbers than the pixels they stand for."""
    with pytest.raises(ValueError, match="factor 4"):
        VAE(**tiny_sizes | {"box": (8, 4, 46, 56)})
    with pytest.raises(ValueError, match="17 latent channels"):
        VAE(**tiny_sizes | {"latent_channels": 17})


@pytest.mark.parametrize("preset", util.PRESET_NAMES)
@pytest.mark.parametrize("kind", ["vae", "vqvae"])
def test_every_preset_builds_its_model(preset, kind):
    """On the content box and on the whole frame, which data that leave the box need."""
    args, _ = util.parse_flags(prestage_train.flags(), ["--model", kind])
    vars(args).update(util.preset_settings("prestage_train.py", preset))
    size = args.image_size
    for box in (tuple(side * size // 256 for side in dataset.CONTENT_BOX), (0, 0, size, size)):
        with torch.device("meta"):
            model, kwargs = prestage_train.build(args, box)
            embedding = model.embed_z(torch.zeros(1))
            h = model.encoder(torch.zeros(1, 1, *box[2:]), embedding)
            assert h.shape[2:] == model.latent_shape[1:] and kwargs["box"] == box
            assert model.decoder(torch.zeros(1, *model.latent_shape), embedding).shape == (1, 1, *box[2:])


# --------------------------------------------------------------------------------------------------------------- files


def described(model, sizes: dict) -> dict:
    more = {"codebook_size": model.codebook_size} if isinstance(model, VQVAE) else {}
    return {"kind": model.kind, "model_kwargs": sizes | more, "step": 3}


def test_a_saved_model_gives_identical_outputs(trained, tiny_sizes, tmp_path):
    """To the last bit in the memory format of training; frozen, in evaluation mode, its scale included."""
    x, z = slices(3)
    digest = util.digest_of(trained.state_dict())
    trained.to(memory_format=torch.channels_last)  # another format sums in another order
    latent = trained.encode(x, z)
    path = tmp_path / "model.safetensors"
    util.save_weights(path, trained.state_dict(), described(trained, tiny_sizes))
    for run in (path, str(tmp_path)):
        loaded = load_first_stage(run)
        assert torch.equal(loaded.encode(x, z), latent)
        assert torch.equal(loaded.decode(latent, z), trained.decode(latent, z))
        assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
        assert loaded.description["step"] == 3 and loaded.description["digest"] == digest


def test_a_file_of_another_kind_or_shape_is_refused(trained, tiny_sizes, tmp_path):
    path = tmp_path / "model.safetensors"
    description = described(trained, tiny_sizes)
    util.save_weights(path, trained.state_dict(), description | {"kind": "diffusion"})
    with pytest.raises(util.UserError, match="diffusion"):
        load_first_stage(path)
    util.save_weights(path, trained.state_dict(), description | {"model_kwargs": tiny_sizes | {"codebook_size": 9}})
    if isinstance(trained, VQVAE):
        with pytest.raises(util.UserError, match="another model"):
            load_first_stage(path)


class Prior(torch.nn.Linear):
    """Stands for a second stage."""

    kind, script = "prior", "prior.py"


def test_a_second_stage_carries_its_first(trained, tiny_sizes, tmp_path):
    """Sampling needs one path: what comes back is the same prior, first stage and description."""
    trained.to(memory_format=torch.channels_last)
    util.save_weights(tmp_path / "first.safetensors", trained.state_dict(), described(trained, tiny_sizes))
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
