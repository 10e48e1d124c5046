"""Video DC-AE of Open-Sora 2.0."""
