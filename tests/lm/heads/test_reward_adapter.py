"""A reward adapter beside the policy's: whose scores, on whose weights, and what is refused."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from adapted import copied, lora, moved, same_state, saved_base, saved_policy, saved_scorer
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from tasks.lm import AutoModelForCausalLMWithValueHead as Valued
from tasks.lm import AutoModelForSeq2SeqLMWithValueHead
from tasks.lm.adapters.active import at_work, reference_adapters
from tasks.lm.adapters.files import put_on
from tasks.lm.adapters.lora import merge_checked
from tasks.lm.attention.forest import serve_forest
from tasks.lm.heads.reward_adapter import load_reward_adapter
from tasks.lm.heads.scores import score_documents
from tasks.lm.model.loading import load_reward

DOCUMENTS = tiny.drawn([3, 7, 5], seed=1)


def padded(left: bool):
    """The documents as rows, junk where there is none of them."""
    width = max(map(len, DOCUMENTS)) + 1
    tokens = torch.full((len(DOCUMENTS), width), 9)
    mask = torch.zeros_like(tokens)
    for row, ids in enumerate(DOCUMENTS):
        place = slice(width - len(ids), None) if left else slice(len(ids))
        tokens[row, place], mask[row, place] = torch.tensor(ids), 1
    return tokens, mask


@pytest.fixture(params=["llama", "gpt2", "opt", "gemma2"])
def two(request, tmp_path):
    """A policy with a reward adapter, and the reward model that this was saved from."""
    base = saved_base(tmp_path / "base", request.param)
    scorer = saved_scorer(tmp_path / "reward", base)
    return Valued.from_pretrained(base, peft_config=lora(), reward_adapter=tmp_path / "reward"), scorer


def test_scores_are_the_reward_models(two):
    """One by one as plain transformers gives them; packed; and in rows that are padded on either side."""
    policy, scorer = two
    wanted = torch.stack([scorer(input_ids=torch.tensor([ids])).logits[0, 0] for ids in DOCUMENTS])
    assert wanted.std() > 0.01
    assert tiny.far(policy.score_documents(DOCUMENTS, rows=2), wanted) < 1e-5
    serve_forest(scorer)
    assert tiny.far(policy.score_documents(DOCUMENTS), score_documents(scorer, DOCUMENTS, 8)) < 1e-5
    for left in (True, False):
        scores = policy.compute_reward_score(*padded(left))
        assert scores.shape == (3, 8, 1) and scores.dtype == torch.float32
        assert tiny.far(scores[:, -1, 0], wanted) < 1e-5
    alone = policy.compute_reward_score(torch.tensor([DOCUMENTS[1]]))
    cut = policy.compute_reward_score(torch.tensor([DOCUMENTS[1][:4]]))
    assert tiny.far(alone[0, 3], cut[0, 3]) < 1e-5, "each token: of what ends there"


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_reward_adapter_becomes_a_plain_reward_model(kind, tmp_path):
    """Put on a scorer of the same base, with its head, and merged under the check."""
    base = saved_base(tmp_path / "base", kind)
    scorer = saved_scorer(tmp_path / "reward", base)
    wanted = score_documents(scorer, DOCUMENTS, 8)
    saved = load_reward_adapter(tmp_path / "reward")
    again = put_on(load_reward(base), saved, "default")
    assert not any(p.requires_grad for p in again.parameters())
    assert torch.equal(score_documents(again, DOCUMENTS, 8), wanted)
    merge_checked(again, DOCUMENTS).save_pretrained(tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert tiny.far(score_documents(merged, DOCUMENTS, 8), wanted) < 1e-5


def test_scoring_leaves_the_model_as_it_was(two):
    policy, _ = two
    before = policy.eval()(input_ids=torch.tensor([DOCUMENTS[1]]))[0]
    scores = policy.score_documents(DOCUMENTS)
    policy.train().pretrained_model.base_model.model.get_output_embeddings().eval()
    modes = [m.training for m in policy.modules()]
    flags = [p.requires_grad for p in policy.parameters()]
    assert torch.equal(policy.score_documents(DOCUMENTS), scores), "without dropout"
    assert [m.training for m in policy.modules()] == modes
    assert [p.requires_grad for p in policy.parameters()] == flags
    assert policy.pretrained_model.active_adapters == ["default"]
    assert torch.equal(policy.eval()(input_ids=torch.tensor([DOCUMENTS[1]]))[0], before)
    learns = [n for n, p in policy.named_parameters() if p.requires_grad]
    assert not any("reward" in n or n.startswith("score") for n in learns)


def test_the_head_stays_float32(tmp_path):
    base = saved_base(tmp_path / "base")
    saved_scorer(tmp_path / "reward", base)
    policy = Valued.from_pretrained(
        base, peft_config=lora(), reward_adapter=tmp_path / "reward", dtype=torch.bfloat16
    )
    assert policy.score.weight.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert policy.score(torch.ones(2, 16, dtype=torch.bfloat16)).dtype == torch.float32


def test_one_base_in_memory(tmp_path):
    """Policy, reference and reward model are the base's weights once, and what is small."""
    base = saved_base(tmp_path / "base")
    plain = {n: p.numel() for n, p in tiny.causal().named_parameters()}
    saved_scorer(tmp_path / "reward", base)
    saved_policy(tmp_path / "sft", base)
    policy = Valued.from_pretrained(tmp_path / "sft", reward_adapter=tmp_path / "reward")
    reference_adapters(policy.pretrained_model)
    small = ("lora_", "v_head", "score.")
    large = [n for n, _ in policy.named_parameters() if not any(part in n for part in small)]
    assert len(large) == len(plain)
    adapter = sum(v.numel() for v in load_file(tmp_path / "sft" / "adapter_model.safetensors").values())
    heads = 16 + 16 + 1
    assert sum(p.numel() for p in policy.parameters()) == sum(plain.values()) + 3 * adapter + heads
    places = {p.data_ptr() for n, p in policy.named_parameters() if n in large}
    seen = set()
    for names in (["default"], ["reference"], ["reward_model_adapter"], []):
        with at_work(policy.pretrained_model, names) as model:
            seen.add(frozenset(p.data_ptr() for n, p in model.named_parameters() if "lora_" not in n))
    assert seen == {frozenset(places)}


