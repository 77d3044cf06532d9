"""LlamaPretraining in a real Trainer: its loss, metrics and groups, and what a checkpoint may and may not change."""

import math
from functools import partial, partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parts import LENGTH, TINY, Recorder, Rows, loader, tiny_llama, trainer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from lightning_multinorm import LlamaPretraining, SinkGD
from lightning_multinorm.data.packing import restarting_positions
from lightning_multinorm.errors import UsageError
from lightning_multinorm.schedules import WarmupCosine


def fit(module: LlamaPretraining, folder: Path, steps: int, *, rows: int = 64, **arguments: Any) -> Any:
    ckpt = arguments.pop("ckpt_path", None)
    run = trainer(folder, steps, **arguments)
    run.fit(module, loader(rows), loader(10), ckpt_path=ckpt)
    return run


def test_loss_is_that_of_transformers(tmp_path: Path) -> None:
    module, recorder = tiny_llama(scheduler=None), Recorder()
    fit(module, tmp_path, 1, logger=recorder)
    tokens = Rows(4).tokens
    expected = initial_model()(input_ids=tokens, labels=tokens).loss.item()
    assert recorder.values("train/loss")[0] == pytest.approx(expected, rel=1e-5)


def initial_model() -> Any:
    module = tiny_llama()
    module.configure_model()
    assert module.model is not None
    return module.model


def test_training_learns_and_reports(tmp_path: Path) -> None:
    recorder = Recorder()
    run = fit(tiny_llama(), tmp_path, 60, logger=recorder, max_epochs=10)
    losses = recorder.values("train/loss")
    assert losses[0] > 4.0 and losses[59] < 1.5  # log 64 = 4.16; the language has log 2 = 0.69
    loss = run.callback_metrics["val/loss"].item()
    assert run.callback_metrics["val/perplexity"].item() == pytest.approx(math.exp(loss), rel=1e-5)
    assert run.callback_metrics["val/bits_per_byte"].item() == pytest.approx(loss / math.log(2) / 2, rel=1e-5)


def test_validation_loss_does_not_depend_on_the_batch_size(tmp_path: Path) -> None:
    losses = []
    for batch_size in (10, 3):
        run = trainer(tmp_path, 1)
        [metrics] = run.validate(tiny_llama(), loader(10, batch_size), verbose=False)
        losses.append(metrics["val/loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_prediction_sums_each_row(tmp_path: Path) -> None:
    rows = [{**row, "document": torch.tensor(k)} for k, row in enumerate(Rows(6))]  # type: ignore[arg-type]
    module = tiny_llama()
    outputs = trainer(tmp_path, 1).predict(module, torch.utils.data.DataLoader(rows, batch_size=4))
    [metrics] = trainer(tmp_path, 1).validate(tiny_llama(), loader(6, 6), verbose=False)
    assert torch.cat([output["document"] for output in outputs]).tolist() == list(range(6))
    assert torch.cat([output["tokens"] for output in outputs]).tolist() == [LENGTH] * 6
    total = torch.cat([output["nats"] for output in outputs]).sum().item()
    assert total / (6 * LENGTH) == pytest.approx(metrics["val/loss"], rel=1e-5)


def test_groups_follow_the_papers_policy_and_the_rules() -> None:
    def rules_of(**arguments: Any) -> dict[str, str]:
        module = tiny_llama(scheduler=None, **arguments)
        module.configure_model()
        groups = module.configure_optimizers().param_groups  # type: ignore[union-attr]
        return {name: group["rule"] for group in groups for name in group["param_names"]}

    rules = rules_of()
    assert {name for name, rule in rules.items() if rule == "multinorm"} == {
        name for name in rules if name.endswith("_proj.weight")
    }
    changed = rules_of(rules={"layers.0.*q_proj": "adam"})
    assert {name for name in rules if rules[name] != changed[name]} == {"model.model.layers.0.self_attn.q_proj.weight"}


def _rates(module: LlamaPretraining) -> dict[str, float]:
    module.configure_model()
    optimizer: Any = module.configure_optimizers()
    groups = optimizer.param_groups
    return {name: g["lr"] * g.get("lr_scale", 1) for g in groups for name in g["param_names"]}


@pytest.mark.parametrize("optimizer", [SinkGD, torch.optim.AdamW])
def test_base_width_is_as_lr_scales_of_matrices_and_head(optimizer: Any) -> None:
    options = {"optimizer": optimizer, "scheduler": None}
    explicit = _rates(tiny_llama(lr_scales={"matrix": 0.25, "head": 0.25}, **options))
    assert _rates(tiny_llama(base_width=8, **options)) == explicit  # hidden_size is 32
    plain = _rates(tiny_llama(**options))
    assert {name: rate / plain[name] for name, rate in explicit.items()} == {
        name: 1.0 if "norm" in name or "embed" in name else 0.25 for name in plain
    }
    both = _rates(tiny_llama(base_width=8, lr_scales={"q_proj": 2.0}, **options))
    assert (
        both["model.model.layers.0.self_attn.q_proj.weight"]
        == 2 * explicit["model.model.layers.0.self_attn.q_proj.weight"]
    )


def test_scales_that_cannot_be_honoured_are_the_users_to_mend() -> None:
    for arguments, message in (
        ({"lr_scales": {"lmhead": 2.0}}, "lr_scales.*matches no parameter"),
        ({"base_width": 8, "optimizer": partial(torch.optim.SGD, lr=0.1)}, "base_width.*SGD"),
    ):
        module = tiny_llama(scheduler=None, **arguments)
        module.configure_model()
        with pytest.raises(UsageError, match=message):
            module.configure_optimizers()
    with pytest.raises(UsageError, match=r"model\.base_width=0"):
        tiny_llama(base_width=0)


def test_schedule_spans_the_run_and_is_stepped_with_the_optimizer(tmp_path: Path) -> None:
    module = tiny_llama()
    run = trainer(tmp_path, 8, accumulate_grad_batches=2)
    run.fit(module, loader())
    [config] = run.lr_scheduler_configs
    assert config.scheduler.total_steps == 8 and config.scheduler.last_epoch == 8
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 * 0.02)


def test_a_run_without_end_needs_a_length(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="max_steps"):
        trainer(tmp_path, -1, max_epochs=-1).fit(tiny_llama(), loader())


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    run = fit(tiny_llama(), tmp_path, 6, rows=4)
    path = tmp_path / "six.ckpt"
    run.save_checkpoint(path)
    return str(path)


def resume(checkpoint: str, folder: Path, lr: float, steps: int = 7) -> tuple[Any, torch.Tensor]:
    module = tiny_llama(optimizer=lambda groups: SinkGD(groups, lr=lr), scheduler=schedule)
    run = fit(module, folder, steps, rows=4, ckpt_path=checkpoint)
    assert module.model is not None
    return run, module.model.model.layers[0].mlp.up_proj.weight.detach()


def schedule(optimizer: torch.optim.Optimizer) -> WarmupCosine:
    return WarmupCosine(optimizer, total_steps=6)


def test_resumed_with_another_rate_the_new_one_holds_at_once(checkpoint: str, tmp_path: Path) -> None:
    start = torch.load(checkpoint, weights_only=True)["state_dict"]["model.model.layers.0.mlp.up_proj.weight"]
    run, same = resume(checkpoint, tmp_path, lr=0.02)
    _, tenfold = resume(checkpoint, tmp_path, lr=0.2)
    torch.testing.assert_close(tenfold - start, 10 * (same - start), rtol=1e-3, atol=1e-6)
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.02 * 0.1)


