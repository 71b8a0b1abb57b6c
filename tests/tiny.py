"""Tiny random models, a tiny tokenizer, tiny questions on disk: what the tests of the learners share."""

from __future__ import annotations

import hashlib
import string
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import torch
from pyarrow import parquet
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

from params.schema import Params
from tasks.data.schema import SCHEMA
from tasks.lm.heads.reward_model import RewardModel
from tasks.lm.model.loading import save_model, train_tokenizer
from tasks.lm.model.template import document_text
from tasks.run.layout import STAGES, Layout

torch.set_num_threads(1)  # nothing here is large enough for two

PAD, EOS = 0, 1
SPECIAL = SimpleNamespace(pad_token_id=PAD, eos_token_id=EOS)  # as much of a tokenizer as PPOTrainer needs
LLAMA = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64,
}  # fmt: skip
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
T5 = {
    "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": PAD,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16,
}  # fmt: skip
BART = {
    "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 64,
    "decoder_start_token_id": EOS,
}  # fmt: skip
DROPOUTS = (
    "attention_dropout hidden_dropout dropout resid_pdrop embd_pdrop attn_pdrop dropout_rate "
    "classifier_dropout hidden_dropout_prob attention_probs_dropout_prob seq_classif_dropout"
)
NO_DROPOUT = dict.fromkeys(DROPOUTS.split(), 0.0)  # whatever an architecture calls it
OWN_KEYS = {
    "gpt2": GPT2,
    "gptj": GPT2 | {"rotary_dim": 4},
    "bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 2},
    "opt": {
        "hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 64,
    },
    "gemma": LLAMA | {"head_dim": 8},
    "gemma2": LLAMA | {"head_dim": 8, "attn_logit_softcapping": 4.0},
    "t5": T5,
    "mt5": T5,
    "bart": BART,
    "marian": BART,
    "m2m_100": BART,
    "ctrl": {"n_embd": 16, "dff": 24, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "electra": LLAMA | {"embedding_size": 12},
    "distilbert": {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 64},
    "modernbert": LLAMA | {"cls_token_id": 2, "sep_token_id": 3, "local_attention": 4},
}  # fmt: skip


def config_of(kind: str, **keys):
    """A tiny configuration of a transformers model type, vocabulary 32."""
    special = {"vocab_size": 32, "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": None}
    return AutoConfig.for_model(kind, **{**OWN_KEYS.get(kind, LLAMA), **special, **keys})


def causal(kind: str = "llama", seed: int = 0, **keys):
    """A random causal model in evaluation mode whose attention and logits are far from uniform."""
    torch.manual_seed(seed)
    return _loud(AutoModelForCausalLM.from_config(config_of(kind, **keys)))


def scorer(kind: str = "llama", seed: int = 0, **keys):
    """A random reward model in evaluation mode."""
    torch.manual_seed(seed)
    return _loud(AutoModelForSequenceClassification.from_config(config_of(kind, **{"num_labels": 1, **keys})))


def encoder(kind: str = "bert", seed: int = 0, **keys):
    """A random encoder without a head, in evaluation mode."""
    torch.manual_seed(seed)
    return _loud(AutoModel.from_config(config_of(kind, **keys)))


def seq2seq(kind: str = "t5", seed: int = 0, **keys):
    """A random encoder-decoder in evaluation mode; T5's own start is far from uniform."""
    torch.manual_seed(seed)
    return AutoModelForSeq2SeqLM.from_config(config_of(kind, **keys)).eval()


def reward_model(model) -> RewardModel:
    """A scorer that reads the policy's tokens."""
    return RewardModel(model, None, None, shares_tokens=True)


def _loud(model):
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                weight.mul_(8)
            elif name.endswith("bias"):
                weight.add_(0.3 * torch.randn_like(weight))
    return model.eval()


def drawn(lengths, seed: int = 0, low: int = 2, high: int = 32) -> list[list[int]]:
    """Random token lists without pad and eos."""
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(low, high, (n,), generator=draw).tolist() for n in lengths]


def far(found, wanted) -> float:
    """Largest difference, relative to the largest wanted magnitude."""
    found, wanted = (torch.as_tensor(x).detach().double() for x in (found, wanted))
    assert found.shape == wanted.shape
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12))


def gradients(model, keep: bool = False) -> dict[str, torch.Tensor]:
    """A copy of every gradient; the model's own are forgotten, unless they are to be kept."""
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    if not keep:
        model.zero_grad()
    return found


def far_gradients(found: dict, wanted: dict) -> float:
    """Largest difference of two sets of gradients, relative to the largest wanted magnitude of all."""
    assert found.keys() == wanted.keys() and found
    scale = max(g.abs().max() for g in wanted.values())
    assert scale > 0
    return float(max((found[n] - wanted[n]).abs().max() for n in wanted) / scale)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        each = out if isinstance(out, tuple | list) else [out]
        self.elements = max([self.elements, *(t.numel() for t in each if isinstance(t, torch.Tensor))])
        return out


