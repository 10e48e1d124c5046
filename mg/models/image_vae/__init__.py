"""The image VAE of Stable Diffusion."""
