"""Every graph that runs on a device, by name: MODEL/PART/PRECISION/SIZE, e.g. tae/encode/bf16/small.

    python -m mg.ascend.graphs tae/encode/bf16/small WEIGHTS      # in the environment of `mg.ascend.stand_ins`

compiles one. Parameters have no data, so that the released models need no memory, and all videos are zeros.
"""

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import mindspore as ms
import numpy as np
from mindspore import ParameterTuple, Tensor, communication, mint, nn, ops
from mindspore.nn.utils import no_init_parameters

from mg import runtime
from mg.ascend.sizes import DENOISERS, SIZES, TEXT_SIZES
from mg.checkpoints import write_state_dict
from mg.collectives import Group
from mg.diffusion.networks import Denoiser, create_denoiser
from mg.diffusion.schedules import Schedule, create_schedule
from mg.generation.training.step import DenoiserStep
from mg.losses.adversarial import DiscriminatorLossConfig
from mg.losses.backbones import BACKBONES, BackboneFeatures
from mg.losses.lpips import LPIPSMaps
from mg.losses.reconstruction import AutoencoderLoss, LossConfig
from mg.models import VideoAutoencoder, create_model
from mg.models.discriminator import DiscriminatorConfig, NLayerDiscriminator3D
from mg.models.trainable import sample
from mg.runtime import Runtime
from mg.text.clip import CLIPTextTower
from mg.text.t5 import T5Encoder
from mg.training.optim import OPTIMIZERS, OptimConfig
from mg.training.step import Adversary, TrainStep

MODELS = tuple(SIZES["small"])
INFERENCE = ("encode", "encode_image", "decode", "decode_image")
# `checkpointed` is `accumulate` with gradient checkpointing, `compete` with a discriminator.
TRAINING = ("accumulate", "accumulate_image", "checkpointed", "compete", "reduce", "update", "update_with_ema")
TEXT = {"t5": T5Encoder, "clip": CLIPTextTower}
# Of a denoiser: `given` has given frames, `flash` uses flash attention, `gradient` is the gradient of its output,
# with gradient checkpointing, `train` a batch's whole part in a training step, with given frames, and `validate` the
# loss alone, of one clip.
DENOISING = ("denoise", "denoise_given", "denoise_flash", "gradient", "train", "validate")
# Graphs that do not depend on the autoencoder, and so are compiled without one or with a small one.
APART = {
    "discriminator": ("judge", "judge_vanilla", "track", "reduce", "update"),
    "optimizer": tuple(OPTIMIZERS),
    "lpips": tuple(BACKBONES),
    "loss_scale": ("adjust",),
    **dict.fromkeys(DENOISERS["small"], DENOISING),
    "diffusion_loss": ("iddpm", "rflow"),
    **dict.fromkeys(TEXT, ("encode",)),
    # What several workers compute together: `*_shards` with optimizer states, gradients and averages sharded over all
    # workers, and the training step of a denoiser if two of them share each clip's tokens.
    "workers": (
        *("reduce", "compete", "judge", "accumulate_shards", "reduce_shards", "update_shards"),
        *("stdit", "stdit2", "stdit3"),
    ),
}
WORKERS = 4
CONTROLS = ("refused", "on_host", "too_wide", "grouped")
TRAINED = "parameters trained: "  # printed by `main`, followed by the number


@dataclass(frozen=True)
class Graph:
    """A graph's name in its parts.

    Attributes:
        model: one of MODELS, a key of APART, or "control".
        part: one of INFERENCE or TRAINING, of the key's parts in APART, or of CONTROLS.
        dtype: fp32 | fp16 | bf16.
        size: small | full.
    """

    model: str
    part: str
    dtype: str
    size: str

    def __str__(self) -> str:
        return "/".join((self.model, self.part, self.dtype, self.size))

    @property
    def trains(self) -> bool:
        return self.part not in INFERENCE and not self.part.startswith("denoise") and self.model != "lpips"

    @property
    def workers(self) -> int:
        """How many workers run the graph together."""
        return WORKERS if self.model == "workers" else 1


