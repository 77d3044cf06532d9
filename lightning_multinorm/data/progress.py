"""What the Trainer's arguments and counters say about batches: how many there will be, how many are done."""

from lightning.pytorch import Trainer

from lightning_multinorm.data.errors import DataError


def batches_to_train(trainer: Trainer | None) -> int:
    """Batches (micro-steps) per rank from the beginning of training to its end.

    Args:
        trainer: Whose `max_steps` (or `limit_train_batches` and `max_epochs`) set the end.

    Returns:
        The number of batches.

    Raises:
        DataError: If there is no Trainer, nothing to do, or no end.
    """
    if trainer is None:
        raise DataError("train_dataloader() asks the Trainer for its number of steps; hand the module to Trainer.fit.")
    for name in ("max_steps", "accumulate_grad_batches"):
        if getattr(trainer, name) == 0:
            raise DataError(f"trainer.{name} is 0, so nothing would be trained; set it to 1 or more.")
    if trainer.max_steps >= 0:
        # From where it is now: a resumed run may accumulate over another number of batches than the one before.
        window, done = trainer.accumulate_grad_batches, batches_trained(trainer)
        return done - done % window + (trainer.max_steps - trainer.global_step) * window
    epochs = trainer.max_epochs or -1
    if type(trainer.limit_train_batches) is int and epochs > 0:
        return trainer.limit_train_batches * epochs
    raise DataError(
        "trainer.max_steps is not set; the training text is an endless stream, so set --trainer.max_steps "
        "(next to --trainer.max_time, if that is to end training)."
    )


def batches_trained(trainer: Trainer | None) -> int:
    """Batches (micro-steps) per rank that have been trained on.

    Args:
        trainer: Whose counters to read. Not `global_step * accumulate_grad_batches`: Lightning's count of batches is
            right inside an accumulation window and with several optimizers too, and is restored from checkpoints.

    Returns:
        The number of batches; 0 without a Trainer, and with `overfit_batches`, which repeats the same ones.
    """
    if trainer is None or trainer.overfit_batches > 0:  # type: ignore[attr-defined]  # set by a connector
        return 0
    return int(trainer.fit_loop.epoch_loop.batch_progress.total.processed)  # type: ignore[attr-defined]
