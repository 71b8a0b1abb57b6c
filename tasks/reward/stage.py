"""The reward stage: groups on disk -> model on disk."""

from __future__ import annotations

import json

from pyarrow import parquet

from params.schema import Params
from tasks.lm.loading import fit_embeddings, load_reward, load_tokenizer, save_model
from tasks.reward.config import RewardConfig
from tasks.reward.records import GroupedAnswers
from tasks.reward.trainer import RewardTrainer
from tasks.run.arguments import training_arguments
from tasks.run.curve import Curve, plot
from tasks.run.devices import derive_seed, seed_everything, use_device
from tasks.run.files import staged
from tasks.run.follow import follow
from tasks.run.layout import Layout, StageResult
from tasks.run.tracking import log_artifact

SCORES = "scores.json"


def read_groups(layout: Layout) -> tuple[list[GroupedAnswers], list[GroupedAnswers]]:
    """Training groups and validation groups; without validation groups the training groups serve for both."""
    columns = ["prompt", "answers", "pairs", "is_validation"]
    found = {False: [], True: []}
    for row in parquet.read_table(
        layout.artifact("pack", "groups", "reward.parquet"), columns=columns
    ).to_pylist():
        responses = tuple(tuple(a["tokens"]) for a in row["answers"])
        group = GroupedAnswers(tuple(row["prompt"]), responses, tuple(tuple(p) for p in row["pairs"]))
        found[row["is_validation"]].append(group)
    return found[False], found[True] or found[False]


def run(params: Params, layout: Layout) -> StageResult:
    """The stage.

    Raises:
        ValueError: no training group; a tokenizer whose pad token is its eos token.
    """
    reward, machine = params.reward, params.machine
    device = use_device(machine.device, machine.threads)
    seed = derive_seed(params.seed, "reward", "train")
    seed_everything(seed)
    source = layout.artifact("sft", "model")
    tokenizer = load_tokenizer(source)
    model = load_reward(source)
    fit_embeddings(model, tokenizer)
    train, held = read_groups(layout)
    if not train:
        raise ValueError("reward: artifacts/pack/groups/reward.parquet holds no training question")
    given = reward.model_dump(exclude={"batch_questions"})
    arguments = training_arguments(
        layout.scratch("reward"),
        examples=len(train),
        batch=reward.batch_questions,
        microbatch_tokens=machine.microbatch_tokens,
        device=device.type,
        seed=seed,
        checkpoint_steps=machine.checkpoint_steps,
        **given,
    )
    looks = {"eval_strategy": "steps", "eval_steps": max(1, arguments["max_steps"] // 10)}
    config = RewardConfig(**arguments, **looks)
    trainer = RewardTrainer(model, config, train, eval_dataset=held, processing_class=tokenizer)
    follow(trainer, "reward")
    trainer.train(resume_from_checkpoint=trainer.latest_checkpoint())
    metrics = {k.removeprefix("eval_"): v for k, v in trainer.evaluate().items()}
    with staged(layout.artifact("reward", "model")) as folder:
        save_model(model, tokenizer, folder)
        scores = {"mean": metrics["score_mean"], "std": metrics["score_std"]}
        (folder / SCORES).write_text(json.dumps(scores, indent=2, sort_keys=True) + "\n")
    curve = Curve.of_log(trainer.state.log_history, ("eval_loss", "eval_accuracy"), ("loss", "accuracy"))
    curve.write(layout.artifact("reward", "curve.csv"))
    log_artifact(
        plot(
            layout.home / "reports/reward/accuracy.png",
            curve,
            ["accuracy"],
            "Reward accuracy on validation pairs",
        )
    )
    return StageResult({"steps": config.max_steps, **metrics})
