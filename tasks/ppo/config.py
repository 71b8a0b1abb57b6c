"""PPOConfig: the settings of PPOTrainer, a dataclass with TRL 0.11's fields and further ones.

Defaults, descriptions and bounds of what the params section `ppo` has as well stand there, once; this class
adds what a script wants of its settings: they can be read, written, parsed from a command line and made a
dictionary.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import ValidationError

from params.schema import MonitorParams, PPOParams

# What becomes of each field: all others are used by the trainer under the name they have.
FOR_SCRIPTS = {  # the trainer tells them to the tracker, and a script reads them
    "exp_name", "task_name", "model_name", "query_dataset", "reward_model", "dataset_num_proc",
}  # fmt: skip
COMPUTED = {  # from the other fields, or by the trainer; what is given for them is replaced
    "world_size", "is_encoder_decoder", "is_peft_model",
    "backward_batch_size", "global_backward_batch_size", "global_batch_size",
}  # fmt: skip
OLDER_NAMES = {"forward_batch_size": "mini_batch_size", "optimize_cuda_cache": "optimize_device_cache"}

# The params section beside this class.
SECTION_LACKS = {  # what belongs to a script or to TRL's own loop; the pipeline has stages and MLflow for it
    *FOR_SCRIPTS, *COMPUTED, *OLDER_NAMES, "steps", "remove_unused_columns", "tracker_kwargs",
    "accelerator_kwargs", "project_kwargs", "tracker_project_name", "push_to_hub_if_best_kwargs",
    "compare_steps", "optimize_device_cache",
}  # fmt: skip
SECTION_ALONE = {  # read by the stage, before there is a trainer
    "lora_rank", "lora_alpha", "normalize_scores",
}  # fmt: skip
DIFFERENT = {  # name -> default there, default here
    "updates": (100, None),  # here TRL's `steps` decide where nothing is said
    "seed": (None, 0),  # there the run's seed decides
    "monitor": (MonitorParams(), {}),  # here what differs from these defaults
}
MAPPINGS = (
    "tracker_kwargs", "accelerator_kwargs", "project_kwargs", "push_to_hub_if_best_kwargs", "monitor",
)  # fmt: skip
LEAST = {"steps": 1, "compare_steps": 1, "seed": 0}


def _says(text: str) -> dict[str, str]:
    return {"help": text}


def _shared(name: str) -> Any:
    """A field of the params section: its default and its description."""
    info = PPOParams.model_fields[name]
    return field(default=info.default, metadata=_says(info.description or name))


def _script() -> str:
    return Path(sys.argv[0]).name.removesuffix(".py")


@dataclass
class PPOConfig:
    """Settings of :class:`tasks.ppo.trainer.PPOTrainer`.

    The first half is TRL 0.11.4's, in its order, with its defaults and meanings; the second is our own. It is
    checked when it is made, and by the trainer before each step: what was written in between counts.

    Raises:
        ValueError: a value out of its bounds, or values that do not go together; one line that names the key.
    """

    exp_name: str = field(default_factory=_script, metadata=_says("by default the script's name"))
    seed: int = field(default=0, metadata=_says("of sampling and minibatches"))
    log_with: str | None = field(
        default=None, metadata=_says("tensorboard, wandb, mlflow or another of accelerate's trackers")
    )
    task_name: str | None = field(default=None, metadata=_says("for the tracker"))
    model_name: str = field(default="gpt2", metadata=_says("for scripts and the tracker"))
    query_dataset: str = field(default="stanfordnlp/imdb", metadata=_says("for scripts and the tracker"))
    reward_model: str = field(
        default="sentiment-analysis:lvwerra/distilbert-imdb", metadata=_says("for scripts and the tracker")
    )
    remove_unused_columns: bool = field(
        default=True, metadata=_says("columns of the data set that neither the model nor log_stats reads")
    )
    tracker_kwargs: dict | str | None = field(
        default_factory=dict, metadata=_says("by tracker: how it is started; JSON on a command line")
    )
    accelerator_kwargs: dict | str | None = field(
        default_factory=dict, metadata=_says("for accelerate's Accelerator; JSON on a command line")
    )
    project_kwargs: dict | str | None = field(
        default_factory=dict,
        metadata=_says("as logging_dir, of a ProjectConfiguration; JSON on a command line"),
    )
    tracker_project_name: str = field(default="trl", metadata=_says("project or experiment of the tracker"))
    push_to_hub_if_best_kwargs: dict | str | None = field(
        default_factory=dict, metadata=_says("of push_to_hub after a best score; JSON on a command line")
    )
    steps: int = field(default=20000, metadata=_says("responses of a whole run; see updates"))
    learning_rate: float = _shared("learning_rate")
    adap_kl_ctrl: bool = _shared("adap_kl_ctrl")
    init_kl_coef: float = _shared("init_kl_coef")
    kl_penalty: Literal["kl", "abs", "mse", "k3", "full"] = _shared("kl_penalty")
    target: float = _shared("target")
    horizon: int | None = _shared("horizon")
    gamma: float = _shared("gamma")
    lam: float = _shared("lam")
    cliprange: float = _shared("cliprange")
    cliprange_value: float = _shared("cliprange_value")
    vf_coef: float = _shared("vf_coef")
    batch_size: int = _shared("batch_size")
    forward_batch_size: int | None = field(default=None, metadata=_says("older name of mini_batch_size"))
    mini_batch_size: int = _shared("mini_batch_size")
    gradient_accumulation_steps: int = _shared("gradient_accumulation_steps")
    world_size: int | None = field(default=None, metadata=_says("computed: processes"))
    ppo_epochs: int = _shared("ppo_epochs")
    max_grad_norm: float | None = _shared("max_grad_norm")
    optimize_cuda_cache: bool | None = field(
        default=None, metadata=_says("older name of optimize_device_cache")
    )
    optimize_device_cache: bool = field(
        default=False, metadata=_says("give cached GPU memory back before and after each step")
    )
    early_stopping: bool = _shared("early_stopping")
    target_kl: float = _shared("target_kl")
    compare_steps: int = field(
        default=1, metadata=_says("steps between two comparisons of push_to_hub_if_best_kwargs")
    )
    ratio_threshold: float = _shared("ratio_threshold")
    use_score_scaling: bool = _shared("use_score_scaling")
    use_score_norm: bool = _shared("use_score_norm")
    score_clip: float | None = _shared("score_clip")
    whiten_rewards: bool = _shared("whiten_rewards")
    gradient_checkpointing: bool = _shared("gradient_checkpointing")
    is_encoder_decoder: bool | None = field(default=None, metadata=_says("computed: of the model"))
    is_peft_model: bool | None = field(default=None, metadata=_says("computed: of the model"))
    backward_batch_size: int | None = field(
        default=None, metadata=_says("computed: mini_batch_size × gradient_accumulation_steps")
    )
    global_backward_batch_size: int | None = field(default=None, metadata=_says("computed: the same"))
    global_batch_size: int | None = field(default=None, metadata=_says("computed: batch_size"))
    dataset_num_proc: int | None = field(
        default=None, metadata=_says("for scripts: workers of datasets' map")
    )

    updates: int | None = field(
        default=None, metadata=_says("rollouts of PPOTrainer.train; null: steps / batch_size, rounded up")
    )
    optimizer: Literal["adam", "adamw", "adamw_8bit", "muon", "sgd"] = _shared("optimizer")
    adam_beta2: float = _shared("adam_beta2")
    weight_decay: float = _shared("weight_decay")
    samples_per_prompt: int = _shared("samples_per_prompt")
    kl_in: Literal["reward", "loss"] = _shared("kl_in")
    spike_factor: float = _shared("spike_factor")
    max_skipped_steps: int = _shared("max_skipped_steps")
    critic_warmup_updates: int = _shared("critic_warmup_updates")
    num_layers_unfrozen: int | None = _shared("num_layers_unfrozen")
    num_value_layers_unfrozen: int | None = _shared("num_value_layers_unfrozen")
    score_baseline: float = _shared("score_baseline")
    missing_eos_penalty: float = _shared("missing_eos_penalty")
    temperature: float = _shared("temperature")
    response_tokens: int = _shared("response_tokens")
    select: Literal["last", "best"] = _shared("select")
    kl_budget_nats: float = _shared("kl_budget_nats")
    eval_updates: int = _shared("eval_updates")
    monitor: dict | str | None = field(
        default_factory=dict, metadata=_says("thresholds other than the defaults; JSON on a command line")
    )
    preflight: bool = _shared("preflight")
    dtype: Literal["float32", "bfloat16"] = _shared("dtype")

    def __post_init__(self) -> None:
        self.check()

    @classmethod
    def of_section(cls, section: PPOParams, seed: int) -> PPOConfig:
        """The settings of the params section `ppo`.

        Args:
            section: validated.
            seed: of the run, where the section has none of its own.
        """
        given = {name: getattr(section, name) for name in SHARED | DIFFERENT.keys() | {"log_with"}}
        given["monitor"] = section.monitor.model_dump()
        given["seed"] = seed if section.seed is None else section.seed
        return cls(**given)

    def check(self) -> None:
        """Refuse values that are out of bounds or do not go together, and compute what follows from them.

        Raises:
            ValueError: one line that names the key.
        """
        self._take_older_names()
        for name in MAPPINGS:
            self._set(name, _as_mapping(name, getattr(self, name)))
        for name, least in LEAST.items():
            value = _plain(getattr(self, name))
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                wanted = f"a whole number of at least {least}"
                raise ValueError(f"ppo.{name}: {wanted} is wanted, not {value!r:.60}")
            self._set(name, value)
        given = {name: _plain(getattr(self, name)) for name in SHARED}
        given |= {"monitor": self.monitor} | ({} if self.updates is None else {"updates": self.updates})
        try:
            section = PPOParams.model_validate(given)
        except ValidationError as error:
            raise ValueError(_one_line(error)) from None
        for name in SHARED if self.updates is None else SHARED | {"updates"}:
            self._set(name, getattr(section, name))
        self._compute()

    def __setattr__(self, name: str, value: Any) -> None:
        """Write a field; what is computed from it follows. Another name is kept, with a warning."""
        if name not in self.__dataclass_fields__ and not hasattr(type(self), name):
            near = get_close_matches(name, self.__dataclass_fields__, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            warnings.warn(f"PPOConfig has no field {name}: nothing here reads it{hint}", stacklevel=2)
        self._set(name, _plain(value))
        if name in ("batch_size", "mini_batch_size", "gradient_accumulation_steps"):
            self._compute()

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _take_older_names(self) -> None:
        for old, name in OLDER_NAMES.items():
            if (value := getattr(self, old)) is not None:
                warnings.warn(f"PPOConfig: {old} is the older name of {name}", FutureWarning, stacklevel=4)
                self._set(name, value)
                self._set(old, None)

    def _compute(self) -> None:
        """Batch sizes count over all processes here, so that the global ones are the same."""
        names = "mini_batch_size", "gradient_accumulation_steps", "batch_size"
        sizes = [self.__dict__.get(name) for name in names]
        if all(isinstance(size, int) for size in sizes):
            self._set("backward_batch_size", sizes[0] * sizes[1])
            self._set("global_backward_batch_size", sizes[0] * sizes[1])
            self._set("global_batch_size", sizes[2])

    @property
    def total_ppo_epochs(self) -> int:
        """Rollouts of a whole run: `updates`, or as many as TRL counts, `steps` responses in batches."""
        return -(-self.steps // self.batch_size) if self.updates is None else self.updates

    @property
    def thresholds(self) -> MonitorParams:
        """What the monitor goes by: `monitor`, and the defaults for the rest."""
        return MonitorParams.model_validate(self.monitor)

    def to_dict(self) -> dict[str, Any]:
        """Every field and `total_ppo_epochs`, those of a mapping under `name/key`, as TRL writes them."""
        found: dict[str, Any] = {}
        for name, value in {**vars(self), "total_ppo_epochs": self.total_ppo_epochs}.items():
            found |= _flat(name, value) if isinstance(value, Mapping) else {name: value}
        return found


SHARED = frozenset(
    {f.name for f in fields(PPOConfig)} & PPOParams.model_fields.keys() - DIFFERENT.keys() - {"log_with"}
)


def _flat(name: str, values: Mapping) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        path = f"{name}/{key}"
        found |= _flat(path, value) if isinstance(value, Mapping) else {path: value}
    return found


def _plain(value: Any) -> Any:
    """A number of numpy, or of a tensor's `item`, as Python's."""
    return value.item() if isinstance(value, np.generic) else value


def _as_mapping(name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"ppo.{name}: {value!r:.60} is no JSON: {error}") from None
    if not isinstance(value, Mapping | None):
        raise ValueError(f"ppo.{name}: a mapping is wanted, not {type(value).__name__}")
    return dict(value or {})


def _one_line(error: ValidationError) -> str:
    """The first of pydantic's errors, by its key."""
    first, more = error.errors()[0], error.error_count() - 1
    if first["type"] == "value_error":  # ours: its text names the keys already
        return str(first["ctx"]["error"])
    key = ".".join(map(str, first["loc"]))
    text = f"ppo.{key}: {first['msg'][:1].lower()}{first['msg'][1:]}, not {first['input']!r:.60}"
    return text + (f" (and {more} more)" if more else "")
