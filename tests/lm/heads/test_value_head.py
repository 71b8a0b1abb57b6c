"""A value for every token, in a folder that plain transformers loads; what TRL left on disk is read too."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, GenerationConfig

from tasks.lm import AutoModelForCausalLMWithValueHead
from tasks.lm.heads import policy_files
from tasks.lm.heads.policy_files import PICKLE, VALUE_HEAD

IDS = torch.tensor([[5, 6, 7, 8], [9, 4, 3, 2]])
KINDS = ["llama", "gpt2", "opt", "gpt_neox", "gemma", "gemma2", "bloom", "qwen2", "mistral", "phi3", "cohere"]
NARROW = {"word_embed_proj_dim": 8, "do_layer_norm_before": False}  # OPT-350m
Valued = AutoModelForCausalLMWithValueHead


def lora() -> LoraConfig:
    return LoraConfig(r=2, target_modules="all-linear")


def policy(kind="llama", **keys):
    model = Valued(tiny.causal(kind, **keys))
    torch.manual_seed(7)
    torch.nn.init.normal_(model.v_head.summary.weight)
    torch.nn.init.constant_(model.v_head.summary.bias, 0.25)
    return model.eval()


def saved(folder, kind="llama", **keys) -> Path:
    """A plain transformers folder."""
    tiny.causal(kind, **keys).save_pretrained(folder)
    return folder


@torch.no_grad()
def same(found, wanted) -> bool:
    """Logits and values to the bit, the value head's weights with them."""
    outputs = all(torch.equal(a, b) for a, b in zip(found(IDS)[::2], wanted(IDS)[::2], strict=True))
    return outputs and torch.equal(found.v_head.summary.weight, wanted.v_head.summary.weight)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_forward_is_trls(kind):
    model = policy(kind)
    assert model.v_head.summary.weight.shape == (1, 16)
    logits, loss, values = model(IDS)
    plain = model.pretrained_model(IDS, output_hidden_states=True)
    assert logits.shape == (2, 4, 32) and loss is None and values.shape == (2, 4)
    assert torch.equal(logits, plain.logits) and values.dtype == torch.float32
    hidden = plain.hidden_states[-1]
    wanted = hidden @ model.v_head.summary.weight[0] + model.v_head.summary.bias
    assert tiny.far(values, wanted) < 1e-6, "the value is read where the logits are read, after the last norm"


@torch.no_grad()
def test_what_the_forward_gives_on_demand():
    model = policy()
    logits, loss, _ = model(IDS, labels=IDS)
    wanted = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    assert tiny.far(loss, wanted) < 1e-6
    _, _, whole = model(IDS)
    *_, cache = model(IDS[:, :3], return_past_key_values=True)
    _, _, last, cache = model(IDS[:, 3:], cache, torch.ones_like(IDS), return_past_key_values=True)
    assert tiny.far(last, whole[:, 3:]) < 1e-5 and cache.get_seq_length() == 4


@pytest.mark.parametrize(
    ("kind", "keys"), [("gpt2", {}), ("opt", {}), ("llama", {}), ("roberta", {"is_decoder": True})]
)
@torch.no_grad()
def test_padding_changes_no_value(kind, keys):
    """TRL passes no positions: absolute ones would be shifted by padding on the left."""
    model = policy(kind, **keys)
    junk, mask = torch.full((2, 2), 17), torch.tensor([[0, 0, 1, 1, 1, 1]] * 2)
    wanted = model(IDS)
    for tokens, real, where in ((torch.cat([junk, IDS], 1), mask, slice(2, 6)),
                                (torch.cat([IDS, junk], 1), mask.flip(1), slice(0, 4))):  # fmt: skip
        logits, _, values = model(tokens, attention_mask=real)
        assert tiny.far(logits[:, where], wanted[0]) < 1e-5 and tiny.far(values[:, where], wanted[2]) < 1e-5
    *_, cache = model(tokens[:, :3], attention_mask=mask[:, 2:5], return_past_key_values=True)
    left = model(IDS[:, 3:], cache, torch.ones_like(IDS))[2]
    assert tiny.far(left, wanted[2][:, 3:]) < 1e-5


