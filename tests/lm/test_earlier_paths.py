"""Paths of modules that scripts know from before they stood in rooms."""

from importlib import import_module

import pytest


@pytest.mark.parametrize(
    ("path", "home", "names"),
    [
        ("prompt", "model.template", ["encode_texts", "prompt_text", "without_eos"]),
        ("loading", "model.loading", ["fit_embeddings", "load_causal", "load_tokenizer", "save_model"]),
        ("scoring", "heads.scores", ["score_documents"]),
    ],
)
def test_an_earlier_path_leads_to_the_same_functions(path, home, names):
    earlier, now = import_module(f"tasks.lm.{path}"), import_module(f"tasks.lm.{home}")
    assert all(getattr(earlier, name) is getattr(now, name) for name in names)
