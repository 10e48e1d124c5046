"""Losses and the discriminator for training video autoencoders."""
