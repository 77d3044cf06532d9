"""The model card of an exported model: what it is and how it was trained, from the run's own files, and no more."""

import csv
from pathlib import Path
from typing import Any

import yaml

from lightning_multinorm.inference.trained import Trained

_METRICS = {
    "train/loss": "training loss, nats per token",
    "val/loss": "validation loss, nats per token",
    "val/perplexity": "validation perplexity",
    "val/bits_per_byte": "validation bits per byte",
}
_SHAPE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- lightning-multinorm
---

# {name}

A LLaMA with {parameters:,} parameters, pretrained with lightning-multinorm; a base model, tuned for no task. This card
was written by `python -m lightning_multinorm export` from the files of the run.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModelForCausalLM.from_pretrained("FOLDER")
inputs = tokenizer({start}"Once upon a time", add_special_tokens=False, return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```
{usage}
## Model

{model}

## Training

{training}
"""


def model_card(trained: Trained) -> str:
    """Markdown. What the run's folder does not tell is left out, and that is said."""
    run = trained.path.absolute().parent.parent
    steps = int(trained.state.get("global_step", 0))
    tokens = trained.state.get("callbacks", {}).get("Throughput", {}).get("tokens")
    rows = {"checkpoint": f"`{trained.path.name}`", "optimizer steps": f"{steps:,}"}
    rows |= {"tokens": f"{tokens:,}"} if tokens is not None else {}
    rows |= _measured(run / "metrics.csv", steps) | _configured(run / "config.yaml")
    after_end = trained.state.get("TextDataModule", {}).get("packing") != "paper"
    return _CARD.format(
        name=run.parent.name if (run / "config.yaml").is_file() else trained.path.stem,
        parameters=trained.model.num_parameters(),
        start="tokenizer.eos_token + " if after_end else "",
        usage=_USAGE if after_end else "",
        model=_table(_described(trained)),
        training=_table(rows) + ("" if (run / "config.yaml").is_file() else _UNKNOWN),
    )


_USAGE = """
In training every document came after an end-of-text token, so that a prompt begins with one.
"""
_UNKNOWN = "\n\nThe run's `config.yaml` was not beside the checkpoint, so optimizer and data are not known here."


def _described(trained: Trained) -> dict[str, str]:
    config, known = trained.model.config, len(set(trained.tokenizer.get_vocab().values()))
    rows = {name: str(getattr(config, name)) for name in _SHAPE}
    rows["vocab_size"] = f"{config.vocab_size} ({known} in the tokenizer)"
    rows["longest sequence"] = str(config.max_position_embeddings)
    return {**rows, "precision": str(trained.model.dtype).removeprefix("torch.")}


def _measured(file: Path, steps: int) -> dict[str, str]:
    """The last values of metrics that were logged before so many steps were made."""
    found: dict[str, str] = {}
    if file.is_file():
        with file.open(newline="") as stream:
            for row in csv.DictReader(stream):
                if (row.get("step") or "").isdigit() and int(row["step"]) < steps:
                    found |= {name: row[name] for name in _METRICS if row.get(name)}
    return {_METRICS[name]: f"{float(found[name]):.4f}" for name in _METRICS if name in found}


def _configured(file: Path) -> dict[str, str]:
    if not file.is_file():
        return {}
    config: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    model, data, trainer = config["model"], config["data"], config["trainer"]
    rows = {
        "optimizer": _class(model["optimizer"]),
        "schedule": _class(model["scheduler"]),
        "policy": model["policy"],
        "data": data["source"],
        "sequence length": data["sequence_length"],
        "sequences per device and micro-batch": data["batch_size"],
        "micro-batches per step": trainer["accumulate_grad_batches"],
        "strategy": trainer["strategy"] if isinstance(trainer["strategy"], str) else _class(trainer["strategy"]),
        "training precision": trainer["precision"] or "32-true",
        "seed": config["seed_everything"],
    }
    return {name: f"`{value}`" for name, value in rows.items()}


def _class(entry: dict[str, Any] | None) -> str:
    """A class with its arguments, as one writes a call."""
    if entry is None:
        return "none"
    arguments = ", ".join(f"{key}={value}" for key, value in (entry.get("init_args") or {}).items())
    return f"{entry['class_path']}({arguments})"


def _table(rows: dict[str, str]) -> str:
    cells = "\n".join(f"| {name} | {value.replace('|', chr(92) + '|')} |" for name, value in rows.items())
    return f"| | |\n|---|---|\n{cells}"
