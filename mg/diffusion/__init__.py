"""Diffusion on the latents of videos: networks that denoise, and the schedules that train and sample them."""
