"""transformers' LLaMA with a loss that needs no logits of all tokens."""

from torch import Tensor
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers import LlamaForCausalLM

from lightning_multinorm.llama.chunked import chunked_loss


class Llama(LlamaForCausalLM):
    """A LLaMA: its weights, names and logits are those of transformers' `LlamaForCausalLM`."""

    def chunked_loss(
        self, input_ids: Tensor, position_ids: Tensor | None, labels: Tensor, chunk: int
    ) -> tuple[Tensor, Tensor]:
        """The sum of all losses and each label's (B, T), see `llama.chunked.chunked_loss`.

        The output head's weight is read here, inside the module that FSDP2 has gathered it for.
        """
        hidden = self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state
        return chunked_loss(hidden, self.lm_head.weight, labels, chunk)

    def gathers_for_loss(self) -> None:
        """Let FSDP2 gather weights for `chunked_loss` as it does for ``forward``; after ``fully_shard``."""
        register_fsdp_forward_method(self, "chunked_loss")
