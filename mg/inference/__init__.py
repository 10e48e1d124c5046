"""Running a model over clips: reconstructions, data sets into latents and back, statistics of latents."""
