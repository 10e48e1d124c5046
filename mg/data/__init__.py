"""From a CSV index of videos and images to batches. Light to import: decoders and MindSpore load only when used."""

from mg.data.errors import DataError

__all__ = ["DataError"]
