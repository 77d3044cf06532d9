"""Reads the index of a folder of shards without running what it holds: it is a pickle, which torch trusts."""

import pathlib
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from typing_extensions import override

from lightning_multinorm.errors import UsageError

_METADATA = "torch.distributed.checkpoint.metadata"
_ADMITTED = {
    (_METADATA, "Metadata"),
    (_METADATA, "MetadataIndex"),
    (_METADATA, "StorageMeta"),
    (_METADATA, "TensorStorageMetadata"),
    (_METADATA, "BytesStorageMetadata"),
    (_METADATA, "ChunkStorageMetadata"),
    (_METADATA, "TensorProperties"),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
}


class _Unpickler(pickle.Unpickler):
    @override
    def find_class(self, module: str, name: str) -> Any:
        if module == "pathlib" and name in ("PosixPath", "WindowsPath"):
            return pathlib.PurePath  # where it was written; of no use here, and perhaps of another system
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if dtype or (module, name) in _ADMITTED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} does not belong into it")


class Reader(dcp.FileSystemReader):
    """`torch.distributed.checkpoint.FileSystemReader` for folders of strangers.

    Raises:
        UsageError: from reading an index that holds anything but what one consists of; nothing of it is run.
    """

    @override
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / ".metadata"
        try:
            with path.open("rb") as file:
                metadata = _Unpickler(file).load()
            files = {place.relative_path for place in metadata.storage_data.values()}
        except (pickle.UnpicklingError, AttributeError, EOFError, ValueError, TypeError, IndexError, KeyError) as error:
            raise UsageError(f"{path} is no index of shards, and may be of ill will: {error}") from error
        outside = sorted(file for file in files if Path(file).name != file)
        if outside:
            raise UsageError(f"{path} names {outside[0]}, which is no file of the folder")
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata
