"""The ppo stage: SFT model, reward model and prompts on disk -> policy on disk."""

from __future__ import annotations

import json

from pyarrow import parquet

from params.schema import Params
from tasks.lm.adapters.files import read_adapter
from tasks.lm.adapters.lora import add_adapter, merge_checked, merge_onto
from tasks.lm.heads.reward_adapter import ScoredByAdapter
from tasks.lm.heads.value_head import AutoModelForCausalLMWithValueHead
from tasks.lm.model.ends import ends_of
from tasks.lm.model.freezing import blocks_of
from tasks.lm.model.loading import load_causal, load_tokenizer
from tasks.lm.model.quantized import is_quantized, quantized_keys
from tasks.lm.numerics.matmul import use_onednn_products
from tasks.lm.sampling.generation import row_seeds
from tasks.ppo.config import PPOConfig
from tasks.ppo.kl_control import spent
from tasks.ppo.looks import HELD_OUT, OF_JUDGE
from tasks.ppo.loop import Loop
from tasks.ppo.reward_functions import RewardFunction, from_adapter, from_model
from tasks.ppo.trainer import PPOTrainer
from tasks.run.curve import plot
from tasks.run.devices import derive_seed, seed_everything, use_device
from tasks.run.files import staged
from tasks.run.layout import Layout, Refusal, StageResult
from tasks.run.monitor.picture import draw
from tasks.run.progress import Progress
from tasks.run.tracking import log_artifact, log_metrics, log_tag

MONITOR_TAG = "stackrl.monitor"  # of the stage's MLflow run: the findings in words
PROBES = 8  # prompts on whose responses a merge is checked


def refuse_unless_passed(layout: Layout) -> None:
    """Raises Refusal, quoting the card, when the reward model did not pass its gate."""
    if not json.loads(layout.artifact("reward_eval", "gate.json").read_text())["passed"]:
        card = layout.artifact("reward_eval", "card.json")
        reason = json.loads(card.read_text())["verdict"] if card.is_file() else "see the report card"
        raise Refusal(f"the reward model did not pass its gate: {reason}")


def prepare(params: Params, layout: Layout) -> tuple[Loop, object]:
    """Models, prompts and trainer, as the stage needs them; returns the loop and the tokenizer.

    Raises:
        ValueError: no prompt, a reward model without its scores.json, or a quantised base where none can run.
    """
    section, machine = params.ppo, params.machine
    device = use_device(machine.device, machine.threads)
    if machine.onednn and device.type == "cpu":
        use_onednn_products()
    seed_everything(derive_seed(params.seed, "ppo", "models"))
    source = layout.artifact("sft", "model")
    tokenizer = load_tokenizer(source)
    causal = load_causal(source, **quantized_keys(params.model.quantize))
    if section.lora_rank:
        causal = add_adapter(causal, section.lora_rank, section.lora_alpha)
    layers = section.num_value_layers_unfrozen
    policy = AutoModelForCausalLMWithValueHead(
        causal, num_value_layers_unfrozen=len(blocks_of(causal)) if layers is None else layers
    )
    trainer = PPOTrainer(
        PPOConfig.of_section(section, params.seed), policy, tokenizer=tokenizer, device=device,
        microbatch_rows=machine.microbatch_rows, trunk_megabytes=machine.trunk_megabytes,
    )  # fmt: skip
    reward_fn, judge = (reward_of(params, layout, n, causal, tokenizer, device) for n in ("model", "judge"))
    rows = parquet.read_table(
        layout.artifact("pack", "prompts", "rl.parquet"), columns=["prompt", "is_validation"]
    ).to_pylist()
    train, held = ([r["prompt"] for r in rows if r["is_validation"] is flag] for flag in (False, True))
    if not train:
        raise ValueError("ppo: artifacts/pack/prompts/rl.parquet holds no training prompt")
    return Loop(trainer, reward_fn, train, held or train[:64], machine.decode_rows, judge), tokenizer


