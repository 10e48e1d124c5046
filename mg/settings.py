"""Checks of settings: of their values, and that a run that continues in a folder uses those of its results."""

import json
from pathlib import Path
from typing import Any


def require(holds: bool, config: Any, name: str, wanted: str) -> None:
    """Raise ValueError, naming the field `name` of a dataclass and its value, unless `holds`."""
    if not holds:
        raise ValueError(f"{name} is {getattr(config, name)}; it must be {wanted}")


def check_settings(path: Path, settings: dict, remedy: str = "another output_path, or resume=False") -> None:
    """Check that existing rows were made with these settings.

    Args:
        remedy: what a user can give instead of the same settings.

    Raises:
        ValueError: they differ; the message says how.
    """
    try:
        before = _flat(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        reason = f"cannot be read ({error}), so the settings of the results next to it are unknown"
        raise ValueError(f"{path}: {reason}; give another output_path") from None
    now = _flat(json.loads(json.dumps(settings)))
    differing = [
        f"{key} was {before.get(key, 'not there')} and is {now.get(key, 'not there')} now"
        for key in dict.fromkeys([*before, *now])
        if before.get(key) != now.get(key)
    ]
    if differing:
        more = f", and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise ValueError(
            f"{path}: the results there were made with different settings: {'; '.join(differing[:3])}{more}. "
            f"Give the same settings, {remedy}"
        )


def _flat(value, prefix: str = "") -> dict[str, str]:
    """Nested dicts as dotted names -> text."""
    if not isinstance(value, dict):
        return {prefix.rstrip("."): str(value)}
    return {key: text for name, inner in value.items() for key, text in _flat(inner, f"{prefix}{name}.").items()}
