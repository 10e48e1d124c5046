"""Denoiser training: a task for `mg.training.trainer`, on stored latents or latents encoded during training."""