@pytest.mark.parametrize("way", ["fresh", "trained on", "stacked"])
def test_all_adapters_survive_save_and_load(tmp_path, way):
    base = saved_base(tmp_path / "base")
    saved_scorer(tmp_path / "reward", base)
    sft = saved_policy(tmp_path / "sft", base)
    source, config = {
        "fresh": (base, lora()), "trained on": (tmp_path / "sft", None), "stacked": (tmp_path / "sft", lora())
    }[way]  # fmt: skip
    keys = {"v_head_init_strategy": "normal"}
    policy = Valued.from_pretrained(source, peft_config=config, reward_adapter=tmp_path / "reward", **keys)
    names = reference_adapters(policy.pretrained_model)
    assert names == ([] if way == "fresh" else ["reference"])
    moved(policy.eval(), 5)
    policy.save_pretrained(tmp_path / "saved")
    found = Valued.from_pretrained(tmp_path / "saved").eval()
    ids = torch.tensor([DOCUMENTS[1]])
    for a, b in ((policy, found), (found, policy)):
        assert torch.equal(a(ids)[0], b(ids)[0]) and torch.equal(a(ids)[2], b(ids)[2])
    assert torch.equal(found.score_documents(DOCUMENTS), policy.score_documents(DOCUMENTS))
    learns = lambda m: {n for n, p in m.named_parameters() if p.requires_grad}  # noqa: E731
    assert learns(found) == learns(policy) and found.supports_rm_adapter
    if names:
        assert reference_adapters(found.pretrained_model) == names
        with at_work(found.pretrained_model, names) as reference:
            assert tiny.far(reference(input_ids=ids).logits, sft(input_ids=ids).logits) < 1e-6
    frozen = Valued.from_pretrained(tmp_path / "saved", is_trainable=False)
    assert learns(frozen) == {n for n in learns(policy) if "v_head" in n}
    kept = tmp_path / "saved" / "reward_model_adapter"
    again = Valued.from_pretrained(base, peft_config=lora(), reward_adapter=kept)
    assert torch.equal(again.score_documents(DOCUMENTS), policy.score_documents(DOCUMENTS))
    assert json.loads((kept / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    assert tiny.far(score_documents(PeftModel.from_pretrained(plain, kept), DOCUMENTS, 8),
                    policy.score_documents(DOCUMENTS)) < 1e-5, "plain peft finds the head too"  # fmt: skip
    merged = merge_checked(policy, DOCUMENTS)
    merged.save_pretrained(tmp_path / "merged")
    assert tiny.far(Valued.from_pretrained(tmp_path / "merged")(ids)[0], found(ids)[0]) < 1e-5
    assert tiny.far(Valued.from_pretrained(tmp_path / "merged")(ids)[2], found(ids)[2]) < 1e-5
    assert not merged.supports_rm_adapter and not merged.is_peft_model


def test_plain_peft_takes_no_part_for_the_whole(tmp_path):
    """A policy of two adapters has none where peft would look for the one."""
    base = saved_base(tmp_path / "base")
    saved_policy(tmp_path / "sft", base)
    Valued.from_pretrained(tmp_path / "sft", peft_config=lora()).save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "adapter_config.json").exists()
    path = tmp_path / "saved" / "adapters.json"
    facts = {"adapters": {"reference": False, "policy": True}, "at_work": ["reference", "policy"]}
    assert json.loads(path.read_text()) == facts | {"reward": None}
    for change in ({"reward": "../../reward"}, {"at_work": ["x"]}, {"at_work": []}, {"adapters": {"a/b": 1}}):
        path.write_text(json.dumps(facts | {"reward": None} | change))
        with pytest.raises(ValueError, match=r"adapters\.json does not describe adapters"):
            Valued.from_pretrained(tmp_path / "saved")
    for text in ("{", "{}", "[]"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"adapters\.json cannot be read"):
            Valued.from_pretrained(tmp_path / "saved")


def test_a_reward_adapter_of_several_labels_gives_each(tmp_path):
    base = saved_base(tmp_path / "base")
    scorer = saved_scorer(tmp_path / "reward", base, num_labels=2)
    policy = Valued.from_pretrained(base, peft_config=lora(), reward_adapter=tmp_path / "reward")
    ids = torch.tensor([[5, 6, 7, 8], [9, 4, 0, 0]])
    found = policy.compute_reward_score(ids, torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]))
    with torch.no_grad():
        wanted = [scorer(input_ids=row[None]).logits[0] for row in (ids[0], ids[1, :2])]
    assert found.shape == (2, 4, 2) and tiny.far(found[:, -1], torch.stack(wanted)) < 1e-5
    with pytest.raises(ValueError, match="the reward adapter has 2 labels; a score is one"):
        policy.score_documents([[5, 6]])