def reward_of(params: Params, layout: Layout, name: str, causal, tokenizer, device) -> RewardFunction:
    """Scores of the reward model or the judge; of its adapter, on the policy's base, where both are adapters.

    Args:
        params: of the run.
        layout: where it is.
        name: `model` or `judge`.
        causal: the policy's language model.
        tokenizer: its tokenizer.
        device: for a model that is loaded.
    """
    folder, rows = layout.artifact("reward", name), params.machine.microbatch_rows
    is_normal, adapter = params.ppo.normalize_scores, folder / "adapter"
    ends = ends_of(causal, tokenizer)
    if not (params.ppo.lora_rank and adapter.is_dir()):
        return from_model(folder, tokenizer, normalize=is_normal, rows=rows, device=device, ends=ends)
    saved = read_adapter(adapter, f"artifacts/reward/{name}/adapter")
    scorer = ScoredByAdapter.beside(causal, saved, f"reward_{name}")
    return from_adapter(scorer, tokenizer, scores=folder if is_normal else None, rows=rows, ends=ends)


def merge(params: Params, layout: Layout, loop: Loop) -> None:
    """The policy without its adapter, which is merged into the SFT model; checked on responses of its own.

    Raises:
        ValueError: the merged policy says something else.
    """
    policy, prompts = loop.trainer.model, loop.held[:PROBES]
    seeds = row_seeds(derive_seed(params.seed, "ppo", "merge"), len(prompts))
    responses = loop.trainer.sample(prompts, seeds).lists()
    documents = [p + r for p, r in zip(prompts, responses, strict=True)]
    if is_quantized(policy.pretrained_model):
        merge_onto(load_causal(layout.artifact("sft", "model")), policy, documents)
    else:
        merge_checked(policy, documents)


def run(params: Params, layout: Layout) -> StageResult:
    """The stage.

    Raises:
        Refusal: the reward model did not pass its gate, or the preflight found that nothing could be learnt.
        ValueError: as :func:`prepare` and :func:`merge`.
    """
    refuse_unless_passed(layout)
    loop, _ = prepare(params, layout)
    trainer = loop.trainer
    with Progress("ppo", params.ppo.updates) as progress:

        def report(update: int, stats: dict) -> None:
            progress.update(update, stats["tokens"], score=stats["ppo/mean_scores"], kl=stats["objective/kl"])
            numbers = {name: value for name, value in stats.items() if isinstance(value, int | float)}
            log_metrics(numbers | {"ppo/tokens_per_second": progress.rate}, step=update)

        loop.run(layout.scratch("ppo"), params.machine.checkpoint_updates, report)
    chosen = loop.select()
    loop.curve.check(layout.artifact("ppo", "curve.csv"))  # before the earlier model is replaced
    if params.ppo.lora_rank:
        merge(params, layout, loop)
    with staged(layout.artifact("ppo", "model")) as out:
        trainer.save_pretrained(out)
    loop.curve.write(layout.artifact("ppo", "curve.csv"))
    pictures = ["score", "kl_nats", "entropy_nats", "value_loss"]
    log_artifact(plot(layout.kept("reports", "ppo", "curve.png"), loop.curve, pictures, "PPO"))
    log_artifact(draw(layout.kept("reports", "ppo", "monitor.png"), loop.looks.means(loop.curve)))
    found = loop.looks.findings.get(chosen, {})
    log_tag(MONITOR_TAG, "; ".join(found.values()) or "nothing found")
    rows = loop.curve.rows
    of_last = ("score", "kl_nats", "kl_coef", "entropy_nats", *HELD_OUT, *OF_JUDGE)
    last = {k: v for k, v in rows[-1].items() if k in of_last}
    last |= spent([row["kl_nats"] for row in rows], params.ppo.target if params.ppo.adap_kl_ctrl else None)
    start = loop.looks.start.means()
    first = {"first_score": rows[0]["score"], "monitor_findings": len(found)}
    at_start = "held_out_proxy", *OF_JUDGE
    first |= {f"first_{name}": start[name.removeprefix("held_out_")] for name in at_start}
    return StageResult({"updates": trainer.updates, "selected_update": chosen, **first, **last})
