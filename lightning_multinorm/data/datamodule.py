"""The LightningDataModule: arguments, ranks, stages and resume. What it hands out is made in `loader`."""

from collections.abc import Iterator
from functools import cached_property, partial
from typing import Any

from lightning.pytorch import LightningDataModule
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from lightning_multinorm.data.arguments import check_arguments
from lightning_multinorm.data.errors import DataError
from lightning_multinorm.data.evaluation import MemoryBatches, document_rows, held_out_rows
from lightning_multinorm.data.files import name_documents
from lightning_multinorm.data.lanes import Packing
from lightning_multinorm.data.loader import Batches, BatchLoader, TrainingBatches
from lightning_multinorm.data.packing import Tokens, share_of_rank
from lightning_multinorm.data.prepared.batches import PreparedBatches
from lightning_multinorm.data.prepared.manifest import is_prepared
from lightning_multinorm.data.prepared.opening import Prepared, open_prepared
from lightning_multinorm.data.progress import batches_to_train, batches_trained
from lightning_multinorm.data.resuming import gather_places, refuse_other_data, resumed_places
from lightning_multinorm.data.sources import Corpus, open_corpus
from lightning_multinorm.data.tokenizer import identify, largest_text_id, load_tokenizer
from lightning_multinorm.data.vocabulary import Batch, Vocabulary