def test_a_reward_adapter_that_does_not_fit_is_refused(tmp_path):
    """And says what to do; the policy stays what it was."""
    base = saved_base(tmp_path / "base")
    other = saved_base(tmp_path / "other", seed=7)
    wide = saved_base(tmp_path / "wide", hidden_size=32)
    gpt = saved_base(tmp_path / "gpt2", "gpt2")
    for name, on in (("other", other), ("wide", wide), ("gpt2", gpt)):
        saved_scorer(tmp_path / f"reward-{name}", on)
    saved_policy(tmp_path / "headless", base)
    policy = Valued.from_pretrained(base, peft_config=lora(target_modules=["q_proj"]))
    before = copied(policy)

    def refused(folder, match, blank=False):
        if blank:  # no name tells: shapes and modules do
            path = folder / "adapter_config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": ""}))
        with pytest.raises(ValueError, match=match):
            policy.take_reward_adapter(load_reward_adapter(folder))
        assert same_state(policy, before) and not policy.supports_rm_adapter

    refused(tmp_path / "reward-other", r"is of the base .*other, the model is .*base; load .*other")
    refused(tmp_path / "reward-wide", r"over 32 numbers; one over 16 is wanted")
    refused(tmp_path / "reward-gpt2", r"another base: the model has no layer transformer\.h\.0", blank=True)
    refused(tmp_path / "headless", "has no score head; it must be trained as sequence classification")
    refused(tmp_path / "base", r"there is no adapter_config\.json in .*base")
    tensors = load_file(tmp_path / "reward-other" / "adapter_model.safetensors")
    name = next(n for n in tensors if n.endswith("down_proj.lora_A.weight"))
    tensors[name] = tensors[name][:, :5].contiguous()
    save_file(tensors, tmp_path / "reward-other" / "adapter_model.safetensors")
    refused(tmp_path / "reward-other", r"lora_A of .*down_proj is for 5 numbers, the model has 24", True)


