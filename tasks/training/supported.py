"""What SFTTrainer and RewardTrainer do with each field of TrainingArguments and each argument of Trainer.

Of transformers 5.17 to 5.23. A field is honoured, refused by its name where it differs from its default, or
without effect for a reason that docs/trainers.md quotes. One that a later transformers adds is refused.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

HONOURED = frozenset(
    """
    output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type
    lr_scheduler_kwargs warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon
    optim_target_modules gradient_accumulation_steps average_tokens_across_devices max_grad_norm bf16 tf32
    activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing
    gradient_checkpointing_kwargs use_cache torch_empty_cache_steps logging_strategy logging_steps
    logging_first_step log_on_each_node log_level log_level_replica disable_tqdm report_to run_name project
    trackio_space_id trackio_bucket_id trackio_static_space_id eval_strategy eval_steps eval_delay
    per_device_eval_batch_size eval_on_start save_strategy save_steps save_on_each_node save_total_limit
    hub_token hub_private_repo hub_model_id hub_revision load_best_model_at_end metric_for_best_model
    greater_is_better ignore_data_skip full_determinism seed data_seed use_cpu dataloader_drop_last
    dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
    dataloader_multiprocessing_context dataloader_in_order train_sampling_strategy ddp_find_unused_parameters
    ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout fsdp fsdp_config
    deepspeed
    """.split()
)
REFUSED = {
    "label_smoothing_factor": "the loss is the trainer's own (RewardConfig has label_smoothing)",
    "fp16": "losses are not scaled here; set bf16, or leave float32",
    "bf16_full_eval": "evaluation computes as training does; set bf16",
    "fp16_full_eval": "evaluation computes as training does; set bf16",
    "torch_compile": "the shapes of packed rows change with each batch",
    "torch_compile_backend": "the shapes of packed rows change with each batch",
    "torch_compile_mode": "the shapes of packed rows change with each batch",
    "use_liger_kernel": "packed rows have kernels of their own, and no logits where nothing is learnt",
    "liger_kernel_config": "packed rows have kernels of their own",
    "neftune_noise_alpha": "its noise follows the length of a row, and a row holds several documents here",
    "auto_find_batch_size": "set microbatch_tokens, which bounds memory and changes no gradient",
    "include_num_input_tokens_seen": "read tokens_seen of the trainer",
    "prediction_loss_only": "all metrics come from the forward of the loss; leave compute_metrics out",
    "eval_do_concat_batches": "compute_metrics gets one array",
    "include_for_metrics": "compute_metrics gets predictions and labels",
    "batch_eval_metrics": "compute_metrics is called once",
    "save_only_model": "checkpoints are there to be resumed; save_model() writes the model alone",
    "enable_jit_checkpoint": "set save_steps; a killed run goes on from its newest checkpoint",
    "push_to_hub": "nothing is pushed while it trains; call trainer.push_to_hub() at the end",
    "hub_strategy": "nothing is pushed while it trains; call trainer.push_to_hub() at the end",
    "hub_always_push": "nothing is pushed while it trains; call trainer.push_to_hub() at the end",
    "accelerator_config": "batches are dealt out by tokens here",
    "parallelism_config": "processes are data parallel or FSDP",
    "label_names": "labels are found in the rows",
    "length_column_name": "rows are packed by their tokens",
    "debug": "its hooks want whole padded batches",
    "skip_memory_metrics": "memory is not measured; leave it True",
}
WITHOUT_EFFECT = {
    "logging_nan_inf_filter": "a training ends at the first loss that is not finite",
    "eval_use_gather_object": "what processes measure is always gathered as objects",
    "eval_accumulation_steps": "results leave the device after each forward",
    "restore_callback_states_from_checkpoint": "callbacks are always restored",
    "remove_unused_columns": "rows are records; unknown columns are never read",
    "do_train": "for scripts; Trainer does not read it either",
    "do_eval": "for scripts; Trainer does not read it either",
    "do_predict": "for scripts; Trainer does not read it either",
    "resume_from_checkpoint": "for scripts; give it to train()",
    "local_rank": "the launcher's environment says it",
}
HOOKS_HONOURED = frozenset(
    """
    model args train_dataset eval_dataset processing_class compute_metrics callbacks optimizers
    optimizer_cls_and_kwargs
    """.split()
)
HOOKS_REFUSED = {
    "data_collator": "rows are packed here, and a collator makes padded ones",
    "model_init": "give model; of a search each trial makes a trainer",
    "compute_loss_func": "override compute_loss, which sums over the batch's parts",
    "preprocess_logits_for_metrics": "compute_metrics gets tokens or scores; there are no logits",
    "quantization_config": "load the model with it and give it as model",  # TRL's
}
_UNSET = (None, False, "no", "", [], {}, ())


def check_written(args: TrainingArguments) -> None:
    """Refuse, before transformers changes them, values that nothing here would follow.

    Raises:
        ValueError: names the field, and says why or what to set instead.
    """
    if args.max_steps == 0:
        raise ValueError("max_steps: 0 trains nothing (-1: num_train_epochs decide)")
    if args.max_steps < 0 and args.num_train_epochs <= 0:
        raise ValueError(f"num_train_epochs: {args.num_train_epochs} trains nothing")
    if args.train_sampling_strategy not in ("random", "sequential"):
        raise ValueError("train_sampling_strategy is random or sequential: rows are packed by their tokens")
    for name, default in _defaults().items():
        if name in HONOURED or name in WITHOUT_EFFECT:
            continue
        if _differs(getattr(args, name), default):
            raise ValueError(f"{name}: {REFUSED.get(name, 'it is not known here')}")


def check_set(args: TrainingArguments) -> None:
    """The same of arguments that are made, and may have been written to since.

    Raises:
        ValueError: names the field.
    """
    defaults = _defaults()
    for name, reason in REFUSED.items():
        if name in defaults and _differs(getattr(args, name), defaults[name]):
            raise ValueError(f"{name}: {reason}")


def check_hooks(trainer: str, config: type, keys: dict[str, Any]) -> None:
    """Refuse arguments of a trainer that nothing here would call.

    Args:
        trainer: its name.
        config: its configuration's class.
        keys: given beside the arguments it names; what is None of those refused is taken out.

    Raises:
        ValueError: one of Trainer's, or of TRL's, that is not served.
        TypeError: one of the configuration's, or of nobody's.
    """
    fields = {field.name for field in dataclasses.fields(config)} | config.other_names.keys()
    for name in list(keys):
        if name in HOOKS_REFUSED:
            if keys.pop(name) is not None:
                raise ValueError(f"{trainer}: {name}: {HOOKS_REFUSED[name]}")
        elif name not in HOOKS_HONOURED:
            what = f"{name} belongs into {config.__name__}" if name in fields else f"no argument {name!r}"
            raise TypeError(f"{trainer}: {what}")


def configured(args: Any, kind: type[TrainingArguments]) -> TrainingArguments:
    """Arguments of a trainer's own kind: those given, their defaults, or those of a TrainingArguments."""
    if args is None:
        return kind()
    if not isinstance(args, TrainingArguments):
        raise TypeError(f"args is a {kind.__name__}, not {type(args).__name__}")
    if isinstance(args, kind):
        check_set(args)
        return args
    names = [f.name for f in dataclasses.fields(args) if f.init and f.name != "remove_unused_columns"]
    unknown = [name for name in names if name not in {f.name for f in dataclasses.fields(kind)}]
    if unknown:
        raise TypeError(f"args is a {kind.__name__}, which has no {unknown[0]}")
    return kind(**{name: getattr(args, name) for name in names})


