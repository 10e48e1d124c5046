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
        before = flattened(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        reason = f"cannot be read ({error}), so the settings of the results next to it are unknown"
        raise ValueError(f"{path}: {reason}; give another output_path") from None
    now = flattened(json.loads(json.dumps(settings)))
    differing = [
        f"{key} was {was} and is {is_now} now"
        for key in dict.fromkeys([*before, *now])
        if (was := before.get(key, "not there")) != (is_now := now.get(key, "not there"))
    ]
    if differing:
        more = f", and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise ValueError(
            f"{path}: the results there were made with different settings: {'; '.join(differing[:3])}{more}. "
            f"Give the same settings, {remedy}"
        )


def flattened(settings: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    if not isinstance(settings, dict):
        return {prefix.rstrip("."): settings}
    return {
        key: value for name, inner in settings.items() for key, value in flattened(inner, f"{prefix}{name}.").items()
    }
