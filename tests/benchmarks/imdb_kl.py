"""KL against its target on real text: positive film reviews, by the library alone, from nothing.

    python tests/benchmarks/imdb_kl.py --work <folder> [--target 3] [--horizon none 10000] [--updates 40] …

A LLaMA of 1.4 million parameters learns pieces of IMDb's reviews, a reward model made from it learns their
labels, and PPO writes on from the first words of unseen pieces. Each horizon begins at the same weights, with
the same prompts and draws; `none` is the run's own. The start is kept in the folder. Prints KL of the middle
fifth of the run, of its second half over the target, the last KL and price, the scores of the first rollout
and of the last look, in standard deviations of what the reward model says of real pieces.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch

from tasks.lm import AutoModelForCausalLMWithValueHead
from tasks.lm.model.loading import create_causal, load_tokenizer, train_tokenizer
from tasks.ppo import PPOConfig, PPOTrainer
from tasks.ppo.kl_control import spent
from tasks.ppo.reward_functions import from_model
from tasks.reward import RewardConfig, RewardTrainer
from tasks.sft import SFTConfig, SFTTrainer

SHARED = Path(os.environ.get("STACKRL_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))
MODEL = {"model_type": "llama", "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
         "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 128,
         "tie_word_embeddings": True}  # fmt: skip
VOCABULARY, WORDS, PROMPT = 4096, 20, 4  # tokens; words of a piece, and of its beginning that is a prompt
SFT, REWARD, RL, HELD = 16_000, 8_000, 2_000, 1_000  # pieces, each of another review
NUMBERS = {
    "updates": 40, "seed": 0, "target": 3.0, "learning_rate": 3e-4, "init_kl_coef": 0.2, "ppo_epochs": 1,
    "vf_coef": 0.1, "value_layers": 0,
}  # fmt: skip
COMMON = {
    "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "optimizer": "muon", "warmup_steps": 20,
    "lr_scheduler_type": "cosine", "dataloader_pin_memory": False,
}  # fmt: skip


def pieces(path: Path, seed: int) -> Iterator[dict]:
    """`{prompt, response, label}`: 20 words of each review, reviews in random order; label 1: positive."""
    with lzma.open(path, "rt", encoding="utf-8") as file:
        reviews = [json.loads(line) for line in file]
    draw = random.Random(seed)
    draw.shuffle(reviews)
    for review in reviews:
        words = review["text"].replace("<br />", " ").split()
        at = draw.randrange(max(1, len(words) - WORDS))
        piece = words[at : at + WORDS]
        prompt, response = " ".join(piece[:PROMPT]), " " + " ".join(piece[PROMPT:])
        yield {"prompt": prompt, "response": response, "label": review["label"]}


def prepare(work: Path, path: Path, seed: int) -> None:
    """Tokenizer, language model, reward model and prompts in a folder."""
    rows = pieces(path, seed)
    held, rl, reward, sft = (list(islice(rows, n)) for n in (HELD, RL, REWARD, SFT))
    tokenizer = train_tokenizer((r["prompt"] + r["response"] for r in sft), VOCABULARY)
    torch.manual_seed(seed)
    model = create_causal(MODEL, tokenizer)
    keys = COMMON | {"seed": seed, "learning_rate": 3e-3, "per_device_train_batch_size": 1}
    config = SFTConfig(str(work / "sft"), num_train_epochs=1, **keys)
    texts, held_texts = ([{"text": r["prompt"] + r["response"]} for r in rows] for rows in (sft, held))
    trainer = SFTTrainer(model, config, texts, processing_class=tokenizer, eval_dataset=held_texts)
    trainer.train()
    print("sft:", trainer.evaluate(), flush=True)
    trainer.save_model()
    tokenizer.save_pretrained(work / "sft")
    keys |= {"learning_rate": 1.5e-3, "per_device_train_batch_size": 64, "without_eos_share": 0.5}
    config = RewardConfig(str(work / "reward"), num_train_epochs=2, **keys)
    trainer = RewardTrainer(str(work / "sft"), config, reward, eval_dataset=held)
    trainer.train()
    print("reward:", trainer.evaluate(), flush=True)
    trainer.save_model()
    prompts = {"rl": [r["prompt"] for r in rl], "held": held}
    (work / "prompts.json").write_text(json.dumps(prompts))


def play(work: Path, horizon: int | None, given: argparse.Namespace) -> dict[str, float]:
    """One run of PPO, and what it found."""
    tokenizer = load_tokenizer(work / "sft")
    prompts = json.loads((work / "prompts.json").read_text())
    raw = from_model(work / "reward", tokenizer)
    known = raw([r["prompt"] for r in prompts["held"]], [r["response"] for r in prompts["held"]])
    mean, std = known.mean(), known.std()
    config = PPOConfig(
        updates=given.updates, batch_size=128, mini_batch_size=64, ppo_epochs=given.ppo_epochs,
        horizon=horizon, target=given.target, init_kl_coef=given.init_kl_coef, lam=1.0, max_grad_norm=1.0,
        learning_rate=given.learning_rate, adam_beta2=0.95, vf_coef=given.vf_coef, response_tokens=32,
        num_value_layers_unfrozen=given.value_layers, eval_updates=max(1, given.updates // 4),
        missing_eos_penalty=1.0, seed=given.seed,
    )  # fmt: skip
    model = AutoModelForCausalLMWithValueHead.from_pretrained(work / "sft")
    trainer, prices = PPOTrainer(config, model, None, tokenizer, device="cpu"), []
    held = [r["prompt"] for r in prompts["held"]][:256]
    curve = trainer.train(
        prompts["rl"],
        lambda prompts, responses: (raw(prompts, responses) - mean) / std,
        held_out=held,
        on_update=lambda *_: prices.append(trainer.kl_ctl.value),
    )
    kl, score = curve.points("kl_nats")[1], curve.points("held_out_score")[1]
    found = spent(kl, config.target) | {"kl_last": kl[-1], "price_last": prices[-1]}
    found |= {"score_first": curve.points("score")[1][0], "held_out_score_last": score[-1]}
    settings = {"horizon": horizon, **{k: v for k, v in vars(given).items() if k in NUMBERS}}
    whole = settings | found | {"kl": kl, "prices": prices, "held_out_score": score}
    with (work / "found.jsonl").open("a") as file:
        file.write(json.dumps(whole) + "\n")
    return found


def main() -> None:
    """The start, where the folder has none; then one run for each horizon."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, default=SHARED / "reviews" / "imdb_50k.jsonl.xz")
    parser.add_argument("--work", type=Path, required=True, help="folder of the start and of what is found")
    parser.add_argument("--horizon", nargs="+", default=["none", "10000"])
    for name, value in NUMBERS.items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(value), default=value)
    given = parser.parse_args()
    if not (given.work / "prompts.json").exists():
        prepare(given.work, given.data, given.seed)
    for horizon in given.horizon:
        found = play(given.work, None if horizon == "none" else int(horizon), given)
        print(f"horizon {horizon}:", ", ".join(f"{k} {v:.3g}" for k, v in found.items()), flush=True)


if __name__ == "__main__":
    main()
