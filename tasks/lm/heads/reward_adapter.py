"""A reward adapter beside the policy's: scores from the base that policy and reference stand on.

The adapter and its score head are those of a sequence-classification model that was trained on the same base;
while it scores, the policy's adapter is off. A score is read at the document's last token, as plain
transformers and the reward stage read it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tasks.lm.adapters.active import at_work
from tasks.lm.adapters.files import SavedAdapter, put_on, read_adapter, tensors_of, write_adapter
from tasks.lm.adapters.lora import has_adapter
from tasks.lm.attention.forest import Segment, has_forest, plant, run_forest
from tasks.lm.logprobs.lm_head import predict
from tasks.lm.logprobs.roads import mask_keys, take_road
from tasks.lm.model.context import check_room, room_of
from tasks.lm.model.modes import evaluating

REWARD = "reward_model_adapter"


class ScoreHead(nn.Module):
    """The frozen linear layer that reads scores; float32 whatever precision the base has."""

    def __init__(self, saved: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(saved["weight"].float().clone(), requires_grad=False)  # [labels, H]
        bias = saved.get("bias")
        self.bias = None if bias is None else nn.Parameter(bias.float().clone(), requires_grad=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden [..., H] -> scores [..., labels], float32, under autocast too."""
        with torch.autocast(hidden.device.type, enabled=False):
            return functional.linear(hidden.float(), self.weight.float(), self.bias)


