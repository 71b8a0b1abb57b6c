"""Answers to StackExchange questions against a reward model, with LoRA, for TRL 0.11."""

from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from datasets import load_dataset
from peft import LoraConfig
from tqdm import tqdm
from transformers import Adafactor, AutoTokenizer, HfArgumentParser, pipeline

from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, set_seed
from trl.core import LengthSampler

tqdm.pandas()


@dataclass
class ScriptArguments:
    model_name: str | None = field(default="", metadata={"help": "the policy"})
    tokenizer_name: str | None = field(default="", metadata={"help": "its tokenizer"})
    reward_model_name: str | None = field(default="", metadata={"help": "the reward model"})
    questions: str | None = field(default="", metadata={"help": "JSON lines with `question`"})
    log_with: str | None = field(default=None, metadata={"help": "of PPOConfig"})
    learning_rate: float | None = field(default=1.41e-5, metadata={"help": "of PPOConfig"})
    output_max_length: int | None = field(default=12, metadata={"help": "most new tokens"})
    mini_batch_size: int | None = field(default=1, metadata={"help": "of PPOConfig"})
    batch_size: int | None = field(default=4, metadata={"help": "of PPOConfig"})
    ppo_epochs: int | None = field(default=2, metadata={"help": "of PPOConfig"})
    gradient_accumulation_steps: int | None = field(default=2, metadata={"help": "of PPOConfig"})
    adafactor: bool | None = field(default=False, metadata={"help": "the optimizer"})
    early_stopping: bool | None = field(default=False, metadata={"help": "of PPOConfig"})
    target_kl: float | None = field(default=0.1, metadata={"help": "of PPOConfig"})
    reward_baseline: float | None = field(default=0.0, metadata={"help": "taken from every score"})
    batched_gen: bool | None = field(default=False, metadata={"help": "not read"})
    save_freq: int | None = field(default=None, metadata={"help": "steps between two saved models"})
    output_dir: str | None = field(default="runs/", metadata={"help": "where to"})
    seed: int | None = field(default=0, metadata={"help": "of PPOConfig"})
    steps: int | None = field(default=8, metadata={"help": "of PPOConfig"})
    init_kl_coef: float | None = field(default=0.2, metadata={"help": "of PPOConfig"})
    adap_kl_ctrl: bool | None = field(default=True, metadata={"help": "of PPOConfig"})


script_args = HfArgumentParser(ScriptArguments).parse_args_into_dataclasses()[0]
config = PPOConfig(
    steps=script_args.steps, model_name=script_args.model_name, learning_rate=script_args.learning_rate,
    log_with=script_args.log_with, batch_size=script_args.batch_size,
    mini_batch_size=script_args.mini_batch_size,
    gradient_accumulation_steps=script_args.gradient_accumulation_steps, optimize_cuda_cache=True,
    early_stopping=script_args.early_stopping, target_kl=script_args.target_kl,
    ppo_epochs=script_args.ppo_epochs, seed=script_args.seed, init_kl_coef=script_args.init_kl_coef,
    adap_kl_ctrl=script_args.adap_kl_ctrl,
)  # fmt: skip
train_dataset = load_dataset("json", data_files=script_args.questions, split="train")
train_dataset = train_dataset.select(range(10))
original_columns = train_dataset.column_names
sent_kwargs = {
    "top_k": None, "function_to_apply": "none", "batch_size": 16, "truncation": True, "max_length": 64,
}  # fmt: skip
tokenizer = AutoTokenizer.from_pretrained(script_args.tokenizer_name)
if getattr(tokenizer, "pad_token", None) is None:
    tokenizer.pad_token = tokenizer.eos_token


def build_dataset(tokenizer):
    def preprocess(examples):
        found = {"query": [], "input_ids": []}
        for question in examples["question"]:
            query = "Question: " + question + "\n\nAnswer: "
            found["query"].append(query)
            found["input_ids"].append(tokenizer(query, truncation=True, max_length=64)["input_ids"])
        return found

    rows = train_dataset.map(preprocess, batched=True, num_proc=None, remove_columns=original_columns)
    rows = rows.filter(lambda row: len(row["input_ids"]) < 40, batched=False)
    rows.set_format(type="torch")
    return rows


def collator(rows):
    return {key: [row[key] for row in rows] for key in rows[0]}


dataset = build_dataset(tokenizer)
set_seed(config.seed)
device_map = {"": Accelerator().local_process_index} if torch.cuda.is_available() else None
lora_config = LoraConfig(
    r=4, lora_alpha=32, lora_dropout=0.05, bias="none", target_modules=["q_proj", "v_proj"],
    task_type="CAUSAL_LM",
)  # fmt: skip
eight_bits = {"load_in_8bit": True} if torch.cuda.is_available() else {}
model = AutoModelForCausalLMWithValueHead.from_pretrained(
    config.model_name, device_map=device_map, peft_config=lora_config, **eight_bits
)
optimizer = None
if script_args.adafactor:
    optimizer = Adafactor(
        filter(lambda p: p.requires_grad, model.parameters()), scale_parameter=False, relative_step=False,
        warmup_init=False, lr=config.learning_rate,
    )  # fmt: skip
ppo_trainer = PPOTrainer(
    config, model, ref_model=None, tokenizer=tokenizer, dataset=dataset, data_collator=collator,
    optimizer=optimizer,
)  # fmt: skip
device = ppo_trainer.accelerator.device
if ppo_trainer.accelerator.num_processes == 1:
    device = 0 if torch.cuda.is_available() else "cpu"
sentiment_pipe = pipeline(
    "sentiment-analysis", model=script_args.reward_model_name, device_map=device_map,
    model_kwargs=eight_bits, tokenizer=tokenizer, return_token_type_ids=False,
)  # fmt: skip
if sentiment_pipe.model.config.pad_token_id is None:
    sentiment_pipe.model.config.pad_token_id = sentiment_pipe.model.config.eos_token_id
generation_kwargs = {
    "top_k": 0.0, "top_p": 1.0, "do_sample": True, "pad_token_id": tokenizer.pad_token_id,
    "eos_token_id": 100_000,
}  # fmt: skip
output_length_sampler = LengthSampler(4, script_args.output_max_length)
for epoch, batch in tqdm(enumerate(ppo_trainer.dataloader)):
    if epoch >= config.total_ppo_epochs:
        break
    question_tensors = batch["input_ids"]
    response_tensors = ppo_trainer.generate(
        question_tensors, return_prompt=False, length_sampler=output_length_sampler, **generation_kwargs
    )
    batch["response"] = tokenizer.batch_decode(response_tensors, skip_special_tokens=True)
    texts = [q + r for q, r in zip(batch["query"], batch["response"], strict=True)]
    pipe_outputs = sentiment_pipe(texts, **sent_kwargs)
    rewards = [torch.tensor(output[0]["score"] - script_args.reward_baseline) for output in pipe_outputs]
    stats = ppo_trainer.step(question_tensors, response_tensors, rewards)
    ppo_trainer.log_stats(stats, batch, rewards)
    if script_args.save_freq and epoch and epoch % script_args.save_freq == 0:
        ppo_trainer.save_pretrained(script_args.output_dir + f"step_{epoch}")
print("step:", stats["ppo/mean_scores"], stats["objective/kl"])
