"""The LightningDataModule: arguments, ranks, stages and resume. What it hands out is made in `loader`."""

from collections.abc import Iterator
from functools import cached_property, partial
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from lightning_multinorm.data.errors import DataError
from lightning_multinorm.data.evaluation import MemoryBatches, document_rows, held_out_rows
from lightning_multinorm.data.files import name_documents
from lightning_multinorm.data.loader import Batches, BatchLoader, TrainingBatches, Vocabulary
from lightning_multinorm.data.packing import Tokens, share_of_rank
from lightning_multinorm.data.progress import batches_to_train, batches_trained
from lightning_multinorm.data.sources import Corpus, open_corpus, rank_share
from lightning_multinorm.data.tokenizer import identify, largest_text_id, load_tokenizer


class TextDataModule(LightningDataModule):
    """Text for pretraining: streamed, tokenised while training, packed without padding, resumed exactly.

    Every batch is a dict of int64 tensors, with B sequences of T tokens: "input_ids" (B, T); "labels" (B, T), the
    token after each input, -100 where nothing is predicted; "bytes" (B,), the UTF-8 bytes of the text the labels stand
    for. Batches to predict on also have "document" (B,), an index into `predict_names` (-100 in rows that only fill up
    a rank's share).

    Args:
        source: "stdlib" (the Python standard library's own modules, on every machine), "c4" (streamed from the
            Hugging Face hub), or local files: a path, a folder, a glob, or a list of these, ending in .txt, .py
            (one document each), .jsonl, .json, .jsonl.gz, .json.gz (one a line) or .parquet (one a row).
        tokenizer: "bpe" (trained on the source, cached), a name on the Hugging Face hub, or a folder.
        vocab_size: Number of ids of "bpe"; other tokenizers have their own.
        sequence_length: Tokens in a sequence.
        batch_size: Sequences per device and micro-step.
        validation_batch_size: The same for validation, test and predict; None for `batch_size`.
        validation_files: Files to validate on, in the forms of `source`; None to hold out documents of the source.
        validation_fraction: Share of the source's documents to hold out (C4 has its own validation split).
        validation_tokens: Length of the beginning of the held-out text to validate and test on.
        predict_files: Text files (one document each) or .jsonl, .json.gz, .parquet (one a line or row) to predict
            on.
        text_field: Key or column that holds the text in JSON lines and Parquet files.
        num_workers: Processes per device that prepare training batches; 0 for the training process itself.
        mix_rows: Rows of packed text that are shuffled together before they are cut into batches, so that a long
            document does not fill a batch; 0 keeps the order of the documents.
        seed: Of the order of files, and of the mixing, in training.

    Attributes:
        predict_names: Name of each document to predict on ("a.txt", "b.jsonl:3" for line 3), once the loader is made.
    """

    def __init__(
        self,
        source: str | list[str] = "stdlib",
        tokenizer: str = "bpe",
        vocab_size: int = 4096,
        sequence_length: int = 256,
        batch_size: int = 32,
        validation_batch_size: int | None = None,
        validation_files: str | list[str] | None = None,
        validation_fraction: float = 0.01,
        validation_tokens: int = 10_000_000,
        predict_files: list[str] | None = None,
        text_field: str = "text",
        num_workers: int = 0,
        mix_rows: int = 1024,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.source = source
        self.tokenizer_name = tokenizer
        self.vocab_size = vocab_size
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.validation_batch_size = validation_batch_size
        self.validation_files = validation_files
        self.validation_fraction = validation_fraction
        self.validation_tokens = validation_tokens
        self.predict_files = predict_files or []
        self.text_field = text_field
        self.num_workers = num_workers
        self.mix_rows = mix_rows
        self.seed = seed
        self.predict_names: list[str] = []
        self._resumed: dict[str, Any] = {}
        self._check_arguments()

    def _check_arguments(self) -> None:
        at_least_one = ("sequence_length", "batch_size", "validation_batch_size", "validation_tokens")
        minimum = {**dict.fromkeys(at_least_one, 1), "num_workers": 0, "mix_rows": 0, "seed": 0}
        for name, least in minimum.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise DataError(f"data.{name} is {value}; set it to {least} or more.")
        if self.tokenizer_name == "bpe" and self.vocab_size < 257:
            raise DataError(
                f"data.vocab_size is {self.vocab_size}; 'bpe' needs 257 or more (256 bytes and the end of text)."
            )
        if not 0 < self.validation_fraction < 1:
            raise DataError(
                f"data.validation_fraction is {self.validation_fraction}; set it between 0 and 1, e.g. 0.01 "
                "(to train without validation set --trainer.limit_val_batches 0)."
            )

    # -- set-up ------------------------------------------------------------------------------------------------------

    @cached_property
    def corpus(self) -> Corpus:
        """The opened source."""
        return open_corpus(self.source, self.text_field, self.validation_files, self.validation_fraction)

    def _training_texts(self) -> Iterator[str]:
        # A generator, so that a tokenizer which is not trained here opens no source.
        yield from (example["text"] for example in self.corpus.train)

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        return Vocabulary(load_tokenizer(self.tokenizer_name, self._training_texts(), self.vocab_size))

    @cached_property
    def _tokenizer_identity(self) -> str:
        return identify(self.tokenizer)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer; trained or loaded when first asked for, at the latest in `setup`."""
        return self._vocabulary.tokenizer

    @property
    def text_vocab_size(self) -> int:
        """One more than the largest id that text and its end can produce."""
        return largest_text_id(self.tokenizer) + 1

    @override
    def prepare_data(self) -> None:
        """On one process per machine: train or download the tokenizer, so that the others find it in the cache."""
        load_tokenizer(self.tokenizer_name, self._training_texts(), self.vocab_size)

    @override
    def setup(self, stage: str | None = None) -> None:
        """Open what the stage needs ("fit", "validate", "test", "predict"; None for all but predict)."""
        self._vocabulary  # noqa: B018 - loads it
        if stage != "predict":
            self.corpus  # noqa: B018 - opens it, so that a wrong path fails here
        elif not self.predict_files:
            raise DataError("data.predict_files is empty; name the text files to predict on.")

    @property
    def _rank_and_world_size(self) -> tuple[int, int]:
        # The strategy knows which processes share data (tensor parallel ones do); without a Trainer there is one.
        shares = self.trainer.distributed_sampler_kwargs if self.trainer else None
        return (int(shares["rank"]), int(shares["num_replicas"])) if shares else (0, 1)

    def _loader(self, dataset: Batches, **options: Any) -> BatchLoader:
        on_cuda = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return BatchLoader(dataset, pin_memory=on_cuda, **options)

    # -- training ----------------------------------------------------------------------------------------------------

    @property
    def _usable_workers(self) -> int:
        # The last rank has the fewest files; the number must be the same on all, since checkpoints hold rank 0's.
        world_size = self._rank_and_world_size[1]
        return min(self.num_workers, rank_share(self.corpus.train, world_size - 1, world_size).num_shards)

    @override
    def train_dataloader(self) -> BatchLoader:
        """As many batches as the Trainer will train on, less those which it has trained on already."""
        rank, world_size = self._rank_and_world_size
        self._refuse_other_data(self._stream_identity())
        dataset = TrainingBatches(
            documents=self.corpus.train,
            vocabulary=self._vocabulary,
            sequence_length=self.sequence_length,
            batch_size=self.batch_size,
            batches=batches_to_train(self.trainer),
            rank=rank,
            world_size=world_size,
            seed=self.seed,
            mix_rows=self.mix_rows,
        )
        if (workers := self._usable_workers) < self.num_workers:
            rank_zero_warn(f"data.num_workers is {self.num_workers}, but a rank has {workers} file(s); using that.")
        return self._loader(dataset, num_workers=workers, consumed=partial(batches_trained, self.trainer))

    # -- evaluation --------------------------------------------------------------------------------------------------

    @cached_property
    def _held_out_rows(self) -> Tokens:
        texts = (example["text"] for example in self.corpus.held_out)
        rows = held_out_rows(texts, self._vocabulary, self.sequence_length, self.validation_tokens)
        if len(rows) == 0:
            raise DataError(
                "no document is held out to validate on; raise --data.validation_fraction, name "
                "--data.validation_files, or set --trainer.limit_val_batches 0."
            )
        return rows

    @override
    def val_dataloader(self) -> BatchLoader:
        """The first `validation_tokens` tokens of the held-out documents, each a label exactly once over all ranks."""
        self._refuse_other_data({"tokenizer": self._tokenizer_identity})
        rows = share_of_rank(self._held_out_rows, *self._rank_and_world_size)
        return self._loader(MemoryBatches(self._vocabulary, rows, self.validation_batch_size or self.batch_size))

    @override
    def test_dataloader(self) -> BatchLoader:
        """The same as for validation."""
        return self.val_dataloader()

    @override
    def predict_dataloader(self) -> BatchLoader:
        """Windows of each document of `predict_files`, every token of it a label exactly once over all ranks."""
        self._refuse_other_data({"tokenizer": self._tokenizer_identity})
        self.predict_names, texts = name_documents(self.predict_files, self.text_field)
        rows, owners = document_rows(texts, self._vocabulary, self.sequence_length)
        ranks = self._rank_and_world_size
        size = self.validation_batch_size or self.batch_size
        own = MemoryBatches(self._vocabulary, share_of_rank(rows, *ranks), size, share_of_rank(owners, *ranks))
        return self._loader(own)

    # -- resume ------------------------------------------------------------------------------------------------------

    def _stream_identity(self) -> dict[str, Any]:
        """All that decides which batch comes at which step."""
        return {
            "world_size": self._rank_and_world_size[1],
            "batch_size": self.batch_size,
            "sequence_length": self.sequence_length,
            "num_workers": self._usable_workers,
            "mix_rows": self.mix_rows,
            "seed": self.seed,
            "source": self.corpus.fingerprint,
            "tokenizer": self._tokenizer_identity,
        }

    @override
    def state_dict(self) -> dict[str, Any]:
        """How many batches were trained on, and what the stream they came from depends on."""
        return {"batches": batches_trained(self.trainer), **self._stream_identity()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember the checkpoint's stream; a different one is refused when batches are asked for."""
        self._resumed = state_dict

    def _refuse_other_data(self, identity: dict[str, Any]) -> None:
        for name, value in identity.items():
            saved = self._resumed.get(name, value)
            if saved != value:
                raise DataError(
                    f"the checkpoint was trained with data.{name} = {saved}, now it is {value}, so its place in the "
                    f"data cannot be found again; restore that {name}, or start anew from the weights alone."
                )
