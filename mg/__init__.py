"""Video autoencoders on MindSpore: Ascend NPUs first, CPU for tests, CUDA where MindSpore offers it."""

import os

# On CPUs with AVX-512, oneDNN answers MindSpore's plain layouts with its reference convolution, 70 times slower than
# the gemm kernels that it picks when held to AVX2. It reads this once, when MindSpore is imported. Other libraries have
# a oneDNN of their own, better off without: MG_LIMITS_ONEDNN tells them that the limit is not the user's.
if "ONEDNN_MAX_CPU_ISA" not in os.environ:
    os.environ.update(ONEDNN_MAX_CPU_ISA="AVX2", MG_LIMITS_ONEDNN="1")

# A GPU newer than MindSpore's kernels compiles them: those that run, not all of them at the start. CUDA reads it once.
os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")

__version__ = "0.1.0"
