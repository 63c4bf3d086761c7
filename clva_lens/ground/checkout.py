"""Which code this is: the package's own sources, its checkout, and the packages beside it."""

import hashlib
import platform
import subprocess
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("clva-lens", "torch", "transformers", "tokenizers", "nnsight", "pillow")
HOUSE = Path(__file__).parents[1]


def code_digest() -> str:
    """Return the SHA-256 of this package's sources."""
    code = hashlib.sha256()
    for path in sorted(HOUSE.rglob("*.py")):
        code.update(path.relative_to(HOUSE).as_posix().encode() + path.read_bytes())
    return code.hexdigest()


def packages() -> dict[str, str]:
    """Return the versions of the packages that decide what a model says."""
    return {name: _version(name) for name in PACKAGES}


@cache
def _version(name: str) -> str:
    return version(name)


def origin() -> dict[str, Any]:
    """Return where a run was made, as far as it does not decide the answers."""
    return {
        "commit": _git("rev-parse", "HEAD"),
        "changed": bool(_git("status", "--porcelain")),
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def _git(*args: str) -> str | None:
    """Return what git says about the checkout that this package lies in; None without one."""
    if not (HOUSE.parent / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(HOUSE.parent), *args]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
