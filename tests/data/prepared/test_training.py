"""Training on a prepared folder under a Trainer: resumed exactly, with other sizes too, and refused if it changed."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_multinorm.data.datamodule import TextDataModule
from lightning_multinorm.data.errors import DataError
from lightning_multinorm.data.prepared.command import Preparer

from ..recorder import Recorder, checkpoint_each_step, make_trainer, train

# lightning 2.6 compares its pytree specs in a way that torch 2.13 deprecates; workers: see test_loader.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
    # The resumed runs here do without the callback that saved the checkpoint.
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    data = TextDataModule(str(shards), vocab_size=300, validation_fraction=0.1)
    Preparer().prepare(None, data, str(folder), shard_tokens=3000)  # type: ignore[arg-type]  # looks at no model
    return folder


@pytest.fixture
def make(make_data: Any, folder: Path) -> Any:
    return lambda **options: make_data(**{"source": str(folder), **options})


def rows(model: Recorder) -> list[list[int]]:
    return [row for batch in model.seen for row in batch]


def test_an_epoch_has_every_row_of_the_text_once(tmp_path: Path, make: Any, make_data: Any) -> None:
    texts = make_data(mix_rows=0)
    stream = texts._vocabulary.stream(list(texts.corpus.train.texts()))
    count = (len(stream) - 1) // 16  # the last row is shorter, and has a test of its own
    model, _ = train(tmp_path, make(batch_size=3), max_steps=-(-count // 3) + 1)
    expected = stream[: count * 16].reshape(-1, 16).tolist()
    assert set(map(tuple, rows(model))) >= set(map(tuple, expected))
    assert rows(model)[:count] != expected
    ordered, _ = train(tmp_path, make(batch_size=3, mix_rows=0), max_steps=count // 3)
    assert rows(ordered) == expected[: count // 3 * 3]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("step", [1, 4])
def test_interrupted_equals_uninterrupted(tmp_path: Path, make: Any, step: int, workers: int) -> None:
    options: dict[str, Any] = {"max_steps": 6, "accumulate_grad_batches": 2}
    whole, _ = train(tmp_path, make(), **options, **checkpoint_each_step(tmp_path))
    rest, trainer = train(tmp_path, make(num_workers=workers), tmp_path / f"step={step}.ckpt", **options)
    assert rest.seen == whole.seen[step * 2 :]
    assert trainer.global_step == 6


def test_other_batch_sizes_go_on_where_the_rows_end(tmp_path: Path, make: Any) -> None:
    """A checkpoint of a resumed run with another size is resumed with a third."""
    whole, _ = train(tmp_path, make(batch_size=1), max_steps=2 * 4 + 3 * 2 + 2 * 5)
    found: list[list[int]] = []
    checkpoint = None
    for batch_size, steps in ((4, 2), (2, 5), (5, 7)):
        data = make(batch_size=batch_size)
        model, trainer = train(tmp_path, data, checkpoint, max_steps=steps)
        found += rows(model)
        checkpoint = tmp_path / f"{steps}.ckpt"
        trainer.save_checkpoint(checkpoint)
    assert found == rows(whole)
    state = torch.load(checkpoint, weights_only=True)["TextDataModule"]
    assert (state["batches"], state["rows"]) == (7, len(found))


def test_another_number_of_ranks_goes_on_where_the_rows_end(
    tmp_path: Path, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = train(tmp_path, make(), max_steps=7)
    train(tmp_path, make(), max_steps=3, **checkpoint_each_step(tmp_path))
    ranks = []
    for rank in range(2):
        monkeypatch.setattr(TextDataModule, "_rank_and_world_size", (rank, 2))
        ranks.append(train(tmp_path, make(), tmp_path / "step=3.ckpt", max_steps=5)[0].seen)
    assert [batch for step in zip(*ranks, strict=True) for batch in step] == whole.seen[3:]


@pytest.mark.parametrize(("name", "value"), [("sequence_length", 8), ("seed", 5), ("mix_rows", 0)])
def test_another_order_is_refused_on_resume(tmp_path: Path, make: Any, name: str, value: int) -> None:
    train(tmp_path, make(), max_steps=1, **checkpoint_each_step(tmp_path))
    with pytest.raises(DataError, match=rf"data.{name} = .*, now it is {value}, .*start anew"):
        train(tmp_path, make(**{name: value}), tmp_path / "step=1.ckpt", max_steps=2)


def test_streamed_and_prepared_checkpoints_are_told_apart(tmp_path: Path, make: Any, make_data: Any) -> None:
    for one, other in ((make, make_data), (make_data, make)):
        train(tmp_path, one(), max_steps=1, **checkpoint_each_step(tmp_path))
        with pytest.raises(DataError, match=r"data.* = .*, now it is"):
            train(tmp_path, other(), tmp_path / "step=1.ckpt", max_steps=2)
        (tmp_path / "step=1.ckpt").unlink()


def test_validation_is_that_of_the_text(tmp_path: Path, make: Any, make_data: Any) -> None:
    seen = []
    for data in (make(validation_tokens=300), make_data(validation_tokens=300)):
        trainer = make_trainer(tmp_path, limit_val_batches=1.0)
        trainer.validate(Recorder(), data, verbose=False)
        seen.append([{name: value.tolist() for name, value in batch.items()} for batch in data.val_dataloader()])
    assert seen[0] == seen[1]


def test_no_text_and_no_cache_is_needed(
    tmp_path: Path, make: Any, monkeypatch: pytest.MonkeyPatch, shards: Path
) -> None:
    monkeypatch.setattr("lightning_multinorm.data.datamodule.open_corpus", lambda *_: pytest.fail("opened the text"))
    data = make()
    train(tmp_path, data, max_steps=1, limit_val_batches=1)
    assert data.text_vocab_size == 300


def test_batches_can_be_replayed(tmp_path: Path, make: Any) -> None:
    data = make()
    model, _ = train(tmp_path, data, max_steps=4)
    assert make().replay(data.batch_position(2))["input_ids"].tolist() == model.seen[1]


def test_the_papers_padding_is_refused(make: Any) -> None:
    with pytest.raises(DataError, match=r"data.packing is 'paper', but prepared data is one stream"):
        make(packing="paper").setup("fit")


def test_isolated_documents(tmp_path: Path, make: Any) -> None:
    data = make(isolate_documents=True, sequence_length=64)
    data.setup("fit")
    batch = data._batches(1).batches(0)
    positions = next(batch)["position_ids"]
    assert positions[:, 0].eq(0).all() and (positions.diff() < 0).any()