class ScoredByAdapter(nn.Module):
    """What a value-head model gains by a reward adapter; TRL 0.11's names."""

    pretrained_model: nn.Module
    rm_adapter_name: str | None = None  # None: no reward adapter

    @classmethod
    def beside(cls, model: nn.Module, saved: SavedAdapter, name: str) -> ScoredByAdapter:
        """What scores by an adapter beside others on one base, of which there may be several.

        Args:
            model: a causal language model under PEFT.
            saved: the adapter and its score head.
            name: what it is called there.

        Raises:
            ValueError: as :meth:`take_reward_adapter`.
        """
        scorer = cls()
        scorer.pretrained_model = model
        scorer.take_reward_adapter(saved, name)
        return scorer

    @property
    def supports_rm_adapter(self) -> bool:
        """Whether there is a reward adapter."""
        return self.rm_adapter_name is not None

    def take_reward_adapter(self, saved: SavedAdapter, name: str = REWARD) -> None:
        """Put a reward adapter beside the policy's, frozen, and its score head into `score`.

        Raises:
            ValueError: no adapter here to stand beside; one of another base, or without a score head. The
                model is as it was.
        """
        model = self.pretrained_model
        if not has_adapter(model):
            raise ValueError(
                "reward_adapter: it stands beside the policy's adapter, and the policy has none; give "
                "peft_config, or use the merged reward model (tasks.ppo.reward_functions.from_model)"
            )
        if model.config.is_encoder_decoder:
            raise ValueError("reward_adapter: encoder-decoders have no last token to read; use from_model")
        weight = saved.head.get("weight")
        if weight is None:
            raise ValueError(
                f"{saved.name} has no score head; it must be trained as sequence classification (task_type "
                "SEQ_CLS, which saves `score`; RewardTrainer does)"
            )
        wide = model.get_output_embeddings().weight
        if weight.shape[1] != wide.shape[1]:
            raise ValueError(
                f"{saved.name} has a score head over {weight.shape[1]} numbers; one over {wide.shape[1]} is "
                "wanted"
            )
        put_on(model, saved, name)
        self.score, self.rm_adapter_name = ScoreHead(saved.head).to(wide.device), name

    @torch.no_grad()
    def compute_reward_score(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **keys: Any
    ) -> Tensor:
        """Scores of every token by the reward adapter, [B, S] -> [B, S, labels] float32; one label, mostly.

        Padding has the score of its document's last token: `[:, -1, 0]` is a document's score, on
        whichever side it is padded.

        Args:
            input_ids: tokens [B, S].
            attention_mask: [B, S]; positions count its ones.
            keys: for the language model.

        Raises:
            ValueError: there is no reward adapter, or a row has more tokens than the model has places for.
        """
        self._check_reward_adapter()
        is_real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        check_room([row[row.bool()] for row in is_real], room_of(self.pretrained_model), "row")
        places = torch.arange(input_ids.numel(), device=input_ids.device)
        keys = {
            "attention_mask": is_real,
            **mask_keys(self.pretrained_model, is_real),
            "use_cache": False,
            **keys,
        }
        scores = self._scores(lambda model: model(input_ids=input_ids, **keys), places)
        scores = scores.view(*input_ids.shape, -1)
        numbers = torch.arange(input_ids.shape[1], device=input_ids.device)
        last = (numbers * is_real.bool()).argmax(1, keepdim=True)
        of_last = scores.gather(1, last[..., None].expand(-1, -1, scores.shape[-1]))
        return torch.where(is_real.bool()[..., None], scores, of_last)

    @torch.no_grad()
    def score_documents(self, documents: Sequence[Sequence[int]], rows: int = 64) -> Tensor:
        """Scores of whole documents at their last tokens, packed, at most `rows` in one forward.

        B lists -> [B] on the CPU.

        Raises:
            ValueError: there is no reward adapter, one of several labels, or a document has more tokens than
                the model has places.
        """
        self._check_reward_adapter()
        if (labels := len(self.score.weight)) > 1:
            raise ValueError(
                f"the reward adapter has {labels} labels; a score is one, of compute_reward_score"
            )
        check_room(documents, room_of(self.pretrained_model))
        model, scores = self.pretrained_model, []
        take_road(model)
        for first in range(0, len(documents), rows):
            part = documents[first : first + rows]
            scores.append(self._packed(part) if has_forest(model) else self._padded(part))
        return torch.cat(scores).cpu()

    def _packed(self, documents: Sequence[Sequence[int]]) -> Tensor:
        forest = plant([Segment(d) for d in documents]).to(self.score.weight.device)
        ends = [start + length - 1 for start, length in zip(forest.starts, forest.lengths, strict=True)]
        places = torch.tensor(ends, device=forest.tokens.device)
        return self._scores(lambda model: run_forest(model, forest), places)[:, 0]

    def _padded(self, documents: Sequence[Sequence[int]]) -> Tensor:
        device = self.score.weight.device
        rows = [torch.tensor(d, device=device) for d in documents]
        tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(r) for r in rows], batch_first=True)
        return self.compute_reward_score(tokens, mask)[:, -1, 0]

    def _scores(self, run, places: Tensor) -> Tensor:
        """Scores at N places of a batch, [N, labels], without dropout; afterwards the model is as it was."""
        model = self.pretrained_model
        with evaluating(model), at_work(model, [self.rm_adapter_name]):
            return self.score(predict(model, run, places).hidden[places])

    def _check_reward_adapter(self) -> None:
        if not self.supports_rm_adapter:
            raise ValueError("the model has no reward adapter; load it with reward_adapter=<folder or id>")


def load_reward_adapter(where: str | Path, token: str | bool | None = None) -> SavedAdapter:
    """A reward adapter of a folder or of the Hub, as :meth:`ScoredByAdapter.take_reward_adapter` takes it.

    Raises:
        ValueError: no adapter there.
    """
    return read_adapter(where, "reward_adapter", token=token)


def save_reward_adapter(model: ScoredByAdapter, folder: Path) -> None:
    """The reward adapter and its score head, in a folder that loads as `reward_adapter` again."""
    inside, name = model.pretrained_model, model.rm_adapter_name
    head = {k: v for k, v in model.score.state_dict().items()}
    write_adapter(folder, inside.peft_config[name], tensors_of(inside, name), head, None)
