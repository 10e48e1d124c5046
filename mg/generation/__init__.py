"""From prompts, images and videos to videos: requests, mask strategies, references, the loop over clips, the gallery.

The autoencoder is behind `codec`, the network, its schedule and captions behind `pipeline`; `generate` is a run.
"""
