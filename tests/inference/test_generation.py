"""``generate``: greedy is an argmax written out, sampling comes back with its seed, characters come whole."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_multinorm.cli import main
from lightning_multinorm.data.kept import read_tokenizer
from lightning_multinorm.inference.generation import TextPieces, _sampling, prompt_ids, stream
from lightning_multinorm.inference.trained import Trained, load_trained


@pytest.fixture(scope="session")
def trained(runs: Path) -> Trained:
    return load_trained(str(runs / "llama"))


def argmax_loop(trained: Trained, ids: list[int], count: int) -> list[int]:
    """The most probable token, again and again, over all of the text each time."""
    known = torch.zeros(300).masked_fill_(torch.arange(300) >= len(trained.tokenizer), -torch.inf)
    with torch.inference_mode():
        for _ in range(count):
            logits = trained.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
            ids = [*ids, int((logits + known).argmax())]
            if ids[-1] == trained.tokenizer.eos_token_id:
                break
    return ids


def run(capsys: pytest.CaptureFixture[str], ckpt_path: Path, *args: str) -> str:
    main(["generate", "--ckpt_path", str(ckpt_path), "--max_new_tokens", "30", *args])
    return capsys.readouterr().out


def test_greedy_is_the_most_probable_token_each_time(
    runs: Path, trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = "word1 größe 2"
    ids = [0, *trained.tokenizer(prompt, add_special_tokens=False).input_ids]  # a document begins after another's end
    expected = trained.tokenizer.decode(argmax_loop(trained, ids, 30), skip_special_tokens=True)
    assert run(capsys, runs / "llama", "--prompt", prompt, "--temperature", "0") == expected + "\n"
    assert run(capsys, runs / "llama", "--prompt", prompt, "--top_k", "1") == expected + "\n"
    assert len(expected) > len(prompt) + 10


def test_sampling_comes_back_with_its_seed(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, again, other = (run(capsys, runs / "spread", "--top_k", "null", "--seed", seed) for seed in "112")
    assert first == again != other


def test_the_prompt_comes_from_standard_input(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = run(capsys, runs / "llama", "--prompt", "größe 你\n")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("größe 你\n".encode())))
    assert run(capsys, runs / "llama", "--prompt", "-") == given
    assert given.startswith("größe 你\n")


def test_text_ends_where_the_models_positions_do(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = read_tokenizer(runs / "spread" / "version_0" / "tokenizer")
    prompt = tokenizer.decode(tokenizer(" größe" * 48).input_ids[:40])
    main(["generate", "--ckpt_path", str(runs / "spread"), "--prompt", prompt, "--temperature", "0"])
    captured = capsys.readouterr()
    assert captured.err == "The model's positions end here, at 48 tokens.\n"
    assert captured.out.startswith(prompt)
    assert len(tokenizer(captured.out.removesuffix("\n")).input_ids) <= 47


@pytest.mark.parametrize("packing", ["stream", "paper"])
def test_a_prompt_begins_as_documents_did_in_training(packing: str, trained: Trained) -> None:
    ids = trained.tokenizer("word1").input_ids
    assert prompt_ids(trained.tokenizer, "word1", packing == "stream") == ([0] if packing == "stream" else []) + ids
    assert prompt_ids(trained.tokenizer, "", packing == "stream") == [0]
    assert 0 not in prompt_ids(trained.tokenizer, "<|endoftext|>", after_end=False)


def test_ids_that_no_token_has_are_never_sampled(runs: Path) -> None:
    trained = load_trained(str(runs / "llama"))
    unknown = range(len(trained.tokenizer), 300)
    head: Any = trained.model.lm_head.weight
    greedy = _sampling(trained.model, trained.tokenizer, 20, 0, None, 1.0)
    first = stream(trained.model, trained.tokenizer, [0], greedy, lambda text: None)
    head[unknown] = 2 * head[first[0]]  # more probable, where that was probable
    new = stream(trained.model, trained.tokenizer, [0], greedy, lambda text: None)
    assert len(unknown) > 5 and new == first
    greedy.suppress_tokens = None
    assert max(stream(trained.model, trained.tokenizer, [0], greedy, lambda text: None)) >= unknown.start  # it would


def test_text_comes_in_whole_characters(trained: Trained) -> None:
    text = "größe 你好, мир 🙂 e\u0301!"
    ids = trained.tokenizer(text).input_ids
    pieces = written(trained, ids)
    assert "".join(pieces) == text and not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert len(pieces) > 12  # not all at the end
    smile = trained.tokenizer("🙂").input_ids
    assert len(smile) == 4
    assert "".join(written(trained, smile[:2])) == "\N{REPLACEMENT CHARACTER}"  # the text ended inside it
    assert "".join(written(trained, [*smile[:2], *ids])) == "\N{REPLACEMENT CHARACTER}" + text


def written(trained: Trained, ids: list[int]) -> list[str]:
    pieces: list[str] = []
    streamer = TextPieces(trained.tokenizer, pieces.append)
    streamer.put(torch.tensor([[0, *trained.tokenizer("word1 ").input_ids]]))
    for id in ids:
        streamer.put(torch.tensor([id]))
    streamer.end()
    return [piece for piece in pieces if piece]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--max_new_tokens", "0"), "max_new_tokens=0 must be at least 1"),
        (("--temperature", "-1"), "temperature=-1.0 must be 0 or more"),
        (("--temperature", ".inf"), "temperature=inf must be 0 or more"),
        (("--top_k", "0"), "top_k=0 must be at least 1, or null"),
        (("--top_p", "1.5"), "top_p=1.5 must be above 0 and at most 1"),
        (("--device", "tpu9"), "device=tpu9 is not usable"),
        (("--prompt", "word " * 60), "the model's positions end at 48; shorten it"),
        (("--prompt", "a\udcff"), "the prompt is no text: byte 1 is not UTF-8"),
        (("--promt", "a"), "promt is not known; did you mean prompt?"),
    ],
)
def test_an_error_is_one_line(
    args: tuple[str, ...], message: str, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["generate", "--ckpt_path", str(runs / "spread"), *args])
    captured = capsys.readouterr()
    assert stopped.value.code == 2 and message in captured.err and captured.err.count("\n") == 1
    assert captured.out == ""
