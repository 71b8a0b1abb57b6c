"""Models that learn from votes: an encoder with a linear head, one whose upper layers are tuned, LLaMAs."""

from __future__ import annotations

import os
import random
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from learning_world import Job, Lesson, World
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, AutoTokenizer

from tasks.lm.heads.scores import score_documents
from tasks.lm.model.loading import create_causal, load_reward, load_tokenizer, save_model
from tasks.lm.model.template import encode_documents, encode_prompts
from tasks.reward import GroupedAnswers, RewardConfig, RewardTrainer, pair_loss
from tasks.run.devices import seed_everything
from tasks.run.text_rule import sigmoid

SHARED = Path(os.environ.get("STACKRL_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))
ASKED, SAID = 36, 89  # first tokens of a question and of an answer that the encoder reads
LOWER = 4  # layers of the encoder that are frozen
CHARACTERS = 350  # of a question that a decoder reads
DOCUMENT = {"stories260K": 448, "scratch": 288}  # tokens of question and answer that a decoder reads
SMALL = {"model_type": "llama", "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 512}  # fmt: skip


def encode(folder: Path, world: World) -> None:
    """What the encoder's lower layers make of every question with each answer, kept in bfloat16."""
    torch.set_num_threads(1)
    source = os.environ["STACKRL_ENCODER"]
    tokenizer, model = AutoTokenizer.from_pretrained(source), AutoModel.from_pretrained(source).eval()
    model.encoder.layer = model.encoder.layer[:LOWER]
    cut = lambda text, most: tokenizer(text, add_special_tokens=False)["input_ids"][:most]  # noqa: E731
    first, last = tokenizer.cls_token_id, tokenizer.sep_token_id
    asked = [[first, *cut(g["question"], ASKED), last] for g in world.groups for _ in g["answers"]]
    said = [[*cut(a["text"], SAID), last] for g in world.groups for a in g["answers"]]
    lengths = np.array([len(q) + len(a) for q, a in zip(asked, said, strict=True)])
    starts = np.append(0, np.cumsum(lengths))
    hidden = torch.empty(starts[-1], model.config.hidden_size, dtype=torch.bfloat16)
    order = np.argsort(lengths, kind="stable")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for some in np.array_split(order, len(order) // 32):
            rows = [torch.tensor(asked[i] + said[i]) for i in some]
            kinds = [torch.tensor([0] * len(asked[i]) + [1] * len(said[i])) for i in some]
            ids, kinds = (pad_sequence(these, batch_first=True) for these in (rows, kinds))
            states = model(input_ids=ids, attention_mask=(ids != 0).long(), token_type_ids=kinds)[0]
            for i, state in zip(some, states, strict=True):
                hidden[starts[i] : starts[i + 1]] = state[: lengths[i]].bfloat16()
    kept = {"hidden": hidden, "starts": torch.tensor(starts), "asked": torch.tensor([len(q) for q in asked])}
    save_file(kept, folder / "hidden.safetensors")
    of_answer = (hidden[starts[i] + len(q) : starts[i + 1]] for i, q in enumerate(asked))
    save_file(
        {"mean": torch.stack([states.float().mean(0) for states in of_answer])}, folder / "mean.safetensors"
    )


def train_frozen(folder: Path, world: World, taught: Lesson, job: Job, held: np.ndarray) -> np.ndarray:
    """Scores of the held-out answers [B], linear in the mean lower state of the answer; ridge, by Newton."""
    states = load_file(folder / "mean.safetensors")["mean"].double().numpy()
    states -= states.mean(0)
    better, worse = (states[taught.pairs[:, side]] for side in (0, 1))
    scale = np.sqrt(((better - worse) ** 2).mean(0))
    x, both, how = (better - worse) / scale, (better + worse) / scale, job.how
    quadratic = job.ridge * np.eye(x.shape[1]) + 2 * how.centering * (both.T * taught.weights) @ both
    beta = np.zeros(x.shape[1])
    for _ in range(20):
        right = sigmoid(x @ beta + taught.ahead)
        gradient = x.T @ (taught.weights * (1 - how.smoothing - right)) - quadratic @ beta
        step = np.linalg.solve((x.T * (taught.weights * right * (1 - right))) @ x + quadratic, gradient)
        beta += step
        if abs(step).max() < 1e-8:
            break
    return states[held] / scale @ beta


class Upper(nn.Module):
    """The encoder's upper layers and a score head over its first state and the mean of the answer's."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        seed_everything(seed)
        model = AutoModel.from_pretrained(os.environ["STACKRL_ENCODER"], attn_implementation="sdpa")
        self.layers = model.encoder.layer[LOWER:].eval()  # no dropout
        self.score = nn.Linear(2 * model.config.hidden_size, 1)
        nn.init.normal_(self.score.weight, std=0.01)
        nn.init.zeros_(self.score.bias)

    def forward(self, hidden: Tensor, is_real: Tensor, is_said: Tensor) -> Tensor:
        """[B, T, H], [B, T], [B, T] -> [B]."""
        sees = is_real[:, None, None].expand(-1, 1, hidden.shape[1], -1)
        for layer in self.layers:
            out = layer(hidden, sees)
            hidden = out[0] if isinstance(out, tuple) else out
        mean = (hidden * is_said[..., None]).sum(1) / is_said.sum(1, keepdim=True)
        return self.score(torch.cat([hidden[:, 0], mean], dim=1).float())[:, 0]


@dataclass(frozen=True, slots=True)
class States:
    """What `encode` kept. A answers."""

    hidden: Tensor  # [all tokens, H] bfloat16
    starts: Tensor  # [A + 1]
    asked: Tensor  # [A] tokens before the answer's

    def score(self, upper: Upper, answers: Tensor, rows: int = 64) -> Tensor:
        """Scores of some answers, those of like length side by side. [B] -> [B]."""
        lengths = (self.starts[1:] - self.starts[:-1])[answers]
        order, found = torch.argsort(lengths, stable=True), []
        for some in order.split(rows):
            at = answers[some]
            states = [self.hidden[self.starts[i] : self.starts[i + 1]] for i in at]
            place = torch.arange(int(lengths[some].max()))
            is_real = place < lengths[some, None]
            is_said = is_real & (place >= self.asked[at, None])
            found.append(upper(pad_sequence(states, batch_first=True), is_real, is_said))
        return torch.cat(found)[torch.argsort(order)]


def train_encoder(folder: Path, world: World, taught: Lesson, job: Job, held: np.ndarray) -> np.ndarray:
    """Scores of the held-out answers [B] by the encoder, its upper layers and a head trained."""
    states = States(**load_file(folder / "hidden.safetensors"))
    upper, draw, how = Upper(job.seed), random.Random(job.seed), job.how
    owner = world.laid.owner[taught.pairs[:, 0]]
    of_question = [np.flatnonzero(owner == q) for q in np.unique(owner)]
    rates = [(upper.layers, job.learning_rate), (upper.score, 10 * job.learning_rate)]
    parameters = [{"params": part.parameters(), "lr": rate} for part, rate in rates]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.01)
    steps = job.epochs * -(-len(of_question) // job.questions)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.1 * steps), 1) * (1 - step / steps)
    )
    odds, weights = torch.tensor(taught.ahead).float(), torch.tensor(taught.weights).float()
    for _ in range(job.epochs):
        draw.shuffle(of_question)
        for first in range(0, len(of_question), job.questions):
            chosen = np.concatenate(of_question[first : first + job.questions])
            answers, place = np.unique(taught.pairs[chosen], return_inverse=True)
            with torch.autocast("cpu", torch.bfloat16):
                scores = states.score(upper, torch.tensor(answers))
            better, worse = scores[torch.tensor(place.reshape(-1, 2))].T
            losses = pair_loss(better, worse, odds[chosen], how.smoothing, how.centering)
            (losses @ weights[chosen] / weights[chosen].sum()).backward()
            nn.utils.clip_grad_norm_(upper.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return states.score(upper, torch.tensor(held), 256).double().numpy()


def train_decoder(folder: Path, world: World, taught: Lesson, job: Job, held: np.ndarray) -> np.ndarray:
    """Scores of the held-out answers [B] by a LLaMA, pre-trained or from nothing, with RewardTrainer."""
    seed_everything(job.seed)
    base = SHARED / "models" / job.model if job.model == "stories260K" else folder / "base"
    tokenizer = load_tokenizer(base)
    prompts, responses = [], []
    for group in world.groups:
        asked = group["question"][:CHARACTERS]
        prompts += map(tuple, encode_prompts(tokenizer, [asked]))
        documents = encode_documents(tokenizer, [(asked, a["text"]) for a in group["answers"]])
        most = max(DOCUMENT[job.model], len(prompts[-1]) + 1)
        responses += [tuple(d[len(prompts[-1]) : most]) for d in documents]
    owner = world.laid.owner
    tell = [responses[better] != responses[worse] for better, worse in taught.pairs]  # not cut to the same
    taught = replace(taught, pairs=taught.pairs[tell], weights=taught.weights[tell])
    first, asker, train = np.searchsorted(owner, np.arange(len(prompts) + 1)), owner[taught.pairs[:, 0]], []
    for q in np.unique(asker):
        of_one = asker == q
        pairs = tuple(map(tuple, (taught.pairs[of_one] - first[q]).tolist()))
        answers = tuple(responses[first[q] : first[q + 1]])
        train.append(GroupedAnswers(prompts[q], answers, pairs, tuple(taught.weights[of_one].tolist())))
    with tempfile.TemporaryDirectory() as name:
        if job.model == "scratch":
            base = Path(name) / "base"
            save_model(create_causal(SMALL, tokenizer), tokenizer, base)
        arguments = RewardConfig(
            output_dir=name, use_cpu=True, disable_tqdm=True, save_strategy="no", seed=job.seed,
            num_train_epochs=job.epochs, learning_rate=job.learning_rate, weight_decay=0.01, warmup_steps=20,
            lr_scheduler_type="cosine", per_device_train_batch_size=job.questions, microbatch_tokens=8192,
            dataloader_pin_memory=False, logging_steps=1000,
        )  # fmt: skip
        trainer = RewardTrainer(load_reward(base), arguments, train, processing_class=tokenizer)
        trainer.train()
    documents = [[*prompts[owner[i]], *responses[i]] for i in held]
    return score_documents(trainer.model, documents, 64).double().numpy()
