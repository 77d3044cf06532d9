"""``export``: what transformers loads is the model that was trained, to the last bit; nothing of a user is lost."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_multinorm import LlamaPretraining, TextDataModule
from lightning_multinorm.checkpoints.reading import read_whole
from lightning_multinorm.cli import main
from lightning_multinorm.data.kept import keep_tokenizer, read_tokenizer
from lightning_multinorm.errors import UsageError
from lightning_multinorm.inference import export as exporting
from lightning_multinorm.inference.export import export
from lightning_multinorm.inference.trained import find_checkpoint, load_trained
from tests.checkpoints.files import flip, truncate
from tests.checkpoints.test_io import largest_file

TEXT = "word1 größe 2 <|endoftext|> 你好\n"


def checkpoint(runs: Path, name: str) -> Path:
    return runs / name / "version_0" / "checkpoints" / "last.ckpt"


def trained_logits(path: Path) -> torch.Tensor:
    """Of the checkpoint's weights in the module that trained them."""
    state = read_whole(path)
    saved = {
        key: value for key, value in state["llama_config"].items() if key not in ("transformers_version", "model_type")
    }
    module = LlamaPretraining(size=None, config=saved)
    module.configure_model()
    module.load_state_dict(state["state_dict"])
    with torch.inference_mode():
        return module.eval()(torch.arange(40)[None])


def exported_logits(folder: Path, **arguments: Any) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, **arguments)
    with torch.inference_mode():
        return model(input_ids=torch.arange(40)[None]).logits


@pytest.mark.parametrize("name", ["llama", "spread"])
def test_the_exported_model_is_the_trained_one(name: str, runs: Path, tmp_path: Path) -> None:
    path = checkpoint(runs, name)
    assert path.is_dir() == (name == "spread")
    export(str(path), str(tmp_path / "out"))
    assert torch.equal(exported_logits(tmp_path / "out"), trained_logits(path))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] == (name == "spread") and config["use_cache"]
    assert config["eos_token_id"] == 0 and config["dtype"] == "float32"
    assert {file.stat().st_mode for file in (tmp_path / "out").iterdir()} == {0o100644}


@pytest.mark.parametrize("name", ["llama", "spread"])
def test_the_loaded_model_is_the_trained_one(name: str, runs: Path) -> None:
    model = load_trained(str(runs / name)).model
    with torch.inference_mode():
        assert torch.equal(model(input_ids=torch.arange(40)[None]).logits, trained_logits(checkpoint(runs, name)))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (name == "spread")


def test_the_tokenizer_makes_the_same_ids(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # trained once more
    data = TextDataModule(source=str(runs.parent / "texts"), vocab_size=300, validation_fraction=0.3)
    export(str(runs / "llama"), str(tmp_path / "out"))
    exported = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert exported(TEXT).input_ids == data.tokenizer(TEXT).input_ids
    assert exported.eos_token == data.tokenizer.eos_token
    assert "local_files_only" not in json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())


def test_another_precision_is_that_of_rounding(runs: Path, tmp_path: Path) -> None:
    path = checkpoint(runs, "spread")
    export(str(path), str(tmp_path / "out"), dtype="bfloat16")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    weights = read_whole(path)["state_dict"]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[f"model.{name}"].bfloat16()), name


def test_a_weight_that_a_precision_cannot_hold_is_refused(runs: Path, tmp_path: Path) -> None:
    state = torch.load(checkpoint(runs, "llama"), weights_only=True)
    state["state_dict"]["model.model.norm.weight"][3] = 1e5
    torch.save(state, tmp_path / "large.ckpt")
    tokenizer = str(runs / "llama" / "version_0" / "tokenizer")
    with pytest.raises(UsageError, match=r"cannot hold model\.norm\.weight"):
        export(str(tmp_path / "large.ckpt"), str(tmp_path / "out"), "float16", tokenizer)
    assert not (tmp_path / "out").exists()


def test_large_weights_lie_in_several_files(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "LARGEST_FILE", "60KB")
    export(str(runs / "llama"), str(tmp_path))  # an empty folder will do
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert torch.equal(exported_logits(tmp_path), trained_logits(checkpoint(runs, "llama")))


