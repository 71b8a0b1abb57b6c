import json
import logging
import math
import os
import random
import resource
import subprocess
import sys

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.run.checkpoint import (
    MANIFEST,
    STATE,
    TENSORS,
    Checkpoint,
    latest,
    load,
    restore_rng,
    rng_state,
    save,
)


def same(left, right) -> bool:
    """Equal in type and to the last bit; nan equals nan, -0.0 does not equal 0.0."""
    if isinstance(left, torch.Tensor):
        kind = isinstance(right, torch.Tensor) and (left.dtype, left.shape) == (right.dtype, right.shape)
        return kind and tensor_bytes(left) == tensor_bytes(right)
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, float):
        return left.hex() == right.hex()
    return left == right


def tensor_bytes(tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def flip(path, at=-1):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


ODD = {
    "none": None,
    "yes": True,
    "big": 2**100,
    "small": 5e-324,
    "third": 1 / 3,
    "negative zero": -0.0,
    "infinite": [math.inf, -math.inf, math.nan],
    "text": "ü\n\ud800 ~",
    "pair": (1, (2.0,), ()),
    "empty": [{}, [], ""],
    "mixed": {0: "int", "0": "str", -7: {1: 2}},
    "tilde": {"~tensor": 1, "~": {"~dict": []}},
}


def test_everything_but_tensors_comes_back_with_its_type_and_bits(tmp_path):
    path = save(tmp_path, 3, ODD)
    found = latest(tmp_path)
    assert isinstance(found, Checkpoint) and found.step == 3 and found.path == path
    assert same(found.state, ODD)


keys = st.text() | st.integers()


@settings(deadline=None, max_examples=30)
@given(
    st.dictionaries(
        keys,
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
            lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(keys, inner),
            max_leaves=10,
        ),
    )
)
def test_any_plain_state_comes_back(tmp_path_factory, state):
    folder = tmp_path_factory.mktemp("any")
    save(folder, 0, state)
    assert same(latest(folder).state, state)


