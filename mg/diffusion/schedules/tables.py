"""The tables of Gaussian diffusion (arXiv 2006.11239), and the subset of steps used in sampling.

In fp64: Open-Sora 1.1 and 1.2 keep the respaced betas in fp32, which is off by 2e-4 near t = 0.
"""

import numpy as np


def noise_betas(name: str, steps: int) -> np.ndarray:
    """The variance that each step adds.

    Args:
        name: linear | squaredcos_cap_v2 (the cosine of arXiv 2102.09672).

    Raises:
        ValueError: an unknown name, or less than one step.
    """
    if steps < 1:
        raise ValueError(f"diffusion_steps is {steps}; it must be at least 1")
    if name == "linear":
        return np.linspace(1000 / steps * 0.0001, 1000 / steps * 0.02, steps)
    if name == "squaredcos_cap_v2":
        kept = np.cos((np.linspace(0, 1, steps + 1) + 0.008) / 1.008 * np.pi / 2) ** 2
        return np.minimum(1 - kept[1:] / kept[:-1], 0.999)
    raise ValueError(f"noise_schedule is {name!r}; it must be one of linear, squaredcos_cap_v2")


def respaced(steps: int, respacing: str | int) -> list[int]:
    """The kept ones of timesteps 0 to steps - 1, from the cleanest to the noisiest.

    Args:
        respacing: "" keeps all; n keeps n from the first to the last; "a,b,c" keeps a, b and c of three equal
            sections; "ddimN" keeps every k-th, for a whole k that leaves N.

    Raises:
        ValueError: more steps to keep than there are, no such k, or a malformed respacing.
    """
    text = str(respacing)
    if not text:
        return list(range(steps))
    if text.startswith("ddim") and text[4:].isdecimal():
        for stride in range(1, steps):
            if len(range(0, steps, stride)) == int(text[4:]):
                return list(range(0, steps, stride))
        raise ValueError(f"timestep_respacing is {text!r}; no stride leaves that many of {steps} steps")
    counts = [int(count) for count in text.split(",") if count.strip().isdecimal()]
    if len(counts) != len(text.split(",")) or not all(counts):
        raise ValueError(f'timestep_respacing is {text!r}; it must be such as "100", "10,15,20" or "ddim50"')
    kept: list[int] = []
    start = 0
    for section, count in enumerate(counts):
        size = steps // len(counts) + (section < steps % len(counts))
        if count > size:
            raise ValueError(
                f"timestep_respacing is {text!r}; a section of {size} of {steps} steps cannot keep {count}"
            )
        stride = (size - 1) / (count - 1) if count > 1 else 1
        # Summed, not multiplied: the sum's rounding error decides how halves are rounded in the released models.
        kept += [start + round(at) for at in np.cumsum([0.0] + [stride] * (count - 1)).tolist()]
        start += size
    return kept


class DiffusionTables:
    """Tables computed from the betas of n steps, each (n,) in fp64; t counts from the cleanest step."""

    def __init__(self, betas: np.ndarray):
        self.betas = betas
        alphas = 1 - betas
        self.alphas_cumprod = np.cumprod(alphas)
        self.alphas_cumprod_prev = np.append(1.0, self.alphas_cumprod[:-1])
        # x_t = sqrt(abar) x0 + sqrt(1 - abar) noise, and back.
        self.sqrt_alphas_cumprod = np.sqrt(self.alphas_cumprod)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(1 - self.alphas_cumprod)
        self.sqrt_recip_alphas_cumprod = np.sqrt(1 / self.alphas_cumprod)
        self.sqrt_recipm1_alphas_cumprod = np.sqrt(1 / self.alphas_cumprod - 1)
        # q(x_{t-1} | x_t, x0): its mean is coef1 x0 + coef2 x_t.
        self.posterior_variance = betas * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)
        # The first step's variance is 0, which has no logarithm.
        clipped = np.append(self.posterior_variance[1:2], self.posterior_variance[1:]) if len(betas) > 1 else betas
        self.posterior_log_variance_clipped = np.log(clipped)
        self.posterior_mean_coef1 = betas * np.sqrt(self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)
        self.posterior_mean_coef2 = (1 - self.alphas_cumprod_prev) * np.sqrt(alphas) / (1 - self.alphas_cumprod)

    def kept(self, timesteps: list[int]) -> "DiffusionTables":
        """The tables for a subset of the steps, with the same noise levels."""
        levels = self.alphas_cumprod[timesteps]
        return DiffusionTables(1 - levels / np.append(1.0, levels[:-1]))
