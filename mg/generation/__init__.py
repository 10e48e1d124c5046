"""Video generation from prompts, images and videos: requests, mask strategies, references, the clip loop, the gallery.

`codec` wraps the autoencoder, `pipeline` the denoiser, its schedule and the text encoder; `generate` is a run.
"""