def test_tensors_come_back_bit_for_bit(tmp_path):
    base = torch.randn(4, 6)
    state = {
        "bf16": torch.randn(3).bfloat16(),
        "bytes": torch.arange(256, dtype=torch.uint8),
        "ids": torch.tensor([2**62, -1]),
        "mask": torch.tensor([True, False]),
        "scalar": torch.tensor(1 / 3),
        "none": torch.empty(0, 5),
        "nan": torch.tensor([math.nan, -0.0, math.inf]),
        "transposed": base.t(),
        "rows": [base[:2], base[1:3], base[:, ::2]],
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    expected = {**state, "parameter": torch.ones(2)}
    save(tmp_path, 1, state)
    assert same(latest(tmp_path).state, expected)


def test_a_tied_tensor_is_written_once_and_stays_tied(tmp_path):
    weight = torch.randn(1000)
    path = save(tmp_path, 1, {"embed": weight, "head": weight, "again": weight.view(1000)})
    assert (path / TENSORS).stat().st_size < 2 * 4000
    state = latest(tmp_path).state
    assert state["embed"].data_ptr() == state["head"].data_ptr() == state["again"].data_ptr()


@pytest.mark.parametrize(
    ("state", "where"),
    [
        ({"a": [{"b": object()}]}, "state.a.0.b: a checkpoint cannot hold a object"),
        ({"a": numpy.ones(2)}, "state.a: a checkpoint cannot hold a ndarray"),
        ({"a": {1.5: 0}}, "state.a: a checkpoint's dict keys are str or int, not 1.5"),
        ({"a": {True: 0}}, "state.a: a checkpoint's dict keys are str or int, not True"),
        ({"a": torch.eye(2).to_sparse()}, "state.a: a Tensor of layout torch.sparse_coo"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_place(tmp_path, state, where):
    with pytest.raises(ValueError, match=where.replace(".", r"\.")):
        save(tmp_path, 1, state)
    assert not list(tmp_path.iterdir())


def test_a_negative_step_is_refused(tmp_path):
    with pytest.raises(ValueError, match="negative"):
        save(tmp_path, -1, {})


def test_nothing_there_is_none(tmp_path):
    assert latest(tmp_path) is None
    assert latest(tmp_path / "missing") is None


def test_the_two_newest_stay(tmp_path):
    for step in (5, 9, 10, 100):
        save(tmp_path, step, {"step": step})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-100"]
    assert latest(tmp_path).step == 100


@pytest.mark.parametrize("name", [TENSORS, STATE, MANIFEST, "notes.json"])
@pytest.mark.parametrize("harm", ["flip", "cut", "remove", "empty"])
def test_a_harmed_newest_falls_back_to_the_older_with_one_line(tmp_path, caplog, name, harm):
    save(tmp_path, 1, {"x": torch.ones(3), "n": 1})
    path = save(tmp_path, 2, {"x": torch.ones(3), "n": 2}, texts={"notes.json": "{}"}) / name
    match harm:
        case "flip":
            flip(path, -1 if name != MANIFEST else path.read_bytes().index(b'"step": 2') + 8)
        case "cut":
            os.truncate(path, path.stat().st_size // 2)
        case "empty":
            os.truncate(path, 0)
        case "remove":
            path.unlink()
    with caplog.at_level(logging.WARNING):
        found = latest(tmp_path)
    assert found.step == 1 and found.state["n"] == 1
    assert [str(path) in record.getMessage() for record in caplog.records] == [True]
    assert "\n" not in caplog.records[0].getMessage()
    with pytest.raises(ValueError, match=name):
        load(path.parent)


def test_every_single_bit_of_the_manifest_is_either_harmless_or_noticed(tmp_path):
    path = save(tmp_path, 1, {"n": 1}) / MANIFEST
    whole = path.read_bytes()
    for at in range(0, len(whole), 3):
        flip(path, at)
        found = latest(tmp_path)
        assert found is None or (found.step, found.state) == (1, {"n": 1})
        path.write_bytes(whole)


def test_a_resumed_run_replaces_what_it_could_not_read(tmp_path):
    save(tmp_path, 1, {"run": "first"})
    flip(save(tmp_path, 2, {"run": "first"}) / STATE)
    assert latest(tmp_path).step == 1
    save(tmp_path, 2, {"run": "second"})
    assert latest(tmp_path).state == {"run": "second"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2.1"]
    assert save(tmp_path, 2, {"run": "third"}).name == "checkpoint-2.2"  # never over the only good one
    assert latest(tmp_path).state == {"run": "third"}


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_failure_on_the_way_leaves_the_old_ones(tmp_path, monkeypatch, call):
    for step in (1, 2):
        save(tmp_path, step, {"n": step})

    def fail(*_):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="Input/output"):
        patch.setattr(os, call, fail)
        save(tmp_path, 3, {"n": 3})
    assert latest(tmp_path).step == 2
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


def test_a_kill_before_the_rename_leaves_the_old_one_and_its_rubbish_is_swept(tmp_path):
    save(tmp_path, 1, {"n": 1})
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom tasks.run.checkpoint import save\n"
        "os.replace = lambda *_: os.kill(os.getpid(), 9)\nsave(Path(sys.argv[1]), 2, {'n': 2})"
    )
    assert subprocess.run([sys.executable, "-c", code, tmp_path], check=False).returncode == -9
    assert (tmp_path / ".staged-checkpoint-2" / MANIFEST).exists()  # it did come that far
    assert latest(tmp_path).step == 1
    save(tmp_path, 3, {"n": 3})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-3"]


def test_a_kill_while_an_old_one_is_removed_leaves_nothing_that_looks_like_one(tmp_path, monkeypatch):
    for step in (1, 2):
        save(tmp_path, step, {"n": step})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("tasks.run.checkpoint.remove", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
        save(tmp_path, 3, {"n": 3})
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    save(tmp_path, 4, {"n": 4})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint-4"]


def test_a_full_disk_is_an_oserror_and_nothing_valid_is_lost(tmp_path):
    """A file-size limit stands for the full disk: the same write fails, with EFBIG instead of ENOSPC."""
    save(tmp_path, 1, {"x": torch.ones(4)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError) as caught:
            save(tmp_path, 2, {"x": torch.ones(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == 27 and TENSORS in str(caught.value.filename)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert latest(tmp_path).step == 1


def test_texts_stand_beside_and_are_in_the_manifest(tmp_path):
    path = save(tmp_path, 1, {}, texts={"trainer_state.json": "{}\n"})
    assert (path / "trainer_state.json").read_text() == "{}\n"
    assert set(json.loads((path / MANIFEST).read_text())["files"]) == {TENSORS, STATE, "trainer_state.json"}


def draws():
    return random.random(), random.gauss(0, 1), numpy.random.randn(3).tolist(), torch.randn(3).tolist()


def test_generators_come_back(tmp_path):
    random.gauss(0, 1), numpy.random.randn()  # half of a pair is kept inside: it must come back too
    save(tmp_path, 1, {"rng": rng_state()})
    first = draws()
    assert draws() != first
    restore_rng(latest(tmp_path).state["rng"])
    assert draws() == first


def steps(model, optimizer, count):
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.randn(5, 4)).pow(2).mean().backward()
        optimizer.step()


@pytest.mark.parametrize("amsgrad", [False, True])
def test_adamw_continues_bit_for_bit(tmp_path, amsgrad):
    def new():
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3)
        groups = [{"params": [model.weight], "lr": 0.1}, {"params": [model.bias], "weight_decay": 0.0}]
        return model, torch.optim.AdamW(groups, amsgrad=amsgrad, betas=(0.9, 0.95))

    model, optimizer = new()
    steps(model, optimizer, 3)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rng": rng_state()}
    save(tmp_path, 3, state)
    steps(model, optimizer, 3)

    other, resumed = new()
    read = latest(tmp_path).state
    assert same(read["optimizer"]["param_groups"], state["optimizer"]["param_groups"])
    other.load_state_dict(read["model"])
    resumed.load_state_dict(read["optimizer"])
    restore_rng(read["rng"])
    steps(other, resumed, 3)
    assert same(dict(other.state_dict()), dict(model.state_dict()))
    assert same(resumed.state_dict(), optimizer.state_dict())
