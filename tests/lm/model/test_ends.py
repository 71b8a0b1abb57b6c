"""Special tokens are the base model's: every road from base to saved model leaves them as they were."""

from __future__ import annotations

import json
from itertools import product

import pytest
import tiny
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from tasks.lm import AutoModelForCausalLMWithValueHead
from tasks.lm.heads.reward_model import RewardModel
from tasks.lm.model.ends import closed, ends_of, fit_special_tokens, ids_of
from tasks.lm.model.loading import fit_embeddings, load_causal, load_tokenizer, save_model
from tasks.lm.sampling.generation import draw_uniforms, generate
from tasks.ppo import PPOConfig, PPOTrainer
from tasks.reward import RewardConfig, RewardTrainer
from tasks.sft import SFTConfig, SFTTrainer

TURN, TEXT = "<|im_end|>", "<|endoftext|>"
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
ROWS = [{"prompt": f"{i} + 1 =", "completion": f" {i + 1}"} for i in range(4)]
PAIRS = [{"prompt": f"{i} + 1 =", "chosen": f" {i + 1}", "rejected": " 0"} for i in range(4)]


def chat_tokenizer(pad=TEXT, bos="<s>", eos=TURN):
    """Byte-level, every special token of its own, a bos that it writes itself, a chat template."""
    special = [TURN, TEXT, "<|im_start|>", "<s>", "<unk>", "<sep>", "<tool>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate([*special, *alphabet])}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    if bos:
        raw.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, raw.token_to_id(bos))]
        )
    keys = {"pad_token": pad, "bos_token": bos, "eos_token": eos, "unk_token": "<unk>", "sep_token": "<sep>"}
    found = PreTrainedTokenizerFast(
        tokenizer_object=raw, additional_special_tokens=["<|im_start|>", "<tool>"], padding_side="left",
        clean_up_tokenization_spaces=False, **{k: v for k, v in keys.items() if v},
    )  # fmt: skip
    found.chat_template = TEMPLATE
    return found


def base(folder, pad=TEXT, as_list=("generation", "config"), **keys):
    """A chat model's folder; its tokenizer's eos ends turns, a second one texts."""
    tokenizer = chat_tokenizer(pad, **keys)
    model = tiny.causal(vocab_size=len(tokenizer), bos_token_id=3, pad_token_id=1)
    model.config.eos_token_id = [1, 0] if "config" in as_list else 0
    model.generation_config = GenerationConfig(
        eos_token_id=[1, 0] if "generation" in as_list else 0, bos_token_id=3, pad_token_id=1,
        suppress_tokens=[6], forced_bos_token_id=None, do_sample=True, temperature=0.6,
    )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def facts(folder) -> dict:
    """What a folder says of its special tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    generation = json.loads((folder / "generation_config.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    names = ("bos", "pad", "unk", "sep", "eos")
    return {
        "generation": {
            k: v for k, v in generation.items() if k not in ("transformers_version", "_from_model_config")
        },
        "config": {k: v for k, v in config.items() if k.endswith("token_id") or k.endswith("token_ids")},
        "tokenizer": {name: getattr(tokenizer, f"{name}_token") for name in names},
        "others": sorted(map(str, tokenizer.all_special_tokens)),
        "template": tokenizer.chat_template,
        "side": tokenizer.padding_side,
        "a text": tokenizer("1 + 1")["input_ids"],
    }


def by_name(folder, out):
    trainer = SFTTrainer(str(folder), sft_config(out), ROWS)
    trainer.train()
    trainer.save_model()


def by_object(folder, out):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    trainer = SFTTrainer(model, sft_config(out), ROWS, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()


def by_stages(folder, out):
    """pack saves the tokenizer, sft reads it, ppo what sft saved."""
    from tasks.lm.model.ends import save_tokenizer

    save_tokenizer(load_tokenizer(folder), out / "tokenizer")
    model, tokenizer = load_causal(folder), load_tokenizer(out / "tokenizer")
    fit_embeddings(model, tokenizer)
    save_model(model, tokenizer, out / "sft")
    by_ppo(out / "sft", out)


def by_ppo(folder, out):
    policy = AutoModelForCausalLMWithValueHead(load_causal(folder))
    PPOTrainer(PPOConfig(), policy, tokenizer=load_tokenizer(folder), device="cpu").save_pretrained(out)


def sft_config(out):
    return SFTConfig(str(out), max_steps=1, use_cpu=True, save_strategy="no", disable_tqdm=True)


@pytest.mark.parametrize("road", [by_name, by_object, by_stages, by_ppo])
@pytest.mark.parametrize(
    "keys",
    [{}, {"as_list": ("generation",)}, {"as_list": ()}, {"pad": TURN}, {"pad": "<unk>"}, {"bos": None}],
    ids=lambda keys: str(keys or "two ends"),
)
def test_a_saved_model_says_of_its_special_tokens_what_its_base_said(tmp_path, road, keys):
    folder = base(tmp_path / "base", **keys)
    before = facts(folder)
    road(folder, tmp_path / "out")
    assert facts(tmp_path / "out") == before


@pytest.mark.parametrize("road", [by_name, by_object, by_stages])
@pytest.mark.parametrize("ends", [1, [1], [1, 2]])
def test_the_tokenizers_eos_joins_those_of_the_base(tmp_path, road, ends):
    """As where a conversation's end was added to a base that was trained on texts."""
    folder = base(tmp_path / "base")
    for name in ("config.json", "generation_config.json"):
        values = json.loads((folder / name).read_text()) | {"eos_token_id": ends}
        (folder / name).write_text(json.dumps(values))
    road(folder, tmp_path / "out")
    found = {name: json.loads((tmp_path / "out" / name).read_text())["eos_token_id"] for name in
             ("config.json", "generation_config.json")}  # fmt: skip
    assert found["generation_config.json"] == [*ids_of(ends), 0]
    assert found["config.json"] == ([*ends, 0] if isinstance(ends, list) else 0)


