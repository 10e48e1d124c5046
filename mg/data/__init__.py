"""Videos and images from a CSV index to batches. Light to import: no decoder and no MindSpore until one is used."""

from mg.data.errors import DataError

__all__ = ["DataError"]
