"""Optimizers by name: Adam, AdamW, 8-bit AdamW, SGD, or Muon for hidden matrices and AdamW for the rest."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Muon, Optimizer

from tasks.lm.model.quantized import check_bitsandbytes

NAMES = ("adam", "adamw", "adamw_8bit", "muon", "sgd")
MOMENTUM = 0.9  # of sgd
OUTER = ("lm_head", "embed_out", "score", "classifier", "summary")  # heads, the value head's included
BETAS, EPS = (0.9, 0.95), 1e-8


class BatchedMuon(Muon):
    """torch's Muon with the matrices of one shape orthogonalised in one batch.

    A small model has many small matrices: one product of sixteen costs half of sixteen products. The bits are
    torch's wherever bfloat16 is multiplied by instructions; see :func:`newton_schulz` for elsewhere.
    """

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """One update of every matrix that has a gradient."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault(parameter.shape, []).append(parameter)
            for shape, alike in shapes.items():
                updates = newton_schulz(torch.stack([self._momentum(p, group) for p in alike]), group)
                rate = group["lr"] * 0.2 * math.sqrt(max(shape))  # match_rms_adamw
                for parameter, update in zip(alike, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-rate)

    def _momentum(self, parameter: nn.Parameter, group: dict[str, Any]) -> Tensor:
        """The gradient with Nesterov momentum, bfloat16."""
        state, gradient = self.state[parameter], parameter.grad
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        kept = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        return gradient.lerp(kept, group["momentum"]).bfloat16()


def newton_schulz(matrices: Tensor, group: dict[str, Any]) -> Tensor:
    """Nearly orthogonal matrices, [N, R, C] bfloat16 -> the same shape (Jordan et al. 2024).

    Processors without AVX-512 multiply bfloat16 number by number, twenty-five times as slowly as float32.
    There the same bfloat16 factors are multiplied in float32, and the products rounded to bfloat16.

    Args:
        matrices: N of one shape.
        group: `ns_coefficients`, `ns_steps` and `eps`, as torch.optim.Muon names them.
    """
    a, b, c = group["ns_coefficients"]
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=group["eps"])
    work = x.dtype if multiplies_bfloat16(x.device) else torch.float32
    for _ in range(group["ns_steps"]):
        wide = x.to(work)
        gram = (wide @ wide.mT).to(x.dtype).to(work)
        update = torch.baddbmm(gram, gram, gram, beta=b, alpha=c).to(x.dtype).to(work)
        x = torch.baddbmm(wide, update, wide, beta=a).to(x.dtype)
    return x.mT if is_tall else x


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether there are instructions for products of bfloat16: GPUs, and CPUs where oneDNN takes them."""
    return device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


class MuonAdamW(Optimizer):
    """Muon (Jordan et al. 2024) for hidden matrices, AdamW for embeddings, heads, norms and biases.

    Both take the same learning rate: Muon's update is scaled to AdamW's root mean square (arXiv 2502.16982,
    eq. 4). The groups of the two are this optimizer's groups, so that a scheduler sees one optimizer.
    """

    def __init__(
        self,
        matrices: list[nn.Parameter],
        others: list[nn.Parameter],
        lr: float,
        weight_decay: float,
        betas: tuple[float, float] = BETAS,
        eps: float = EPS,
    ) -> None:
        keys = {"lr": lr, "weight_decay": weight_decay}
        self.parts: dict[str, Optimizer] = {}  # an adapter leaves nothing to AdamW, a frozen trunk to Muon
        if matrices:
            self.parts["muon"] = BatchedMuon(matrices, **keys)
        if others:
            self.parts["adamw"] = AdamW(others, betas=betas, eps=eps, **keys)
        super().__init__([*matrices, *others], keys)
        self._link()

    def _link(self) -> None:
        self.param_groups = [group for part in self.parts.values() for group in part.param_groups]

    def step(self, closure=None) -> None:
        """One update of both."""
        for part in self.parts.values():
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of both."""
        for part in self.parts.values():
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The states of both, under `muon` and `adamw`."""
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        for name, part in self.parts.items():
            part.load_state_dict(state_dict[name])
        self._link()


def check_optimizer(name: str, key: str = "optimizer") -> None:
    """Refuse, before compute is spent, an optimizer that cannot be had.

    Args:
        name: one of NAMES.
        key: names it in messages.

    Raises:
        ValueError: another name, or `adamw_8bit` without bitsandbytes or a GPU.
    """
    if name not in NAMES:
        raise ValueError(f"{key} is {name!r}; {', '.join(NAMES[:-1])} or {NAMES[-1]} is wanted")
    if name == "adamw_8bit":
        check_bitsandbytes(f"{key}: adamw_8bit", "take adamw")


def make_optimizer(
    model: nn.Module,
    name: str,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float] = BETAS,
    key: str = "optimizer",
    eps: float = EPS,
) -> Optimizer:
    """An optimizer over the trainable parameters; norms and biases do not decay but under Muon.

    Args:
        model: bare, under adapters, or with a value head.
        name: `adam` (arXiv 1412.6980), `adamw` (1711.05101), `adamw_8bit` (2110.02861), `muon` or `sgd`.
        learning_rate: of all parameters.
        weight_decay: decoupled from the gradient; `adam` has none, and of `sgd` it is part of the gradient.
        betas: decay of the two moments of the Adams.
        key: names `name` in messages.
        eps: added to the Adams' root of the second moment.

    Raises:
        ValueError: as :func:`check_optimizer`, or `adam` with a weight decay.
    """
    check_optimizer(name, key)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if name == "muon":
        tables = [m for m in model.modules() if isinstance(m, nn.Embedding)]  # of positions too
        heads = [m for n, m in model.named_modules() if n.rpartition(".")[2] in OUTER]
        outer = {id(p) for module in (*tables, *heads) for p in module.parameters()}
        matrices = [p for _, p in named if p.ndim == 2 and id(p) not in outer]
        inner = {id(p) for p in matrices}
        others = [p for _, p in named if id(p) not in inner]
        return MuonAdamW(matrices, others, learning_rate, weight_decay, betas, eps)
    if name == "adam":
        if weight_decay:
            raise ValueError(f"{key}: adam has no weight decay ({weight_decay}); adamw has")
        return Adam([p for _, p in named], learning_rate, betas=betas, eps=eps, fused=True)
    groups = [
        {"params": [p for _, p in named if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for _, p in named if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    if name == "sgd":
        return SGD(groups, lr=learning_rate, momentum=MOMENTUM)
    if name == "adamw":
        return AdamW(groups, lr=learning_rate, betas=betas, eps=eps)
    return _in_8_bits(model, groups, learning_rate, betas, eps)


def _in_8_bits(
    model: nn.Module, groups: list[dict[str, Any]], rate: float, betas: tuple, eps: float
) -> Optimizer:
    """AdamW whose moments are 8-bit, but for embeddings, which are not stable so (arXiv 2110.02861, 2.3)."""
    import bitsandbytes

    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})
    return bitsandbytes.optim.AdamW8bit(groups, lr=rate, betas=betas, eps=eps)
