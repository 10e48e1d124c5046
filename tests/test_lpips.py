"""LPIPS equals the `lpips` package, in both modes, with its gradients; its converter takes the originals' files."""

import runpy
import sys
import types
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest

from mg.losses.lpips import LPIPS, LPIPSWeightsError, unit_length

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
    """The `lpips` package over a stand-in for torchvision, whose wheels do not import beside the CPU build of torch."""
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


def test_converter_names_a_file_that_is_not_there(originals, tmp_path, monkeypatch, capsys):
    _, _, linear_file = originals("alex")
    arguments = ("--backbone", tmp_path / "none.pth", "--linear", linear_file, "--target", tmp_path / "t.safetensors")
    assert convert(monkeypatch, *arguments) == 2
    text = capsys.readouterr().err.strip()
    assert text.startswith("error: ") and "none.pth" in text and "\n" not in text
    assert list(tmp_path.iterdir()) == []
