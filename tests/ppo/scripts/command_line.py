"""PPO from a command line, for TRL 0.11: all of PPOConfig are options; causal, seq2seq or with LoRA."""

from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from datasets import load_dataset
from peft import LoraConfig
from tqdm import tqdm
from transformers import AutoTokenizer, HfArgumentParser, pipeline

from trl import AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead
from trl import PPOConfig, PPOTrainer, set_seed
from trl.core import LengthSampler

tqdm.pandas()


@dataclass
class ScriptArguments:
    use_seq2seq: bool = field(default=False, metadata={"help": "an encoder-decoder"})
    trust_remote_code: bool = field(default=False, metadata={"help": "of transformers"})
    use_peft: bool = field(default=False, metadata={"help": "train an adapter"})
    lora_alpha: float | None = field(default=16, metadata={"help": "of the adapter"})
    lora_r: int | None = field(default=16, metadata={"help": "of the adapter"})


args, ppo_config = HfArgumentParser((ScriptArguments, PPOConfig)).parse_args_into_dataclasses()
sent_kwargs = {"top_k": None, "function_to_apply": "none", "batch_size": 16}
model_class = AutoModelForSeq2SeqLMWithValueHead if args.use_seq2seq else AutoModelForCausalLMWithValueHead


def build_dataset(config, query_dataset, shortest=2, longest=8):
    tokenizer = AutoTokenizer.from_pretrained(config.model_name)
    tokenizer.pad_token = tokenizer.eos_token
    rows = load_dataset("json", data_files=query_dataset, split="train").rename_columns({"text": "review"})
    rows = rows.filter(lambda row: len(row["review"]) > 10, num_proc=config.dataset_num_proc)
    input_size = LengthSampler(shortest, longest)

    def tokenize(row):
        row["input_ids"] = tokenizer.encode(row["review"])[: input_size()]
        row["query"] = tokenizer.decode(row["input_ids"])
        return row

    rows = rows.map(tokenize, batched=False, num_proc=config.dataset_num_proc)
    rows.set_format(type="torch")
    return rows


dataset = build_dataset(ppo_config, ppo_config.query_dataset)


def collator(rows):
    return {key: [row[key] for row in rows] for key in rows[0]}


set_seed(ppo_config.seed)
if not args.use_peft:
    ref_model = model_class.from_pretrained(ppo_config.model_name, trust_remote_code=args.trust_remote_code)
    device_map = peft_config = None
else:
    peft_config = LoraConfig(
        r=args.lora_r, lora_alpha=args.lora_alpha, bias="none", target_modules=["q_proj", "v_proj"],
        task_type="CAUSAL_LM",
    )  # fmt: skip
    ref_model = None
    device_map = {"": Accelerator().local_process_index} if torch.cuda.is_available() else None
model = model_class.from_pretrained(
    ppo_config.model_name, trust_remote_code=args.trust_remote_code, device_map=device_map,
    peft_config=peft_config,
)  # fmt: skip
tokenizer = AutoTokenizer.from_pretrained(ppo_config.model_name)
tokenizer.pad_token_id = tokenizer.eos_token_id
ppo_trainer = PPOTrainer(ppo_config, model, ref_model, tokenizer, dataset=dataset, data_collator=collator)

device = ppo_trainer.accelerator.device
if ppo_trainer.accelerator.num_processes == 1:
    device = 0 if torch.cuda.is_available() else "cpu"
ds_plugin = ppo_trainer.accelerator.state.deepspeed_plugin
task, reward_name = ppo_config.reward_model.split(":")
if ds_plugin is not None and ds_plugin.is_zero3_init_enabled():
    with ds_plugin.zero3_init_context_manager(enable=False):
        sentiment_pipe = pipeline(task, model=reward_name, device=device)
else:
    sentiment_pipe = pipeline(task, model=reward_name, device=device)
if sentiment_pipe.tokenizer.pad_token_id is None:
    sentiment_pipe.tokenizer.pad_token_id = tokenizer.pad_token_id
if sentiment_pipe.model.config.pad_token_id is None:
    sentiment_pipe.model.config.pad_token_id = tokenizer.pad_token_id

generation_kwargs = {
    "min_length": -1, "top_k": 0.0, "top_p": 1.0, "do_sample": True,
    "pad_token_id": tokenizer.eos_token_id, "max_new_tokens": 8,
}  # fmt: skip
for _epoch, batch in tqdm(enumerate(ppo_trainer.dataloader)):
    query_tensors = batch["input_ids"]
    response_tensors, ref_response_tensors = ppo_trainer.generate(
        query_tensors, return_prompt=False, generate_ref_response=True, **generation_kwargs
    )
    batch["response"] = tokenizer.batch_decode(response_tensors)
    batch["ref_response"] = tokenizer.batch_decode(ref_response_tensors)
    for name, column in (("rewards", "response"), ("ref_rewards", "ref_response")):
        texts = [q + r for q, r in zip(batch["query"], batch[column], strict=True)]
        outputs = sentiment_pipe(texts, **sent_kwargs)
        batch[name] = [torch.tensor(output[1]["score"]) for output in outputs]
    rewards = batch.pop("rewards")
    stats = ppo_trainer.step(query_tensors, response_tensors, rewards)
    columns = ["query", "response", "ref_response", "ref_rewards"]
    ppo_trainer.log_stats(stats, batch, rewards, columns_to_log=columns)
print("step:", stats["ppo/mean_scores"], stats["objective/kl"])
