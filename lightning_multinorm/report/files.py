"""Files of a report, which bear its mark: only what bears it is replaced or removed."""

import struct
import zlib
from collections.abc import Mapping
from pathlib import Path

from lightning_multinorm.checkpoints.files import new_file
from lightning_multinorm.errors import UsageError

MARK = "written by lightning_multinorm report"
_END = b"\x00\x00\x00\x00IEND"


def marked_svg(svg: str) -> bytes:
    """An SVG with the mark in a comment."""
    return f"{svg}\n<!-- {MARK} -->\n".encode()


def marked_png(png: bytes) -> bytes:
    """A PNG with the mark in a chunk of text, where an image names its software."""
    body = b"tEXtSoftware\x00" + MARK.encode()
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    head, end, tail = png.rpartition(_END)
    return head + chunk + end + tail


def refuse_others(paths: Mapping[Path, bytes] | list[Path]) -> None:
    """Make sure that nothing but an earlier report would be replaced.

    Raises:
        UsageError: naming the first file that is not one of a report.
    """
    for path in paths:
        if path.is_dir():
            raise UsageError(f"{path} is a folder; name a file, as --out report.html")
        if path.exists() and not _bears_mark(path):
            raise UsageError(f"{path} exists, and no report wrote it; name another --out, or move it")


def write(files: Mapping[Path, bytes], folder: Path) -> None:
    """Write the files, and remove the figures of an earlier report in their folder that this one does not have.

    Raises:
        UsageError: if one would replace what no report wrote, or cannot be written.
    """
    refuse_others(files)
    try:
        for path, content in files.items():
            with new_file(path) as file:
                file.write(content)
        for path in folder.iterdir() if folder.is_dir() else ():
            if path not in files and path.suffix in (".svg", ".png") and _bears_mark(path):
                path.unlink()
    except OSError as error:
        raise UsageError(f"{error.filename} cannot be written: {error.strerror}; name another --out") from None


def _bears_mark(path: Path) -> bool:
    return path.is_file() and MARK.encode() in path.read_bytes()
