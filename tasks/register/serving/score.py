"""Questions with answers -> scores: what `mlflow.pyfunc.load_model(...).predict(frame)` runs.

This file travels inside the registered model and stands alone; the weights beside it serve both flavours.
"""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pandas as pd
import torch
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

ROWS = 64  # most documents that are read side by side
COLUMNS = ("question", "answer")


class Scores(PythonModel):
    """A reward model: one number for each answer, higher is better, as it was in training."""

    def load_context(self, context):
        """Weights and tokenizer of the model's folder; float32, as they were trained."""
        auto, folder = AutoModelForSequenceClassification, Path(context.artifacts["model"])
        self.experts = None
        if "experts" in context.artifacts:
            self.experts = frozen_style(folder, context.artifacts["experts"])
            return
        self.tokenizer = AutoTokenizer.from_pretrained(context.artifacts["tokenizer"])
        self.model = auto.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
        self.model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        self.closes_itself, self.room = (context.model_config[key] for key in ("closes_itself", "room"))

    def predict(self, context, model_input: pd.DataFrame, params=None):
        """B questions and answers -> B scores, the model's own: no sigmoid.

        Args:
            context: MLflow's.
            model_input: a DataFrame with the columns `question` and `answer`, or what MLflow makes one of.
            params: there are none.

        Raises:
            ValueError: a question or an answer that is no text; the message names the row.
        """
        asked = pairs(model_input)
        if self.experts is not None:
            texts = ([pair[i] for pair in asked] for i in range(2))
            return self.experts.scores(*texts, ROWS).tolist()
        documents = [self.document(*pair) for pair in asked]
        found = [0.0] * len(documents)
        for length in sorted({len(document) for document in documents}):  # one length needs no padding
            rows = [row for row, document in enumerate(documents) if len(document) == length]
            most = ROWS if self.model.config.get_text_config().pad_token_id is not None else 1
            for first in range(0, len(rows), most):
                part = rows[first : first + most]
                for row, score in zip(part, self.scores([documents[i] for i in part]), strict=True):
                    found[row] = score
        return found

    def document(self, question, answer):
        """Token ids of the whole text with the token that closes it.

        What looks like a special token in a text is letters, as in training. What the model has no places for
        is cut, as the run cuts it.
        """
        text = f"Question: {question}\n\nAnswer: {answer}"
        ids = letters(self.tokenizer, text)
        if self.closes_itself:  # an encoder: its last token closes the text, and is not cut
            return ids if self.room is None or len(ids) <= self.room else [*ids[: self.room - 1], ids[-1]]
        eos = self.tokenizer.eos_token_id
        ids = ids[:-1] if len(ids) > 1 and ids[-1] == eos else ids
        return [*ids, eos][: self.room]

    @torch.no_grad()
    def scores(self, documents):
        """Scores of documents of one length. [B, T] -> B floats."""
        ids = torch.tensor(documents, device=self.model.device)
        logits = self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        return logits[:, 0].float().tolist()


def frozen_style(folder, code):
    """The two experts of a model that reads texts, by the code that trained them, which travels beside it."""
    spec = spec_from_file_location("frozen_style", code)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoder = AutoModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    encoder.to("cuda" if torch.cuda.is_available() else "cpu")
    head, read = module.Head.read(folder), lambda texts: [letters(tokenizer, text) for text in texts]
    return module.FrozenStyle(encoder, tokenizer, head, read)


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


def pairs(model_input):
    """(question, answer) of each row, in its order; ValueError names the row of what is no text."""
    if not isinstance(model_input, pd.DataFrame):
        model_input = pd.DataFrame(model_input)
    missing = [name for name in COLUMNS if name not in model_input.columns]
    if missing:
        raise ValueError(f"no column {missing[0]!r}; `question` and `answer` are wanted")
    columns = [model_input[name].tolist() for name in COLUMNS]
    if all(len(column) == 1 and isinstance(column[0], list) for column in columns):
        columns = [column[0] for column in columns]  # {"question": ["…", "…"], …} comes as one cell
    if len(columns[0]) != len(columns[1]):
        raise ValueError(f"{len(columns[0])} questions and {len(columns[1])} answers")
    rows = list(zip(*columns, strict=True))
    for row, pair in enumerate(rows):
        for name, text in zip(COLUMNS, pair, strict=True):
            if not isinstance(text, str) or (name == "question" and not text.strip()):
                raise ValueError(f"{name} of row {row}: {text!r} is no text")
    return rows


set_model(Scores())