@torch.no_grad()
def test_how_the_head_starts():
    """Zeros unless TRL's own start is asked for, which is torch's."""
    model = tiny.causal()
    assert not Valued(model)(IDS)[2].any()
    for strategy in (None, "random"):
        torch.manual_seed(3)
        wanted = torch.nn.Linear(16, 1)
        torch.manual_seed(3)
        found = Valued(model, v_head_init_strategy=strategy).v_head.summary
        assert torch.equal(found.weight, wanted.weight) and torch.equal(found.bias, wanted.bias)
    wide = tiny.causal("gpt2", n_embd=1024)
    for keys, deviation in (({}, 0.2), ({"v_head_initializer_range": 0.01}, 0.01)):
        found = Valued.from_pretrained(wide, v_head_init_strategy="normal", **keys).v_head.summary
        assert not found.bias.any() and found.weight.std().item() == pytest.approx(deviation, rel=0.1)
    with pytest.raises(ValueError, match="v_head_init_strategy is 'uniform'"):
        Valued(model, v_head_init_strategy="uniform")


def test_dropout_of_the_head():
    """From the configuration, as TRL, or the keyword; none else; off in evaluation mode."""
    assert not any(isinstance(m, torch.nn.Dropout) for m in Valued(tiny.causal()).v_head.modules())
    model = tiny.causal()
    model.config.summary_dropout_prob = 0.5
    assert Valued.from_pretrained(model).v_head.dropout.p == 0.5
    found = Valued.from_pretrained(model, summary_dropout_prob=0.3, v_head_init_strategy="normal")
    assert found.v_head.dropout.p == 0.3 and not found.training and not found.v_head.training
    assert torch.equal(found(IDS)[2], found(IDS)[2])
    found.train()
    assert not torch.equal(found(IDS)[2], found(IDS)[2])
    assert Valued(model.train()).v_head.training
    assert not Valued.from_pretrained(model.eval(), peft_config=lora()).v_head.training


@pytest.mark.parametrize("keys", [{}, NARROW])
def test_the_head_reads_what_reaches_the_embeddings(keys):
    """OPT-350m projects its states from 16 to 8 before."""
    model = policy("opt", **keys)
    width = keys.get("word_embed_proj_dim", 16)
    assert model.v_head.summary.weight.shape == (1, width)
    assert tiny.far(model.pretrained_model.lm_head.weight.shape, (32, width)) == 0
    assert model(IDS)[2].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16"])
@torch.no_grad()
def test_half_precision_weights(tmp_path, dtype):
    """The head, the values and the logits stay float32."""
    wanted = policy()
    wanted.save_pretrained(tmp_path)
    for key in ("dtype", "torch_dtype"):
        model = Valued.from_pretrained(tmp_path, **{key: dtype})
        assert {p.dtype for p in model.pretrained_model.parameters()} == {torch.bfloat16}
        assert {p.dtype for p in model.v_head.parameters()} == {torch.float32}
        logits, _, values = model(IDS)
        assert logits.dtype == values.dtype == torch.float32
        assert tiny.far(values, wanted(IDS)[2]) < 5e-2
    assert {p.dtype for p in Valued.from_pretrained(tmp_path).parameters()} == {torch.float32}
    model.save_pretrained(tmp_path / "half")
    assert load_file(tmp_path / "half" / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    assert same(Valued.from_pretrained(tmp_path / "half", dtype=dtype), model)


@torch.no_grad()
def test_the_head_is_float32_under_autocast():
    """Of half-precision states, the sum of their products is not."""
    model = policy()
    with torch.autocast("cpu", torch.bfloat16):
        states = torch.randn(3, 16)
        values = model.v_head(states)
    assert torch.equal(values, model.v_head(states)) and values.dtype == torch.float32
    assert model.bfloat16()(IDS)[2].dtype == torch.float32


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "gpt_neox"])
@pytest.mark.parametrize("keys", [{}, {"max_shard_size": "5KB"}])
def test_a_saved_folder_is_a_plain_transformers_folder(tmp_path, kind, tied, keys):
    """Identical weights, no key missing and none unexpected; and it loads back with its value head."""
    model = policy(kind, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path, **keys)
    assert len(list(tmp_path.glob("model*.safetensors"))) == 1 or keys
    assert (tmp_path / "model.safetensors.index.json").is_file() is bool(keys)
    assert not list(tmp_path.glob("*.bin"))
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    found, wanted = plain.state_dict(), model.pretrained_model.state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(found[n], wanted[n]) for n in wanted)
    assert same(Valued.from_pretrained(tmp_path), model)
    assert same(Valued.from_pretrained(str(tmp_path), v_head_init_strategy=None), model)


