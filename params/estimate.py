"""`python -m params estimate`: memory per GPU and time of the stages that train, from arithmetic alone.

Counted are the tensors that grow with the model or the batch (:mod:`params.memory`); not the CUDA context,
fragmentation and NCCL's buffers, a few GB together. 2 FLOPs a parameter and token forward, 4 backward (Kaplan
et al., arXiv 2001.08361, section 2.1), of the backward 2 alone through frozen weights; attention is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace

from params.load import ParamsError, read_mapping
from params.memory import GB, kv_cache, training
from params.schema import Params
from params.shapes import Shape, shape_of

OF_WEIGHT = {"none": 4.0, "8bit": 1.0, "4bit": 0.5}  # of a frozen base
SHARDING = ("FSDP", "DEEPSPEED")


@dataclass(frozen=True, slots=True)
class Device:
    """One GPU, and how well it is used; by default an A100 of 80 GB."""

    tflops: float = 312.0  # bfloat16, dense; float32 through TF32 has half
    utilisation: float = 0.4  # share of them that a training reaches
    bandwidth: float = 2.0  # TB/s, which bounds decoding
    memory: float = 80.0  # GB
    answers: float = 3.0  # of a question, on average; each as long as may be
    rows: int = 0  # packed rows; 0: unknown
    questions: int = 0  # of the reward model; 0: unknown


@dataclass(frozen=True, slots=True)
class Estimate:
    """Of one stage.

    Attributes:
        gigabytes: name -> GB on one GPU, at the peak.
        seconds: of one step (sft, reward) or update (ppo).
        steps: how many; 0: unknown.
    """

    gigabytes: dict[str, float]
    seconds: float
    steps: int

    @property
    def total(self) -> float:
        """GB on one GPU."""
        return sum(self.gigabytes.values())


def estimates(params: Params, processes: int, is_sharded: bool, device: Device) -> dict[str, Estimate]:
    """Of sft, reward and ppo, as `params` has them; a reward model that is not trained is left out."""
    shape, shards = shape_of(params.model), processes if is_sharded else 1
    stages = {"sft": _sft(params, shape, processes, shards, device)}
    if params.reward.way == "trained":
        stages["reward"] = _reward(params, shape, processes, shards, device)
    return stages if is_sharded else {**stages, "ppo": _ppo(params, shape, processes, device)}


def _sft(params: Params, shape: Shape, processes: int, shards: int, device: Device) -> Estimate:
    sft, row = params.sft, params.pack.row_tokens
    own = max(1, sft.batch_rows // processes) * row
    forward = own if shards > 1 else min(own, max(row, params.machine.microbatch_tokens))
    trained = _trained(sft, shape)
    memory = training(
        shape, forward, sft.dtype, trained=trained, base=_base(params), shards=shards,
        muon=sft.optimizer == "muon",
    )  # fmt: skip
    seconds = own * _flops(shape.parameters, trained) / _rate(device, sft.dtype)
    return Estimate(memory, seconds, _steps(sft, device.rows, sft.batch_rows))


def _reward(params: Params, shape: Shape, processes: int, shards: int, device: Device) -> Estimate:
    """As large as the SFT model without its head, each answer as long as may be: an upper bound."""
    reward = params.reward
    question = math.ceil(params.pack.document_tokens * device.answers)
    own = max(1, reward.batch_questions // processes) * question
    forward = own if shards > 1 else min(own, max(question, params.machine.microbatch_tokens))
    trunk = replace(shape, is_tied=True)  # the embedding alone; a row of scores is no head to speak of
    trained = _trained(reward, trunk)
    memory = training(
        trunk, forward, reward.dtype, trained=trained, base=_base(params), shards=shards,
        muon=reward.optimizer == "muon",
    )  # fmt: skip
    memory["logits"] = 0.0
    seconds = own * _flops(trunk.parameters, trained) / _rate(device, reward.dtype)
    return Estimate(memory, seconds, _steps(reward, device.questions, reward.batch_questions))


def _ppo(params: Params, shape: Shape, processes: int, device: Device) -> Estimate:
    """Every response as long as may be, every pass taken: an upper bound; scores: reward model and judge."""
    ppo, machine = params.ppo, params.machine
    whole = params.pack.prompt_tokens + ppo.response_tokens
    rows, trained = max(1, ppo.batch_size // processes), _trained(ppo, shape)
    forward = min(max(1, ppo.mini_batch_size // processes), machine.microbatch_rows) * whole
    memory = training(
        shape, forward, ppo.dtype, trained=trained, base=_base(params), recompute=ppo.gradient_checkpointing
    )
    memory["reference"] = 4 * shape.parameters / GB if trained == shape.parameters else 0.0
    reward = params.reward
    are_beside = ppo.lora_rank and reward.lora_rank  # where both are adapters, and no other base is named
    sizes = (
        shape.of_trunk if base or not are_beside else shape.of_lora(reward.lora_rank)
        for base in (reward.base, reward.judge_base)
    )
    memory["scores"] = 4 * sum(sizes) / GB
    side_by_side = min(rows, machine.decode_rows)
    decode = kv_cache(shape, side_by_side, whole, ppo.dtype) / GB
    memory["cache"] = max(0.0, decode - memory["activations"])  # its memory serves the update afterwards
    rate = _rate(device, ppo.dtype)
    read = _base(params) * shape.parameters / (device.bandwidth * 1e12)  # a step reads all weights once
    step = max(read, 2 * shape.parameters * side_by_side / rate)
    sampling = math.ceil(rows / side_by_side) * ppo.response_tokens * step
    forwards = 3 * shape.parameters + shape.of_trunk  # prompts, policy, reference; scores
    forwards *= 2 * rows * whole / rate
    flops = _flops(shape.parameters, trained) + 2 * shape.parameters * ppo.gradient_checkpointing
    passes = ppo.ppo_epochs * rows * whole * flops / rate
    return Estimate(memory, sampling + forwards + passes, ppo.updates)


def _trained(section, shape: Shape) -> int:
    rank = section.lora_rank
    return shape.of_lora(rank) if rank else shape.parameters


def _base(params: Params) -> float:
    return OF_WEIGHT[params.model.quantize]


def _flops(parameters: int, trained: int) -> float:
    """Of one token of training: 6 a parameter, 4 where it is frozen (its adapter's own are left out)."""
    return (6 if trained >= parameters else 4) * parameters


def _rate(device: Device, dtype: str) -> float:
    """FLOP/s that one GPU reaches."""
    return device.tflops * 1e12 * device.utilisation * (1 if dtype == "bfloat16" else 0.5)


def _steps(section, examples: int, batch: int) -> int:
    by_epochs = math.ceil(examples / batch * section.epochs)
    most = section.max_steps
    return min(by_epochs, most) if most and examples else most or by_epochs


def describe(params: Params, settings: Mapping[str, str]) -> str:
    """Lines for the user.

    Raises:
        ParamsError: a setting that :class:`Device` does not have, or that is no positive number; a model of
            unknown shape.
    """
    device = _device(settings)
    processes, is_sharded = _topology(params)
    shape = shape_of(params.model)
    lines = [
        f"{params.model.base or 'model.config'}: {shape.parameters / GB:.3f} billion parameters, "
        f"{processes} process(es){', sharded' if is_sharded else ''}; a GPU of {device.memory:g} GB, "
        f"{device.tflops:g} TFLOP/s used by {device.utilisation:.0%}, {device.bandwidth:g} TB/s"
    ]
    for stage, found in estimates(params, processes, is_sharded, device).items():
        lines += _lines(stage, found, device)
    if params.reward.way != "trained":
        lines.append(f"reward  {params.reward.way}: no training, a forward of reward.base over all answers")
    if is_sharded:
        lines.append("ppo     needs machine.launch ddp, one_gpu or none")
    return "\n".join(lines)


def _lines(stage: str, found: Estimate, device: Device) -> Iterator[str]:
    fits = "" if found.total < device.memory else f": more than {device.memory:g}"
    yield f"{stage:<7} {found.total:7.2f} GB a GPU{fits}; {found.seconds:.3g} s a step, " + (
        f"{found.steps} steps, {found.seconds * found.steps / 3600:.3g} h" if found.steps else "steps unknown"
    )
    parts = [f"{name} {size:.2f}" for name, size in found.gigabytes.items() if size > 0.005]
    yield f"        {', '.join(parts) or 'less than 0.01 each'}"


def _device(settings: Mapping[str, str]) -> Device:
    known = {field.name: type(field.default) for field in fields(Device)}
    values = {}
    for key, text in settings.items():
        if key not in known:
            raise ParamsError(f"{key}: no such setting of an estimate; there are {', '.join(known)}")
        try:
            values[key] = known[key](text)
        except ValueError:
            raise ParamsError(f"{key}: a number is expected, not {text!r}") from None
        if values[key] <= 0:
            raise ParamsError(f"{key}: a positive number is expected, not {text}")
    return Device(**values)


def _topology(params: Params) -> tuple[int, bool]:
    """Processes, and whether they share the weights."""
    if (file := params.machine.launch_file) is None:
        return 1, False
    launch = read_mapping(file)
    processes = params.machine.processes or int(launch["num_processes"])
    return processes, launch["distributed_type"] in SHARDING
