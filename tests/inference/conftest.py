"""Two tiny models, trained by the real command: one in a file, one with tied weights in a folder of shards."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_multinorm.cli import main
from lightning_multinorm.strategies import end_communication

CONFIG = """
trainer: {accelerator: cpu, max_steps: 4, val_check_interval: 2, num_sanity_val_steps: 0, log_every_n_steps: 1}
model:
  size: null
  config: {vocab_size: 300, hidden_size: 32, intermediate_size: 88, num_hidden_layers: 2, num_attention_heads: 4}
data: {source: texts, vocab_size: 300, sequence_length: 16, batch_size: 4, validation_fraction: 0.3}
run: {report: false}
"""
TIED = ("--model.config.tie_word_embeddings", "true", "--model.config.max_position_embeddings", "48")
SPREAD = ("--trainer.strategy", "fsdp2", "--trainer.devices", "1", "--run.name", "spread")


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder ``runs``, with the run ``llama`` in a file and ``spread`` in a folder of shards."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "own.yaml").write_text(CONFIG)
    (folder / "texts").mkdir()
    for name in range(6):
        lines = [f"word{name} größe {line} 你好 text{line % 3}\n" for line in range(8)]
        (folder / "texts" / f"{name}.txt").write_text("".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("sys.argv", ["lightning_multinorm"])
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"):
            patch.setenv(name, "")  # put back at the end as they were
            del os.environ[name]
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        main(["fit", "--config", "own.yaml"])
        main(["fit", "--config", "own.yaml", *TIED, *SPREAD])
        end_communication()
    yield folder / "runs"