@torch.no_grad()
def test_a_folder_without_a_value_head_gets_a_fresh_one(tmp_path, caplog):
    saved(tmp_path)
    assert not Valued.from_pretrained(tmp_path)(IDS)[2].any() and not caplog.records
    assert Valued.from_pretrained(tmp_path, v_head_init_strategy="random")(IDS)[2].any()
    with pytest.raises(ValueError, match=r"base: cannot load .*nowhere"):
        Valued.from_pretrained(tmp_path / "nowhere")


@torch.no_grad()
def test_a_model_object():
    plain = tiny.causal()
    model = Valued.from_pretrained(plain)
    assert model.pretrained_model is plain and model.config is plain.config and not model.is_peft_model
    for keys in ({"dtype": torch.bfloat16}, {"device_map": "cpu"}):
        with pytest.raises(ValueError, match=rf"^{next(iter(keys))}: .*LlamaForCausalLM already"):
            Valued.from_pretrained(plain, **keys)


def test_keys_reach_transformers(tmp_path):
    saved(tmp_path)
    assert (
        Valued.from_pretrained(tmp_path, attn_implementation="eager").config._attn_implementation == "eager"
    )
    with pytest.raises(ValueError, match="trust_remote_code"):
        Valued.from_pretrained(tmp_path, trust_remote_code=True)


@pytest.mark.parametrize(
    "model",
    [tiny.seq2seq(), tiny.scorer(), AutoModel.from_config(tiny.config_of("gpt2")),
     AutoModelForMaskedLM.from_config(tiny.config_of("bert")),
     AutoModelForCausalLM.from_config(tiny.config_of("bert"))],
    ids=lambda model: type(model).__name__,
)  # fmt: skip
def test_what_is_no_causal_model_is_refused_by_name(model):
    for door in (Valued, Valued.from_pretrained):
        with pytest.raises(ValueError, match=rf"^{type(model).__name__} is no causal language model"):
            door(model)
    Valued(AutoModelForCausalLM.from_config(tiny.config_of("bert", is_decoder=True)))
    seeing = tiny.causal()
    seeing.model.sees = torch.nn.Identity()
    seeing.model.sees.is_causal = False  # as the attention of a tower that looks at pictures
    Valued(seeing)


def test_a_value_head_that_does_not_fit_is_refused(tmp_path):
    policy().save_pretrained(tmp_path)
    whole = {"summary.weight": torch.zeros(1, 16), "summary.bias": torch.zeros(1)}
    narrow = whole | {"summary.weight": torch.zeros(1, 8)}
    for head, message in ((narrow, "size mismatch"), (whole | {"gain": torch.zeros(1)}, "gain")):
        save_file(head, tmp_path / VALUE_HEAD)
        with pytest.raises(ValueError, match=f"(?s)saved value head does not fit.*{message}"):
            Valued.from_pretrained(tmp_path)
    for name in whole:
        save_file({name: whole[name]}, tmp_path / VALUE_HEAD)
        message = ({*whole} - {name}).pop()
        with pytest.raises(ValueError, match=f"(?s)saved value head does not fit.*{message}"):
            Valued.from_pretrained(tmp_path)
    (tmp_path / VALUE_HEAD).write_bytes(b"nothing")
    with pytest.raises(ValueError, match=f"{VALUE_HEAD} cannot be read"):
        Valued.from_pretrained(tmp_path)


def trained(adapter):
    """An adapter that does something."""
    torch.manual_seed(3)
    for weight in adapter.parameters():
        if weight.requires_grad:
            weight.data.add_(0.1 * torch.randn_like(weight))
    return adapter


def test_an_adapter_is_put_on(tmp_path):
    for base in (tiny.causal(), saved(tmp_path)):
        model = Valued.from_pretrained(base, peft_config=lora(), v_head_init_strategy="normal")
        assert model.is_peft_model and isinstance(model.pretrained_model, PeftModel)
        learns = [n for n, p in model.named_parameters() if p.requires_grad]
        assert all("lora_" in n or n.startswith("v_head.") for n in learns) and len(learns) > 2
        assert torch.equal(model(IDS)[0], tiny.causal()(IDS).logits)
    with pytest.raises(ValueError, match="adapter already"):
        Valued.from_pretrained(model.pretrained_model, peft_config=lora())
    virtual = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="virtual tokens"):
        Valued.from_pretrained(tiny.causal(), peft_config=virtual)
    with pytest.raises(ValueError, match="virtual tokens"):
        Valued(get_peft_model(tiny.causal(), virtual))