def graphs(
    models: Sequence[str] = (), parts: Sequence[str] = (), dtypes: Sequence[str] = (), sizes: Sequence[str] = ()
) -> list[Graph]:
    """All graphs except the controls, or only those of some models, parts, precisions and sizes.

    Raises:
        ValueError: an unknown name.
    """
    found = [
        Graph(model, part, dtype, size)
        for size in SIZES
        for model in (*MODELS, *APART)
        for part in APART.get(model, INFERENCE + TRAINING)
        for dtype in ("fp32", "fp16", "bf16")
        if not _repeats(model, part, dtype, size)
    ]
    for name, chosen in (("model", models), ("part", parts), ("dtype", dtypes), ("size", sizes)):
        known = list(dict.fromkeys(getattr(graph, name) for graph in found))
        for value in chosen:
            if value not in known:
                raise ValueError(f"unknown {name} {value!r}; it must be one of {', '.join(known)}")
        found = [graph for graph in found if not chosen or getattr(graph, name) in chosen]
    return found


def _repeats(model: str, part: str, dtype: str, size: str) -> bool:
    """Whether a graph equals one of another part, precision or size."""
    if (model == "dit" and part == "denoise_given") or (part == "denoise_flash" and dtype == "fp32"):
        return True
    if part in ("train", "validate") and size != "small":  # `gradient` and the loss cover them
        return True
    if model == "workers" and size != "small":
        return True
    if model in ("optimizer", "loss_scale", "diffusion_loss"):
        return dtype != "fp32" or size != "small"
    # LPIPS and parameters are fp32 in every precision.
    updates = ("reduce", "reduce_shards", "update", "update_shards", "update_with_ema", "track")
    return dtype != "fp32" and (model == "lpips" or part in updates)


class Built(NamedTuple):
    """A cell, its inputs, and how many parameters it trains."""

    cell: nn.Cell
    inputs: tuple[Tensor, ...]
    parameters: int = 0


def build(graph: Graph, weights: Path) -> Built:
    """The cell that a graph is compiled from.

    Args:
        weights: a folder for weight files, which are all zeros.
    """
    if graph.model == "control":
        return _control(graph.part)
    if graph.model == "lpips":
        pixels = SIZES[graph.size]["tae"].pixels
        images = _zeros(4, 3, pixels, pixels)
        return Built(LPIPSMaps(graph.part, _lpips_weights(graph.part, weights)), (images, images))
    if graph.part in DENOISING or graph.part in DENOISERS["small"]:
        return _denoising(graph)
    if graph.model == "diffusion_loss":
        return _diffusion_loss(graph.part)
    if graph.model in TEXT:
        size = TEXT_SIZES[graph.size][graph.model]
        network, ids = (
            TEXT[graph.model](size.config, size.length, graph.dtype),
            Tensor(np.zeros((1, size.length), np.int32)),
        )
        return Built(network, (ids, _zeros(1, size.length)) if graph.model == "t5" else (ids,))
    if graph.model in APART:
        graph, apart = Graph("tae", "", graph.dtype, graph.size), graph
        return _training_cell(*_model(graph), apart, weights)
    model, clip = _model(graph)
    if graph.part in INFERENCE:
        model.set_train(False)
        if graph.part.startswith("encode"):
            return Built(_Encode(model), (clip,))
        return Built(_Decode(model, clip.shape[2]), (_zeros(*model.latent_shape(clip.shape)),))
    return _training_cell(model, clip, graph, weights)


class _Encode(nn.Cell):
    """What `encode` runs on the device, plus sampling as in a training step."""

    def __init__(self, model: VideoAutoencoder):
        super().__init__()
        self.model = model

    def construct(self, x):
        mean, logvar = self.model.posterior(x)
        return mean if logvar is None else (sample(mean, logvar, ops.standard_normal(mean.shape)), mean, logvar)


class _Decode(nn.Cell):
    """What `decode` runs on the device."""

    def __init__(self, model: VideoAutoencoder, frames: int):
        super().__init__()
        self.model, self.frames = model, frames

    def construct(self, z):
        code = self.model.code(z, self.frames) if self.model.two_stages else z
        return self.model.pixels(code, self.frames)


class _Adjust(nn.Cell):
    """The dynamic loss scale after an update."""

    def __init__(self, scaler):
        super().__init__(auto_prefix=False)
        self.scaler = scaler

    def construct(self, finite):
        return self.scaler.adjust(finite)


def _model(graph: Graph) -> tuple[VideoAutoencoder, Tensor]:
    """The model, and the clip or image of a graph."""
    size = SIZES[graph.size][graph.model]
    frames = 1 if graph.part.endswith("image") else size.frames
    return create_model(graph.model, None, graph.dtype, **size.config), _zeros(1, 3, frames, size.pixels, size.pixels)


