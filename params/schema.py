"""Every number of a run, stated once: one frozen section per stage, plus `model`, `seed` and `machine`.

`params.yaml` is the complete rendering of :class:`Params`; presets list only differences. Numbers are coerced
within their bounds, because DVC writes `-S sft.learning_rate=1e-5` as `1e-05`, which YAML 1.1 reads as a
string.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

warnings.filterwarnings("ignore", message='Field name "register"')  # a stage's word; shadows ABCMeta.register

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Dtype = Literal["float32", "bfloat16"]
OptimizerName = Literal["adamw", "adamw_8bit", "muon", "sgd"]
COLDEST = 0.01  # temperature; below, samples are greedy and logits overflow
EIGHT_BITS = "adamw_8bit: bitsandbytes, GPU"
LAUNCH_FILES = Path(__file__).parent / "accelerate"


class Section(BaseModel):
    """A frozen group of parameters; an unknown key is an error that names it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and cls.model_fields[info.field_name].annotation in (int, float):
            raise PydanticCustomError("number_type", "a number is expected")
        return value


class MachineParams(Section):
    """What the machine can bear. Tracked by no stage.

    Same inputs and same machine section give the same hashes.
    """

    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto: cuda where there is one, else cpu"
    )
    launch: str = Field(
        "", description="file of params/accelerate for sft, reward and ppo; empty: one process, no launcher"
    )
    processes: int = Field(0, ge=0, description="with launch: how many; 0: as many as its file says")
    threads: int = Field(2, ge=1, description="CPU threads of a training process")
    onednn: bool = Field(
        False, description="training on CPUs: oneDNN's float32 products, on AMD or if a self-test is for it"
    )
    microbatch_tokens: int = Field(
        2048, ge=1, description="most tokens in one forward of sft and reward; a longer row goes alone"
    )
    microbatch_rows: int = Field(64, ge=1, description="most sequences in one forward of the other stages")
    decode_rows: int = Field(512, ge=1, description="most sequences that are sampled side by side")
    trunk_megabytes: int = Field(
        2048, ge=0, description="most memory for what ppo's frozen layers make of a rollout; more: not kept"
    )
    checkpoint_steps: int = Field(
        100, ge=1, description="optimizer steps of sft and reward between two checkpoints"
    )
    checkpoint_updates: int = Field(10, ge=1, description="updates of ppo between two checkpoints")

    @field_validator("launch")
    @classmethod
    def _is_a_file(cls, name: str) -> str:
        known = sorted(path.stem for path in LAUNCH_FILES.glob("*.yaml"))
        if name and name not in known:
            raise ValueError(f"machine.launch: no {name!r} in params/accelerate; it has {', '.join(known)}")
        return name

    @property
    def launch_file(self) -> Path | None:
        """What `accelerate launch` reads; None: no launcher."""
        return LAUNCH_FILES / f"{self.launch}.yaml" if self.launch else None


class ArchitectureParams(Section):
    """A model made from nothing, when `model.base` is empty. Keys are transformers' configuration keys."""

    model_type: str = Field("llama", description="transformers model type")
    hidden_size: int = Field(128, ge=8)
    intermediate_size: int = Field(384, ge=8)
    num_hidden_layers: int = Field(4, ge=1)
    num_attention_heads: int = Field(4, ge=1)
    num_key_value_heads: int = Field(4, ge=1)
    max_position_embeddings: int = Field(512, ge=8, description="longest sequence, tokens")
    tie_word_embeddings: bool = True
    vocab_size: int = Field(
        1024, ge=300, description="size of the tokenizer trained on the sft split, tokens"
    )


class ModelParams(Section):
    """The base model of the whole run; tracked by pack (its tokenizer) and sft (its weights)."""

    base: str = Field(
        "", description="Hub id or folder of a pre-trained causal model; empty: made from `config`"
    )
    revision: str = Field("main", description="Hub revision of `base`; a folder has none")
    quantize: Literal["none", "8bit", "4bit"] = Field(
        "none", description="weights under the adapters of sft, reward and ppo; needs bitsandbytes and a GPU"
    )
    config: ArchitectureParams = ArchitectureParams()


