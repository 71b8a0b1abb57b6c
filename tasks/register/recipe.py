"""How each kind of model is to be used: the numbers of the run, and the code that travels along."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from params.schema import Params

MODELS = {"sft": "sft", "reward": "reward", "policy": "ppo"}  # name in the registry -> stage
SAMPLING = ("max_new_tokens", "do_sample", "temperature", "top_k", "top_p")
SERVING = Path(__file__).parent / "serving"
EXPERTS = Path(__file__).parents[1] / "lm" / "heads" / "frozen_style.py"  # stands alone, like SERVING


@dataclass(frozen=True, slots=True)
class Recipe:
    """What is the same for all weights of a kind.

    Attributes:
        kind: sft, reward or policy.
        numbers: defaults of an answer by transformers' names, the run's own; none of a reward model.
        cut_prompts_to: tokens of a prompt that stay, from its end; None: longer ones are refused.
        is_frozen_style: a reward model of `reward.way: frozen_style`, whose experts' code travels too.
    """

    kind: str
    numbers: Mapping[str, Any]
    cut_prompts_to: int | None
    is_frozen_style: bool = False

    @classmethod
    def of(cls, kind: str, params: Params) -> Recipe:
        """As the run samples: PPO's length and temperature, from all tokens."""
        if kind == "reward":
            return cls(kind, {}, None, params.reward.way == "frozen_style")
        values = (params.ppo.response_tokens, True, params.ppo.temperature, 0, 1.0)
        most = params.pack.prompt_tokens if params.pack.long_prompts == "left_truncate" else None
        return cls(kind, dict(zip(SAMPLING, values, strict=True)), most)

    @property
    def is_reward(self) -> bool:
        """Whether it scores; else it answers."""
        return self.kind == "reward"

    @property
    def code(self) -> Path:
        """The file that travels along."""
        return SERVING / ("score.py" if self.is_reward else "answer.py")

    @property
    def digest(self) -> str:
        """Of code and numbers: the same weights with another digest answer differently."""
        facts = repr((sorted(self.numbers.items()), self.cut_prompts_to)).encode()
        experts = EXPERTS.read_bytes() if self.is_frozen_style else b""
        return sha256(self.code.read_bytes() + facts + experts).hexdigest()[:16]

    def description(self, name: str, closing: str = "") -> str:
        """Two lines for the registry: what it is, and how it is called.

        Args:
            name: in the registry.
            closing: text of the token that ends a scored document.
        """
        call = f'mlflow.pyfunc.load_model("models:/{name}@candidate").predict'
        if self.is_frozen_style:
            return (
                "Scores an answer to a question as in training, higher is better; style and an encoder.  \n"
                f'`{call}({{"question": ["…"], "answer": ["…"]}})`; by mlflow.pyfunc alone.'
            )
        if self.is_reward:
            return (
                "Scores an answer to a question as in training, higher is better.  \n"
                f'`{call}({{"question": ["…"], "answer": ["…"]}})`; mlflow.transformers gives the same for '
                f"`Question: …\\n\\nAnswer: …{closing}`."
            )
        made = "aligned with the reward model by PPO" if self.kind == "policy" else "fine-tuned on answers"
        numbers = ", ".join(f"{key}={value}" for key, value in self.numbers.items())
        return (
            f"Answers a question; {made}. Params and their defaults: {numbers}.  \n"
            f'`{call}(["How do I …?"], params={{"do_sample": False}})`; for mlflow.transformers a prompt is '
            "`Question: …\\n\\nAnswer:`, without a space at its end."
        )
