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


def hold(folder: Path) -> BinaryIO:
    """Lock `folder`, which must exist, for this process until the file that is returned is closed.

    OutputError while another process holds it. A file system without locks has none: nothing is checked there.
    """
    with disk_errors(folder):
        file = (folder / FILE).open("ab")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.close()
            message, remedy = "another process is at this work", "wait for it, stop it, or give OUT another name"
            raise OutputError(message, where=str(folder), remedy=remedy) from None
    return file
