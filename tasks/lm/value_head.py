"""A causal language model with a scalar output for every token."""

from __future__ import annotations

import copy
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tasks.lm.loading import load_causal

VALUE_HEAD = "value_head.safetensors"


class ValueHead(nn.Module):
    """One linear layer, zero at the start: the first advantages are the rewards themselves."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.summary = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.summary.weight)
        nn.init.zeros_(self.summary.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden [..., H] -> values [...], float32."""
        return self.summary(hidden.to(self.summary.weight.dtype)).squeeze(-1).float()


class AutoModelForCausalLMWithValueHead(nn.Module):
    """`pretrained_model` with a `v_head`; the forward returns (logits, loss, values) as TRL's did."""

    def __init__(self, pretrained_model: nn.Module) -> None:
        super().__init__()
        self.pretrained_model = pretrained_model
        self.config = pretrained_model.config
        self.v_head = ValueHead(pretrained_model.config.get_text_config().hidden_size)

    @classmethod
    def from_pretrained(cls, base: str | Path, revision: str = "main") -> AutoModelForCausalLMWithValueHead:
        """From the Hub or a folder; `value_head.safetensors` is read where the folder has one.

        Raises:
            ValueError: no weights there.
        """
        model = cls(load_causal(base, revision))
        saved = Path(base) / VALUE_HEAD
        if saved.is_file():
            model.v_head.load_state_dict(load_file(saved))
        return model

    def save_pretrained(self, folder: str | Path) -> None:
        """A plain transformers folder, with the value head in a file of its own."""
        self.pretrained_model.save_pretrained(folder)
        save_file({k: v.contiguous() for k, v in self.v_head.state_dict().items()}, Path(folder) / VALUE_HEAD)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **keys
    ) -> tuple[Tensor, None, Tensor]:
        """Tokens [B, S] -> logits [B, S, V], no loss, values [B, S]."""
        out = self.pretrained_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            output_hidden_states=True,
            **{"use_cache": False, **keys},
        )
        return out.logits, None, self.v_head(out.hidden_states[-1])

    def generate(self, *args, **keys):
        """The language model's own `generate`."""
        return self.pretrained_model.generate(*args, **keys)


def create_reference_model(model: nn.Module) -> nn.Module:
    """A frozen copy in evaluation mode."""
    return copy.deepcopy(model).eval().requires_grad_(False)