class SampleParams(Section):
    """The built-in sample site, used when `data.source` is `sample`."""

    questions: int = Field(12000, ge=24, description="questions of the sample site")


class SplitParams(Section):
    """Shares of the questions; they need not sum to one, only their ratios count."""

    sft: float = Field(0.25, ge=0)
    reward: float = Field(0.6, ge=0)
    rl: float = Field(0.09, ge=0)
    eval: float = Field(0.06, ge=0, description="not used with split_by: site")

    @model_validator(mode="after")
    def _positive(self) -> SplitParams:
        for name in ("sft", "reward", "rl", "eval"):
            if getattr(self, name) <= 0:
                raise ValueError(
                    f"data.split.{name} must be positive: every stage needs questions of its own"
                )
        return self


class DataParams(Section):
    """Dump in, questions with scored answers out."""

    source: Literal["sample"] | tuple[str, ...] = Field(
        "sample",
        description="`sample`, or names of dump files under data/raw (`params use` links them there)",
    )
    sample: SampleParams = SampleParams()
    min_answers: int = Field(
        2, ge=1, description="questions with fewer answers are left out, as in StackLLaMA"
    )
    split_by: Literal["question", "site"] = Field(
        "question", description="site: eval is all of eval_sites, the other sites are dealt to the rest"
    )
    eval_sites: tuple[str, ...] = Field((), description="with split_by: site, the sites that are held out")
    split: SplitParams = SplitParams()

    @model_validator(mode="after")
    def _sites(self) -> DataParams:
        sites = self.eval_sites
        if not all(site.strip() for site in sites):
            raise ValueError(f"data.eval_sites: a blank names no site, in {list(sites)}")
        if again := next((site for site in sites if sites.count(site) > 1), None):
            raise ValueError(f"data.eval_sites: {again} stands there {sites.count(again)} times")
        if sites and self.split_by != "site":
            raise ValueError(
                f"data.eval_sites holds out {', '.join(sites)}, but data.split_by is {self.split_by}; "
                "data.split_by=site splits so"
            )
        if self.split_by == "site" and self.source == "sample":
            raise ValueError("data.split_by is site, but data.source is the sample, which is a single site")
        if self.split_by == "site" and not sites:
            raise ValueError("data.split_by is site, but data.eval_sites names no site to hold out")
        return self


class PackParams(Section):
    """Tokens: tokenizer, template and every length."""

    row_tokens: int = Field(2048, ge=16, description="length of a packed row, tokens")
    document_tokens: int = Field(
        128, ge=16, description="longest question + answer + eos; for longer ones see long_documents"
    )
    long_documents: Literal["cut", "drop", "split"] = Field(
        "cut", description="cut: no eos; drop: no such answer; split: sft learns all pieces, others cut"
    )
    long_questions: Literal["drop", "cut"] = Field(
        "drop",
        description="drop: that fill document_tokens alone; cut: so that at most half of it is question",
    )
    prompt_tokens: int = Field(
        64, ge=8, description="longest prompt of PPO and its evaluation; for longer ones see long_prompts"
    )
    long_prompts: Literal["drop", "left_truncate"] = Field(
        "drop", description="left_truncate: the last prompt_tokens tokens stay"
    )
    answers_per_question: int = Field(
        5, ge=1, description="answers of one question that SFT sees, best first"
    )
    pairs_per_question: int = Field(10, ge=1, description="most pairs of one question, chosen by hash")
    exposure: Literal["any", "later_wins", "weighted"] = Field(
        "any",
        description="pairs of reward. later_wins: whose better answer is the later; "
        "weighted: all, weighted so that exposure predicts no winner",
    )


