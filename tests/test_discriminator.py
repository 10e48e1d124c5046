"""The discriminator is Open-Sora's: its logits, its training by torch's conventions, its size, its parameter names."""

import json
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from mg import runtime
from mg.checkpoints import CheckpointError, write_state_dict
from mg.models.discriminator import DISCRIMINATOR_FILE, DiscriminatorConfig, NLayerDiscriminator3D

PARITY = Path(__file__).parent / "data" / "discriminator"  # the original's outputs, ndf 8, evaluation mode
TINY = {"ndf": 4, "n_layers": 3}


class Gradients(nn.Cell):
    """Of logits weighted by `cotangent`, at the trained parameters; compiled as in a training step."""

    def __init__(self, discriminator):
        super().__init__(auto_prefix=False)
        self.discriminator = discriminator
        parameters = ms.ParameterTuple(discriminator.trainable_params())
        self.differentiate = ms.value_and_grad(self.product, 0, parameters, has_aux=True)

    def product(self, x, cotangent, *masks):
        logits, statistics = self.discriminator.forward(x, masks)
        return (logits * cotangent).sum(), logits, statistics

    def construct(self, x, cotangent, *masks):
        outputs, (dx, gradients) = self.differentiate(x, cotangent, *masks)
        return outputs[1], outputs[2], dx, gradients


class Track(nn.Cell):
    def __init__(self, discriminator):
        super().__init__(auto_prefix=False)
        self.discriminator = discriminator

    def construct(self, *statistics):
        return self.discriminator.track(*statistics)


def build_in_torch(torch, discriminator, masks):
    """The same network of torch's layers, with the same weights; dropout multiplies by `masks`, one after the other."""
    masks = iter(masks)

    class Dropout(torch.nn.Module):
        def forward(self, x):
            return x * torch.from_numpy(next(masks)) / (1 - discriminator.dropout)

    layers = []
    for cell in discriminator.main:
        if hasattr(cell, "running_mean"):
            layers.append(torch.nn.BatchNorm3d(cell.weight.size))
        elif hasattr(cell, "weight"):
            out, into = cell.weight.shape[:2]
            bias = f"main.{len(layers)}.bias" in discriminator.parameters_dict()
            strides = [2] + [2, (1, 2, 2)] + [1, 1]
            stride = strides[sum(isinstance(layer, torch.nn.Conv3d) for layer in layers)]
            layers.append(torch.nn.Conv3d(into, out, 3, stride, 1, bias=bias))
        else:
            layers.append(Dropout() if isinstance(cell, nn.Identity) else torch.nn.LeakyReLU(0.2))
    network = torch.nn.ModuleDict({"main": torch.nn.Sequential(*layers)})
    state = {name: torch.from_numpy(p.asnumpy().copy()) for name, p in discriminator.parameters_dict().items()}
    missing, unexpected = network.load_state_dict(state, strict=False)
    assert unexpected == [] and all(name.endswith("num_batches_tracked") for name in missing)
    return network


def assert_close(found, wanted, tolerance, name=""):
    wanted = np.asarray(wanted)
    assert np.abs(found - wanted).max() <= tolerance * max(np.abs(wanted).max(), 1e-6), name


def test_it_has_the_originals_size_and_names():
    discriminator = NLayerDiscriminator3D(DiscriminatorConfig())
    assert sum(p.size for p in discriminator.trainable_params()) == 18_823_553
    small = NLayerDiscriminator3D(DiscriminatorConfig(ndf=8)).parameters_dict()
    keys = json.loads((PARITY / "meta.json").read_text())["keys"]
    assert len(keys) == 34
    wanted = {name: tuple(shape) for name, shape in keys.items() if not name.endswith("num_batches_tracked")}
    assert {name: tuple(p.shape) for name, p in small.items()} == wanted


def test_it_starts_as_the_original_does():
    parameters = NLayerDiscriminator3D(DiscriminatorConfig()).parameters_dict()
    for name, parameter in parameters.items():
        value = parameter.asnumpy()
        if value.ndim == 5:
            assert abs(value.mean()) < 2e-3 and value.std() == pytest.approx(0.02, rel=0.05), name
        elif name.endswith("weight"):
            assert value.mean() == pytest.approx(1, abs=0.01) and value.std() == pytest.approx(0.02, rel=0.3), name
        else:
            assert (value == name.endswith("running_var")).all(), name


def test_logits_are_the_originals(mode):
    discriminator = NLayerDiscriminator3D(
        DiscriminatorConfig(ndf=8, from_pretrained=str(PARITY / "weights.safetensors"))
    )
    x, wanted = np.load(PARITY / "x.npy").astype(np.float32), np.load(PARITY / "logits.npy")
    assert_close(discriminator(Tensor(x)).asnumpy(), wanted, 1e-4)


