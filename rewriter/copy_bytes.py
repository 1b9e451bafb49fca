"""Copies bytes between files without taking them into memory, and holes as holes."""

from __future__ import annotations

import errno
import os
from typing import IO

_CHUNK = 1 << 24
_NOT_HERE = {errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM}


def copy_range(source: IO[bytes], offset: int, count: int, target: IO[bytes]) -> None:
    """Append `count` bytes of `source` from `offset` on to `target`, which must be a real file open for writing.

    The kernel copies (and shares blocks, on file systems that can); what is a hole stays one.

    Raises:
        EOFError: `source` ends before.
        OSError: as reading and writing do.
    """
    target.flush()
    start = target.tell()
    if os.fstat(source.fileno()).st_size < offset + count:
        raise EOFError(f"{count} bytes were asked for behind {offset}, and the file is shorter")
    place, end = offset, offset + count
    while place < end:
        data, hole = _segment(source.fileno(), place, end)
        _copy(source.fileno(), data, hole - data, target.fileno(), start + data - offset)
        place = hole
    reached = start + count
    if os.fstat(target.fileno()).st_size < reached:
        os.ftruncate(target.fileno(), reached)
    target.seek(reached)


def _segment(handle: int, place: int, end: int) -> tuple[int, int]:
    """(begin, end) of the next stretch that holds data, at or behind `place`, cut at `end`."""
    try:
        data = min(os.lseek(handle, place, os.SEEK_DATA), end)
        return data, min(os.lseek(handle, data, os.SEEK_HOLE), end) if data < end else end
    except OSError as error:
        if error.errno == errno.ENXIO:  # nothing but a hole from here on
            return end, end
        return place, end  # the file system does not tell


def _copy(source: int, offset: int, count: int, target: int, to: int) -> None:
    while count:
        try:
            done = os.copy_file_range(source, target, count, offset, to)
        except OSError as error:
            if error.errno not in _NOT_HERE:
                raise
            done = os.pwrite(target, os.pread(source, min(count, _CHUNK), offset), to)
        if not done:
            raise EOFError("the file became shorter while it was copied")
        offset, to, count = offset + done, to + done, count - done
