"""The denoisers, by name.

    create_denoiser("STDiT3-XL/2")                                     # Open-Sora 1.2's, untrained
    create_denoiser("STDiT3-XL/2", pretrained="OpenSora-STDiT-v3")     # a released folder or file
    create_denoiser("STDiT2-XL/2", pretrained="PixArt-XL-2-512x512.pth")    # start from an image network
    create_denoiser("stdit3", depth=2, hidden_size=96, num_heads=4)    # keywords override the config

All share the interface of `mg.diffusion.networks.denoiser`.
"""

from pathlib import Path

from mg.checkpoints import StateDict
from mg.diffusion.networks.denoiser import DENOISERS, Denoiser
from mg.diffusion.networks.dit import DiT
from mg.diffusion.networks.stdit import STDiT
from mg.diffusion.networks.stdit2 import STDiT2
from mg.diffusion.networks.stdit3 import STDiT3

__all__ = ["DENOISERS", "TYPES", "Denoiser", "create_denoiser", "network_of"]

for _network in (STDiT, STDiT2, STDiT3, DiT):
    DENOISERS.add(_network)

# The names used in configs: which network, and how its config differs from the default.
TYPES: dict[str, tuple[str, dict]] = {
    "STDiT-XL/2": ("stdit", {}),
    "STDiT2-XL/2": ("stdit2", {}),
    "STDiT3-XL/2": ("stdit3", {}),
    "STDiT3-3B/2": ("stdit3", {"hidden_size": 1872, "num_heads": 26}),
    "DiT-XL/2": ("dit", {}),
    "DiT-XL/2x2": ("dit", {"patch_size": [2, 2, 2]}),
}


def network_of(type: str) -> tuple[type[Denoiser], dict]:
    """The class of a name from TYPES or of a network's own name, and how its config differs from the default.

    Raises:
        ValueError: an unknown name.
    """
    if type not in TYPES and type not in DENOISERS.names():
        raise ValueError(f"there is no network {type!r}; there are {', '.join(TYPES)}")
    name, sizes = TYPES.get(type, (type, {}))
    return DENOISERS.model_class(name), sizes


def create_denoiser(
    type: str,
    pretrained: str | Path | StateDict | None = None,
    dtype: str = "fp32",
    use_recompute: bool = False,
    **config,
) -> Denoiser:
    """Build a network; its default config is that of the released weights.

    Args:
        type: one of TYPES, or the name of a network: stdit | stdit2 | stdit3 | dit.
        pretrained: file or folder of weights: ours, Open-Sora's, or PixArt's or DiT's to start from. The config next to
            them is the default then.
        dtype: fp32 | fp16 | bf16, the precision of matrix products.
        use_recompute: gradient checkpointing, block by block.
        config: overrides of the network's config. `enable_flashattn` means `enable_flash_attn`.

    Raises:
        ValueError: an unknown name or config key, or a value that cannot be built.
        CheckpointError: weights that cannot be read or do not fit.
    """
    network, sizes = network_of(type)
    if "enable_flashattn" in config:
        config["enable_flash_attn"] = config.pop("enable_flashattn")
    return DENOISERS.create(network.name, pretrained, {**sizes, **config}, dtype, use_recompute)
