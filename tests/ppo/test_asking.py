"""The generation arguments of transformers, one by one."""

from __future__ import annotations

import pytest

from tasks.ppo import PPOConfig
from tasks.ppo.asking import Asked, asked_of

CONFIG = PPOConfig(response_tokens=6, temperature=0.7)


def asked(lengths=None, eos_id=1, **given) -> Asked:
    return asked_of(given, CONFIG, eos_id, 32, 2, lengths)


def test_nothing_asked_is_what_the_configuration_says(caplog):
    assert asked() == Asked([6, 6], 1, do_sample=True, top_k=0, top_p=1.0, min_tokens=0)
    assert not caplog.records


def test_each_argument_is_heard_and_none_is_taken_from_the_caller():
    given = {"max_new_tokens": 4, "min_new_tokens": 2, "top_k": 5.0, "top_p": 0.5, "do_sample": False}
    kept = dict(given)
    assert asked_of(given, CONFIG, 1, 32, 2) == Asked([4, 4], 1, False, 5, 0.5, 2) and given == kept
    assert asked([3, 5], max_new_tokens=4).max_tokens == [3, 5], "a length sampler's come first"
    none = dict.fromkeys(("top_k", "top_p", "min_new_tokens", "max_new_tokens", "max_length", "min_length"))
    assert asked(**none) == asked(min_length=-1, max_length=0, min_new_tokens=-3, temperature=0.7) == asked()


@pytest.mark.parametrize(
    ("own", "given", "wanted"),
    [(0, {}, 0), (31, {}, 31), (32, {}, None), (-1, {}, None), (1, {"eos_token_id": 2}, 2),
     (1, {"eos_token_id": [2]}, 2), (1, {"eos_token_id": (2,)}, 2), (1, {"eos_token_id": -1}, None),
     (1, {"eos_token_id": None}, None), (1, {"eos_token_id": [1, 2]}, (1, 2)), ((1, 3), {}, (1, 3)),
     ((1, 3), {"eos_token_id": 2}, 2), ((1, 32), {}, 1), (1, {"eos_token_id": (2, -1, 40, 3)}, (2, 3)),
     (1, {"eos_token_id": [2, 5, 2, 99]}, (2, 5))],
)  # fmt: skip
def test_which_token_ends_a_response(own, given, wanted):
    assert asked(eos_id=own, **given).eos_id == wanted


@pytest.mark.parametrize("wrong", [[], [[1]], [1, "a"], "</s>", ["</s>"], 1.0])
def test_what_is_no_eos(wrong):
    with pytest.raises(ValueError, match="eos_token_id must be a token or several, not"):
        asked(eos_token_id=wrong)


@pytest.mark.parametrize(
    "harmless",
    [{"num_beams": 1}, {"num_return_sequences": 1}, {"repetition_penalty": 1.0}, {"use_cache": True},
     {"typical_p": 1.0}, {"remove_padding": True}, {"pad_to_multiple_of": None}, {"pad_token_id": 9},
     {"bos_token_id": 9}, {"synced_gpus": False}],
)  # fmt: skip
def test_what_changes_nothing_is_taken(harmless):
    assert asked(**harmless) == asked()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"num_beams": 2}, "num_beams=2 is not known"),
        ({"num_beams": 2}, "beam search draws from no distribution"),
        ({"num_return_sequences": 0}, "num_return_sequences must be a whole number from 1, not 0"),
        ({"repetition_penalty": -1.0}, "penalty.* has to be a strictly positive"),
        ({"stop_strings": ["a", ""]}, "stop_strings must be texts"),
        ({"generation_config": {}}, "generation_config must be a GenerationConfig, not dict"),
        ({"attention_mask": [1]}, "attention_mask=.*none is padded"),
        ({"max_new_token": None}, "max_new_token=None is not known"),
        ({"use_cache": False}, "use_cache=False is not known"),
        ({"typical_p": 0.9}, "typical_p=0.9 is not known"),
        ({"remove_padding": False}, "remove_padding=False is not known"),
        ({"pad_to_multiple_of": 8}, "pad_to_multiple_of=8 is not known"),
        ({"penalty_alpha": 0.6}, "penalty_alpha=0.6 is not known"),
        ({"max_length": 1}, "give max_new_tokens; max_length counts the prompt"),
        ({"min_length": 1}, "give min_new_tokens; min_length counts the prompt"),
        ({"temperature": 0.6}, r"temperature is 0\.6, but .* ppo\.temperature, 0\.7"),
        ({"temperature": 1.0}, r"temperature is 1\.0"),
        ({"max_new_tokens": 0}, "at least one new token, not 0"),
        ({"lengths": [3, 0]}, "at least one new token, not 0"),
    ],
)
def test_what_is_refused(given, words):
    with pytest.raises(ValueError, match=f"^generate: .*{words}"):
        asked(**given)


@pytest.mark.parametrize("warp", [{"top_k": 5}, {"top_p": 0.9}, {"min_new_tokens": 1}])
def test_another_distribution_is_said_where_one_is_sampled(caplog, warp):
    asked(**warp, do_sample=False)
    assert not caplog.records
    asked(**warp)
    assert "sample from another distribution" in caplog.text
