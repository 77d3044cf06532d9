"""What `TextDataModule`'s arguments may be, checked before anything is opened. Stands on `lanes` and `errors`."""

from typing import Any, get_args

from lightning_multinorm.data.errors import DataError
from lightning_multinorm.data.lanes import Packing

_LEAST = {
    "sequence_length": 1,
    "batch_size": 1,
    "validation_batch_size": 1,
    "validation_tokens": 1,
    "num_workers": 0,
    "mix_rows": 0,
    "seed": 0,
}


def check_arguments(data: Any) -> None:
    """Look at the attributes of a `TextDataModule`.

    Raises:
        DataError: Naming the first that is not possible, and what is.
    """
    for name, least in _LEAST.items():
        value = getattr(data, name)
        if value is not None and value < least:
            raise DataError(f"data.{name} is {value}; set it to {least} or more.")
    if data.packing not in get_args(Packing):
        raise DataError(f"data.packing is {data.packing!r}; set it to one of {', '.join(get_args(Packing))}.")
    if data.tokenizer_name == "bpe" and data.vocab_size < 257:
        raise DataError(
            f"data.vocab_size is {data.vocab_size}; 'bpe' needs 257 or more (256 bytes and the end of text)."
        )
    if not 0 < data.validation_fraction < 1:
        raise DataError(
            f"data.validation_fraction is {data.validation_fraction}; set it between 0 and 1, e.g. 0.01 "
            "(to train without validation set --trainer.limit_val_batches 0)."
        )
