"""A directory of unfinished work belongs to one process at a time.

A user who takes a slow run for dead starts it again: two processes that resume the same work write over each other's files. The
lock is the system's own (POSIX), so a process that is killed leaves none behind.
"""

import errno
import fcntl
from pathlib import Path
from typing import BinaryIO

from bitwright.errors import OutputError
from bitwright.files.checkpoint import disk_errors

FILE = "lock"


class Lock:
    """The lock of one directory, held until it is released or this object is gone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file: BinaryIO | None = None

    def take(self) -> None:
        """Lock the directory, which must exist, for this process, unless it is already.

        OutputError while another process holds it. A file system without locks has none: nothing is checked there.
        """
        if self._file:
            return
        with disk_errors(self.folder):
            file = (self.folder / FILE).open("ab")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.close()
                message, remedy = "another process is at this work", "wait for it, stop it, or give OUT another name"
                raise OutputError(message, where=str(self.folder), remedy=remedy) from None
        self._file = file

    def release(self) -> None:
        """Unlock: before the directory is removed, since NFS keeps a file that is still open."""
        if self._file:
            self._file.close()
            self._file = None