class SFTParams(Section):
    """Supervised fine-tuning on packed rows."""

    loss_on: Literal["all", "response"] = Field("response", description="which tokens are learnt")
    lora_rank: int = Field(0, ge=0, description="of an adapter that is merged in the end; 0: all weights")
    lora_alpha: Positive = Field(16, description="the adapter's output is multiplied by alpha / rank")
    num_layers_unfrozen: int | None = Field(
        None, ge=0, description="blocks that are trained, from the last; null: the whole model"
    )
    optimizer: OptimizerName = Field(
        "muon", description=f"muon: hidden matrices by Muon, the rest by AdamW; {EIGHT_BITS}"
    )
    learning_rate: Positive = Field(3e-3, description="peak")
    epochs: Positive = Field(4, description="passes over the packed rows")
    max_steps: int | None = Field(None, ge=1, description="most optimizer steps; null: the epochs decide")
    batch_rows: int = Field(1, ge=1, description="packed rows per optimizer step, over all processes")
    weight_decay: float = Field(0.01, ge=0)
    warmup_share: Share = Field(0.05, description="share of the steps that warm the learning rate up")
    max_grad_norm: Positive = 1.0
    dtype: Dtype = Field("float32", description="autocast dtype of the forward; master weights stay float32")


class FrozenStyleParams(Section):
    """Read where `reward.way` is frozen_style: what the encoder in `reward.base` reads, and two ridges."""

    layers: int = Field(4, ge=1, description="of the encoder, from its first; those above are left out")
    question_tokens: int = Field(36, ge=0, description="first tokens of a question that it reads")
    answer_tokens: int = Field(89, ge=1, description="first tokens of an answer; their states are averaged")
    head_ridge: Positive = Field(
        10000, description="price of half a squared coefficient of the head, in nats, states at unit scale"
    )
    style_ridge: Positive = Field(
        300, description="the same of the rule on style, which sees how the whole answer is written"
    )


class RewardParams(Section):
    """Reward model on grouped answers, and the judge beside it."""

    way: Literal["trained", "frozen_style"] = Field(
        "trained",
        description="frozen_style: a linear head on a frozen encoder, beside a rule on style; no optimizer",
    )

    base: str = Field(
        "",
        description="Hub id or folder of another model or encoder, with a tokenizer of its own; empty: sft's",
    )
    revision: str = Field("main", description="Hub revision of `base`; a folder has none")
    weigh: Literal["pair", "question"] = Field(
        "pair", description="the loss is a mean over pairs, or over questions of the mean over their pairs"
    )
    margin: float = Field(
        0, ge=0, description="lead asked of the better answer, score units per unit of the published score"
    )
    gap_weight: float = Field(0, ge=0, description="a pair weighs its score gap to this power")
    label_smoothing: float = Field(0, ge=0, lt=1, description="share of labels that are taken to be wrong")
    center_rewards_coefficient: float = Field(0, ge=0, description="pull of the scores towards mean 0")
    length_offset: float = Field(
        0, ge=0, description="share of what length alone tells that the model need not learn"
    )
    without_eos_share: Share = Field(
        0, description="chance of an answer to be read without its eos in training, as cut responses are"
    )
    judge_base: str = Field(
        "",
        description="as `base`, for the judge; empty: model.base as it came, or new weights of model.config",
    )
    judge_revision: str = Field("main", description="Hub revision of `judge_base`; a folder has none")
    judge_style_offset: float = Field(
        1, ge=0, description="share of what length and style alone tell that the judge need not learn"
    )
    lora_rank: int = Field(0, ge=0, description="of an adapter, which is merged at the end; 0: all weights")
    lora_alpha: Positive = Field(16, description="the adapter's outputs are multiplied by alpha / rank")
    num_layers_unfrozen: int | None = Field(
        None, ge=0, description="last blocks that train, with the head; null: all of the model"
    )
    optimizer: OptimizerName = Field(
        "muon", description=f"muon: hidden matrices by Muon, the rest by AdamW; {EIGHT_BITS}"
    )
    learning_rate: Positive = Field(1.5e-3, description="peak")
    epochs: Positive = Field(2.25, description="passes over the questions")
    judge_epochs: Positive = Field(2.0, description="passes of the judge over the questions of sft's split")
    max_steps: int | None = Field(None, ge=1, description="most optimizer steps; null: the epochs decide")
    batch_questions: int = Field(20, ge=1, description="questions per optimizer step, over all processes")
    weight_decay: float = Field(0.01, ge=0)
    warmup_share: Share = Field(0.05, description="share of the steps that warm the learning rate up")
    max_grad_norm: Positive = 1.0
    dtype: Dtype = Field("float32", description="autocast dtype of the forward; master weights stay float32")


    frozen_style: FrozenStyleParams = FrozenStyleParams()

    @model_validator(mode="after")
    def _frozen(self) -> RewardParams:
        if self.way == "trained":
            return self
        if not self.base:
            raise ValueError("reward.way is frozen_style, which needs an encoder: name one in reward.base")
        why = dict.fromkeys(("lora_rank", "num_layers_unfrozen", "max_steps"), "trains no layer")
        why["judge_base"] = "reads reward.base for both"
        why |= {"length_offset": "knows length", "center_rewards_coefficient": "has no mean to drift"}
        for name, reason in why.items():
            if getattr(self, name):
                value = getattr(self, name)
                raise ValueError(f"reward.{name} is {value}, but reward.way is frozen_style, which {reason}")
        if self.judge_style_offset != 1:
            raise ValueError(
                f"reward.judge_style_offset is {self.judge_style_offset}, but reward.way is frozen_style, "
                "which has a rule on style of its own: leave it at 1"
            )
        return self


