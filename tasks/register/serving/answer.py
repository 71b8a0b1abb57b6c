"""Questions -> answers: what `mlflow.pyfunc.load_model(...).predict(["How do I …?"])` runs.

This file travels inside the registered model and stands alone; the weights beside it serve both flavours.
"""

import math
import numbers
from pathlib import Path

import pandas as pd
import torch
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

ROWS = 64  # most answers that are written side by side
BEFORE, AFTER = "Question: ", "\n\nAnswer:"  # around a question; an answer follows after a space


class Answers(PythonModel):
    """A causal language model that answers questions, and nothing else."""

    def load_context(self, context):
        """Weights and tokenizer of the model's folder; float32, as they were trained."""
        folder = Path(context.artifacts["model"])
        self.tokenizer = AutoTokenizer.from_pretrained(context.artifacts["tokenizer"])
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
        self.model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        saved = self.model.generation_config
        ends = saved.eos_token_id if isinstance(saved.eos_token_id, list) else [saved.eos_token_id]
        self.ends = [end for end in dict.fromkeys([*ends, self.tokenizer.eos_token_id]) if end is not None]
        self.model.generation_config = GenerationConfig()  # what is not asked for is not added in silence
        self.defaults, self.room, self.most = (
            context.model_config[key] for key in ("defaults", "room", "cut_prompts_to")
        )

    def predict(self, context, model_input: pd.DataFrame, params=None):
        """B questions -> B answers, without the question and without special tokens.

        Args:
            context: MLflow's.
            model_input: a text, a list of texts, or a DataFrame with a column `question` or without names.
            params: max_new_tokens, do_sample, temperature, top_k (0: all tokens), top_p (1: all), seed (a
                sampled answer's; -1: another one each time).

        Raises:
            ValueError: a question that is no text or is empty, one too long for the model, or a number out of
                its bounds; the message names the row or the number.
        """
        how = checked({**self.defaults, **(params or {})})
        prompts = [self.prompt(text, row, how) for row, text in enumerate(questions(model_input))]
        found = [""] * len(prompts)
        if how["do_sample"] and how["seed"] >= 0:
            torch.manual_seed(how["seed"])
        lengths = sorted({len(prompt) for prompt in prompts})
        for length in lengths:  # rows of one length need no padding: each has the answer it has alone
            rows = [row for row, prompt in enumerate(prompts) if len(prompt) == length]
            for first in range(0, len(rows), ROWS):
                part = rows[first : first + ROWS]
                for row, text in zip(part, self.answers([prompts[i] for i in part], how), strict=True):
                    found[row] = text
        return found

    def prompt(self, question, row, how):
        """Token ids; what looks like a special token in a question is letters, as in training."""
        text = f"{BEFORE}{question}{AFTER}"
        ids = letters(self.tokenizer, text)
        if len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id:  # some tokenizers close every text
            ids = ids[:-1]
        if self.most is not None and len(ids) > self.most:  # as the run cut them: the end stays, which asks
            head = ids[:1] if ids[0] == self.tokenizer.bos_token_id else []
            ids = head + ids[len(ids) - self.most + len(head) :]
        if self.room is not None and len(ids) + how["max_new_tokens"] > self.room:
            raise ValueError(
                f"question of row {row}: {len(ids)} tokens, with max_new_tokens {how['max_new_tokens']} too "
                f"many for the model's {self.room} positions"
            )
        return ids

    @torch.no_grad()
    def answers(self, prompts, how):
        """Answers to prompts of one length. [B, P] -> B texts."""
        ids = torch.tensor(prompts, device=self.model.device)
        draw = {key: how[key] for key in ("temperature", "top_k", "top_p")} if how["do_sample"] else {}
        pad = self.tokenizer.pad_token_id
        config = GenerationConfig(
            max_new_tokens=how["max_new_tokens"], do_sample=how["do_sample"], eos_token_id=self.ends or None,
            pad_token_id=self.ends[0] if pad is None and self.ends else pad, **draw,
        )  # fmt: skip
        tokens = self.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config
        )
        rows = tokens[:, ids.shape[1] :].tolist()
        clean = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return [clean_text(text) for text in self.tokenizer.batch_decode(rows, **clean)]


def letters(tokenizer, text):
    """Token ids of a text, as in training: what looks like a special token in it is letters.

    For some tokenizers (SentencePiece's Unigram) such a token is a word like others; a space parts it.
    """
    plain = {"split_special_tokens": True, "return_attention_mask": False}
    named = {getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "cls", "sep")}
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special = special.union(tokenizer.all_special_ids) - ({tokenizer.unk_token_id} - named)
    around = sum(token in special for token in tokenizer("", **plain)["input_ids"])
    for _ in range(4):
        ids = tokenizer(text, **plain)["input_ids"]
        if sum(token in special for token in ids) <= around:
            return ids
        read = tokenizer(text, split_special_tokens=True, return_offsets_mapping=True)
        spans = list(zip(read["input_ids"], read["offset_mapping"], strict=True))
        for token, (first, stop) in reversed(spans):
            if token in special and stop > first:
                text = f"{text[: first + 1]} {text[first + 1 :]}"
    raise ValueError(f"the tokenizer reads a special token in {text!r:.60}")


def clean_text(text):
    """Without blanks around it, and without what is no text: half a character, where the tokens ended."""
    return text.replace("\ufffd", "").strip()


def questions(model_input):
    """The texts of an input, in its order; ValueError names the row of what is none."""
    if isinstance(model_input, pd.DataFrame):
        if not len(model_input.columns):
            return []
        named = "question" in model_input.columns
        column = "question" if named else model_input.columns[0]
        if not named and not str(column).isdigit():
            raise ValueError(f"the first column is {column!r}; `question` is wanted, or a list of texts")
        model_input = model_input[column].tolist()
    elif isinstance(model_input, dict):
        model_input = model_input["question"]
    cells = [model_input] if isinstance(model_input, str) else list(model_input)
    if len(cells) == 1 and isinstance(cells[0], list):  # {"question": ["…", "…"]} comes as one cell
        cells = cells[0]
    for row, text in enumerate(cells):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"question of row {row}: {text!r} is no text")
    return cells


def checked(how):
    """The numbers of a generation, within their bounds; ValueError names one that is not."""
    rules = {
        "max_new_tokens": lambda n: n >= 1,
        "temperature": lambda t: math.isfinite(t) and t > 0,
        "top_k": lambda k: k >= 0,
        "top_p": lambda p: 0 < p <= 1,
    }
    for name, holds in rules.items():
        if not isinstance(how[name], numbers.Real) or not holds(how[name]):
            more = "; do_sample=false takes the likeliest token" if name == "temperature" else ""
            raise ValueError(f"{name} is {how[name]!r}, out of its bounds{more}")
    return {**how, "max_new_tokens": int(how["max_new_tokens"]), "top_k": int(how["top_k"])}


set_model(Answers())
