"""What ``--ckpt_path last`` stands for on the command line: the newest whole checkpoint of all versions of a run."""

from pathlib import Path

from jsonargparse import Namespace
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_multinorm.checkpoints.files import tidy
from lightning_multinorm.checkpoints.last import newest
from lightning_multinorm.errors import UsageError


def last_checkpoint(config: Namespace, subcommand: str) -> Path | None:
    """The newest whole checkpoint, with a warning for each newer one that is damaged; halves of others are removed.

    Lightning's own "last" looks into the folder of the version that is just beginning, and finds nothing.

    Args:
        config: of the subcommand.
        subcommand: of the command line.

    Returns:
        Its path; None if there is none to train on from, which is said, so that a job can be put in the queue again
        and again with one command.

    Raises:
        UsageError: if there is none to evaluate, or it cannot be known where the run keeps them.
    """
    folders, where = _folders(config)
    path, damaged = newest(folders)
    for folder in folders:
        tidy(folder)
    for other, wrong in damaged.items():
        rank_zero_warn(f"The checkpoint {other} is not usable, and passed over: {wrong}.")
    if path is None and subcommand != "fit":
        raise UsageError(f"--ckpt_path last: there is no whole checkpoint in {where}; name one, or train first")
    if path is None:
        rank_zero_info(f"--ckpt_path last: there is no whole checkpoint in {where}; the run begins anew.")
    return path


def _folders(config: Namespace) -> tuple[list[Path], str]:
    """Where a run keeps its checkpoints, and that in words."""
    dirpath, logger = config.checkpoint.dirpath, config.trainer.logger
    if dirpath is None and logger in (None, True):
        run = Path(config.run.root) / config.run.name
        return sorted(run.glob("version_*/checkpoints")), str(run / "version_*" / "checkpoints")
    if dirpath is None and logger is False:
        dirpath = Path(config.trainer.default_root_dir or ".") / "checkpoints"
    if dirpath is None:
        raise UsageError(
            "--ckpt_path last looks into run.root, where a trainer.logger of your own does not write: set "
            "checkpoint.dirpath, or name the checkpoint"
        )
    return [Path(dirpath)], str(dirpath)
