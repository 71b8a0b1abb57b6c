"""A small language model learns to please a sentiment classifier: the cells of a notebook, for TRL 0.11.

Arguments: folders of language model and classifier, JSON lines with `text`, folder for the result.
"""

import sys

import pandas as pd
import torch
from datasets import load_dataset
from tqdm import tqdm
from transformers import AutoTokenizer, pipeline

from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from trl.core import LengthSampler

tqdm.pandas()
language_model, classifier, texts_file, result = sys.argv[1:]

# %% settings: most of them are read again below
config = PPOConfig(model_name=language_model, learning_rate=1.41e-5, log_with=None)
config.batch_size, config.mini_batch_size = 4, 2
config.backward_batch_size = config.mini_batch_size * config.gradient_accumulation_steps
config.query_dataset = texts_file
sent_kwargs = {"top_k": None, "function_to_apply": "none", "batch_size": 16}


# %% prompts: the first tokens of reviews
def build_dataset(config, shortest=2, longest=8):
    tokenizer = AutoTokenizer.from_pretrained(config.model_name)
    tokenizer.pad_token = tokenizer.eos_token
    rows = load_dataset("json", data_files=config.query_dataset, split="train")
    rows = rows.rename_columns({"text": "review"}).filter(lambda row: len(row["review"]) > 10, batched=False)
    input_size = LengthSampler(shortest, longest)

    def tokenize(row):
        row["input_ids"] = tokenizer.encode(row["review"])[: input_size()]
        row["query"] = tokenizer.decode(row["input_ids"])
        return row

    rows = rows.map(tokenize, batched=False)
    rows.set_format(type="torch")
    return rows


def collator(rows):
    return {key: [row[key] for row in rows] for key in rows[0]}


dataset = build_dataset(config)

# %% policy, reference, trainer
model = AutoModelForCausalLMWithValueHead.from_pretrained(config.model_name)
ref_model = AutoModelForCausalLMWithValueHead.from_pretrained(config.model_name)
tokenizer = AutoTokenizer.from_pretrained(config.model_name)
tokenizer.pad_token = tokenizer.eos_token
ppo_trainer = PPOTrainer(config, model, ref_model, tokenizer, dataset=dataset, data_collator=collator)

# %% the classifier
device = ppo_trainer.accelerator.device
if ppo_trainer.accelerator.num_processes == 1:
    device = 0 if torch.cuda.is_available() else "cpu"
sentiment_pipe = pipeline("sentiment-analysis", model=classifier, device=device)
print(sentiment_pipe("what a good text", **sent_kwargs))

# %% sampling, scoring, learning
gen_kwargs = {
    "min_length": -1, "top_k": 0.0, "top_p": 1.0, "do_sample": True, "pad_token_id": tokenizer.eos_token_id,
}  # fmt: skip
output_length_sampler = LengthSampler(4, 16)
generation_kwargs = dict(gen_kwargs)
for _epoch, batch in enumerate(tqdm(ppo_trainer.dataloader)):
    query_tensors = batch["input_ids"]
    response_tensors = []
    for query in query_tensors:
        generation_kwargs["max_new_tokens"] = output_length_sampler()
        query_response = ppo_trainer.generate(query, **generation_kwargs).squeeze()
        response_tensors.append(query_response[-(len(query_response) - len(query)) :])
    batch["response"] = [tokenizer.decode(r.squeeze()) for r in response_tensors]
    texts = [q + r for q, r in zip(batch["query"], batch["response"], strict=True)]
    outputs = sentiment_pipe(texts, **sent_kwargs)
    rewards = [torch.tensor(i["score"]) for output in outputs for i in output if i["label"] == "POSITIVE"]
    stats = ppo_trainer.step(query_tensors, response_tensors, rewards)
    ppo_trainer.log_stats(stats, batch, rewards)
print("step:", stats["ppo/mean_scores"], stats["objective/kl"])

# %% what both models say now
dataset.set_format("pandas")
some = dataset[:].sample(2, random_state=0)
game_data = {"query": some["query"].tolist()}
said = {"before": [], "after": []}
for ids in some["input_ids"].tolist():
    query, length = torch.tensor([list(ids)]), output_length_sampler()
    for name, speaker in (("before", ref_model), ("after", model)):
        out = speaker.generate(query.to(device), max_new_tokens=length, **gen_kwargs).squeeze()[-length:]
        said[name].append(tokenizer.decode(out))
for name, texts in said.items():
    game_data[f"response ({name})"] = texts
    pairs = [q + r for q, r in zip(game_data["query"], texts, strict=True)]
    scores = [output[0]["score"] for output in sentiment_pipe(pairs, **sent_kwargs)]
    game_data[f"rewards ({name})"] = scores
frame = pd.DataFrame(game_data)
print(frame[["rewards (before)", "rewards (after)"]].mean())

# %% the result
model.save_pretrained(result)
tokenizer.save_pretrained(result)