def digests(folder: Path) -> dict[str, str]:
    """The name and sha256 of every file below a folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def question(number: int, answers=None, site: str = "s.example", **keys) -> dict:
    """A row of the data stage: `answers` are (text, score)."""
    a, b = number % 7, number % 5
    text = f"What is {a} + {b}?\n\nTurn {number}, please{'!' * (number % 3)}"
    answers = answers or [(f"It is `{a + b}`.", 3), (f"It is `{a + b + 1}`.", number % 2), ("Who knows?", 0)]
    common = {"created": "2020-01-02T03:04:05.000", "owner_id": None, "licence": "CC BY-SA 4.0"}
    rows = [
        {"id": 10 * number + i, "text": t, "score": s, "votes": s, "accepted": False, **common,
         "created": f"2020-01-02T03:04:{i:02d}.000"}
        for i, (t, s) in enumerate(answers)
    ]  # fmt: skip
    row = {"site": site, "id": number, "title": text.split("\n")[0], "text": text, "tags": [], **common}
    known = {"kind": "sums", "expected": str(a + b), "wrong": [str(a + b + 1)]}
    known |= {"cluster": f"{site}/{a} + {b}"}
    known |= {"wording": ("known", "new")[number % 2], "misleads": number % 3 == 0}
    return row | known | {"answers": rows} | keys


@cache
def tokenizer():
    """A trained tokenizer of 330 tokens; do not change it."""
    rows = [question(n) for n in range(80)]
    return train_tokenizer((document_text(r["text"], a["text"]) for r in rows for a in r["answers"]), 330)


@cache
def encoder_tokenizer():
    """Characters between [CLS] and [SEP], as BERT's; no eos. 104 tokens; do not change it."""
    special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    known = {word: i for i, word in enumerate([*special.values(), *string.printable])}
    raw = Tokenizer(models.WordLevel(known, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    raw.decoder = decoders.Fuse()
    ends = [("[CLS]", known["[CLS]"]), ("[SEP]", known["[SEP]"])]
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=ends
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, **special)


def params(**sections) -> Params:
    """Small, quick parameters; sections override them key by key."""
    small = {
        "machine": {"device": "cpu", "threads": 1},
        "model": {"config": {k: v for k, v in LLAMA.items()} | {"vocab_size": 330, "num_hidden_layers": 1}},
        "pack": {"row_tokens": 96, "document_tokens": 48, "prompt_tokens": 40},
        "sft": {"epochs": 1, "batch_rows": 4},
        "reward": {"epochs": 1, "batch_questions": 8},
        "reward_eval": {"bootstrap_samples": 100, "enforce": False},
        "ppo": {
            "updates": 4, "batch_size": 8, "mini_batch_size": 4, "response_tokens": 6, "eval_updates": 2,
            "learning_rate": 1e-3, "init_kl_coef": 0.05, "ppo_epochs": 1, "target": 0.5, "lam": 1.0,
            "max_grad_norm": 1.0, "missing_eos_penalty": 1.0, "monitor": {"responses": 16},
        },
        "policy_eval": {
            "prompts": 12, "samples_per_prompt": 2, "bootstrap_samples": 100, "temperatures": [1.0, 0.5],
            "best_of": 3, "best_of_samples": 5,
        },
    }  # fmt: skip
    merged = {k: {**small.get(k, {}), **sections.get(k, {})} for k in {*small, *sections} - {"seed"}}
    return Params.model_validate({"seed": sections.get("seed", 0), **merged})


def project(root: Path, splits: dict[str, list[dict]] | None = None) -> Layout:
    """A working directory whose stages have no dependency, with the data stage's outs where `splits` come."""
    stages = {stage: {"cmd": "none", "params": ["seed"]} for stage in STAGES}
    lines = [f"  {name}: {{cmd: none, params: {s['params']}}}" for name, s in stages.items()]
    (root / "dvc.yaml").write_text("stages:\n" + "\n".join(lines) + "\n")
    (root / "params.yaml").write_text("seed: 0\n")
    layout = Layout(root, root)
    for name, rows in (splits or {}).items():
        path = layout.artifact("data", f"{name}.parquet")
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), path)
    return layout


def splits(sft: int = 60, reward: int = 60, rl: int = 40, held: int = 20) -> dict[str, list[dict]]:
    """Questions of four splits, no number twice; a few of each are validation questions by their hash."""
    starts = {"sft": (100, sft), "reward": (330, reward), "rl": (430, rl), "eval": (570, held)}
    return {
        name: [question(n) for n in range(first, first + count)] for name, (first, count) in starts.items()
    }


def save(model, folder: Path, known=None) -> Path:
    """A transformers folder with its tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    save_model(model, known or tokenizer(), folder)
    return folder


def copied(packed, root):
    """A project that has what `pack` and `sft` left in another one."""
    root.mkdir()
    layout = project(root)
    layout.artifact("pack").parent.mkdir()
    for stage in ("pack", "sft"):
        layout.artifact(stage).symlink_to(packed.artifact(stage))
    return layout