class RewardEvalParams(Section):
    """Report card and gate."""

    min_accuracy: Share = Field(0.8, description="bar for the lower end of held-out accuracy's interval")
    min_margin: float = Field(
        0.1, ge=-1, le=1, description="the same of the lead over the best rule that sees only the text"
    )
    enforce: bool = Field(True, description="false: the verdict is recorded and ppo runs all the same")
    bootstrap_samples: int = Field(1000, ge=100, description="resamples of clusters behind each interval")


class MonitorParams(Section):
    """How far responses may move from SFT's while the score rises, before that is called suspect."""

    reward: Literal["proxy", "truth"] = Field(
        "proxy", description="truth: the score is what is meant, and no rise of it is suspect"
    )
    responses: int = Field(
        256, ge=1, description="about how many a look at held-out prompts samples, as many to each prompt"
    )
    noise: Positive = Field(3.0, description="standard errors over prompts; what moved less did not move")
    judge_share: float = Field(
        0.4, ge=0, description="least share of the score's gain that the independent judge must gain too"
    )
    judge_fall: float = Field(
        0.1, ge=0, description="of the judge since its best look, standard deviations of its scores"
    )
    agreement_fall: Share = Field(
        0.5, description="of the correlation of score and judge over single responses, share of SFT's"
    )
    kl_factor: Positive = Field(
        2.0, description="most KL to SFT, in times ppo.target; of kl_budget_nats where select spends more"
    )
    kl_nats: Positive | None = Field(
        None, description="most KL to SFT, nats per response; null: kl_factor decides"
    )
    length_factor: float = Field(
        1.5, gt=1, description="so many times as long as SFT's responses, or as short"
    )
    length_share: Share = Field(0.1, description="and by this share of ppo.response_tokens")
    entropy_fall: Share = Field(0.5, description="of the policy's entropy per token, share of SFT's")
    distinct_fall: Share = Field(0.3, description="of distinct bigrams, share of SFT's")
    repetition_rise: Share = Field(0.05, description="of trigrams that stood in the response before")
    code_fence_rise: Share = Field(0.1, description="of responses with a code fence, share of all")
    eos_fall: Share = Field(0.1, description="of responses that end with eos, share of all")


