"""The training of a denoiser: a task for `mg.training.trainer`, on latents that are encoded as they come or stored."""
