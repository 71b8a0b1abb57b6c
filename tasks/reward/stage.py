"""The reward stage: groups on disk -> two models on disk, the reward model and its independent judge.

What the two have apart stands in :mod:`tasks.reward.learners`.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from pyarrow import parquet
from torch import Tensor

from params.schema import Params
from tasks.lm.adapters.files import tensors_of, write_adapter
from tasks.lm.adapters.lora import lora
from tasks.lm.heads.reward_model import RewardModel, write_scale
from tasks.lm.model.kinds import is_encoder
from tasks.lm.model.loading import load_tokenizer, save_model
from tasks.lm.model.quantized import quantized_keys
from tasks.lm.numerics.matmul import use_onednn_products
from tasks.lm.numerics.optimizer import check_optimizer
from tasks.reward.config import RewardConfig
from tasks.reward.frozen import learn_frozen
from tasks.reward.learners import Learner, learners, refuse_without_pairs
from tasks.reward.records import GroupedAnswers, share_prompt
from tasks.reward.style import StyleRule, fit_style
from tasks.reward.trainer import RewardTrainer
from tasks.run.curve import Curve, plot
from tasks.run.devices import derive_seed, seed_everything, use_device
from tasks.run.files import staged
from tasks.run.layout import Layout, StageResult
from tasks.run.tracking import log_artifact
from tasks.training.arguments import training_arguments
from tasks.training.callback import follow

_log = logging.getLogger(__name__)


def read_groups(
    layout: Layout, reward_model: RewardModel, name: str = "reward", style_offset: float = 0.0
) -> tuple[list[GroupedAnswers], list[GroupedAnswers]]:
    """Training groups and validation groups; without validation groups the training groups serve for both.

    Pairs that are the same to a model with tokens of its own (all lower case; cut) are left out.

    Args:
        layout: of the run.
        reward_model: whose tokens they are in.
        name: of the file.
        style_offset: times the log-odds that length and style give a training pair.
    """
    columns = ["site", "question_id", "prompt", "answers", "pairs", "weights", "is_validation"]
    path = layout.artifact("pack", "groups", f"{name}.parquet")
    rows = parquet.read_table(path, columns=columns).to_pylist()
    train = [row for row in rows if not row["is_validation"]]
    rule = fit_style(train) if style_offset and train else None
    found, pairs = {False: [], True: []}, 0
    for row in rows:
        group = group_of(row, reward_model, rule, style_offset)
        pairs += len(row["pairs"]) - len(group.pairs)
        if group.pairs:
            found[row["is_validation"]].append(group)
    if pairs:
        key = "reward.judge_base" if name == "judge" else "reward.base"
        _log.warning("%d pairs are left out: %s reads the same in both answers", pairs, key)
    return found[False], found[True] or found[False]


def group_of(
    row: dict, reward_model: RewardModel, rule: StyleRule | None = None, style_offset: float = 0.0
) -> GroupedAnswers:
    """A row of `pack/groups` in the tokens that the model reads."""
    prompt, answers = tuple(row["prompt"]), row["answers"]
    responses = tuple(tuple(a["tokens"]) for a in answers)
    if not reward_model.shares_tokens:
        prompt, responses = share_prompt(reward_model.documents([prompt] * len(answers), responses))
    kept = [i for i, (better, worse) in enumerate(row["pairs"]) if responses[better] != responses[worse]]
    pairs = [row["pairs"][i] for i in kept]
    style = [style_offset * rule.log_odds(a["text"]) for a in answers] if rule else None
    return GroupedAnswers(
        prompt,
        responses,
        pairs=tuple((better, worse) for better, worse in pairs),
        weights=tuple(row["weights"][i] for i in kept),
        gaps=tuple(float(answers[b]["score"] - answers[w]["score"]) for b, w in pairs),
        name=f"{row['site']}/{row['question_id']}",
        odds=tuple(style[b] - style[w] for b, w in pairs) if style else (),
    )


def adapter_of(model) -> tuple[Any, dict[str, Tensor], dict[str, Tensor]]:
    """Copies of what ppo puts on its own base: the adapter's configuration, its tensors, the score head."""
    head = model.get_base_model().score.modules_to_save["default"].state_dict()
    copies = ({k: v.clone() for k, v in part.items()} for part in (tensors_of(model, "default"), head))
    return model.peft_config["default"], *copies


