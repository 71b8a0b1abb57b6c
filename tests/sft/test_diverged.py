"""Both trainers of transformers' kind, and what becomes of a training whose numbers are lost."""

from __future__ import annotations

import math

import pytest
import tiny
import torch

from tasks.reward import RewardConfig, RewardTrainer
from tasks.sft import SFTConfig, SFTTrainer

TEXTS = [{"text": f"What is {i} + 1? It is {i + 1}."} for i in range(8)]
PAIRS = [{"prompt": f"{i} + 1 =", "chosen": f" {i + 1}", "rejected": f" {i}"} for i in range(8)]
MADE = {
    "sft": (SFTTrainer, SFTConfig, tiny.causal, TEXTS),
    "reward": (RewardTrainer, RewardConfig, tiny.scorer, PAIRS),
}


def trainer(kind, folder, model=None, **arguments):
    made, config, model_of, rows = MADE[kind]
    tokenizer = tiny.tokenizer()
    model = model or model_of(vocab_size=len(tokenizer))
    usual = {"max_steps": 6, "use_cpu": True, "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True,
             "per_device_train_batch_size": 2}  # fmt: skip
    usual |= {"row_tokens": 32} if kind == "sft" else {}
    args = config(str(folder), **{**usual, **arguments})
    return made(model, args, rows, rows[:2], processing_class=tokenizer)


both = pytest.mark.parametrize("kind", list(MADE))


@both
def test_a_learning_rate_far_too_high_ends_the_training(tmp_path, kind):
    """Trainer's own filter would log a loss of 0 and go on to the last step."""
    made = trainer(kind, tmp_path, learning_rate=1e30, logging_nan_inf_filter=True)
    made.section = f"{kind}."
    with pytest.raises(ValueError, match=rf"^step \d: the .* is .*; is {kind}\.learning_rate \(1e\+30\) too"):
        made.train()
    assert made.state.global_step < 6
    assert all(math.isfinite(entry["loss"]) for entry in made.state.log_history if "loss" in entry)


@both
def test_a_gradient_that_is_not_finite_moves_nothing(tmp_path, kind):
    made = trainer(kind, tmp_path, max_grad_norm=1.0)
    made.model.get_input_embeddings().weight.register_hook(lambda grad: grad * math.inf)
    before = {name: value.clone() for name, value in made.model.state_dict().items()}
    with pytest.raises(ValueError, match=r"^step 1: the norm of the gradient is (nan|inf); is lear"):
        made.train()
    assert all(torch.equal(value, before[name]) for name, value in made.model.state_dict().items())


@both
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_model_that_is_broken_is_neither_taken_nor_measured_nor_saved(tmp_path, kind, bad):
    made = trainer(kind, tmp_path)
    made.save_model()
    kept = (tmp_path / "model.safetensors").read_bytes()
    weight = made.model.model.layers[0].mlp.down_proj.weight
    weight.data[0, 0] = bad
    with pytest.raises(ValueError, match=r"not finite|eval_loss is nan; is learning_rate"):
        made.evaluate()
    with pytest.raises(ValueError, match=r"^the model is not saved in .*: model\.layers\.0\.mlp\.down_proj"):
        made.save_model()
    assert (tmp_path / "model.safetensors").read_bytes() == kept
    with pytest.raises(ValueError, match=r"^model: model\.layers\.0\.mlp\.down_proj\.weight holds a number"):
        trainer(kind, tmp_path, model=made.model)


@both
def test_no_checkpoint_is_written_of_lost_weights(tmp_path, kind):
    """Nothing looks at gradients between the last step and its checkpoint but this."""
    made = trainer(kind, tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    step = made.create_optimizer().step

    def loses_one(*arguments, **keys):
        step(*arguments, **keys)
        made.model.get_input_embeddings().weight.data[0, 0] = math.nan

    made.optimizer.step = loses_one
    with pytest.raises(ValueError, match=r"^no checkpoint of step 1: model\.embed_tokens\.weight holds"):
        made.train()
    assert made.latest_checkpoint() is None


def test_a_perplexity_beyond_all_numbers_is_said(tmp_path):
    """Its logarithm is finite, and a trainer that took the exponential of it died without a line."""
    made = trainer("sft", tmp_path)
    made.model.lm_head.weight.data.mul_(1e4)
    with pytest.raises(ValueError, match=r"^after step 0: eval_perplexity is inf; is learning_rate"):
        made.evaluate()


@both
def test_a_metric_that_is_nan_is_never_the_best(tmp_path, kind):
    more = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    made = trainer(kind, tmp_path, load_best_model_at_end=True, metric_for_best_model="mine", **more)
    made.compute_metrics = lambda _: {"mine": math.nan}
    with pytest.raises(ValueError, match=r"^metric_for_best_model: eval_mine is nan at step 1$"):
        made.train()
    made.args.metric_for_best_model = "eval_loss"
    assert math.isnan(made.evaluate()["eval_mine"])  # a user's own may be undefined
