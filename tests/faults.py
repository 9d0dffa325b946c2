"""Faults on demand: from its n-th operation on, a file system fails, or the process is dead."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.fsync"}


class Killed(BaseException):
    """Nothing catches it; and nothing that runs while it passes can change a file."""


class _Faults:
    def __init__(self):
        self.folder, self.kind, self.left, self.reached = None, "", 0, False
        sys.addaudithook(self._hook)  # which stays
        self._fsync = os.fsync

    def _hook(self, event: str, arguments: tuple) -> None:
        if self.folder is None:
            return
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if not (writes or event in _CHANGES):
            return
        # What is removed inside a folder that is open has a name only.
        if not os.path.abspath(os.fsdecode(arguments[0])).startswith(self.folder) and event != "os.remove":
            return
        if self.kind == "full" and event in ("os.rename", "os.remove", "os.rmdir"):
            return  # these need no room
        self.left -= 1
        if self.left > 0:
            return
        self.reached = True
        if self.kind == "killed":
            raise Killed
        code = errno.ENOSPC if self.kind == "full" else errno.EROFS
        raise OSError(code, os.strerror(code), str(arguments[0]))

    def fsync(self, descriptor: int) -> None:
        """What was not synced when the machine went down may be there in part."""
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        try:
            self._hook("os.fsync", (path,))
        except BaseException:
            if path.is_file():
                os.truncate(path, path.stat().st_size // 2)
            raise
        self._fsync(descriptor)


_faults = _Faults()


@contextmanager
def fault(folder: Path, kind: str, number: int) -> Iterator[_Faults]:
    """From the `number`-th operation below `folder` that changes something: "killed", "full" or "read-only".

    `reached` says whether there were so many.
    """
    _faults.kind, _faults.left, _faults.reached = kind, number, False
    os.fsync = _faults.fsync
    _faults.folder = str(folder)
    try:
        yield _faults
    finally:
        _faults.folder = None
        os.fsync = _faults._fsync