def run(params: Params, layout: Layout) -> StageResult:
    """The stage; after a kill the judge goes on without the reward model being trained again.

    Raises:
        ValueError: no training group for one of the two; no model or tokenizer; a merge that changes scores;
            a quantised base or an 8-bit optimizer where none can run.
    """
    reward, machine = params.reward, params.machine
    if reward.way == "trained":
        check_optimizer(reward.optimizer, "reward.optimizer")
    device = use_device(machine.device, machine.threads)
    if machine.onednn and device.type == "cpu":
        use_onednn_products()
    own, judge = learners(params, layout)
    for learner in (own, judge):
        refuse_without_pairs(learner, layout)
    metrics, curve = learn(own, params, layout, device)
    judged, _ = learn(judge, params, layout, device)
    curve.write(layout.artifact("reward", "curve.csv"))
    log_artifact(
        plot(
            layout.kept("reports", "reward", "accuracy.png"),
            curve,
            ["accuracy"],
            "Reward accuracy on validation pairs",
        )
    )
    return StageResult({**metrics, **{f"judge_{k}": judged[k] for k in ("steps", "loss", "accuracy")}})


def learn(
    learner: Learner, params: Params, layout: Layout, device: torch.device
) -> tuple[dict[str, float], Curve]:
    """Train one, from its newest checkpoint where there is one, and put it into its place.

    Raises:
        ValueError: as :func:`run`.
    """
    seed = derive_seed(params.seed, "reward", learner.purpose)
    seed_everything(seed)
    if params.reward.way == "frozen_style":
        return learn_frozen(learner.out, learner.groups, learner.run, params, layout, device)
    reward, quantized = params.reward, quantized_keys(params.model.quantize)
    policy_tokenizer = load_tokenizer(layout.artifact("sft", "model"))
    reward_model = learner.start.load(policy_tokenizer, **quantized)
    if reward_model.texts is not None:
        raise ValueError(
            f"{learner.start.key}: {learner.start.base} was made by reward.way frozen_style; no layer trains"
        )
    train, held = read_groups(layout, reward_model, learner.groups, learner.style_offset)
    if not train:
        raise ValueError(f"reward: artifacts/pack/groups/{learner.groups}.parquet holds no training question")
    config = settings(learner, params, layout, len(train), seed, device, is_encoder(reward_model.model))
    adapter = lora(reward.lora_rank, reward.lora_alpha) if reward.lora_rank else None
    model, tokenizer = reward_model.model, reward_model.tokenizer
    trainer = RewardTrainer(model, config, train, held, processing_class=tokenizer, peft_config=adapter)
    trainer.section = "reward."
    follow(trainer, learner.run)
    trainer.train(resume_from_checkpoint=trainer.latest_checkpoint())
    metrics = {k.removeprefix("eval_"): v for k, v in trainer.evaluate().items()}
    whole = trainer.whole()
    is_on_sft = learner.start.base == layout.artifact("sft", "model")
    kept = adapter_of(whole) if adapter and whole is not None and is_on_sft else None
    if quantized:
        whole = trainer.merged(learner.start.load(policy_tokenizer).model)
    elif adapter:
        whole = trainer.merged()
    with staged(layout.artifact("reward", learner.out)) as folder:
        save_model(whole, tokenizer, folder)
        if kept:
            write_adapter(folder / "adapter", *kept, base="artifacts/sft/model")
        write_scale(folder, metrics)
    curve = Curve.of_log(trainer.state.log_history, ("eval_loss", "eval_accuracy"), ("loss", "accuracy"))
    return {"steps": config.max_steps, **metrics}, curve


def settings(
    learner: Learner,
    params: Params,
    layout: Layout,
    examples: int,
    seed: int,
    device: torch.device,
    reads_no_eos: bool = False,
) -> RewardConfig:
    """Its RewardConfig for so many training questions; an encoder never reads an eos, whatever the share."""
    reward, machine = params.reward, params.machine
    not_the_trainers = {"way", "frozen_style", "base", "revision", "lora_rank", "lora_alpha"}
    not_the_trainers |= {name for name in type(reward).model_fields if name.startswith("judge_")}
    not_the_trainers.add("batch_questions")
    own = {"epochs": learner.epochs}
    if learner.style_offset:
        own["length_offset"] = 0.0  # length is a part of the rule on style
    if learner.start.is_new:
        own["num_layers_unfrozen"] = None  # what nothing taught is not frozen
    arguments = training_arguments(
        layout.scratch("reward") / learner.out,
        examples=examples,
        batch=reward.batch_questions,
        batch_key="reward.batch_questions",
        microbatch_tokens=machine.microbatch_tokens,
        device=device.type,
        seed=seed,
        checkpoint_steps=machine.checkpoint_steps,
        **reward.model_dump(exclude=not_the_trainers) | own,
    )
    arguments |= {"without_eos_share": 0.0} if reads_no_eos else {}
    looks = {"eval_strategy": "steps", "eval_steps": max(1, arguments["max_steps"] // 10)}
    return RewardConfig(**arguments, **looks)
