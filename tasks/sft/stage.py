"""The sft stage: packed rows on disk -> policy on disk."""

from __future__ import annotations

from pyarrow import parquet

from params.schema import Params
from tasks.lm.adapters.lora import lora
from tasks.lm.model.loading import create_causal, fit_embeddings, load_causal, load_tokenizer, save_model
from tasks.lm.model.quantized import quantized_keys
from tasks.lm.numerics.matmul import use_onednn_products
from tasks.lm.numerics.optimizer import check_optimizer
from tasks.run.curve import Curve, plot
from tasks.run.devices import derive_seed, seed_everything, use_device
from tasks.run.files import staged
from tasks.run.layout import Layout, StageResult
from tasks.run.tracking import log_artifact
from tasks.sft.config import SFTConfig
from tasks.sft.records import PackedRow
from tasks.sft.trainer import SFTTrainer
from tasks.training.arguments import training_arguments
from tasks.training.callback import follow


def read_rows(layout: Layout) -> tuple[list[PackedRow], list[PackedRow]]:
    """Training rows and validation rows; without validation documents the training rows serve for both."""
    table = parquet.read_table(layout.artifact("pack", "rows", "sft.parquet")).to_pylist()
    rows = {
        held: [
            PackedRow(*(tuple(r[k]) for k in ("tokens", "lengths", "prompts")))
            for r in table
            if r["is_validation"] is held
        ]
        for held in (False, True)
    }
    return rows[False], rows[True] or rows[False]


def run(params: Params, layout: Layout) -> StageResult:
    """The stage.

    Raises:
        ValueError: a base model without weights, no training row, a merge that changes what the model says,
            a quantised base or an 8-bit optimizer where none can run.
    """
    sft, machine = params.sft, params.machine
    check_optimizer(sft.optimizer, "sft.optimizer")
    quantized = quantized_keys(params.model.quantize)
    device = use_device(machine.device, machine.threads)
    if machine.onednn and device.type == "cpu":
        use_onednn_products()
    seed = derive_seed(params.seed, "sft", "train")
    seed_everything(seed)
    tokenizer = load_tokenizer(layout.artifact("pack", "tokenizer"))
    if params.model.base:
        model = load_causal(params.model.base, params.model.revision, **quantized)
    else:
        model = create_causal(params.model.config.model_dump(exclude={"vocab_size"}), tokenizer)
    fit_embeddings(model, tokenizer)
    parameters = sum(p.numel() for p in model.parameters())
    train, held = read_rows(layout)
    if not train:
        raise ValueError("sft: artifacts/pack/rows holds no training row")
    given = sft.model_dump(exclude={"batch_rows", "lora_rank", "lora_alpha"})
    arguments = training_arguments(
        layout.scratch("sft"),
        examples=len(train),
        batch=sft.batch_rows,
        batch_key="sft.batch_rows",
        microbatch_tokens=machine.microbatch_tokens,
        device=device.type,
        seed=seed,
        checkpoint_steps=machine.checkpoint_steps,
        **given,
    )
    config = SFTConfig(**arguments)
    adapter = lora(sft.lora_rank, sft.lora_alpha) if sft.lora_rank else None
    trainer = SFTTrainer(model, config, train, held, processing_class=tokenizer, peft_config=adapter)
    trainer.section = "sft."
    follow(trainer, "sft")
    trainer.train(resume_from_checkpoint=trainer.latest_checkpoint())
    metrics = trainer.evaluate()
    if quantized:
        base = load_causal(params.model.base, params.model.revision)
        fit_embeddings(base, tokenizer)
        model = trainer.merged(onto=base)
    else:
        model = trainer.merged() if adapter else trainer.whole()
    curve = Curve.of_log(trainer.state.log_history, ("loss", "learning_rate", "grad_norm"))
    curve.check(layout.artifact("sft", "curve.csv"))  # before the earlier model is replaced
    with staged(layout.artifact("sft", "model")) as folder:
        save_model(model, tokenizer, folder)
    curve.write(layout.artifact("sft", "curve.csv"))
    log_artifact(plot(layout.kept("reports", "sft", "loss.png"), curve, ["loss"], "SFT loss, nats per token"))
    return StageResult(
        {
            "steps": config.max_steps,
            "parameters": parameters,
            **{k.removeprefix("eval_"): v for k, v in metrics.items()},
        }
    )
