"""Measuring reconstructions: metrics, and the plain baseline that a model has to beat."""
