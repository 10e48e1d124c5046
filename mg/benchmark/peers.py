"""PyTorch networks from diffusers to compare models with: the same kind of network, with random weights.

torch and diffusers are imported only to build a network, and MindSpore only to choose one: a peer's process must not
load MindSpore because its memory is measured.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

LEARNING_RATE = 1e-5


@dataclass(frozen=True)
class Peer:
    """A class of diffusers and its config.

    Attributes:
        name: its name in a table.
        by_frame: it works on images, so a clip's frames are its batch.
    """

    name: str
    kind: str
    config: dict
    by_frame: bool


def peer_of(model: str, config: Mapping) -> Peer | None:
    """The network to compare a model with this config with; None if diffusers has none.

    For the TAE it is the image VAE that the TAE is inflated from, for temporal_vae its spatial half.
    """
    from mg.models.hunyuan_vae.weights import config_to_diffusers as hunyuan_config
    from mg.models.image_vae.image_vae import IMAGE_VAE_CONFIG
    from mg.models.image_vae.weights import config_to_diffusers as image_config
    from mg.models.temporal_vae.weights import spatial_config

    if model in ("image_vae", "tae"):
        shared = {key: config[key] for key in IMAGE_VAE_CONFIG if key in config}
        name = "AutoencoderKL, frames as the batch"
        return Peer(name, "AutoencoderKL", image_config({**IMAGE_VAE_CONFIG, **shared}), by_frame=True)
    if model == "temporal_vae":
        name = "AutoencoderKL, frames as the batch (only the spatial half)"
        return Peer(name, "AutoencoderKL", image_config(spatial_config(config)), by_frame=True)
    if model == "hunyuan_vae":
        kind = "AutoencoderKLHunyuanVideo"
        return Peer(kind, kind, hunyuan_config(config), by_frame=False)
    return None


def missing() -> str | None:
    """Why no peer can be measured here; None if one can."""
    try:
        importlib.import_module("torch")
        importlib.import_module("diffusers")
    except ImportError as error:
        return f"torch and diffusers are needed but cannot be imported ({error}): see requirements-test.txt"
    return None


class PeerNetwork:
    """A peer with calls that mirror our `encode`, `decode` and training step.

    Args:
        shape: of the clips, (B, C, T, H, W); padded to whole latents, as for our models.
        precision: fp32 | tf32, on CUDA | fp16 | bf16.
        threads: number of torch threads.
        device: cpu | cuda, with convolutions found by trial; clips and results are in the host's memory.
        settings: channels_last | and for encode and decode: compile | autocast, for weights in fp32.
    """

    def __init__(
        self,
        peer: Peer,
        shape: tuple[int, ...],
        precision: str,
        threads: int,
        device: str = "cpu",
        settings: Sequence[str] = (),
    ):
        import diffusers
        import torch

        torch.set_num_threads(threads)
        torch.manual_seed(0)
        if device == "cuda":
            torch.backends.cudnn.benchmark = True
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        self.torch, self.by_frame, self.device, self.settings = torch, peer.by_frame, device, settings
        kinds = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
        self.precision = kinds[precision]
        self.dtype = torch.float32 if "autocast" in settings else self.precision
        config = {key: value for key, value in peer.config.items() if not key.startswith("_")}
        self.network = getattr(diffusers, peer.kind)(**config).eval()
        self.network.to(device, self.dtype)
        self.time, self.space = 1, 2 ** (len(config["block_out_channels"]) - 1)  # pixels per latent
        if not peer.by_frame:  # no tiles along time
            self.network.use_framewise_encoding = self.network.use_framewise_decoding = False
            self.time, self.space = config["temporal_compression_ratio"], config["spatial_compression_ratio"]
        b, c, t, h, w = shape
        self.shape = (b, c, t + (1 - t) % self.time, h + -h % self.space, w + -w % self.space)
        self.layout = torch.contiguous_format
        if "channels_last" in settings:
            self.layout = torch.channels_last if peer.by_frame else torch.channels_last_3d
            self.network.to(memory_format=self.layout)

    def clip(self, seed: int):
        """A random clip in [-1, 1], with frames as the batch if the network works on images."""
        b, c, t, h, w = self.shape
        x = np.random.default_rng(seed).uniform(-1, 1, (b * t, c, h, w) if self.by_frame else self.shape)
        return self.torch.from_numpy(x.astype(np.float32)).to(self.dtype)

    def encoder(self) -> Callable[[int], None]:
        clips = [self.clip(seed) for seed in range(2)]
        return self._runner(lambda x: self.network.encode(x, return_dict=False)[0].mode(), clips)

    def decoder(self) -> Callable[[int], None]:
        with self.torch.inference_mode():
            shape = self.latent_shape()
            latents = [self.torch.randn(shape, dtype=self.dtype) for _ in range(2)]
        return self._runner(lambda z: self.network.decode(z, return_dict=False)[0], latents)

    def _runner(self, function: Callable, inputs: list) -> Callable[[int], None]:
        """A function that runs `function` on one of the inputs, with the settings of encode and decode."""
        torch, autocasts = self.torch, "autocast" in self.settings and self.precision != self.torch.float32
        if "compile" in self.settings:
            function = torch.compile(function, dynamic=False)

        def run(number: int) -> None:
            with torch.inference_mode(), torch.autocast(self.device, self.precision, enabled=autocasts):
                x = inputs[number % 2].to(self.device)
                function(x.contiguous(memory_format=self.layout)).cpu()

        return run

    def trainer(self) -> Callable[[int], None]:
        """L1 and KL weighted as in `mg.losses.reconstruction` (no LPIPS), AdamW and clipping as in `mg.training`."""
        clips = [self.clip(seed).contiguous(memory_format=self.layout) for seed in range(2)]
        network, frames = self.network.train(), self.shape[0] * self.shape[2]
        optimizer = self.torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
        pixels = np.prod(self.shape[1:]) / self.shape[2]  # values per frame

        def run(number: int) -> None:
            x = clips[number % 2]
            posterior = network.encode(x).latent_dist
            y = network.decode(posterior.sample()).sample
            loss = (x - y).abs().mean() * pixels + 1e-6 * posterior.kl().sum() / frames
            loss.backward()
            self.torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        return run

    def latent_shape(self) -> tuple[int, ...]:
        b, _, t, h, w = self.shape
        z, h, w = self.network.config.latent_channels, h // self.space, w // self.space
        return (b * t, z, h, w) if self.by_frame else (b, z, 1 + (t - 1) // self.time, h, w)


def count_torch_operations(run: Callable[[], None]) -> int:
    """Floating-point operations of a call, 2 per multiply-add, including attention."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # The counter doesn't know torch's fused attention for CPUs.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops()
