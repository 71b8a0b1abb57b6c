"""Policy, reference and reward model on one base, by adapters, for TRL 0.11."""

from dataclasses import dataclass, field

import torch
from accelerate import PartialState
from datasets import load_dataset
from peft import LoraConfig
from tqdm import tqdm
from transformers import AutoTokenizer, BitsAndBytesConfig, HfArgumentParser

from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from trl.core import LengthSampler


@dataclass
class ScriptArguments:
    model_name: str | None = field(default=None, metadata={"help": "the base"})
    dataset_name: str | None = field(default=None, metadata={"help": "JSON lines with `text`"})
    rm_adapter: str | None = field(default=None, metadata={"help": "the reward adapter"})
    log_with: str | None = field(default=None, metadata={"help": "of PPOConfig"})
    use_safetensors: bool | None = field(default=False, metadata={"help": "of from_pretrained"})
    seed: int | None = field(default=0, metadata={"help": "of PPOConfig"})
    use_score_scaling: bool | None = field(default=False, metadata={"help": "of PPOConfig"})
    use_score_norm: bool | None = field(default=False, metadata={"help": "of PPOConfig"})
    score_clip: float | None = field(default=None, metadata={"help": "of PPOConfig"})
    dataset_num_proc: int | None = field(default=None, metadata={"help": "workers that tokenise"})


script_args = HfArgumentParser(ScriptArguments).parse_args_into_dataclasses()[0]


def create_and_prepare_dataset(tokenizer, num_proc):
    rows = load_dataset("json", data_files=script_args.dataset_name, split="train")
    input_size = LengthSampler(6, 12)

    def tokenize(row):
        row["input_ids"] = tokenizer.encode(row["text"])[: input_size()]
        row["query"] = tokenizer.decode(row["input_ids"])
        return row

    rows = rows.map(tokenize, batched=False, num_proc=num_proc)
    rows.set_format("torch")
    return rows


lora_config = LoraConfig(
    r=4, lora_alpha=32, lora_dropout=0.05, bias="none", target_modules=["q_proj", "v_proj"],
    task_type="CAUSAL_LM",
)  # fmt: skip
nf4_config = None
if torch.cuda.is_available():
    nf4_config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
model = AutoModelForCausalLMWithValueHead.from_pretrained(
    script_args.model_name, device_map={"": 0} if torch.cuda.is_available() else None,
    peft_config=lora_config, quantization_config=nf4_config,
    reward_adapter=script_args.rm_adapter, use_safetensors=script_args.use_safetensors,
)  # fmt: skip
tokenizer = AutoTokenizer.from_pretrained(script_args.model_name)
tokenizer.pad_token = tokenizer.eos_token
with PartialState().local_main_process_first():
    dataset = create_and_prepare_dataset(tokenizer, script_args.dataset_num_proc)


def collator(rows):
    return {key: [row[key] for row in rows] for key in rows[0]}


config = PPOConfig(
    model_name=script_args.model_name, log_with=script_args.log_with, learning_rate=1e-5, batch_size=4,
    mini_batch_size=2, gradient_accumulation_steps=2, optimize_cuda_cache=True, seed=script_args.seed,
    use_score_scaling=script_args.use_score_scaling, use_score_norm=script_args.use_score_norm,
    score_clip=script_args.score_clip,
)  # fmt: skip
ppo_trainer = PPOTrainer(
    config, model, ref_model=None, tokenizer=tokenizer, dataset=dataset, data_collator=collator
)
generation_kwargs = {
    "top_k": 0.0, "top_p": 0.9, "do_sample": True, "pad_token_id": tokenizer.pad_token_id,
    "max_new_tokens": 8,
}  # fmt: skip
for _epoch, batch in tqdm(enumerate(ppo_trainer.dataloader)):
    question_tensors = batch["input_ids"]
    response_tensors = ppo_trainer.generate(question_tensors, return_prompt=False, **generation_kwargs)
    batch["response"] = tokenizer.batch_decode(response_tensors, skip_special_tokens=True)
    texts = [q + r for q, r in zip(batch["query"], batch["response"], strict=True)]
    inputs = tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")
    inputs = inputs.to(ppo_trainer.accelerator.device)
    inputs.pop("token_type_ids", None)
    raw_rewards = ppo_trainer.accelerator.unwrap_model(ppo_trainer.model).compute_reward_score(**inputs)
    rewards = [raw_rewards[i, -1, 1] for i in range(len(raw_rewards))]
    stats = ppo_trainer.step(question_tensors, response_tensors, rewards)
    ppo_trainer.log_stats(stats, batch, rewards)
print("step:", stats["ppo/mean_scores"], stats["objective/kl"])
