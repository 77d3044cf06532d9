"""Small models for the tests of the optimizers, with the names of their hidden matrices, and one step of training."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TEXT_MATRICES = ("layers.0.weight", "layers.1.weight", "layers.2.weight")
LLAMA_MATRICES = tuple(
    f"model.layers.{i}.{name}.weight"
    for i in range(2)
    for name in (
        *(f"self_attn.{c}_proj" for c in "qkvo"),
        *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    )
)


class TinyText(nn.Module):
    """Embedding, three matrices (two of one shape), a norm and an untied head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(13, 12)
        self.layers = nn.ModuleList([nn.Linear(12, 8), nn.Linear(8, 8), nn.Linear(8, 8, bias=False)])
        self.norm = nn.LayerNorm(8)
        self.lm_head = nn.Linear(8, 13)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.lm_head(self.norm(x))


class Logits(nn.Module):
    """A tiny random LLaMA; its logits. The parameters keep the names they have in the Hugging Face model."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=13,
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=2,
            num_attention_heads=2,
            tie_word_embeddings=False,
        )
        llama = LlamaForCausalLM(config)
        self.model, self.lm_head = llama.model, llama.lm_head

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lm_head(self.model(tokens).last_hidden_state)


def backward(model: nn.Module, step: int) -> Tensor:
    """Loss of the step-th batch of tokens, and its gradients."""
    tokens = torch.randint(0, 13, (4, 9), generator=torch.Generator().manual_seed(step))
    model.zero_grad()
    loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    return loss.detach()
