"""The optimizer of a transformers Trainer: one of ours by name, or the one that `optim` names."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer
from transformers import TrainingArguments

from tasks.lm.numerics.optimizer import check_optimizer, make_optimizer

ADAM = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8}  # transformers' defaults
NOT_SERVED = {
    "lomo": "it steps inside backward, and a batch has several here",
    "layerwise": "it steps inside backward, and a batch has several here",
    "schedule_free": "its weights differ between training and evaluation",
}


def check_optim(args: TrainingArguments) -> None:
    """Refuse, before compute is spent, an optimizer that cannot be had or settings that it would ignore.

    Raises:
        ValueError: names the setting.
    """
    changed = [name for name, default in ADAM.items() if getattr(args, name) != default]
    changed += [name for name in ("optim_args", "optim_target_modules") if getattr(args, name)]
    if args.optimizer is None:
        for word, why in NOT_SERVED.items():
            if word in str(args.optim.value):
                raise ValueError(f"optim {args.optim.value}: {why}")
        return
    check_optimizer(args.optimizer)
    if args.optim != TrainingArguments.__dataclass_fields__["optim"].default:
        raise ValueError(f"optimizer is {args.optimizer!r} and optim {args.optim.value!r}; set one of them")
    foreign = [name for name in changed if args.optimizer == "sgd" or not name.startswith("adam")]
    if foreign:
        raise ValueError(f"{foreign[0]}: optimizer {args.optimizer} has none; set optim, of transformers")


class NamedOptimizer:
    """A mixin before transformers' Trainer whose `args.optimizer` is one of ours, or None: `args.optim`."""

    def create_optimizer(self, model=None) -> Optimizer:
        """The optimizer that `args` name, over the trainable parameters.

        Raises:
            ValueError: it cannot be had, or ignores one of its settings.
        """
        args = self.args
        if self.optimizer is None and args.optimizer is not None:
            betas = args.adam_beta1, args.adam_beta2
            rates = args.learning_rate, args.weight_decay
            self.optimizer = make_optimizer(
                self.model, args.optimizer, *rates, betas=betas, eps=args.adam_epsilon
            )
        if self.optimizer is None and self.optimizer_cls_and_kwargs is None:
            self._check_heeded()
        try:
            return super().create_optimizer(model)
        except (ImportError, ValueError) as error:
            raise ValueError(f"optim {args.optim.value}: {' '.join(str(error).split())}") from error

    def _check_heeded(self) -> None:
        """Each setting that was changed changes the optimizer."""
        args, name = self.args, self.args.optim.value
        if isinstance(args.optim_args, str) and not all(
            part.count("=") == 1 for part in args.optim_args.replace(" ", "").split(",")
        ):
            raise ValueError(f"optim_args is {args.optim_args!r}; name=value,name=value is wanted")
        defaults: dict[str, Any] = {**ADAM, "optim_args": None, "optim_target_modules": None}
        for key, default in defaults.items():
            value = getattr(args, key)
            if value and value != default and self._made_with() == self._made_with(**{key: default}):
                raise ValueError(f"{key}: optim {name} has none")

    def _made_with(self, **changed: Any) -> Any:
        """What transformers would make; words, where it refuses."""
        before = {key: getattr(self.args, key) for key in changed}
        vars(self.args).update(changed)
        try:
            kind, keys = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            return kind, {k: v for k, v in keys.items() if k not in ("params", "model")}, "params" in keys
        except (ImportError, ValueError, TypeError) as error:
            if not changed:
                raise ValueError(f"optim {self.args.optim.value}: {' '.join(str(error).split())}") from error
            return str(error)
        finally:
            vars(self.args).update(before)


def refuse_two_optimizers(args: TrainingArguments, keys: dict[str, Any]) -> None:
    """One optimizer is asked for, not two.

    Raises:
        ValueError: an object, or a class, beside a name.
    """
    given = [name for name in ("optimizers", "optimizer_cls_and_kwargs") if keys.get(name)]
    if keys.get("optimizers") and keys["optimizers"][0] is None:
        given.remove("optimizers")
    if args.optimizer is not None and given:
        raise ValueError(f"{given[0]}: optimizer is {args.optimizer!r} already; set one of the two")