@pytest.mark.parametrize("is_trainable", [True, False])
def test_an_adapter_folder_loads_back(tmp_path, is_trainable):
    """Adapter files and the value head; the base is where the adapter's configuration says."""
    base = AutoModelForCausalLM.from_pretrained(saved(tmp_path / "base"))
    model = Valued(trained(get_peft_model(base, lora())), v_head_init_strategy="normal").eval()
    model.save_pretrained(tmp_path / "adapter")
    files = {path.name for path in (tmp_path / "adapter").glob("*.*")} - {"README.md"}
    assert files == {"adapter_config.json", "adapter_model.safetensors", VALUE_HEAD}
    found = Valued.from_pretrained(tmp_path / "adapter", is_trainable=is_trainable)
    assert found.is_peft_model and same(found, model)
    assert any("lora_" in n and p.requires_grad for n, p in found.named_parameters()) is is_trainable
    assert found.v_head.summary.weight.requires_grad
    half = Valued.from_pretrained(tmp_path / "adapter", dtype=torch.bfloat16).pretrained_model
    assert half.base_model.model.lm_head.weight.dtype == torch.bfloat16


def test_an_adapter_without_its_base_or_its_weights_is_refused(tmp_path):
    model = Valued(get_peft_model(tiny.causal(), lora()))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = None
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="names no base model"):
        Valued.from_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"has no adapter_model\.safetensors"):
        Valued.from_pretrained(tmp_path)


def trl_layout(model, folder, sharded: bool) -> None:
    """As TRL ≤ 0.11 saves: the head's weights among the model's."""
    model.pretrained_model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weights |= {f"v_head.{name}": value for name, value in model.v_head.state_dict().items()}
    names = sorted(weights)  # v_head.* come last
    if not sharded:
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return
    index = {}
    for number, part in enumerate((names[:5], names[5:-1], names[-1:])):  # the head in two shards
        shard = f"model-{number:05d}-of-00003.safetensors"
        save_file({name: weights[name] for name in part}, folder / shard, {"format": "pt"})
        index |= dict.fromkeys(part, shard)
    written = {"metadata": {}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(written))


@pytest.mark.parametrize("sharded", [False, True])
def test_trls_layout_loads(tmp_path, sharded, monkeypatch):
    """Of the shards, only those that hold something of the head are read for it."""
    model, opened, door = policy(), [], policy_files.safe_open
    trl_layout(model, tmp_path, sharded)
    monkeypatch.setattr(
        policy_files, "safe_open", lambda path, kind: (opened.append(path), door(path, kind))[1]
    )
    assert same(Valued.from_pretrained(tmp_path), model)
    assert len(opened) == 1 + sharded < 3


