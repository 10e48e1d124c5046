"""Diffusion on the latents of videos: the networks that denoise, and the schedules that train and sample them."""
