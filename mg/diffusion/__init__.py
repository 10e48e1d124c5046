"""Video diffusion in latent space: the denoisers, and the schedules that train and sample them."""
