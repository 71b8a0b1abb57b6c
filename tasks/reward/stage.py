"""The reward stage: groups on disk -> model on disk."""

from __future__ import annotations

import json
import logging
from typing import Any

from pyarrow import parquet
from torch import Tensor

from params.schema import Params
from tasks.lm.adapter_files import tensors_of, write_adapter
from tasks.lm.adapters import lora
from tasks.lm.loading import load_tokenizer, save_model
from tasks.lm.optimizer import check_optimizer
from tasks.lm.products import use_onednn_products
from tasks.lm.quantized import quantized_keys
from tasks.lm.reward_model import RewardModel
from tasks.reward.config import RewardConfig
from tasks.reward.records import GroupedAnswers, share_prompt
from tasks.reward.trainer import RewardTrainer
from tasks.run.arguments import training_arguments
from tasks.run.curve import Curve, plot
from tasks.run.devices import derive_seed, seed_everything, use_device
from tasks.run.files import staged
from tasks.run.follow import follow
from tasks.run.layout import Layout, StageResult
from tasks.run.tracking import log_artifact

SCORES = "scores.json"
_log = logging.getLogger(__name__)


def read_groups(
    layout: Layout, reward_model: RewardModel
) -> tuple[list[GroupedAnswers], list[GroupedAnswers]]:
    """Training groups and validation groups; without validation groups the training groups serve for both.

    Pairs that are the same to a model with tokens of its own (all lower case; cut) are left out.
    """
    columns = ["site", "question_id", "prompt", "answers", "pairs", "weights", "is_validation"]
    path = layout.artifact("pack", "groups", "reward.parquet")
    found, pairs = {False: [], True: []}, 0
    for row in parquet.read_table(path, columns=columns).to_pylist():
        group = group_of(row, reward_model)
        pairs += len(row["pairs"]) - len(group.pairs)
        if group.pairs:
            found[row["is_validation"]].append(group)
    if pairs:
        _log.warning("%d pairs are left out: reward.base reads the same in both answers", pairs)
    return found[False], found[True] or found[False]


def group_of(row: dict, reward_model: RewardModel) -> GroupedAnswers:
    """A row of `pack/groups` in the tokens that the model reads."""
    prompt, answers = tuple(row["prompt"]), row["answers"]
    responses = tuple(tuple(a["tokens"]) for a in answers)
    if not reward_model.shares_tokens:
        prompt, responses = share_prompt(reward_model.documents([prompt] * len(answers), responses))
    kept = [i for i, (better, worse) in enumerate(row["pairs"]) if responses[better] != responses[worse]]
    pairs = [row["pairs"][i] for i in kept]
    return GroupedAnswers(
        prompt,
        responses,
        pairs=tuple((better, worse) for better, worse in pairs),
        weights=tuple(row["weights"][i] for i in kept),
        gaps=tuple(float(answers[b]["score"] - answers[w]["score"]) for b, w in pairs),
        name=f"{row['site']}/{row['question_id']}",
    )


def adapter_of(model) -> tuple[Any, dict[str, Tensor], dict[str, Tensor]]:
    """Copies of what ppo puts on its own base: the adapter's configuration, its tensors, the score head."""
    head = model.get_base_model().score.modules_to_save["default"].state_dict()
    copies = ({k: v.clone() for k, v in part.items()} for part in (tensors_of(model, "default"), head))
    return model.peft_config["default"], *copies


def run(params: Params, layout: Layout) -> StageResult:
    """The stage.

    Raises:
        ValueError: no training group; no model or tokenizer; a merge that changes scores; a quantised base or
            an 8-bit optimizer where none can run.
    """
    reward, machine = params.reward, params.machine
    check_optimizer(reward.optimizer, "reward.optimizer")
    quantized = quantized_keys(params.model.quantize)
    device = use_device(machine.device, machine.threads)
    if machine.onednn and device.type == "cpu":
        use_onednn_products()
    seed = derive_seed(params.seed, "reward", "train")
    seed_everything(seed)
    source = layout.artifact("sft", "model")
    policy_tokenizer = load_tokenizer(source)
    named = {"revision": reward.revision, "key": "reward.base"} if reward.base else {}
    reward_model = RewardModel.load(reward.base or source, policy_tokenizer, **named, **quantized)
    train, held = read_groups(layout, reward_model)
    if not train:
        raise ValueError("reward: artifacts/pack/groups/reward.parquet holds no training question")
    given = reward.model_dump(exclude={"batch_questions", "base", "revision", "lora_rank", "lora_alpha"})
    arguments = training_arguments(
        layout.scratch("reward"),
        examples=len(train),
        batch=reward.batch_questions,
        batch_key="reward.batch_questions",
        microbatch_tokens=machine.microbatch_tokens,
        device=device.type,
        seed=seed,
        checkpoint_steps=machine.checkpoint_steps,
        **given,
    )
    looks = {"eval_strategy": "steps", "eval_steps": max(1, arguments["max_steps"] // 10)}
    config = RewardConfig(**arguments, **looks)
    adapter = lora(reward.lora_rank, reward.lora_alpha) if reward.lora_rank else None
    model, tokenizer = reward_model.model, reward_model.tokenizer
    trainer = RewardTrainer(model, config, train, held, processing_class=tokenizer, peft_config=adapter)
    follow(trainer, "reward")
    trainer.train(resume_from_checkpoint=trainer.latest_checkpoint())
    metrics = {k.removeprefix("eval_"): v for k, v in trainer.evaluate().items()}
    whole = trainer.whole()
    kept = adapter_of(whole) if adapter and whole is not None and not reward.base else None
    if quantized:
        whole = trainer.merged(RewardModel.load(reward.base or source, policy_tokenizer, **named).model)
    elif adapter:
        whole = trainer.merged()
    with staged(layout.artifact("reward", "model")) as folder:
        save_model(whole, tokenizer, folder)
        if kept:
            write_adapter(folder / "adapter", *kept, base="artifacts/sft/model")
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
