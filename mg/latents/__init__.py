"""Datasets of latents: folders written by `mg.latents.encode`, read here, and decoded by `mg.latents.decode`.

    from mg.latents import open_latents

    latents = open_latents("outputs/latents")
    clip = latents["a.mp4"]             # its caption, shape, frames, fps ...; nothing is read yet
    z = clip.read()                     # (z, t, h, w), float32
    z = clip.read(start=8, stop=16)     # reads only these 8 latent frames

Reading needs neither MindSpore nor a model.
"""

from mg.latents.folder import LatentFolder, Latents, open_latents

__all__ = ["LatentFolder", "Latents", "open_latents"]
