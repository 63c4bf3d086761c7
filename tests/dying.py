"""Deaths of a process at its k-th operation on files, three ways; the test looks at what is left.

The process is a fork, in which an audit hook counts what is about to be opened for writing,
renamed, removed or made below a folder.
"""

import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Literal

WAYS = ("killed", "interrupted", "torn")
"""Gone at once; by an exception, so that clauses of ``finally`` run; gone with half of a file."""
Way = Literal["killed", "interrupted", "torn"]

_CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link"}
_FINISHED, _DEAD, _FAILED = 0, 9, 10


def dies(work: Callable[[], object], root: Path, at: int, way: Way) -> bool:
    """Do ``work`` in a process that dies at its operation ``at``; False if it was over before.

    Raises:
        AssertionError: if the work ends with an error of its own.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
        child = os.fork()
    if child == 0:
        code = _FAILED
        try:
            sys.addaudithook(_Death(str(root), at, way).hook)
            work()
            code = _FINISHED
        except KeyboardInterrupt:
            code = _DEAD
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (_FINISHED, _DEAD), f"operation {at}, {way}: the work failed by itself"
    return code == _DEAD


class _Death:
    def __init__(self, root: str, at: int, way: Way) -> None:
        self.root, self.left, self.way = root, at, way
        self.last: str | None = None

    def hook(self, event: str, args: tuple) -> None:
        writes = event == "open" and bool(args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if not (writes or event in _CHANGES) or not str(args[0]).startswith(self.root):
            return
        if self.left == 0:
            self.left = -1
            self._die()
        self.left -= 1
        if writes:
            self.last = str(args[0])

    def _die(self) -> None:
        if self.way == "interrupted":
            raise KeyboardInterrupt
        if self.way == "torn" and self.last is not None and Path(self.last).is_file():
            os.truncate(self.last, Path(self.last).stat().st_size // 2)
        os._exit(_DEAD)
