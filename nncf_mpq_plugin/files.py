"""Files that appear only whole, and what to say where they cannot be written."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from nncf_mpq_plugin.errors import InputError, MPQError, StorageError

TEMPORARY = ".tmp-"  # how the names of unfinished files begin
MISPLACED = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ENOENT),
    errno.ELOOP,
)


@contextlib.contextmanager
def written_atomically(path: str | Path) -> Iterator[Path]:
    """
    A temporary file's path beside ``path``, with the same suffix; it is renamed to ``path`` at the end, and removed
    after an error. The folder is made.

    :raises InputError: if there can be no such file (a read-only folder, say).
    :raises StorageError: if the disk is full or fails.
    """
    path = Path(path)
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise unwritable(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Remove what a killed process left half-written below ``folder``, in which nobody else may be writing."""
    for file in folder.rglob(f"{TEMPORARY}*"):
        file.unlink(missing_ok=True)


def unwritable(
    path: Path, error: Exception, remedy: str = "Choose another place, or change its permissions."
) -> MPQError:
    """
    :param error: what a library said when it could not write ``path``.
    :param remedy: what to do about a place where nothing can be written.
    :return: a :class:`StorageError` for a disk that is full or fails, an :class:`InputError` otherwise.
    """
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := re.search(r"os error (\d+)", str(error))):  # safetensors
        number = int(found[1])
    reason = os.strerror(number) if number is not None else f"{type(error).__name__}: {error}"
    if number in MISPLACED:
        return InputError(f"{path}: cannot be written ({reason}). {remedy}")
    try:
        free = f"{shutil.disk_usage(path.parent).free / 2**20:.1f} MiB free"  # a library may not say why
    except OSError:
        free = "free space unknown"
    return StorageError(
        f"{path}: could not be written ({reason}; {free}). Nothing is half-written. Make room there, then go on with "
        "the same command."
    )
