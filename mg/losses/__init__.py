"""What a video autoencoder is trained with."""