def test_resumed_unchanged_it_equals_an_uninterrupted_run(checkpoint: str, tmp_path: Path) -> None:
    whole = tiny_llama(scheduler=schedule)
    fit(whole, tmp_path, 7, rows=4)
    assert whole.model is not None
    _, resumed = resume(checkpoint, tmp_path, lr=0.02)
    assert torch.equal(whole.model.model.layers[0].mlp.up_proj.weight, resumed)


def test_checkpoint_loads_with_its_own_configuration(checkpoint: str) -> None:
    module = LlamaPretraining.load_from_checkpoint(checkpoint)
    assert module.llama_config.hidden_size == TINY["hidden_size"]
    tokens = Rows(2).tokens[:, :-1]
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    module.eval()
    reference = initial_model().eval()
    reference.load_state_dict({name.removeprefix("model."): value for name, value in saved.items()})
    assert torch.equal(module(tokens), reference(tokens).logits)


@pytest.mark.filterwarnings("ignore")  # torch's own, of its compiler
def test_compiled_it_trains_alike_and_checkpoints_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced as for a GPU; the code that inductor would write, which takes long, is left out."""
    quick = partialmethod(torch.nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(LlamaDecoderLayer, "compile", quick, raising=False)
    runs = []
    for compiled in (False, True):
        module, recorder = tiny_llama(compile=compiled), Recorder()
        fit(module, tmp_path, 3, rows=12, logger=recorder)
        runs.append((recorder.values("train/loss"), module.state_dict()))
    (losses, weights), (compiled_losses, compiled_weights) = runs
    assert compiled_losses == pytest.approx(losses, rel=1e-5)
    assert list(compiled_weights) == list(weights)
    torch.testing.assert_close(compiled_weights, weights, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_isolated_documents_do_not_see_each_other() -> None:
    """In a row of two documents every logit is that of the document alone, behind its end-of-text."""
    module = tiny_llama()
    module.configure_model()
    end, first, second = 0, [5, 9, 3, 7], [8, 8, 2, 61, 30, 4]
    row = np.array([[end, *first, end, *second]])
    positions = torch.from_numpy(restarting_positions(row, end))
    together = module(torch.from_numpy(row), positions)[0]
    alone = [module(torch.tensor([[end, *document]]))[0] for document in (first, second)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(together, module(torch.from_numpy(row))[0], atol=1e-3)


def test_checkpoint_of_another_model_is_refused_by_field(checkpoint: str, tmp_path: Path) -> None:
    module = LlamaPretraining(size=None, config={**TINY, "intermediate_size": 96})
    with pytest.raises(UsageError, match="intermediate_size=88 in the checkpoint, 96 in the configuration"):
        trainer(tmp_path, 7).fit(module, loader(), ckpt_path=checkpoint)