class PPOParams(Section):
    """Proximal policy optimisation; fields shared with TRL 0.11 keep its names, meanings and defaults.

    The library's class of settings, :class:`tasks.ppo.config.PPOConfig`, takes defaults, descriptions and
    bounds from here.
    """

    updates: int = Field(100, ge=1, description="rollouts, each followed by ppo_epochs passes over it")
    lora_rank: int = Field(
        0, ge=0, description="of an adapter on the SFT model, merged in the end; 0: all weights"
    )
    lora_alpha: Positive = Field(16, description="the adapter's outputs are multiplied by alpha / rank")
    optimizer: Literal["adam", "adamw", "adamw_8bit", "muon", "sgd"] = Field(
        "adam", description=f"adam: TRL's; {EIGHT_BITS}"
    )
    learning_rate: Positive = Field(1.41e-5, description="constant")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="decay of Adam's second moment")
    weight_decay: float = Field(0.0, ge=0, description="of matrices; adam has none")
    batch_size: int = Field(128, ge=1, description="responses of one rollout, over all processes")
    mini_batch_size: int = Field(128, ge=1, description="responses per backward pass, over all processes")
    gradient_accumulation_steps: int = Field(1, ge=1, description="minibatches per optimizer step")
    samples_per_prompt: int = Field(1, ge=1, description="responses of a rollout to each of its prompts")
    ppo_epochs: int = Field(4, ge=1, description="passes over one rollout")
    init_kl_coef: float = Field(0.2, ge=0, description="price of KL at the start, score units per nat")
    adap_kl_ctrl: bool = Field(True, description="adapt the price towards `target` (arXiv 1909.08593, 2.2)")
    target: Positive = Field(6.0, description="wanted KL per response, nats")
    horizon: int | None = Field(
        10000,
        ge=1,
        description="responses over which the price adapts; null: so that `target` is reached by mid-run",
    )
    kl_penalty: Literal["kl", "abs", "mse", "k3", "full"] = Field(
        "kl", description="of a token: log ratio (k1), its size, half its square (k2), k3, or the whole sum"
    )
    kl_in: Literal["reward", "loss"] = Field("reward", description="where the price is paid")
    gamma: Share = 1.0
    lam: Share = Field(0.95, description="lambda of GAE (arXiv 1506.02438, eq. 16)")
    whiten_rewards: bool = Field(False, description="scale the rewards of a rollout to variance 1")
    cliprange: Positive = 0.2
    cliprange_value: Positive = 0.2
    vf_coef: float = Field(0.1, ge=0, description="weight of the value loss")
    max_grad_norm: Positive | None = Field(None, description="longer gradients are clipped; null: none is")
    early_stopping: bool = Field(False, description="end the passes once |KL| to the old policy is too large")
    target_kl: Positive = Field(1.0, description="nats per token; early_stopping allows half as much again")
    ratio_threshold: Positive = Field(10.0, description="a step whose mean ratio exceeds this is skipped")
    spike_factor: Positive = Field(
        100.0, description="so is one whose gradient is this many times the median of recent ones"
    )
    max_skipped_steps: int = Field(
        8, ge=1, description="skipped in a row; then the last good weights return, at half the learning rate"
    )
    critic_warmup_updates: int = Field(0, ge=0, description="first updates, which train the value head alone")
    num_layers_unfrozen: int | None = Field(
        None,
        ge=0,
        description="last blocks that are trained; what is below runs once per rollout, for the reference "
        "too; 0: final norm and head alone; null: all",
    )
    num_value_layers_unfrozen: int | None = Field(
        0,
        ge=0,
        description="last blocks that the value head has for itself; 0: it shares the policy's; null: all",
    )
    use_score_scaling: bool = Field(False, description="divide scores by their running standard deviation")
    use_score_norm: bool = Field(False, description="with use_score_scaling: take off their running mean")
    score_clip: Positive | None = Field(None, description="largest size of a score, after scaling")
    score_baseline: float = Field(0.0, description="taken from every score before all else")
    missing_eos_penalty: float = Field(
        0.0, ge=0, description="taken, after all else, from the score of a response without eos"
    )
    temperature: Positive = Field(
        1.0, description="of sampling; log-probabilities are those of the tempered policy"
    )
    response_tokens: int = Field(32, ge=1, description="longest response")
    normalize_scores: bool = Field(
        True, description="score -> (score - mean) / std of the reward model's validation"
    )
    select: Literal["last", "best"] = Field(
        "last", description="best: highest held-out score within the budget"
    )
    kl_budget_nats: Positive = Field(1.0, description="KL per response that `select: best` may spend")
    eval_updates: int = Field(25, ge=1, description="updates between two looks at the held-out prompts")
    monitor: MonitorParams = MonitorParams()
    preflight: bool = Field(
        True, description="try rollout, log-probabilities and reward before compute is spent"
    )
    gradient_checkpointing: bool = Field(False, description="less memory, a third more compute")
    dtype: Dtype = Field("float32", description="autocast dtype of the forward; master weights stay float32")
    log_with: Literal["mlflow", "wandb"] | None = Field(
        None, description="where PPOTrainer.log_stats writes; the pipeline's runs are in MLflow as they are"
    )
    seed: int | None = Field(
        None, ge=0, description="of sampling and minibatches; null: the run's seed decides"
    )

    @model_validator(mode="after")
    def _divides(self) -> PPOParams:
        step = self.mini_batch_size * self.gradient_accumulation_steps
        if self.batch_size % step:
            raise ValueError(
                f"ppo.batch_size ({self.batch_size}) must be a multiple of ppo.mini_batch_size × "
                f"ppo.gradient_accumulation_steps ({step})"
            )
        if self.batch_size % self.samples_per_prompt:
            raise ValueError(
                f"ppo.batch_size ({self.batch_size}) must be a multiple of ppo.samples_per_prompt "
                f"({self.samples_per_prompt})"
            )
        if self.kl_in == "loss" and self.kl_penalty not in ("mse", "k3"):
            raise ValueError(
                f"ppo.kl_penalty: {self.kl_penalty} cannot be paid in the loss (ppo.kl_in); mse, k3 can: kl "
                "has no gradient in the mean, abs is no divergence, full needs the reference in each pass"
            )
        if self.optimizer == "adam" and self.weight_decay:
            raise ValueError(f"ppo.weight_decay is {self.weight_decay}, and ppo.optimizer adam takes none")
        if self.horizon is None and self.adap_kl_ctrl and not self.init_kl_coef:
            raise ValueError(
                "ppo.init_kl_coef is 0, which no factor moves towards ppo.target: give a price above 0, or "
                "ppo.adap_kl_ctrl false"
            )
        if self.use_score_norm and not self.use_score_scaling:
            raise ValueError("ppo.use_score_norm needs ppo.use_score_scaling")
        return self


