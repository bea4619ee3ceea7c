"""Laws of training/stages.py: files of both stages against memory."""

from types import SimpleNamespace

import pytest
import torch

import util
from model_diffusion import LatentDiffusion
from model_VAE import MODELS, VQVAE
from training import checkpoints
from training.stages import (
    allow_brains,
    find_encoder,
    latent_digest,
    load_first_stage,
    load_second_stage,
    save_second_stage,
)

VARIANTS = {
    "vae": {},
    "vqvae": {"codebook_size": 16},
    "vqvae fsq": {"levels": (4, 3, 3, 2)},
    "vqvae2": {"codebook_size": 16},
}


def slices(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x [count, 1, 64, 64] in [-1, 1] and z."""
    return 2 * torch.rand(count, 1, 64, 64) - 1, torch.arange(count)


def noise() -> torch.Generator:
    """Of the texture, always the same."""
    return torch.Generator().manual_seed(5)


@pytest.fixture(params=VARIANTS)
def described(request, tiny_sizes) -> dict:
    """The description of a tiny autoencoder of each kind with all its parts."""
    sizes = tiny_sizes | VARIANTS[request.param] | {"perceptual": True}
    return {"kind": request.param.split()[0], "model_kwargs": sizes, "step": 3}


@pytest.fixture
def trained(described, awaken):
    """As if trained, in the memory format of training: another one sums in another order."""
    model = awaken(MODELS[described["kind"]](**described["model_kwargs"]).eval())
    x, z = slices(8)
    model.fit(x, z)
    model.set_latent_statistics([(x, z)])
    return model.to(memory_format=torch.channels_last)


@pytest.fixture
def path(trained, described, tmp_path):
    checkpoints.save_weights(tmp_path / "model.safetensors", trained.state_dict(), described)
    return tmp_path / "model.safetensors"


def test_other_slices_than_the_first_stage_learned_from_are_named(trained, capsys):
    def said(digest: str) -> str:
        data = SimpleNamespace(digest=digest, slices_per_brain=4)
        allow_brains(trained, data, SimpleNamespace(digest="held out", slices_per_brain=4))
        return capsys.readouterr().out

    trained.description = {"data": {"digest": "a"}}
    assert said("a") == "" and "trained on other slices" in said("b")
    trained.description = {}
    assert said("b") == ""


def test_a_saved_model_gives_identical_outputs(trained, path):
    """To the last bit; frozen, in evaluation mode, its scale included; by file and by folder, with either decoder."""
    x, z = slices(3)
    latent, faithful = trained.encode(x, z), trained.decode(trained.encode(x, z), z)
    trained.use_decoder("perceptual")
    sharp = trained.draw(latent, z, noise())
    files = (path, "fidelity", faithful), (path.parent, "perceptual", sharp), (path, None, sharp)
    for run, decoder, picture in files:
        loaded = load_first_stage(run, decoder=decoder)
        assert torch.equal(loaded.encode(x, z), latent) and torch.equal(loaded.draw(latent, z, noise()), picture)
        assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
        assert loaded.description["step"] == 3
        assert loaded.description["digest"] == latent_digest(trained.state_dict())
    assert load_first_stage(path).decoder_in_use == "fidelity" and not torch.equal(faithful, sharp)


def test_a_frozen_first_stage_is_not_moved_by_a_module_around_it(path):
    """Its train() reaches all parts of it; a forward pass in training mode would move a codebook."""
    outer = torch.nn.ModuleDict({"mine": torch.nn.Linear(2, 2), "frozen": load_first_stage(path)}).train()
    before = {name: tensor.clone() for name, tensor in outer["frozen"].state_dict().items()}
    outer["frozen"](*slices(4))
    assert outer["mine"].training and not any(module.training for module in outer["frozen"].modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in outer["frozen"].state_dict().items())


def test_what_a_frozen_first_stage_does_not_take_is_said(path):
    """Pixels instead of [-1, 1], bytes, halves, a z that no brain has, NaN; in words, wherever it goes in."""
    model, (x, z) = load_first_stage(path), slices(3)
    latent = model.encode(x, z)
    for wrong, words in ((255 * x.abs(), "lie in .-1, 1"), (x.byte(), "float32"), (x.half(), "float32"),
                         (x * torch.nan, "lie in|not finite")):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            model.encode(wrong, z)
    for wrong in (z - 1, z + 999, z.float()):
        for use in (lambda z: model.encode(x, z), lambda z: model.decode(latent, z)):
            with pytest.raises(ValueError, match="z must be slices|z int64"):
                use(wrong)
    for wrong in (latent.double(), latent * torch.inf):
        with pytest.raises(ValueError, match="float32|not finite"):
            model.decode(wrong, z)
    with pytest.raises(ValueError, match="torch.autocast"):
        model.bfloat16().decode(latent, z)


def test_the_digest_of_latents_ignores_decoder_and_texture(trained):
    """Whoever learned the latents of one first stage can decode with another that differs in its decoders only."""
    before = latent_digest(trained.state_dict())
    for layer in (trained.decoder.stem, trained.texture.stem):
        layer.weight.data += 1
    assert latent_digest(trained.state_dict()) == before
    trained.encoder.stem[1].weight.data += 1
    assert latent_digest(trained.state_dict()) != before


def test_weights_without_an_encoder_make_a_first_stage_that_only_decodes(trained, described, tmp_path):
    """It decodes as before; asked to encode, it says what is missing."""
    x, z = slices(3)
    latent = trained.encode(x, z)
    weights = {name: w for name, w in trained.state_dict().items() if not name.startswith(("encoder.", "encoder_top."))}
    checkpoints.save_weights(tmp_path / "half.safetensors", weights, described)
    half = load_first_stage(tmp_path / "half.safetensors")
    assert torch.equal(half.decode(latent, z), trained.decode(latent, z))
    with pytest.raises(ValueError, match="only decodes"):
        half.encode(x, z)


def test_an_encoder_is_found_by_its_latents(trained, described, path):
    """A decoder's own, else that of a run here whose decoders may differ; damaged files are passed over."""
    x, z = slices(3)
    whole, half = load_first_stage(path), load_first_stage(path)
    assert find_encoder(whole) is whole
    half.keep_decoders()
    half.slices_per_brain = 3
    assert find_encoder(half) is None
    checkpoints.run_weights("broken").parent.mkdir(parents=True)
    checkpoints.run_weights("broken").write_bytes(b"no weights")
    trained.decoder.stem.weight.data += 1
    checkpoints.save_weights(checkpoints.run_weights("same"), trained.state_dict(), described)
    found = find_encoder(half)
    assert torch.equal(found.encode(x, z), whole.encode(x, z)) and found.slices_per_brain == 3
    trained.encoder.stem[1].weight.data += 1
    checkpoints.save_weights(checkpoints.run_weights("same"), trained.state_dict(), described)
    assert find_encoder(half) is None


def test_a_file_of_another_kind_shape_or_decoder_is_refused(trained, described, tmp_path):
    path, sizes = tmp_path / "other.safetensors", described["model_kwargs"]
    single = {"model_kwargs": sizes | {"perceptual": False}}
    weights = MODELS[described["kind"]](**single["model_kwargs"]).state_dict()
    for tensors, other, words in (
        (trained.state_dict(), {"kind": "diffusion"}, "diffusion"),
        (trained.state_dict(), {"model_kwargs": sizes | {"widths": (16, 32)}}, "another model"),
        (weights, single, "no perceptual decoder"),
    ):
        checkpoints.save_weights(path, tensors, described | other)
        with pytest.raises(util.UserError, match=words):
            load_first_stage(path, decoder="perceptual")
    assert load_first_stage(path, decoder=None).texture is None


OPTIONS = {"ema": True, "sphere": False, "rotation": False}  # of a quantiser of release 1


class Prior(torch.nn.Linear):
    """Stands for a second stage."""

    kind, script = "prior", "prior.py"
    slices_per_brain = 6


def test_a_second_stage_carries_its_first(trained, path):
    """Sampling needs one path: what comes back is the same prior, first stage and description."""
    first_stage, prior, second = load_first_stage(path), Prior(3, 2), path.with_name("second.safetensors")
    save_second_stage(second, prior, first_stage, {"model_kwargs": {"in_features": 3, "out_features": 2}})
    prior_back, first_back = load_second_stage(second, {"prior": Prior})
    x, z = slices(2)
    assert torch.equal(prior_back.weight, prior.weight) and torch.equal(first_back.encode(x, z), trained.encode(x, z))
    assert prior_back.description["first_stage"]["digest"] == first_stage.description["digest"]
    assert first_back.description == {k: v for k, v in first_stage.description.items() if k != "path"}
    with pytest.raises(util.UserError, match="no first stage"):
        load_first_stage(second)
    with pytest.raises(util.UserError, match=r"prior\.py --name nobody"):
        load_second_stage("nobody", {"prior": Prior})
    with pytest.raises(util.UserError, match=trained.kind):
        load_second_stage(path, {"prior": Prior})


@pytest.mark.parametrize("extra", [{"perceptual": True, "grain": True}, {"perceptual": True}, {"grain": False}])
def test_the_perceptual_decoder_of_release_1_is_left_out(trained, described, extra):
    """Its pictures came from another network; the codec is the same to the last bit, and decodes alone."""
    (x, z), path = slices(3), checkpoints.run_weights("release_1")
    weights = {name: tensor for name, tensor in trained.state_dict().items() if not name.startswith("texture.")}
    if "perceptual" in extra:
        weights |= {f"perceptual.{name}": tensor.clone() for name, tensor in trained.decoder.state_dict().items()}
    if extra.get("grain"):
        weights |= {"perceptual.grain.synthesis": torch.ones(3), "grain.strength.2.weight": torch.ones(3)}
    kwargs = {name: value for name, value in described["model_kwargs"].items() if name != "perceptual"} | extra
    checkpoints.save_weights(path, weights, described | {"model_kwargs": kwargs})
    loaded = load_first_stage(path, decoder=None)
    assert loaded.texture is None and loaded.decoder_in_use == "fidelity"
    assert loaded.description["digest"] == latent_digest(trained.state_dict())
    assert torch.equal(loaded.decode(loaded.encode(x, z), z), trained.decode(trained.encode(x, z), z))
    with pytest.raises(util.UserError, match="no perceptual decoder.*--start-from"):
        load_first_stage(path, decoder="perceptual")
    loaded.keep_decoders()
    assert torch.equal(find_encoder(loaded).encode(x, z), trained.encode(x, z))


def test_weights_of_removed_choices_are_refused(tiny_sizes, tmp_path):
    """Read otherwise than they were trained, they would give other pictures."""
    path, first = tmp_path / "old.safetensors", VQVAE(**tiny_sizes, codebook_size=16)
    kwargs = tiny_sizes | {"codebook_size": 16}
    first.description = {"kind": "vqvae", "model_kwargs": kwargs}
    prior = LatentDiffusion(latent_shape=(4, 6, 7), widths=(8,), blocks=1)
    kwargs_of_prior = {"latent_shape": [4, 6, 7], "channels": 8, "channel_multipliers": [1], "blocks": 1}
    chosen = {"schedule": "cosine", "prediction": "v", "weighting": "plain", "times": "uniform"}
    for other in (chosen, {"slice_noise": "own"}):  # as diffusion of release 1 has them
        save_second_stage(path, prior, first, {"model_kwargs": kwargs_of_prior | other})
        with pytest.raises(util.UserError, match="train it anew"):
            load_second_stage(path, {"diffusion": LatentDiffusion})
    sphere = {"quantizer_options": OPTIONS | {"sphere": True}}
    checkpoints.save_weights(path, first.state_dict(), {"kind": "vqvae", "model_kwargs": kwargs | sphere})
    with pytest.raises(util.UserError, match="train it anew"):
        load_first_stage(path)