def _training_cell(model: VideoAutoencoder, clip: Tensor, graph: Graph, weights: Path) -> Built:
    """A part of `TrainStep`; the only function here that knows its internals."""
    part, adversary = graph.part, None
    settings: dict[str, Any] = {"weight_decay": 0.01}
    if graph.model == "optimizer":
        settings |= {"name": part}
    if graph.model == "loss_scale":
        settings |= {"loss_scale": "dynamic"}
    if part == "checkpointed":
        model.recompute_activations()
    worker, sharded = Runtime("ascend", 0, graph.workers), part.endswith("_shards")
    if part in ("compete", "judge") or graph.model == "discriminator":
        discriminator = DiscriminatorConfig() if graph.size == "full" else DiscriminatorConfig(ndf=8, n_layers=3)
        kind = DiscriminatorLossConfig(disc_loss_type="vanilla" if part == "judge_vanilla" else "hinge")
        judge = NLayerDiscriminator3D(discriminator, graph.dtype, worker.world_size)
        adversary = Adversary(judge, disc_loss=kind)
    config = OptimConfig(ema_decay=0.9 if part in ("update_with_ema", "update_shards") else 0.0, **settings)
    loss = AutoencoderLoss(_all_terms(model, clip, weights))
    sharers = Group.of(worker) if sharded else None
    step = TrainStep(model, loss, config, 2, graph.dtype, worker.world_size, adversary, sharers)
    updater = step.discriminator_updater if graph.model == "discriminator" else step.updater
    scale, noise = _zeros(), _zeros(*model.latent_shape(clip.shape))
    if graph.model == "loss_scale":
        return Built(_Adjust(updater.scaler), (Tensor(True),))
    if graph.model == "optimizer" or part.startswith("update"):
        _, numbers = updater.optimizer.next_update()
        return Built(updater._update, (scale, *numbers), len(updater.parameters))
    if part.startswith("reduce"):
        return Built(updater._reduce, ())
    if adversary is None:
        if not model.two_stages:
            return Built(step._accumulate, (clip, noise, scale, None))
        x, valid = model.align_frames(clip.asnumpy())
        return Built(step._accumulate, (Tensor(x), noise, scale, Tensor(valid)))
    if part == "track":
        norms = [adversary.discriminator.main[at + 1] for at in adversary.discriminator.normed]
        return Built(step._track, tuple(_zeros(*norm.weight.shape) for norm in norms for _ in ("mean", "variance")))
    masks = tuple(Tensor(np.ones(shape, np.uint8)) for shape in adversary.discriminator.mask_shapes(clip.shape))
    if part == "compete":
        return Built(step._compete, (clip, noise, scale, scale, *masks))
    return Built(step._judge, (clip, clip, scale, *masks, *masks))


class _Gradient(nn.Cell):
    """The gradient of a cell's output with respect to all of its trainable parameters."""

    def __init__(self, cell: nn.Cell):
        super().__init__(auto_prefix=False)
        self.cell = cell
        self.gradient = ops.GradOperation(get_by_list=True)
        self.trained = ParameterTuple(cell.trainable_params())

    def construct(self, *inputs):
        return self.gradient(self.cell, self.trained)(*inputs)


def _denoising(graph: Graph) -> Built:
    """A denoiser, with the guided and the unguided half in one batch of two."""
    if graph.workers > 1:
        graph, shared = replace(graph, model=graph.part, part="train"), Group.of(Runtime("ascend", 0, graph.workers), 2)
    else:
        shared = None
    (t, h, w), config = DENOISERS[graph.size][graph.model]
    flash, gradient = graph.part == "denoise_flash", graph.part in ("gradient", "train")
    network = create_denoiser(graph.model, None, graph.dtype, gradient, **config, enable_flash_attn=flash)
    if shared is not None:
        network.share_tokens(shared)
    tokens = 1 if graph.model == "dit" else network.config["model_max_length"]
    y, mask = _zeros(2, 1, tokens, network.config["caption_channels"]), Tensor(np.ones((2, tokens), np.bool_))
    given = Tensor(np.ones((2, t), np.bool_)) if graph.part == "denoise_given" else None
    inputs = (_zeros(2, network.in_channels, t, h, w), _zeros(2), y, None if graph.model == "dit" else mask, given)
    sizes = (_zeros(2),) * len(network.extra_inputs)
    if graph.part in ("train", "validate"):
        return _denoiser_step(network, graph, (*inputs, *sizes))
    return Built(_Gradient(network) if gradient else network, inputs + sizes)