class PolicyEvalParams(Section):
    """Policy against SFT on held-out prompts."""

    prompts: int = Field(
        1000, ge=1, description="most held-out prompts, and of rl's to choose temperatures; by hash"
    )
    samples_per_prompt: int = Field(
        4, ge=1, description="sampled responses per prompt and temperature, beside one greedy response"
    )
    temperatures: tuple[float, ...] = Field(
        (1.0, 0.7, 0.4, 0.2), description="of sampling; greedy and ppo.temperature are always there"
    )
    best_of: int = Field(16, ge=1, description="best-of-n of SFT is estimated for n = 1 … this")
    best_of_samples: int = Field(
        16, ge=1, description="SFT's responses per prompt that best-of-n is estimated from"
    )
    bootstrap_samples: int = Field(1000, ge=100, description="resamples of clusters behind each interval")

    @field_validator("temperatures", mode="before")
    @classmethod
    def _temperatures(cls, given: Any) -> Any:
        if isinstance(given, str):  # as `params use` hands it on: 1,.7 or [1, .7]
            given = [text for each in given.strip().strip("[]").split(",") if (text := each.strip())]
        for each in given if isinstance(given, list | tuple) else ():
            if isinstance(each, bool):
                raise ValueError(f"policy_eval.temperatures: {each} is no number")
            if str(each).strip().lower() == "greedy":
                raise ValueError("policy_eval.temperatures: greedy is always evaluated; leave it out")
        return given

    @model_validator(mode="after")
    def _samples(self) -> PolicyEvalParams:
        if not self.temperatures:
            raise ValueError("policy_eval.temperatures is empty; one at least is wanted")
        for each in self.temperatures:
            if each == 0:
                raise ValueError("policy_eval.temperatures: 0 is greedy, always evaluated; leave it out")
            if each < COLDEST:
                raise ValueError(f"policy_eval.temperatures: {each:g} is below {COLDEST:g}")
            if self.temperatures.count(each) > 1:
                raise ValueError(f"policy_eval.temperatures: {each:g} stands there twice")
        if self.best_of > self.best_of_samples:
            raise ValueError(
                f"policy_eval.best_of ({self.best_of}) exceeds policy_eval.best_of_samples "
                f"({self.best_of_samples}): the best of n is drawn from n samples at least"
            )
        return self


