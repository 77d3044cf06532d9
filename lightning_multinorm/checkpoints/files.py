"""Files and folders that take their name when they are whole and on the disk, whatever ends the process before.

Until then they lie beside it as ``.NAME.xxxxxxxx.tmp``, readable for their owner alone, and locked by their writer, so
that what a killed process has left can be told from what is being written, and removed.
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

_TEMPORARY = ".tmp"
_ASIDE = ".old"
_UMASK = os.umask(0o077)
os.umask(_UMASK)  # it can only be read by setting it, and not while threads make files


@contextmanager
def new_file(target: Path) -> Iterator[BinaryIO]:
    """A file to write into; at the end of the block it is flushed to the disk, and replaces ``target`` in one step.

    Raises:
        OSError: from writing. ``target`` is as it was before, and nothing is left beside it.
    """
    _prepare(target)
    descriptor, name = tempfile.mkstemp(_TEMPORARY, f".{target.name}.", target.parent)
    try:
        with open(descriptor, "wb") as file:
            _lock(file.fileno())
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), 0o666 & ~_UMASK)
            _put(Path(name), target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to write into; at the end of the block it replaces ``target``. Files in it are to be flushed by then.

    Between two renames there is no ``target``, but what it was before lies beside it, where `existing` finds it.

    Raises:
        OSError: from writing. ``target`` is as it was before, and nothing is left beside it.
    """
    _prepare(target)
    temporary = Path(tempfile.mkdtemp(_TEMPORARY, f".{target.name}.", target.parent))
    descriptor = os.open(temporary, os.O_RDONLY)
    try:
        _lock(descriptor)
        yield temporary
        os.fsync(descriptor)
        os.chmod(temporary, 0o777 & ~_UMASK)
        _put(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        os.close(descriptor)


def existing(path: Path) -> Path:
    """Where a checkpoint lies: under its name, or beside it if the process was killed between two renames."""
    aside = _aside(path)
    return aside if not os.path.lexists(path) and aside.exists() else path


def set_aside(folder: Path) -> list[Path]:
    """Checkpoints of a folder that lie beside their names, because a process was killed between two renames."""
    found = [path for path in folder.glob(f".*{_ASIDE}") if path.name != _ASIDE]
    return [path for path in found if existing(path.with_name(path.name[1 : -len(_ASIDE)])) == path]


def system_error(error: BaseException) -> BaseException:
    """What the operating system said, where torch raised an error of its own on top of that; else the error."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    return cause or error


def remove(path: Path) -> None:
    """Remove a file or a folder; a folder is gone in one step, too."""
    if path.is_dir() and not path.is_symlink():
        hidden = path.with_name(f".{path.name}.removed{_TEMPORARY}")
        shutil.rmtree(hidden, ignore_errors=True)
        shutil.rmtree(path.rename(hidden), ignore_errors=True)  # what is left of it goes with the next write
    else:
        path.unlink(missing_ok=True)


def _prepare(target: Path) -> None:
    """Make the folder, put back what was set aside, and remove what killed processes have left."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for aside in set_aside(target.parent):
        aside.rename(aside.with_name(aside.name[1 : -len(_ASIDE)]))
    tidy(target.parent)


def tidy(folder: Path) -> None:
    """Remove what killed processes have left in a folder: halves of files and folders, and what was replaced."""
    replaced = set(folder.glob(f".*{_ASIDE}")) - set(set_aside(folder))
    for path in [*folder.glob(f".*.*{_TEMPORARY}"), *replaced]:
        if not _is_being_written(path):
            with suppress(FileNotFoundError):  # another process may be removing it, too
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _put(temporary: Path, target: Path) -> None:
    aside = None
    if os.path.lexists(target) and (temporary.is_dir() or (target.is_dir() and not target.is_symlink())):
        aside = target.rename(_aside(target))
    try:
        os.replace(temporary, target)
    except BaseException:
        if aside is not None:
            aside.rename(target)
        raise
    flush_folder(target.parent)
    if aside is not None:
        remove(aside)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}{_ASIDE}")


def flush_folder(folder: Path) -> None:
    """Make new names in a folder outlast a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> None:
    with suppress(OSError):  # a file system without locks: left-overs in it are taken for being written, and stay
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_being_written(path: Path) -> bool:
    """Whether another process, or thread, holds the lock."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False
