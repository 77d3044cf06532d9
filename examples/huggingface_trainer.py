"""SinkGD in Hugging Face's Trainer: a tiny LLaMA on bytes of the Python standard library; no hub, no download.

`parameter_groups(model)` makes the groups, and the optimizer enters as `Trainer(optimizers=(optimizer, None))`. None
leaves the schedule to the Trainer, which makes it from its arguments and steps it with the optimizer.

pip install 'lightning-multinorm[examples]'
python examples/huggingface_trainer.py [--steps 200]
"""

import argparse
import inspect
import statistics
import textwrap

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from lightning_multinorm import SinkGD, parameter_groups

LENGTH = 64


class Bytes(Dataset[dict[str, Tensor]]):
    """Rows of consecutive bytes of some modules' sources; transformers shifts the labels itself."""

    def __init__(self) -> None:
        sources = "".join(inspect.getsource(module) for module in (argparse, inspect, statistics, textwrap))
        data = torch.tensor(list(sources.encode()))
        self.rows = data[: len(data) // LENGTH * LENGTH].view(-1, LENGTH)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def llama() -> LlamaForCausalLM:
    """A LLaMA of 0.3 M parameters, whose tokens are bytes."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def main(steps: int = 200, folder: str = "runs/huggingface") -> Trainer:
    """Train for some steps; the Trainer's log is in ``state.log_history``."""
    set_seed(0)
    model = llama()
    optimizer = SinkGD(parameter_groups(model), lr=0.02)
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=16,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 10,
        logging_steps=max(1, steps // 10),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Bytes(), optimizers=(optimizer, None))
    trainer.train()
    return trainer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    main(parser.parse_args().steps)