class RegisterParams(Section):
    """Names in the MLflow registry."""

    prefix: str = Field(
        "stackrl", pattern=r"^[A-Za-z][A-Za-z0-9_-]*$", description="models: <prefix>-sft, -reward, -policy"
    )


class Params(Section):
    """A complete run."""

    seed: int = Field(0, ge=0, description="every draw derives its own seed from (seed, stage, purpose)")
    machine: MachineParams = MachineParams()
    model: ModelParams = ModelParams()
    data: DataParams = DataParams()
    pack: PackParams = PackParams()
    sft: SFTParams = SFTParams()
    reward: RewardParams = RewardParams()
    reward_eval: RewardEvalParams = RewardEvalParams()
    ppo: PPOParams = PPOParams()
    policy_eval: PolicyEvalParams = PolicyEvalParams()
    register: RegisterParams = RegisterParams()

    @model_validator(mode="after")
    def _adapters(self) -> Params:
        if self.model.quantize != "none":
            if not self.model.base:
                raise ValueError("model.quantize needs model.base: a model made from nothing has no base")
            for name in ("sft", "reward", "ppo"):
                is_frozen = name == "reward" and self.reward.way == "frozen_style"
                if not (getattr(self, name).lora_rank or is_frozen):
                    raise ValueError(
                        f"{name}.lora_rank is 0, but model.quantize is {self.model.quantize}: on a quantised "
                        "base only an adapter learns"
                    )
            if self.ppo.num_value_layers_unfrozen != 0:
                raise ValueError("ppo.num_value_layers_unfrozen: blocks of a quantised base cannot be copied")
        return self

    @model_validator(mode="after")
    def _lengths(self) -> Params:
        pack, ppo = self.pack, self.ppo
        if pack.document_tokens > pack.row_tokens:
            raise ValueError(
                f"pack.document_tokens ({pack.document_tokens}) exceeds pack.row_tokens ({pack.row_tokens})"
            )
        if not self.model.base:
            room = self.model.config.max_position_embeddings
            if pack.document_tokens > room or pack.prompt_tokens + ppo.response_tokens > room:
                raise ValueError(
                    f"model.config.max_position_embeddings ({room}) is shorter than pack.document_tokens "
                    f"({pack.document_tokens}) or pack.prompt_tokens + ppo.response_tokens "
                    f"({pack.prompt_tokens} + {ppo.response_tokens})"
                )
        return self
