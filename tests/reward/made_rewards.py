"""Random questions with answers, a trainer of a tiny model, and plain transformers' answer to the same."""

from __future__ import annotations

from functools import cache

import tiny
import torch
from transformers import PreTrainedTokenizerFast

from tasks.reward import GroupedAnswers, RewardConfig, RewardTrainer

CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"


@cache
def chat_tokenizer():
    """The tiny tokenizer with a chat template that writes no eos."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tiny.tokenizer().backend_tokenizer, pad_token="<|pad|>", eos_token="<|eos|>",
        chat_template=CHAT,
    )  # fmt: skip


def groups(count: int, seed: int = 0) -> list[GroupedAnswers]:
    """Questions with two to four answers; every answer has a better or a worse one."""
    found = []
    for n in range(count):
        prompt, *answers = tiny.drawn(
            [3 + n % 7, *(1 + (5 * n + 3 * k) % 9 for k in range(2 + n % 3))], seed + n
        )
        answers = tuple((*a, tiny.EOS) if k % 2 else tuple(a) for k, a in enumerate(answers))
        pairs = tuple((i, j) for i in range(len(answers)) for j in range(i)) if n % 2 else ((0, 1),)
        found.append(GroupedAnswers(tuple(prompt), answers, pairs))
    return found


def trainer(
    folder, *callbacks, model=None, train=None, held=None, tokenizer=None, peft=None, **arguments
) -> RewardTrainer:
    defaults = {
        "max_steps": 6, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "seed": 5,
        "learning_rate": 1e-2, "logging_steps": 1, "save_steps": 2, "optimizer": "muon", "use_cpu": True,
        "disable_tqdm": True, "dataloader_pin_memory": False, "lr_scheduler_type": "cosine",
        "per_device_eval_batch_size": 3,
    }  # fmt: skip
    config = RewardConfig(output_dir=str(folder), **{**defaults, **arguments})
    return RewardTrainer(
        model or tiny.scorer(), config, train or groups(13), eval_dataset=held or groups(5, 50),
        processing_class=tokenizer, peft_config=peft, callbacks=list(callbacks),
    )  # fmt: skip


def padded_scores(model, some) -> list[torch.Tensor]:
    """Each answer with its question in a row of its own, through the plain model's own pooling."""
    rows = [[*g.prompt, *r] for g in some for r in g.responses]
    width = max(map(len, rows)) + 3
    ids = torch.tensor([row + [tiny.PAD] * (width - len(row)) for row in rows])
    flat = model(input_ids=ids, attention_mask=(ids != tiny.PAD).long()).logits[:, 0]
    return list(flat.split([len(g.responses) for g in some]))


def padded_loss(model, some) -> torch.Tensor:
    scores = padded_scores(model, some)
    losses = [(1 + (s[w] - s[b]).exp()).log() for g, s in zip(some, scores, strict=True) for b, w in g.pairs]
    return torch.stack(losses).mean()
