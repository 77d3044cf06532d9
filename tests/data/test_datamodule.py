"""TextDataModule under a Trainer and the command line: evaluation, prediction and arguments."""

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.cli import LightningCLI

from lightning_multinorm.data import DataError, TextDataModule

from .recorder import Recorder, checkpoint_each_step, make_trainer, train

# lightning 2.6 compares its pytree specs in a way that torch 2.13 deprecates; workers: see test_loader.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
    # The runs that read a checkpoint here do without the callback that saved it.
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
]


# -- evaluation ------------------------------------------------------------------------------------------------------


def test_validation_and_test_count_each_held_out_token_once(tmp_path: Path, make_data: Any) -> None:
    data = make_data(validation_batch_size=3)
    trainer = make_trainer(tmp_path, limit_val_batches=1.0)
    (validated,) = trainer.validate(Recorder(), data, verbose=False)
    (tested,) = trainer.test(Recorder(), data, verbose=False)
    expected = len(data._vocabulary.stream(list(data.corpus.held_out.texts())))
    assert validated["tokens"] == tested["tokens"] == expected > 100
    (limited,) = trainer.validate(Recorder(), make_data(validation_tokens=50), verbose=False)
    assert limited["tokens"] == 50


def test_held_out_documents_are_tokenised_once(make_data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_data()
    first = [batch["labels"].tolist() for batch in data.val_dataloader()]
    monkeypatch.setattr(type(data._vocabulary), "stream", lambda *_: pytest.fail("tokenised again"))
    assert [batch["labels"].tolist() for batch in data.val_dataloader()] == first


def test_nothing_held_out_is_explained(tmp_path: Path, make_data: Any) -> None:
    data = make_data(validation_fraction=1e-9)
    with pytest.raises(DataError, match=r"--data.validation_fraction.*--data.validation_files"):
        make_trainer(tmp_path, limit_val_batches=1.0).validate(Recorder(), data)


def test_predict_names_documents(tmp_path: Path, make_data: Any) -> None:
    (tmp_path / "a.txt").write_text("sink row column " * 20)
    (tmp_path / "notes.md").write_text("größe")
    (tmp_path / "b.jsonl").write_text('{"text": "norm"}\n{"text": "matrix step"}\n')
    files = [str(tmp_path / name) for name in ("a.txt", "notes.md", "b.jsonl")]
    data = make_data(predict_files=files)
    batches = make_trainer(tmp_path).predict(Recorder(), data)
    assert data.predict_names == [*files[:2], f"{files[2]}:1", f"{files[2]}:2"]
    sizes = [0] * 4
    for batch in batches or []:
        for document, size in zip(batch["document"].tolist(), batch["bytes"].tolist(), strict=True):
            sizes[document] += size
    assert sizes == [320, len("größe".encode()), 4, 11]


def test_predict_wants_files(tmp_path: Path, make_data: Any) -> None:
    with pytest.raises(DataError, match=r"data.predict_files is empty"):
        make_trainer(tmp_path).predict(Recorder(), make_data())


def test_evaluation_minds_the_tokenizer_alone(tmp_path: Path, make_data: Any) -> None:
    train(tmp_path, make_data(), max_steps=1, **checkpoint_each_step(tmp_path))
    trainer = make_trainer(tmp_path, limit_val_batches=1)
    saved = str(tmp_path / "step=1.ckpt")
    trainer.validate(Recorder(), make_data(batch_size=2, seed=3), ckpt_path=saved, verbose=False)
    with pytest.raises(DataError, match=r"data.tokenizer = "):
        trainer.validate(Recorder(), make_data(vocab_size=310), ckpt_path=saved, verbose=False)


# -- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("sequence_length", 0, "1 or more"),
        ("batch_size", -1, "1 or more"),
        ("validation_batch_size", 0, "1 or more"),
        ("validation_tokens", 0, "1 or more"),
        ("num_workers", -1, "0 or more"),
        ("seed", -1, "0 or more"),
        ("vocab_size", 256, "257 or more"),
        ("validation_fraction", 0.0, "between 0 and 1"),
        ("validation_fraction", 1.0, "between 0 and 1"),
        ("packing", "tight", "one of stream, paper"),
    ],
)
def test_arguments_are_checked_at_once(name: str, value: Any, remedy: str) -> None:
    with pytest.raises(DataError, match=rf"data.{name} is '?{value}\b.*{remedy}"):
        TextDataModule(**{name: value})


def test_attributes_after_setup(make_data: Any) -> None:
    data = make_data()
    data.prepare_data()
    data.setup("fit")
    assert data.text_vocab_size == len(data.tokenizer) == 300


def test_a_loaded_tokenizer_opens_no_source(make_data: Any, tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    data = make_data(source="/nowhere", tokenizer=str(tmp_path), predict_files=["a.txt"])
    data.prepare_data()
    data.setup("predict")
    assert data.text_vocab_size == 300
    with pytest.raises(DataError, match="'/nowhere' matches no file"):
        data.setup("fit")


@pytest.fixture
def quiet_arguments(tmp_path: Path) -> Iterator[list[str]]:
    options = {"accelerator": "cpu", "logger": "false", "enable_checkpointing": "false", "max_steps": "2"}
    options |= {"enable_progress_bar": "false", "enable_model_summary": "false", "limit_val_batches": "0"}
    yield list(itertools.chain.from_iterable((f"--trainer.{name}", value) for name, value in options.items()))


def test_command_line_and_yaml_build_it(
    tmp_path: Path, shards: Path, quiet_arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "data.yaml"
    files = sorted(shards.iterdir())
    config.write_text(
        f"data:\n  source:\n  - {files[0]}\n  - {files[1]}\n  validation_files: {files[2]}\n"
        "  vocab_size: 300\n  sequence_length: 16\n"
    )
    arguments = ["fit", "--config", str(config), "--data.batch_size", "4", *quiet_arguments]
    monkeypatch.setattr(sys, "argv", ["program", *arguments])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # lightning 2.6 uses an old name of jsonargparse's
    cli = LightningCLI(Recorder, TextDataModule, save_config_callback=None, seed_everything_default=1)
    assert cli.datamodule.source == [str(files[0]), str(files[1])]
    assert len(cli.model.seen) == 2
    assert len(cli.model.seen[0]) == 4
