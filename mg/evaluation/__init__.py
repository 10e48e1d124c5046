"""Measuring models over clips: their reconstructions, their latents, and the plain baseline that they have to beat."""
