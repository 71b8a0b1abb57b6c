"""What `tasks.lm` shows, and what it loads for that."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import tasks.lm
from tasks.lm.heads import reference, value_head


def modules_after(line: str) -> set[str]:
    """What a fresh interpreter has loaded after a line."""
    code = f"import json, sys; {line}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


@pytest.mark.parametrize("name", ["template", "reading", "ends"])
def test_text_is_read_without_torch_and_transformers(name):
    found = modules_after(f"import tasks.lm.model.{name}") - modules_after("pass")
    assert not {"torch", "transformers", "numpy"} & found and len(found) < 60
    ours = {module for module in found if module.startswith("tasks.")}
    assert ours <= {"tasks.lm", "tasks.lm.model", *(f"tasks.lm.model.{n}" for n in (name, "reading"))}


def test_names_are_loaded_when_they_are_asked_for():
    assert tasks.lm.create_reference_model is reference.create_reference_model
    assert tasks.lm.AutoModelForCausalLMWithValueHead is value_head.AutoModelForCausalLMWithValueHead
    assert tasks.lm.AutoModelForSeq2SeqLMWithValueHead is value_head.AutoModelForSeq2SeqLMWithValueHead
    assert set(tasks.lm.__all__) <= set(dir(tasks.lm))
    with pytest.raises(AttributeError, match="no attribute 'AutoModel'"):
        tasks.lm.AutoModel  # noqa: B018


def test_documented_places_of_merging_are_one():
    from tasks.lm import adapters

    assert adapters.merge_checked is adapters.lora.merge_checked
    assert adapters.merge_onto is adapters.lora.merge_onto
