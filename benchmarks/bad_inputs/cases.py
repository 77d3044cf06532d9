"""The bad inputs: files that are made in an empty folder, and arguments that are given there."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

SHORT = "--trainer.max_steps=2 --trainer.limit_val_batches=0 --data.batch_size=2"
FIT = f"fit --config quickstart.yaml {SHORT}"
ADAMW = f"{FIT} --config optimizer/adamw.yaml --norm_convergence.shadow=true"
PREDICT = "predict --config quickstart.yaml"
SHARDED = "--trainer.strategy lightning_multinorm.strategies.ShardedStrategy"


class Case(NamedTuple):
    """One bad input.

    Attributes:
        name: what is wrong.
        arguments: of the command line, as they are typed.
        file: the file that is wrong, if one is.
        make: writes it.
    """

    name: str
    arguments: str
    file: str | None = None
    make: Callable[[Path], object] = Path.touch


def text(content: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(content)


def data(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def folder_with(name: str, content: str) -> Callable[[Path], object]:
    def make(path: Path) -> None:
        path.mkdir()
        (path / name).write_text(content)

    return make


_LINE = json.dumps({"text": "one good line of text"}) + "\n"
_BYTES = bytes(range(256)) * 50
_CUT = gzip.compress(b"".join(json.dumps({"text": f"line {k}"}).encode() + b"\n" for k in range(20000)))[:20000]

KINDS: dict[str, list[Case]] = {
    "Command and options": [
        Case("no subcommand", ""),
        Case("unknown subcommand", "fitt --config quickstart.yaml"),
        Case("option without a value", "fit --config"),
        Case("unknown option", f"{FIT} --data.batch_sise=3"),
        Case("option that is short for several", f"{FIT} --trainer.max=3"),
        Case("unknown argument of a class", f"{FIT} --model.optimizer.init_args.iterationz=3"),
        Case("unknown class", f"{FIT} --model.optimizer=NoSuchOptimizer"),
        Case("class that its module has not", f"{FIT} --model.optimizer=lightning_multinorm.SinkGDD"),
        Case("unknown callback", f"{FIT} --trainer.callbacks=NoSuchCallback"),
        Case("class without what it needs", f"{FIT} --model.optimizer=lightning_multinorm.MultiNormGD"),
        Case("words for a whole number", f"{FIT} --data.batch_size=many"),
        Case("null for a whole number", f"{FIT} --data.batch_size=null"),
        Case("word for a number of a class", f"{FIT} --model.optimizer.init_args.lr=fast"),
        Case("number for two", f"{FIT} --model.optimizer.init_args.betas=3"),
        Case("word for true or false", f"{FIT} --model.gradient_release=perhaps"),
        Case("number for a mapping", f"{FIT} --model.config=3"),
        Case("unknown choice", f"{FIT} --nonfinite.action=ignore"),
        Case("unknown size", f"{FIT} --model.size=61m"),
        Case("unknown policy", f"{FIT} --model.policy=none"),
        Case("unknown precision", f"{FIT} --trainer.precision=8-bit"),
        Case("unknown strategy", f"{FIT} --trainer.strategy=fsdp3"),
        Case("unknown field of the model", f"{FIT} --model.config.hidden_sise=128"),
    ],
    "Configuration files": [
        Case("no such file", "fit --config llama1B.yaml"),
        Case("no YAML", "fit --config own.yaml", "own.yaml", text("trainer:\n  max_steps: [3\n")),
        Case("a list", "fit --config own.yaml", "own.yaml", text("- trainer\n- model\n")),
        Case("binary", "fit --config own.yaml", "own.yaml", data(_BYTES)),
        Case("a number for a section", "fit --config own.yaml", "own.yaml", text("trainer: 3\n")),
        Case("unknown section", "fit --config own.yaml", "own.yaml", text("trainr: {max_steps: 3}\n")),
        Case("unknown key", "fit --config own.yaml", "own.yaml", text("data: {batch_sise: 3}\n")),
        Case("wrong type", "fit --config own.yaml", "own.yaml", text("trainer: {max_steps: soon}\n")),
    ],
    "Values out of range": [
        Case("negative learning rate", f"{FIT} --model.optimizer.init_args.lr=-1"),
        Case("negative learning rate of AdamW", f"{ADAMW} --model.optimizer.init_args.lr=-1"),
        Case("no iteration", f"{FIT} --model.optimizer.init_args.iterations=0"),
        Case("warm-up of three runs", f"{FIT} --model.scheduler.init_args.warmup=3"),
        Case("no sequence in a batch", f"{FIT} --data.batch_size=0"),
        Case("no step", f"{FIT} --trainer.max_steps=0"),
        Case("run without end", f"{FIT} --trainer.max_steps=-1"),
        Case("accumulation of nothing", f"{FIT} --trainer.accumulate_grad_batches=0"),
        Case("no device", f"{FIT} --trainer.accelerator=cpu --trainer.devices=0"),
        Case("all text held out", f"{FIT} --data.validation_fraction=1.5"),
        Case("tokenizer of fewer ids than bytes", f"{FIT} --data.vocab_size=100"),
        Case("validation often", f"{FIT} --trainer.val_check_interval=often"),
        Case("logged every 0 steps", f"{FIT} --norm_convergence.every_n_steps=0"),
    ],
    "Impossible combinations": [
        Case("heads that do not divide the width", f"{FIT} --model.config.num_attention_heads=3"),
        Case("heads that key-value heads do not divide", f"{FIT} --model.config.num_key_value_heads=3"),
        Case("sequences longer than the positions", f"{FIT} --data.sequence_length=4096"),
        Case("tokenizer larger than the model's vocabulary", f"{FIT} --model.config.vocab_size=1000"),
        Case("release and accumulation", f"{FIT} --model.gradient_release=true --trainer.accumulate_grad_batches=2"),
        Case("release and clipping", f"{FIT} --model.gradient_release=true --trainer.gradient_clip_val=1"),
        Case("release and float16", f"{FIT} --model.gradient_release=true --trainer.precision=16-true"),
        Case("release and AdamW", f"{ADAMW} --model.gradient_release=true"),
        Case("AdamW watched by norms", f"{ADAMW} --norm_convergence.shadow=false"),
        Case("tensor parallelism over more devices than there are", f"{FIT} --trainer.accelerator=cpu {SHARDED} "
             "--trainer.strategy.tensor_parallel_size=3"),
        Case("GPU that is not there", f"{FIT} --trainer.accelerator=gpu"),
        Case("rule that is no regular expression", f'{FIT} --model.rules={{"(":"adam"}}'),
        Case("rule that fits no parameter", f'{FIT} --model.rules={{"nosuch":"adam"}}'),
    ],
    "Data": [
        Case("no such file", f"{FIT} --data.source=nowhere/*.jsonl"),
        Case("empty folder", f"{FIT} --data.source=texts", "texts", Path.mkdir),
        Case("empty file", f"{FIT} --data.source=a.txt", "a.txt"),
        Case("file of another kind", f"{FIT} --data.source=a.pdf", "a.pdf"),
        Case("binary text", f"{FIT} --data.source=a.txt", "a.txt", data(_BYTES)),
        Case("JSON lines that are not UTF-8", f"{FIT} --data.source=a.jsonl", "a.jsonl",
             data('{"text": "größe"}\n'.encode("latin-1"))),
        Case("broken line of JSON", f"{FIT} --data.source=a.jsonl", "a.jsonl", text(_LINE * 9 + '{"text": "bro\n')),
        Case("JSON without text", f"{FIT} --data.source=a.jsonl", "a.jsonl", text('{"body": "text"}\n')),
        Case("gzip cut in the middle", f"{FIT} --data.source=a.jsonl.gz", "a.jsonl.gz", data(_CUT)),
        Case("no gzip", f"{FIT} --data.source=a.jsonl.gz", "a.jsonl.gz", text(_LINE)),
        Case("no Parquet", f"{FIT} --data.source=a.parquet", "a.parquet", text("PAR1 and no more")),
        Case("document longer than memory allows", f"{FIT} --data.source=a.jsonl", "a.jsonl",
             lambda path: path.write_text(json.dumps({"text": "word " * 14_000_000}))),
        Case("tokenizer that is nowhere", f"{FIT} --data.tokenizer=nowhere/tokenizer"),
        Case("broken tokenizer", f"{FIT} --data.tokenizer=own", "own", folder_with("tokenizer.json", "{")),
        Case("nothing to predict on", PREDICT),
        Case("no such file to predict on", f"{PREDICT} --data.predict_files=[a.txt]"),
    ],
    "Checkpoints and output": [
        Case("no such checkpoint", f"{FIT} --ckpt_path=nowhere.ckpt"),
        Case("no checkpoint", f"{FIT} --ckpt_path=own.ckpt", "own.ckpt", data(_BYTES)),
        Case("no such checkpoint to validate", "validate --config quickstart.yaml --ckpt_path=nowhere.ckpt"),
        Case("folder that cannot be written", f"{FIT} --run.root=a.txt/runs", "a.txt", text("mine")),
        Case("table that is there already", f"{PREDICT} --data.predict_files=[a.csv] --perplexity.out=a.csv", "a.csv",
             text("mine")),
    ],
}  # fmt: skip
