"""Video autoencoders on MindSpore: Ascend NPUs first, CPU for tests, CUDA where MindSpore offers it.

    import mg

    vae = mg.from_pretrained("models/tae.ckpt")
    z, mean, logvar = vae.encode(x)      # x (B, 3, T, H, W) in [-1, 1]

All models share the interface of `mg.models.autoencoder`.
"""

import os
from typing import TYPE_CHECKING

# On CPUs with AVX-512, oneDNN answers MindSpore's plain layouts with its reference convolution, 70 times slower than
# the gemm kernels that it picks when held to AVX2. It reads this once, when MindSpore is imported. Other libraries have
# a oneDNN of their own, better off without: MG_LIMITS_ONEDNN tells them that the limit is not the user's.
if "ONEDNN_MAX_CPU_ISA" not in os.environ:
    os.environ.update(ONEDNN_MAX_CPU_ISA="AVX2", MG_LIMITS_ONEDNN="1")

# A GPU newer than MindSpore's kernels compiles them: those that run, not all of them at the start. CUDA reads it once.
os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")

if TYPE_CHECKING:
    from mg.models import create_model, from_pretrained, list_models, register_model

__version__ = "0.1.0"

__all__ = ["create_model", "from_pretrained", "list_models", "register_model"]


def __getattr__(name: str):
    """Models come with MindSpore, which takes seconds: only when they are asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mg import models

    return getattr(models, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
