"""What is wrong with a checkpoint, found before it is read: truncation and flipped bits, by the checksums it holds.

A single file is a zip archive with a CRC-32 for each tensor. A folder has the size and the CRC-32 of each of its files
in `META`, which is written last.
"""

import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

META = "meta.pt"
"""In a folder of shards: what a checkpoint holds beside tensors. Lightning's name."""
FILES = "files"
"""Its entry with the sizes and checksums of the folder's other files."""
_PIECE = 1 << 22

Checksums = dict[str, tuple[int, int]]


def is_folder(path: Path) -> bool:
    """Whether a checkpoint is a folder of shards."""
    return path.is_dir() and ((path / ".metadata").is_file() or (path / META).is_file())


def damage(path: Path, rank: int = 0, ranks: int = 1) -> str | None:
    """What is wrong with a checkpoint, in a few words; None if nothing is. Reads all of it.

    Args:
        path: a file or a folder of shards.
        rank: of this process; the files of a folder are shared out over the ranks.
        ranks: how many there are.
    """
    if path.is_dir():
        return _damage_of_folder(path, rank, ranks)
    if not path.is_file():
        return "there is no such file or folder"
    return _damage_of_archive(path)


def checksums(files: list[Path]) -> Checksums:
    """Name, size and CRC-32 of files."""
    return {file.name: (file.stat().st_size, _crc(file)) for file in files}


def _damage_of_archive(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except zipfile.BadZipFile:
        size = path.stat().st_size
        return f"truncated, or no checkpoint ({size:,} bytes)" if size else "empty"
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    except Exception as error:  # what a flipped bit in a header makes of it
        return f"damaged ({error})"
    return None if damaged is None else f"damaged ({damaged} does not match its checksum)"


def _damage_of_folder(path: Path, rank: int, ranks: int) -> str | None:
    for name in (META, ".metadata"):
        if not (path / name).is_file():
            return f"incomplete ({name} is missing)"
    if wrong := _damage_of_archive(path / META):
        return f"{META} is {wrong}"
    try:
        meta: dict[str, Any] = torch.load(path / META, map_location="cpu", weights_only=True)
    except Exception:  # more than plain values: for whoever reads it to refuse or to allow
        return None
    table: Checksums = meta.get(FILES, {})  # Lightning writes none
    for name, (size, crc) in sorted(table.items())[rank::ranks]:
        file = path / name
        try:
            found = file.stat().st_size
            if found != size:
                return f"{name} is {'truncated' if found < size else 'damaged'} ({found:,} bytes of {size:,})"
            if _crc(file) != crc:
                return f"{name} is damaged (it does not match its checksum)"
        except FileNotFoundError:
            return f"incomplete ({name} is missing)"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror or error}"
    return None


def _crc(file: Path) -> int:
    crc = 0
    with file.open("rb") as stream:
        while piece := stream.read(_PIECE):
            crc = zlib.crc32(piece, crc)
    return crc