def test_a_reward_model_pads_with_what_ends_no_text(tmp_path):
    """Its score is read at the last token that is not pad; the policy's own pad ends texts."""
    folder = base(tmp_path / "base")
    args = RewardConfig(
        str(tmp_path / "rm"), max_steps=1, use_cpu=True, save_strategy="no", disable_tqdm=True
    )
    trainer = RewardTrainer(str(folder), args, PAIRS)
    trainer.train()
    trainer.save_model()
    config = json.loads((tmp_path / "rm" / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "rm")
    assert config["eos_token_id"] == [1, 0] and config["pad_token_id"] == tokenizer.pad_token_id not in (0, 1)
    assert RewardModel.load(tmp_path / "rm", load_tokenizer(folder)).shares_tokens
    assert (tokenizer.bos_token, tokenizer.chat_template) == ("<s>", TEMPLATE)


def test_which_tokens_end_a_text():
    model = tiny.causal()
    assert ends_of(model, tiny.SPECIAL) == ends_of(model) == (1,)
    model.generation_config.eos_token_id = [7, 5, 7]
    assert ends_of(model, tiny.SPECIAL) == (1, 7, 5) and ends_of(model) == (7, 5)
    model.config.eos_token_id = [9]
    assert ends_of(model) == (7, 5, 9)
    model.generation_config.eos_token_id, model.config.eos_token_id = None, None
    assert ends_of(model) == ()
    fit_special_tokens(model, tiny.SPECIAL)
    assert (model.generation_config.eos_token_id, model.config.eos_token_id) == (1, 1)


@pytest.mark.parametrize(("kind", "draws"), product(["llama", "gemma2", "bloom", "t5"], [False, True]))
def test_sampling_ends_at_each(kind, draws):
    """The first of them cuts a response short, and changes nothing before."""
    model = tiny.seq2seq(kind) if kind == "t5" else tiny.causal(kind)
    prompts, length = tiny.drawn([3, 5, 2, 4, 6, 3, 7, 5], seed=3), 12
    uniforms = draw_uniforms(range(len(prompts)), length) if draws else None
    keys = {"max_tokens": length, "pad_id": 0, "uniforms": uniforms}
    whole = generate(model, prompts, eos_id=None, **keys).lists()
    ends = [whole[0][2], whole[1][4], whole[2][1], 99]  # the last is none of the vocabulary's
    cuts = [next((i for i, token in enumerate(row) if token in ends), length - 1) + 1 for row in whole]
    assert len(set(cuts)) > 1 or kind == "t5"
    found = generate(model, prompts, eos_id=ends, **keys).lists()
    assert found == [row[:cut] for row, cut in zip(whole, cuts, strict=True)]
    late = generate(model, prompts, eos_id=ends, min_tokens=5, **keys).lists()
    assert all(len(row) >= 6 or len(row) == length for row in late)
    assert not any(token in ends for row in late for token in row[:5])


def test_closing_by_hand():
    assert closed([[5, 7], [5, 1], [5, 6], [7], []], (1, 7), 1) == [[5, 1], [5, 1], [5, 6], [1], []]


def ppo_trainer(**keys):
    model = tiny.causal()
    model.generation_config.eos_token_id = [1, 7]
    policy = AutoModelForCausalLMWithValueHead(model)
    config = PPOConfig(batch_size=3, mini_batch_size=3, response_tokens=6, **keys)
    return PPOTrainer(config, policy, tokenizer=tiny.SPECIAL, device="cpu")


@pytest.mark.parametrize("dense", [False, True])
def test_a_response_that_ended_by_any_of_them_pays_no_penalty(dense):
    trainer = ppo_trainer(missing_eos_penalty=1.0)
    queries = tiny.drawn([3, 3, 3])
    responses = [[5, 6, 1], [5, 6, 7], [5, 6, 8]]
    scores = [torch.zeros(3) for _ in queries] if dense else torch.zeros(3)
    from tasks.ppo.batch import check_batch

    batch = check_batch(queries, responses, scores, None, 3, trainer.vocabulary(), trainer.room())
    paid = trainer.shape(batch, learn=False)
    assert [row[-1].item() if dense else row.item() for row in paid] == [0.0, 0.0, -1.0]


def test_rollouts_and_generate_end_at_each(tmp_path):
    trainer = ppo_trainer()
    prompts = tiny.drawn([3] * 40, seed=4)
    sampled = trainer.sample(prompts, range(40)).lists()
    last = {row[-1] for row in sampled if len(row) < 6}
    assert last == {1, 7} and not any({1, 7} & set(row[:-1]) for row in sampled)
    tensors = [torch.tensor(prompt) for prompt in prompts]
    own = trainer.generate(tensors, return_prompt=False)
    assert {row[-1].item() for row in own if len(row) < 6} == {1, 7}
    given = trainer.generate(tensors, return_prompt=False, eos_token_id=[5, 9])
    assert {row[-1].item() for row in given if len(row) < 6} == {5, 9}
    assert not any({5, 9} & set(row[:-1].tolist()) for row in given)
