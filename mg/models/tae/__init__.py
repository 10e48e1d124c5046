"""Movie Gen's temporal autoencoder."""