@pytest.mark.parametrize("fault", ["a tensor less", "a tensor more", "another rank"])
def test_an_adapter_that_is_not_what_it_says_is_taken_off_again(tmp_path, fault):
    base = saved_base(tmp_path / "base")
    saved_scorer(tmp_path / "reward", base)
    path = tmp_path / "reward" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(n for n in tensors if n.endswith("down_proj.lora_B.weight"))
    change = {
        "a tensor less": {},
        "a tensor more": {name: tensors[name], "base_model.model.lm_head.lora_A.weight": torch.ones(2, 16)},
        "another rank": {name: tensors[name][:, :1].contiguous()},
    }[fault]
    del tensors[name]
    save_file(tensors | change, path)
    policy = Valued.from_pretrained(base, peft_config=lora())
    before, flags = copied(policy), [p.requires_grad for p in policy.parameters()]
    with pytest.raises(ValueError, match="does not fit its own configuration"):
        policy.take_reward_adapter(load_reward_adapter(tmp_path / "reward"))
    assert same_state(policy, before) and [p.requires_grad for p in policy.parameters()] == flags
    assert policy.pretrained_model.active_adapters == ["default"] and not policy.supports_rm_adapter


def test_a_reward_adapter_needs_a_policy_under_an_adapter(tmp_path):
    base = saved_base(tmp_path / "base")
    saved_scorer(tmp_path / "reward", base)
    with pytest.raises(ValueError, match="the policy has none; give peft_config"):
        Valued.from_pretrained(base, reward_adapter=tmp_path / "reward")
    with pytest.raises(ValueError, match="has no reward adapter"):
        Valued.from_pretrained(base).compute_reward_score(torch.tensor([[3]]))
    with pytest.raises(ValueError, match="has no reward adapter"):
        Valued.from_pretrained(base).score_documents([[3]])
    t5 = AutoModelForSeq2SeqLMWithValueHead.from_pretrained(tiny.seq2seq(), peft_config=lora())
    with pytest.raises(ValueError, match="encoder-decoders have no last token"):
        t5.take_reward_adapter(load_reward_adapter(tmp_path / "reward"))
    for name in ("lm_head", "default"):
        with pytest.raises(ValueError, match=f"cannot be called {name}"):
            Valued.from_pretrained(
                base, peft_config=lora(), reward_adapter=tmp_path / "reward", reward_adapter_name=name
            )


def test_a_base_that_moved_is_the_same_base(tmp_path, monkeypatch):
    """By a relative name, by a name that starts above the adapter, or by equal files under another name."""
    base = saved_base(tmp_path / "base")
    saved_scorer(tmp_path / "reward", base)
    copy = saved_base(tmp_path / "copy")
    path = tmp_path / "reward" / "adapter_config.json"
    Valued.from_pretrained(copy, peft_config=lora(), reward_adapter=tmp_path / "reward")
    for name in ("base", str(base)):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": name}))
        Valued.from_pretrained(base, peft_config=lora(), reward_adapter=tmp_path / "reward")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "team/elsewhere"}))
    with pytest.raises(ValueError, match="is of the base team/elsewhere"):
        Valued.from_pretrained(base, peft_config=lora(), reward_adapter=tmp_path / "reward")