def _denoiser_step(network: Denoiser, graph: Graph, inputs: tuple) -> Built:
    """A part of `DenoiserStep`; the only function here that knows its internals."""
    schedule = create_schedule("rflow" if graph.model == "stdit3" else "iddpm")
    x, _, y, mask, _, *sizes = inputs
    t = Tensor(schedule.draw_t(np.random.default_rng(0), 2))
    step = DenoiserStep(network, schedule, OptimConfig(), 2, graph.dtype)
    if graph.part == "validate":
        one = [None if each is None else each[:1] for each in (x, t, x, None, y, mask, *sizes)]
        return Built(step._losses, tuple(one))
    given = Tensor(np.ones((2, x.shape[2]), np.bool_)) if network.takes_frame_mask else None
    return Built(step._accumulate, (_zeros(), x, t, x, given, y, mask, *sizes))


def _all_terms(model: VideoAutoencoder, clip: Tensor, weights: Path) -> LossConfig:
    """Every term of the loss that the model can have."""
    return LossConfig(
        lpips_weights=_lpips_weights("vgg", weights),
        kl_weight=float(model.geometry.has_posterior),
        outlier_weight=1.0,
        latent_weight=float(model.two_stages),
        identity_weight=float(model.two_stages and clip.shape[2] == 1),
    )


def _lpips_weights(net: str, folder: Path) -> str:
    """A file of zeros instead of the weights of LPIPS, which loads them when it is built."""
    file = folder / f"lpips_{net}.safetensors"
    if not file.exists():
        backbone = BACKBONES[net]
        shapes = {f"backbone.{p.name}": p.shape for p in BackboneFeatures(backbone).get_parameters()}
        shapes |= {f"linear.{depth}.weight": (1, channels) for depth, channels in enumerate(backbone.tap_channels)}
        write_state_dict(file, {name: np.zeros(shape, np.float32) for name, shape in shapes.items()})
    return str(file)


class _Denoiser(nn.Cell):
    """A minimal network with a denoiser's interface."""

    def __init__(self):
        super().__init__()
        self.project = nn.Dense(4, 8, has_bias=False)

    def construct(self, x, t, x_mask=None):
        b, _, frames, h, w = x.shape
        return self.project(x.reshape(b, 4, frames * h * w).swapaxes(1, 2)).swapaxes(1, 2).reshape(b, 8, frames, h, w)


class _DiffusionLoss(nn.Cell):
    """A schedule's loss of a network's output."""

    def __init__(self, schedule: Schedule):
        super().__init__()
        self.network, self.schedule = _Denoiser(), schedule

    def construct(self, x0, t, noise, x_mask):
        return mint.mean(self.schedule.training_losses(self.network, x0, t, noise, x_mask))


def _diffusion_loss(name: str) -> Built:
    """The gradient of a schedule's loss, with given frames."""
    schedule, latents = create_schedule(name), _zeros(2, 4, 5, 6, 8)
    t = Tensor(schedule.draw_t(np.random.default_rng(0), 2))
    return Built(_Gradient(_DiffusionLoss(schedule)), (latents, t, latents, Tensor(np.ones((2, 5), np.bool_))))


class _Cholesky(nn.Cell):
    def construct(self, x):
        return ops.cholesky(x)


class _Convolution(nn.Cell):
    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.conv = ops.Conv2D(channels, 3, pad_mode="same", group=groups)

    def construct(self, x, weight):
        return self.conv(x, weight)


def _control(name: str) -> Built:
    """A graph with one known fault."""
    if name == "refused":
        return Built(nn.MaxPool2d(2, 2), (_zeros(1, 8, 8, 8).astype(ms.bfloat16),))
    if name == "on_host":
        return Built(_Cholesky(), (_zeros(4, 4),))
    if name == "too_wide":
        return Built(_Convolution(8, 1), (_zeros(1, 8, 4, 4097), _zeros(8, 8, 3, 3)))
    return Built(_Convolution(8, 2), (_zeros(1, 8, 8, 8), _zeros(8, 4, 3, 3)))


def _zeros(*shape: int) -> Tensor:
    return Tensor(np.zeros(shape, np.float32))


def main(arguments: Sequence[str]) -> None:
    """Compile one graph. If an aclop kernel was selected the process may crash after the selection, since there is no
    CANN to build it."""
    name, weights = arguments
    graph = Graph(*name.split("/"))
    runtime.setup("ascend")
    if graph.workers > 1:
        communication.init()
    with nullcontext() if graph.model == "control" else no_init_parameters():
        built = build(graph, Path(weights))
    sys.stdout.write(f"{TRAINED}{built.parameters}\n")
    sys.stdout.flush()
    built.cell.compile(*built.inputs)


if __name__ == "__main__":
    main(sys.argv[1:])