def test_the_card_says_what_the_run_measured(runs: Path, tmp_path: Path) -> None:
    first = shutil.copytree(runs / "llama", tmp_path / "llama") / "version_0"
    with (first / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    losses = {row["step"]: float(row["val/loss"]) for row in rows if row.get("val/loss")}
    with (first / "metrics.csv").open("a") as file:  # of steps that this checkpoint has not seen
        file.write(",".join("9" for _ in rows[0]) + "\n")
    export(str(first), str(tmp_path / "out"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| validation loss, nats per token | {losses['3']:.4f} |" in card
    assert "| tokens | 256 |" in card and "lightning_multinorm.SinkGD(lr=0.02, matrix_lr_scale=0.05" in card
    (first / "config.yaml").unlink()
    export(str(first), str(tmp_path / "unknown"))
    assert "optimizer and data are not known" in (tmp_path / "unknown" / "README.md").read_text()


def test_nothing_is_overwritten(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").write_text("mine")
    for out in (tmp_path, tmp_path / "mine"):
        with pytest.raises(SystemExit):
            main(["export", "--ckpt_path", str(runs / "llama"), "--out", str(out)])
        assert capsys.readouterr().err == (
            f"error: out={out} is there already, and is not overwritten; name an empty or a new folder\n"
        )
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_full_disk_leaves_nothing(runs: Path, tmp_path: Path) -> None:
    with largest_file(50_000), pytest.raises(UsageError, match=r"could not be written \(.*large"):
        export(str(runs / "llama"), str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_or_foreign_checkpoint_is_refused(runs: Path, tmp_path: Path) -> None:
    tokenizer = str(runs / "llama" / "version_0" / "tokenizer")
    damaged = Path(shutil.copy(checkpoint(runs, "llama"), tmp_path / "a.ckpt"))
    flip(damaged)
    with pytest.raises(UsageError, match=r"a\.ckpt is not usable: damaged"):
        load_trained(str(damaged), tokenizer)
    torch.save({"state_dict": {"weight": torch.ones(3)}}, tmp_path / "b.ckpt")
    with pytest.raises(UsageError, match="holds no LLaMA"):
        load_trained(str(tmp_path / "b.ckpt"), tokenizer)
    state = torch.load(checkpoint(runs, "llama"), weights_only=True)
    del state["state_dict"]["model.lm_head.weight"]
    torch.save(state, tmp_path / "c.ckpt")
    with pytest.raises(UsageError, match=r"lm_head\.weight is missing, not \(300, 32\)"):
        load_trained(str(tmp_path / "c.ckpt"), tokenizer)


def test_a_run_stands_for_its_newest_whole_checkpoint(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(runs / "llama", tmp_path / "llama")
    [best] = run.glob("version_0/checkpoints/best*")
    last = run / "version_0" / "checkpoints" / "last.ckpt"
    for folder in (run, run / "version_0", last.parent):
        assert find_checkpoint(folder) == last
    truncate(last)
    assert find_checkpoint(run) == best
    assert f"{last} is not usable, and passed over: truncated" in capsys.readouterr().err
    best.unlink()
    for folder, message in ((run, "no whole checkpoint in it"), (tmp_path / "nowhere", "no such file or folder")):
        with pytest.raises(UsageError, match=message):
            find_checkpoint(folder)


def test_a_run_keeps_its_own_tokenizer(runs: Path, tmp_path: Path) -> None:
    own = read_tokenizer(runs / "llama" / "version_0" / "tokenizer")
    shutil.copy(checkpoint(runs, "llama"), tmp_path / "a.ckpt")
    with pytest.raises(UsageError, match=rf"no tokenizer for {tmp_path}/a\.ckpt .*--tokenizer"):
        load_trained(str(tmp_path / "a.ckpt"))
    keep_tokenizer(own, tmp_path, run=runs)  # checkpoints that lie elsewhere
    keep_tokenizer(own, tmp_path, run=runs)
    assert load_trained(str(tmp_path / "a.ckpt")).tokenizer(TEXT).input_ids == own(TEXT).input_ids
    own.backend_tokenizer.add_tokens(["word1 größe"])
    with pytest.raises(UsageError, match=r"tokenizer is not this run's .*--checkpoint\.dirpath"):
        keep_tokenizer(own, tmp_path, run=runs)


def test_another_tokenizer_is_spoken_of(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load_trained(str(runs / "llama"))
    assert capsys.readouterr().err == ""
    own = read_tokenizer(runs / "llama" / "version_0" / "tokenizer")
    own.backend_tokenizer.add_tokens(["word1 größe"])
    own.save_pretrained(tmp_path / "more")
    load_trained(str(runs / "llama"), str(tmp_path / "more"))
    assert "not the one that the checkpoint was trained with" in capsys.readouterr().err
    own.backend_tokenizer.add_tokens([f"beyond{k}" for k in range(20)])
    own.save_pretrained(tmp_path / "beyond")
    with pytest.raises(UsageError, match="the model only 300"):
        load_trained(str(runs / "llama"), str(tmp_path / "beyond"))
    (tmp_path / "more" / "tokenizer.json").write_text("{")
    for folder, message in ((tmp_path / "more", "cannot be loaded"), (tmp_path / "no", "is no folder")):
        with pytest.raises(UsageError, match=message):
            read_tokenizer(folder)