@pytest.mark.parametrize(
    "mode, frames, dropout", [("graph", 5, 0.3), ("pynative", 5, 0.3), ("pynative", 5, 0.0), ("pynative", 1, 0.3)]
)
def test_a_training_pass_is_torchs(mode, frames, dropout):
    runtime.setup("cpu", mode, seed=0)
    torch = pytest.importorskip("torch")
    discriminator = NLayerDiscriminator3D(DiscriminatorConfig(**TINY, dropout=dropout))
    rng = np.random.default_rng(0)
    for parameter in discriminator.get_parameters():  # larger than at the start, so that nothing is lost in rounding
        value = parameter.asnumpy() + 0.3 * rng.uniform(0, 1, parameter.shape)
        parameter.set_data(Tensor(value.astype(np.float32)))
    x = rng.uniform(-1, 1, (2, 3, frames, 20, 17)).astype(np.float32)
    masks = discriminator.draw_masks(x.shape, [rng, rng])
    assert len(masks) == (3 if dropout else 0)
    network = build_in_torch(torch, discriminator, masks or [np.ones(1, np.uint8)] * 3).train()
    pixels = torch.from_numpy(x).requires_grad_()
    wanted = network["main"](pixels)
    cotangent = rng.standard_normal(wanted.shape).astype(np.float32)
    (wanted * torch.from_numpy(cotangent)).sum().backward()

    logits, statistics, dx, gradients = Gradients(discriminator)(*map(Tensor, (x, cotangent, *masks)))
    assert logits.shape == (2, 1, -(-frames // 4), 3, 3)
    assert_close(logits.asnumpy(), wanted.detach(), 1e-4)
    assert_close(dx.asnumpy(), pixels.grad, 1e-4)
    trained = dict(network.named_parameters())
    assert {p.name for p in discriminator.trainable_params()} == set(trained)
    for parameter, gradient in zip(discriminator.trainable_params(), gradients):
        assert_close(gradient.asnumpy(), trained[parameter.name].grad, 1e-4, parameter.name)
    Track(discriminator)(*statistics)
    for name, wanted in network.named_buffers():
        if not name.endswith("num_batches_tracked"):
            assert_close(discriminator.parameters_dict()[name].asnumpy(), wanted, 1e-5, name)


def test_masks_depend_only_on_the_generator_and_keep_the_set_share():
    discriminator = NLayerDiscriminator3D(DiscriminatorConfig(ndf=16, dropout=0.3))
    shape = (1, 3, 8, 64, 64)
    first, again, other = (discriminator.draw_masks(shape, [np.random.default_rng(seed)]) for seed in (0, 0, 1))
    assert [mask.shape for mask in first] == discriminator.mask_shapes(shape)
    assert all((a == b).all() for a, b in zip(first, again)) and not (first[0] == other[0]).all()
    assert all(mask.dtype == np.uint8 and set(np.unique(mask)) == {0, 1} for mask in first)
    assert np.concatenate([mask.ravel() for mask in first]).mean() == pytest.approx(0.7, abs=0.01)
    assert NLayerDiscriminator3D(DiscriminatorConfig(**TINY, dropout=0)).draw_masks(shape, []) == ()


def test_weights_come_back_from_a_file_or_a_checkpoints_folder(tmp_path):
    first, second, third = (NLayerDiscriminator3D(DiscriminatorConfig(**TINY)) for _ in range(3))
    weights = {name: p.asnumpy() for name, p in first.parameters_dict().items()}
    write_state_dict(tmp_path / DISCRIMINATOR_FILE, weights)
    second.load_weights(tmp_path)
    third.load_weights(tmp_path / DISCRIMINATOR_FILE)
    for name, wanted in weights.items():
        for found in (second, third):
            np.testing.assert_array_equal(found.parameters_dict()[name].asnumpy(), wanted)


def test_weights_of_another_size_are_an_error_that_names_file_and_keys(tmp_path):
    with pytest.raises(CheckpointError) as error:
        NLayerDiscriminator3D(DiscriminatorConfig(ndf=4, from_pretrained=str(PARITY / "weights.safetensors")))
    for part in ("weights.safetensors does not fit this discriminator", "main.0.weight", "discriminator.ndf"):
        assert part in str(error.value)
    with pytest.raises(CheckpointError, match=str(tmp_path / DISCRIMINATOR_FILE)):  # a checkpoint of stage 1
        NLayerDiscriminator3D(DiscriminatorConfig(from_pretrained=str(tmp_path)))


@pytest.mark.parametrize("name, value", [("ndf", 0), ("n_layers", 0), ("dropout", 1.0), ("dropout", -0.1)])
def test_a_setting_out_of_range_is_an_error(name, value):
    with pytest.raises(ValueError, match=f"^{name} is {value}; it must be "):
        DiscriminatorConfig(**{name: value})


def test_low_precision_has_nearly_the_logits_of_fp32():
    config = DiscriminatorConfig(ndf=8, from_pretrained=str(PARITY / "weights.safetensors"))
    x = Tensor(np.load(PARITY / "x.npy").astype(np.float32))
    wanted = NLayerDiscriminator3D(config)(x).asnumpy()
    for dtype in ("fp16", "bf16"):
        logits = NLayerDiscriminator3D(config, dtype)(x)
        assert logits.dtype == ms.float32
        assert 0 < np.abs(logits.asnumpy() - wanted).max() < 0.05 * np.abs(wanted).max()
