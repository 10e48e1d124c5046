"""The VAE of HunyuanVideo."""
