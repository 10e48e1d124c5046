"""`StoredConfig`: what the configs of models have in common.

A config is a frozen dataclass whose defaults are the released checkpoint's, and which reads as a mapping too:
`config.ch` and `config["ch"]`, `{**config}`, `config == {"ch": 128, ...}`. Its keys are those of the file next to
weights.
"""

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

import numpy as np

from mg.config import require


class StoredConfig(Mapping[str, Any]):
    """Base of the configs. A subclass is a `dataclass(frozen=True, eq=False)`, and checks itself in `__post_init__`.

    Raises:
        ValueError: a model of this config cannot be built; the message names the key.
    """

    def __getitem__(self, key: str) -> Any:
        if key not in self.__dataclass_fields__:  # type: ignore[attr-defined]
            raise KeyError(key)
        return getattr(self, key)

    def __iter__(self) -> Iterator[str]:
        return (each.name for each in fields(self))  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(fields(self))  # type: ignore[arg-type]

    def check(self, key: str, holds: bool, wanted: str) -> None:
        """Raise ValueError, naming the key and its value, unless `holds`."""
        require(holds, self, key, wanted)

    def check_positive(self, *keys: str) -> None:
        """Raise ValueError unless the values of these keys are whole numbers above 0."""
        for key in keys:
            self.check(key, is_positive(self[key]), "a whole number above 0")


def is_positive(value: Any) -> bool:
    """Whether a value is a whole number above 0."""
    return type(value) is int and value > 0


def is_above_0(value: Any) -> bool:
    """Whether a value is a number above 0, or a list of such numbers."""
    values = np.ravel(value)
    return values.size > 0 and values.dtype.kind in "iuf" and bool((values > 0).all())


def are_positive(values: Any, count: int | None = None) -> bool:
    """Whether values are a list of whole numbers above 0, `count` of them or at least one."""
    listed = isinstance(values, (list, tuple)) and all(map(is_positive, values))
    return listed and (len(values) == count if count is not None else len(values) > 0)