def take_tokenizer(keys: dict[str, Any], given: Any) -> Any:
    """`tokenizer=`, as Trainer called it until 5.0, is processing_class; it is taken out of `keys`.

    Raises:
        TypeError: both are given.
    """
    other = keys.pop("tokenizer", None)
    if other is not None and given is not None:
        raise TypeError("tokenizer is processing_class here, and both are given")
    return given if other is None else other


def check_model(trainer: str, model: Any) -> None:
    """A model is wanted.

    Raises:
        ValueError: there is none.
    """
    if model is None:
        raise ValueError(f"{trainer}: model is wanted: a model, its folder or Hub id")


def check_trained(method: str, dataset: Any) -> None:
    """What is checked on training data has some.

    Raises:
        ValueError: there is none.
    """
    if not dataset:
        raise ValueError(f"{method}: it is checked on the train_dataset, and there is none")


def _defaults() -> dict[str, Any]:
    fields = dataclasses.fields(TrainingArguments)
    made = (f.default if f.default_factory is dataclasses.MISSING else f.default_factory() for f in fields)
    return dict(zip((f.name for f in fields), made, strict=True))


def _differs(value: Any, default: Any) -> bool:
    """Whether something is asked for; what transformers makes of a default is not."""
    if dataclasses.is_dataclass(value) and value == type(value)():
        return False  # an AcceleratorConfig
    if isinstance(value, dict) and value.items() <= AcceleratorConfig().to_dict().items():
        return False  # one that was written out
    return value != default and not (_is_unset(value) and _is_unset(default))


def _is_unset(value: Any) -> bool:
    return any(value is one or (type(value) is type(one) and value == one) for one in _UNSET)