def test_a_pickled_head_is_never_read(tmp_path, caplog, monkeypatch):
    """TRL pickles the head of a model under an adapter; the fresh one is said."""
    monkeypatch.setattr(torch, "load", None)
    base = AutoModelForCausalLM.from_pretrained(saved(tmp_path / "base"))
    Valued(get_peft_model(base, lora())).save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / VALUE_HEAD).unlink()
    Valued.from_pretrained(tmp_path / "adapter")
    assert "adapter: a fresh value head" in caplog.text, "of one on the Hub, the pickle is not even asked for"
    for name in ("base", "adapter"):
        (tmp_path / name / PICKLE).write_bytes(b"\x80\x04.")
        caplog.clear()
        assert not Valued.from_pretrained(tmp_path / name)(IDS)[2].any()
        assert f"pickled into {PICKLE} is never read" in caplog.text
    (tmp_path / "base" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds no \*\.safetensors"):
        Valued.from_pretrained(tmp_path / "base")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The cache of the Hub, with what a download leaves there: a function from a repository to its folder."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def folder(repository: str, revision: str = "main") -> Path:
        root = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
        commit = revision.encode().hex().rjust(40, "c")
        (root / "refs").mkdir(parents=True, exist_ok=True)
        (root / "refs" / revision).write_text(commit)
        (root / "snapshots" / commit).mkdir(parents=True)
        return root / "snapshots" / commit

    return folder


@pytest.mark.parametrize("layout", ["ours", "trl", "trl sharded", "plain"])
def test_a_repository_on_the_hub(hub, layout, caplog):
    model, folder = policy(), hub("team/policy")
    if layout == "ours":
        model.save_pretrained(folder)
    elif layout == "plain":
        model.pretrained_model.save_pretrained(folder)
    else:
        trl_layout(model, folder, layout == "trl sharded")
    found = Valued.from_pretrained("team/policy")
    assert torch.equal(found(IDS)[0], model(IDS)[0])
    if layout == "plain":
        assert not found(IDS)[2].any()
        assert f"{VALUE_HEAD} of team/policy is not in the cache" in caplog.text
        assert caplog.text.count("not in the cache") == 1, "a plain model lacks other files too"
    else:
        assert same(found, model)


def test_an_adapter_on_the_hub(hub):
    base, adapter = hub("team/base"), hub("team/adapter")
    tiny.causal().save_pretrained(base)
    model = Valued.from_pretrained("team/base", peft_config=lora(), v_head_init_strategy="normal")
    trained(model.pretrained_model)
    model.save_pretrained(adapter)
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == "team/base"
    assert same(Valued.from_pretrained("team/adapter"), model)
    with pytest.raises(ValueError, match="base: cannot load team/other"):
        Valued.from_pretrained("team/other")


def test_revisions_on_the_hub(hub):
    """Of a model, and of the base that an adapter names."""
    models = {}
    for seed, revision in enumerate(("main", "v2")):
        models[revision] = Valued(tiny.causal(seed=seed), v_head_init_strategy="normal").eval()
        models[revision].save_pretrained(hub("team/policy", revision))
    for revision, wanted in models.items():
        assert same(Valued.from_pretrained("team/policy", revision=revision), wanted)
    adapted = Valued(trained(get_peft_model(models["v2"].pretrained_model, lora()))).eval()
    for named in ({"revision": "v2"}, {}):
        folder = hub("team/adapter", f"of-{named.get('revision', 'main')}")
        adapted.save_pretrained(folder)
        config = json.loads((folder / "adapter_config.json").read_text())
        config |= {"base_model_name_or_path": "team/policy", "revision": None} | named
        (folder / "adapter_config.json").write_text(json.dumps(config))
    assert same(Valued.from_pretrained("team/adapter", revision="of-v2"), adapted)
    assert not same(Valued.from_pretrained("team/adapter", revision="of-main"), adapted)


def test_push_to_hub(monkeypatch, tmp_path):
    """One commit with what save_pretrained writes, to a repository of the given name."""
    calls = []

    class Hub:
        def __init__(self, token=None):
            calls.append(("token", token))

        def create_repo(self, repo_id, **keys):
            calls.append(("create", repo_id, keys))
            return SimpleNamespace(repo_id=f"me/{repo_id}")

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            calls.append(("upload", repo_id, commit_message))
            Path(folder_path).rename(tmp_path / "repository")
            Path(folder_path).mkdir()
            return "commit"

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    model = policy()
    keys = {"private": True, "token": "t", "commit_message": "done", "max_shard_size": "5KB"}
    assert model.push_to_hub("policy", **keys) == "commit"
    assert calls == [
        ("token", "t"),
        ("create", "policy", {"private": True, "exist_ok": True}),
        ("upload", "me/policy", "done"),
    ]
    assert (tmp_path / "repository" / "model.safetensors.index.json").is_file()
    assert same(Valued.from_pretrained(tmp_path / "repository"), model)


@pytest.mark.parametrize("kind", KINDS)
def test_generate_is_the_language_models_own(kind):
    model, config = policy(kind), GenerationConfig(max_new_tokens=3, do_sample=False)
    found = model.generate(IDS, generation_config=config)
    assert torch.equal(found, model.pretrained_model.generate(IDS, max_new_tokens=3, do_sample=False))


def test_gradient_checkpointing_is_the_language_models_own():
    model = policy()
    model.gradient_checkpointing_enable()
    assert model.pretrained_model.is_gradient_checkpointing
    model.gradient_checkpointing_disable()
    assert not model.pretrained_model.is_gradient_checkpointing


BY_TRL = """
import os
import sys
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from trl import AutoModelForCausalLMWithValueHead as Valued

folder = sys.argv[1]
keys = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "vocab_size": 32}
torch.manual_seed(0)
LlamaForCausalLM(LlamaConfig(**keys)).save_pretrained(folder + "/base")
model = Valued.from_pretrained(folder + "/base").eval()
model.save_pretrained(folder + "/one")
model.save_pretrained(folder + "/shards", max_shard_size="5KB")
model.pretrained_model.v_head = model.v_head
model.pretrained_model.save_pretrained(folder + "/pushed")
os.mkdir(folder + "/adapter")  # TRL does not
Valued.from_pretrained(folder + "/base", peft_config=LoraConfig(r=2)).save_pretrained(folder + "/adapter")
with torch.no_grad():
    logits, _, values = model(torch.tensor([[5, 6, 7, 8], [9, 4, 3, 2]]))
print(logits.flatten().tolist(), values.flatten().tolist(), sep="\\n")
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("STACKRL_PPO_PEER_PYTHON"), reason="no python with TRL 0.11")
@torch.no_grad()
def test_checkpoints_of_trl_itself(tmp_path, caplog):
    python = os.environ["STACKRL_PPO_PEER_PYTHON"]
    plain = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    made = subprocess.run(
        [python, "-c", BY_TRL, str(tmp_path)], env=plain, capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stderr
    logits, values = (torch.tensor(json.loads(line)) for line in made.stdout.splitlines()[-2:])
    assert values.abs().min() > 0
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    for name in ("one", "shards", "pushed"):
        found = Valued.from_pretrained(tmp_path / name)(IDS)
        assert tiny.far(found[0].flatten(), logits) <= 1e-5 and tiny.far(found[2].flatten(), values) <= 1e-5
    assert (tmp_path / "adapter" / PICKLE).is_file() and "never read" not in caplog.text
    assert not Valued.from_pretrained(tmp_path / "adapter")(IDS)[2].any()
    assert "never read" in caplog.text


# ---- what TRL's and trlX's users read and give


def test_attributes_are_the_language_models():
    model = policy()
    inside = model.pretrained_model
    assert model.device == inside.device and model.dtype == torch.float32
    model.generation_config = GenerationConfig(max_new_tokens=3)
    assert inside.generation_config.max_new_tokens == 3 == model.generation_config.max_new_tokens
    assert model.resize_token_embeddings(40).num_embeddings == 40
    assert model(IDS)[0].shape == (2, 4, 40) and model.get_input_embeddings().num_embeddings == 40
    assert "lm_head" in model.lm_head_namings and Valued.transformers_parent_class is AutoModelForCausalLM
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = model.nothing


def test_a_whole_state_gives_the_head_back():
    model, other = policy(), Valued(tiny.causal())
    other.post_init(model.state_dict())
    assert torch.equal(other(IDS)[2], model(IDS)[2])


def test_a_model_from_a_configuration_and_an_adapter_from_a_mapping():
    config = tiny.config_of("llama")
    made = Valued.from_config(config, num_value_layers_unfrozen=1)
    assert len(made.v_head.branch.blocks) == 1 and made.config is config
    given = {"peft_type": "LORA", "r": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    adapted = Valued.from_pretrained(tiny.causal(), peft_config=given)
    assert adapted.is_peft_model and adapted.pretrained_model.active_peft_config.r == 2
    for wrong, words in (
        ({"r": 2}, "peft_config: it has no peft_type"),
        ({"peft_type": "LORA", "rank": 2}, "peft_config: .*rank"),
        ({"peft_type": "LORRA"}, "peft_config: .*LORRA"),
        ("lora", "peft_config must be a PeftConfig or a mapping, not str"),
    ):
        with pytest.raises(ValueError, match=words):
            Valued.from_pretrained(tiny.causal(), peft_config=wrong)


@pytest.mark.parametrize("given", [None, True, False])
def test_use_safetensors_is_always_true(tmp_path, caplog, given):
    found = Valued.from_pretrained(saved(tmp_path), use_safetensors=given)
    assert isinstance(found, Valued) and ("a pickle never is" in caplog.text) is (given is False)