class TextDataModule(LightningDataModule):
    """Text for pretraining: streamed and tokenised while training, or prepared before; packed, resumed exactly.

    Every batch is a dict of int64 tensors, with B sequences of T tokens: "input_ids" (B, T); "labels" (B, T), the
    token after each input, -100 where nothing is predicted; "bytes" (B,), the UTF-8 bytes of the text the labels stand
    for; "position_ids" (B, T) with `isolate_documents`. Batches to predict on also have "document" (B,), an index into
    `predict_names` (-100 in rows that only fill up a rank's share).

    Args:
        source: "stdlib" (the Python standard library's own modules, on every machine), "c4" (streamed from the
            Hugging Face hub), or files: a path, a folder, a glob, or a list of these, ending in .txt, .py
            (one document each), .jsonl, .json, .jsonl.gz, .json.gz (one a line) or .parquet (one a row); of the last
            kinds also addresses ("https://…", "hf://…", "s3://…"), which are streamed. A folder that `prepare` wrote
            is trained on as it is: the options that decided its tokens must be the same, all others are free.
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
        packing: "stream" cuts documents, each followed by its end-of-text, into rows without padding; "paper" makes a
            row of each document, cut off or filled up, as the papers' code does; nothing is predicted from filling.
        isolate_documents: Whether attention is kept inside each document of a row, by positions that restart.
        num_workers: Processes per device that make training batches; 0 for a thread of the training process.
        mix_rows: Rows of packed text that are shuffled together before they are cut into batches, so that a long
            document does not fill a batch; 0 keeps the order of the documents. Of prepared data, any other number
            shuffles all rows of an epoch.
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
        packing: Packing = "stream",
        isolate_documents: bool = False,
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
        self.packing = packing
        self.isolate_documents = isolate_documents
        self.num_workers = num_workers
        self.mix_rows = mix_rows
        self.seed = seed
        self.predict_names: list[str] = []
        self._resumed: dict[str, Any] = {}
        self._training: BatchLoader | None = None
        check_arguments(self)

    # -- set-up ------------------------------------------------------------------------------------------------------

    @property
    def token_options(self) -> dict[str, Any]:
        """The options that decide which tokens the text becomes, by their names on the command line."""
        names = ["source", "text_field", "validation_files", "validation_fraction", "validation_tokens"]
        names += ["vocab_size"] if self.tokenizer_name == "bpe" else []
        return {"data.tokenizer": self.tokenizer_name, **{f"data.{name}": getattr(self, name) for name in names}}

    @cached_property
    def _prepared(self) -> Prepared | None:
        if not is_prepared(self.source):
            return None
        if self.packing != "stream":
            raise DataError(f"data.packing is {self.packing!r}, but prepared data is one stream; set it to stream.")
        return open_prepared(str(self.source), self.token_options)

    @cached_property
    def corpus(self) -> Corpus:
        """The opened source."""
        return open_corpus(self.source, self.text_field, self.validation_files, self.validation_fraction)

    def _training_texts(self) -> Iterator[str]:
        # A generator, so that a tokenizer which is not trained here opens no source.
        yield from self.corpus.train.texts()

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        return Vocabulary(self._load_tokenizer(), self.isolate_documents)

    def _load_tokenizer(self) -> PreTrainedTokenizerBase:
        if self._prepared is not None:
            return self._prepared.load_tokenizer()
        return load_tokenizer(self.tokenizer_name, self._training_texts(), self.vocab_size)

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
        self._load_tokenizer()

    @override
    def setup(self, stage: str | None = None) -> None:
        """Open what the stage needs ("fit", "validate", "test", "predict"; None for all but predict)."""
        self._vocabulary  # noqa: B018 - loads it
        if stage != "predict":
            self._prepared or self.corpus  # noqa: B018 - opens it, so that a wrong path fails here
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

    @override
    def train_dataloader(self) -> BatchLoader:
        """As many batches as the Trainer will train on, less those which it has trained on already."""
        refuse_other_data(self._resumed, self._stream_identity())
        self._training = self._loader(
            self._batches(batches_to_train(self.trainer)),
            num_workers=self.num_workers,
            consumed=partial(batches_trained, self.trainer),
            resumed=resumed_places(self._resumed, self._rank_and_world_size[0]),
            recent=max(2, self.trainer.accumulate_grad_batches if self.trainer else 1),
        )
        return self._training

    def _batches(self, total: int = 0) -> TrainingBatches | PreparedBatches:
        rank, world_size = self._rank_and_world_size
        if self._prepared is not None:
            return self._prepared.batches(
                self._vocabulary,
                self.sequence_length,
                self.batch_size,
                (rank, world_size),
                seed=self.seed,
                shuffle=self.mix_rows > 0,
                total=total,
                resumed=self._resumed,
            )
        return TrainingBatches(
            shards=self.corpus.train,
            vocabulary=self._vocabulary,
            sequence_length=self.sequence_length,
            batch_size=self.batch_size,
            total=total,
            rank=rank,
            world_size=world_size,
            seed=self.seed,
            mix_rows=self.mix_rows,
            packing=self.packing,
            workers=max(1, self.num_workers),
        )

    def batch_position(self, batches: int) -> dict[str, Any] | None:
        """Where a training batch comes from, for `replay`.

        Args:
            batches: Which one: the number that were trained on, it included; one of the last two, or of
                the micro-batches of the last step.

        Returns:
            Plain numbers, and the name of the shard; None if it is not known any more.
        """
        stream = self._batches()
        if isinstance(stream, PreparedBatches):
            return stream.position(batches - 1)
        places = self._training.last_places if self._training is not None else {}
        return stream.position(*places[batches]) if batches in places else None

    def replay(self, position: dict[str, Any]) -> Batch:
        """A training batch once more, of whatever rank, on any machine with the same data and configuration.

        Args:
            position: What `batch_position` returned. This module must be attached to a Trainer with as many ranks.

        Returns:
            The batch.
        """
        return self._batches().replay(position)

    # -- evaluation --------------------------------------------------------------------------------------------------

    @cached_property
    def _held_out_rows(self) -> Tokens:
        shape = (self.sequence_length, self.validation_tokens)
        if self._prepared is not None:
            rows = self._prepared.held_out_rows(*shape)
        else:
            rows = held_out_rows(self.corpus.held_out.texts(), self._vocabulary, *shape)
        if len(rows) == 0:
            raise DataError(
                "no document is held out to validate on; raise --data.validation_fraction, name "
                "--data.validation_files, or set --trainer.limit_val_batches 0."
            )
        return rows

    @override
    def val_dataloader(self) -> BatchLoader:
        """The first `validation_tokens` tokens of the held-out documents, each a label exactly once over all ranks."""
        refuse_other_data(self._resumed, {"tokenizer": self._tokenizer_identity})
        rows = share_of_rank(self._held_out_rows, *self._rank_and_world_size)
        return self._loader(MemoryBatches(self._vocabulary, rows, self.validation_batch_size or self.batch_size))

    @override
    def test_dataloader(self) -> BatchLoader:
        """The same as for validation."""
        return self.val_dataloader()

    @override
    def predict_dataloader(self) -> BatchLoader:
        """Windows of each document of `predict_files`, every token of it a label exactly once over all ranks."""
        refuse_other_data(self._resumed, {"tokenizer": self._tokenizer_identity})
        self.predict_names, texts = name_documents(self.predict_files, self.text_field)
        rows, owners = document_rows(texts, self._vocabulary, self.sequence_length)
        ranks = self._rank_and_world_size
        size = self.validation_batch_size or self.batch_size
        own = MemoryBatches(self._vocabulary, share_of_rank(rows, *ranks), size, share_of_rank(owners, *ranks))
        return self._loader(own)

    # -- resume ------------------------------------------------------------------------------------------------------

    def _stream_identity(self) -> dict[str, Any]:
        source = self.corpus.fingerprint if self._prepared is None else self._prepared.manifest.fingerprint
        return {**self._batches().identity(), "source": source, "tokenizer": self._tokenizer_identity}

    @override
    def state_dict(self) -> dict[str, Any]:
        """Where every rank's stream goes on, and what it depends on; a collective call."""
        trained, stream = batches_trained(self.trainer), self._batches()
        if isinstance(stream, PreparedBatches):
            return {"batches": trained, "rows": stream.dealt.used(trained), **self._stream_identity()}
        places = self._training.places(trained) if self._training is not None else {}
        gathered = gather_places(places, *self._rank_and_world_size)
        return {"batches": trained, "places": gathered, **self._stream_identity()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember the checkpoint's stream; a different one is refused when batches are asked for."""
        self._resumed = state_dict
