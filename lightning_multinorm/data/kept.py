"""The tokenizer that a run keeps beside its checkpoints, so that they mean something without its data."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lightning_multinorm.checkpoints.files import existing, new_folder
from lightning_multinorm.data.errors import DataError
from lightning_multinorm.data.hub import reason
from lightning_multinorm.data.tokenizer import identify

_NAME = "tokenizer"
_CHECKPOINTS = "checkpoints"


def keep_tokenizer(tokenizer: PreTrainedTokenizerBase, checkpoints: Path, run: Path | None) -> None:
    """Save a tokenizer where `kept_tokenizer` finds it: in the run's folder, or among checkpoints that lie elsewhere.

    Args:
        tokenizer: of the run.
        checkpoints: folder that they are written to.
        run: the run's folder, if it has one.

    Raises:
        DataError: if the place holds another tokenizer, of earlier checkpoints.
    """
    inside = run is not None and checkpoints.absolute() == (run / _CHECKPOINTS).absolute()
    place = (checkpoints.parent if inside else checkpoints) / _NAME
    if place.exists():
        if identify(read_tokenizer(place)) != identify(tokenizer):
            raise DataError(
                f"{place} is not this run's tokenizer, but that of other checkpoints in {checkpoints}; name another "
                "--checkpoint.dirpath"
            )
        return
    with new_folder(place) as folder:
        tokenizer.save_pretrained(folder)


def kept_tokenizer(checkpoint: Path) -> Path:
    """The folder of the tokenizer that a checkpoint was trained with.

    Raises:
        DataError: if there is none.
    """
    folder = checkpoint.absolute().parent
    places = [folder / _NAME, *([folder.parent / _NAME] if folder.name == _CHECKPOINTS else [])]
    for place in map(existing, places):
        if place.is_dir():
            return place
    raise DataError(
        f"there is no tokenizer for {checkpoint} (looked for {' and '.join(map(str, places))}); name its folder with "
        "--tokenizer"
    )


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """A fast tokenizer from a local folder; code that comes with it is never run.

    Raises:
        DataError: if there is none.
    """
    if not folder.is_dir():
        raise DataError(f"tokenizer={folder} is no folder; name one with a tokenizer.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers and tokenizers share no base class
        raise DataError(
            f"the tokenizer in {folder} cannot be loaded ({reason(error)}); name another folder with --tokenizer"
        ) from None
    if not tokenizer.is_fast:
        raise DataError(f"the tokenizer in {folder} has no fast version; use one with a tokenizer.json")
    for where in ("is_local", "local_files_only"):  # of this loading, which it would be saved with
        tokenizer.init_kwargs.pop(where, None)
    return tokenizer
