"""The trained toy models, each in a folder of its own with its card."""

from pathlib import Path

FOLDER = Path(__file__).parent


def names() -> tuple[str, ...]:
    """Return the names of the toys that are here."""
    return tuple(sorted(path.parent.name for path in FOLDER.glob("*/config.json")))
