"""Evaluation of models on clips: reconstructions, latents, speed, and the plain baselines they have to beat."""
