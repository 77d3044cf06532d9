"""Training under a Trainer: as many batches as asked for, resumed exactly wherever it stopped, refused if changed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_multinorm.data import DataError

from .recorder import checkpoint_each_step, train

# lightning 2.6 compares its pytree specs in a way that torch 2.13 deprecates; workers: see test_loader.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
    # The resumed runs here do without the callback that saved the checkpoint.
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_exactly_the_batches_of_max_steps(tmp_path: Path, make_data: Any, accumulate: int) -> None:
    model, trainer = train(tmp_path, make_data(), max_steps=5, accumulate_grad_batches=accumulate)
    assert len(model.seen) == trainer.num_training_batches == 5 * accumulate
    assert (trainer.global_step, trainer.current_epoch) == (5, 1)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("step", [1, 4, 6])
def test_interrupted_equals_uninterrupted(
    tmp_path: Path, make_data: Any, step: int, accumulate: int, workers: int
) -> None:
    options: dict[str, Any] = {"max_steps": 6, "accumulate_grad_batches": accumulate}
    whole, _ = train(tmp_path, make_data(num_workers=workers), **options, **checkpoint_each_step(tmp_path))
    rest, trainer = train(tmp_path, make_data(num_workers=workers), tmp_path / f"step={step}.ckpt", **options)
    assert rest.seen == whole.seen[step * accumulate :]
    assert trainer.global_step == 6


@pytest.mark.parametrize("saved_by", ["callback", "trainer"])
def test_training_can_be_prolonged(tmp_path: Path, make_data: Any, saved_by: str) -> None:
    whole, _ = train(tmp_path, make_data(), max_steps=9)
    _, trainer = train(tmp_path, make_data(), max_steps=4, **checkpoint_each_step(tmp_path))
    if saved_by == "trainer":
        trainer.save_checkpoint(tmp_path / "step=4.ckpt")
    rest, _ = train(tmp_path, make_data(), tmp_path / "step=4.ckpt", max_steps=9)
    assert rest.seen == whole.seen[4:]


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (3, 2)])
def test_accumulation_may_change_on_resume(tmp_path: Path, make_data: Any, before: int, after: int) -> None:
    options = {"max_steps": 6, "accumulate_grad_batches": before}
    train(tmp_path, make_data(), **options, **checkpoint_each_step(tmp_path))
    whole, _ = train(tmp_path, make_data(), max_steps=20)
    options["accumulate_grad_batches"] = after
    rest, trainer = train(tmp_path, make_data(), tmp_path / "step=4.ckpt", **options)
    assert trainer.global_step == 6
    assert len(rest.seen) <= 2 * after
    assert rest.seen == whole.seen[4 * before :][: len(rest.seen)]


def test_resume_after_a_crash_repeats_the_lost_step(tmp_path: Path, make_data: Any) -> None:
    whole, _ = train(tmp_path, make_data(), max_steps=6)
    callback = ModelCheckpoint(tmp_path, "crash", save_on_exception=True, every_n_train_steps=100)
    with pytest.raises(RuntimeError, match="power cut"):
        train(tmp_path, make_data(), fail_at=3, max_steps=6, callbacks=[callback], enable_checkpointing=True)
    (saved,) = tmp_path.glob("*.ckpt")
    rest, _ = train(tmp_path, make_data(), saved, max_steps=6)
    assert rest.seen == whole.seen[3:]


def test_resume_with_validation_in_between(tmp_path: Path, make_data: Any) -> None:
    options: dict[str, Any] = {"max_steps": 6, "limit_val_batches": 2, "val_check_interval": 2}
    whole, _ = train(tmp_path, make_data(), **options, **checkpoint_each_step(tmp_path))
    for step in (2, 3):
        rest, _ = train(tmp_path, make_data(), tmp_path / f"step={step}.ckpt", **options)
        assert rest.seen == whole.seen[step:]


def test_shorter_epochs_go_on_in_the_stream(tmp_path: Path, make_data: Any) -> None:
    whole, _ = train(tmp_path, make_data(), max_steps=6)
    by_steps, trainer = train(tmp_path, make_data(), max_steps=6, limit_train_batches=2)
    by_epochs, _ = train(tmp_path, make_data(), max_epochs=3, limit_train_batches=2)
    assert by_steps.seen == by_epochs.seen == whole.seen
    assert trainer.current_epoch == 3


def test_overfitting_sees_the_same_batches(tmp_path: Path, make_data: Any) -> None:
    model, _ = train(tmp_path, make_data(), max_steps=4, overfit_batches=2)
    assert model.seen[:2] == model.seen[2:]


def test_random_numbers_do_not_matter(tmp_path: Path, make_data: Any) -> None:
    seen = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        seen.append(train(tmp_path, make_data(), max_steps=3)[0].seen)
    assert seen[0] == seen[1]


def test_end_of_training_must_be_known(tmp_path: Path, make_data: Any) -> None:
    with pytest.raises(DataError, match=r"--trainer.max_steps"):
        train(tmp_path, make_data(), max_epochs=1)
    with pytest.raises(DataError, match=r"Trainer.fit"):
        make_data().train_dataloader()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", 2),
        ("sequence_length", 8),
        ("packing", "paper"),
        ("vocab_size", 310),
        ("num_workers", 2),
        ("seed", 5),
        ("source", None),
    ],
)
def test_another_stream_is_refused_on_resume(tmp_path: Path, make_data: Any, name: str, value: Any) -> None:
    train(tmp_path, make_data(), max_steps=2, **checkpoint_each_step(tmp_path))
    value = value or str(next(Path(make_data().source).iterdir()))
    reported = {"vocab_size": "(source|tokenizer)"}.get(name, name)
    with pytest.raises(DataError, match=rf"data.{reported} = .*, now it is .*start anew"):
        train(tmp_path, make_data(**{name: value}), tmp_path / "step=1.ckpt", max_steps=2)


def test_another_world_size_is_refused_on_resume(tmp_path: Path, make_data: Any) -> None:
    train(tmp_path, make_data(), max_steps=1, **checkpoint_each_step(tmp_path))
    checkpoint = torch.load(tmp_path / "step=1.ckpt", weights_only=True)  # plain types only
    assert checkpoint["TextDataModule"]["batches"] == 1
    checkpoint["TextDataModule"]["world_size"] = 4
    torch.save(checkpoint, tmp_path / "four.ckpt")
    with pytest.raises(DataError, match="world_size = 4, now it is 1"):
        train(tmp_path, make_data(), tmp_path / "four.ckpt", max_steps=2)


def test_more_workers_than_files_share_them(tmp_path: Path, make_data: Any, shards: Path) -> None:
    files = [str(path) for path in sorted(shards.iterdir())[:2]]
    model, _ = train(tmp_path, make_data(source=files, num_workers=3), max_steps=3)
    rows = [tuple(row) for batch in model.seen for row in batch]
    assert len(set(rows)) == len(rows) == 3 * 4


def test_a_trained_batch_can_be_replayed(tmp_path: Path, make_data: Any) -> None:
    data = make_data()
    model, _ = train(tmp_path, data, max_steps=5)
    for batches in (4, 5):
        position = data.batch_position(batches)
        assert data.replay(position)["input_ids"].tolist() == model.seen[batches - 1]
    assert data.batch_position(3) is data.batch_position(6) is None
