"""Video autoencoders on MindSpore: Ascend NPUs first, CPU for tests, CUDA where MindSpore offers it.

    import mg

    vae = mg.from_pretrained("models/tae.ckpt")
    z, mean, logvar = vae.encode(x)      # x (B, 3, T, H, W) in [-1, 1]

All models share the interface of `mg.models.autoencoder`.
"""

import os
from typing import TYPE_CHECKING

# On CPUs with AVX-512, oneDNN runs MindSpore's plain layouts with its reference convolution, 70 times slower than the
# gemm kernels it picks when limited to AVX2. It reads this once, when MindSpore is imported. Other libraries bundle
# their own oneDNN, which is faster without it: MG_LIMITS_ONEDNN tells them that the user didn't set the limit.
if "ONEDNN_MAX_CPU_ISA" not in os.environ:
    os.environ.update(ONEDNN_MAX_CPU_ISA="AVX2", MG_LIMITS_ONEDNN="1")

# On a GPU newer than MindSpore's kernels, compile only the kernels that run, not all at startup. CUDA reads it once.
os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")

if TYPE_CHECKING:
    from mg.models import create_model, from_pretrained, list_models, register_model

__version__ = "0.1.0"

__all__ = ["create_model", "from_pretrained", "list_models", "register_model"]


def __getattr__(name: str):
    """Import the models lazily: they need MindSpore, which takes seconds to import."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mg import models

    return getattr(models, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
