"""The launch files as accelerate reads them, and the key that names them."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType

from params.load import ParamsError, read_mapping, validate
from params.schema import LAUNCH_FILES, MachineParams

KINDS = {
    "one_gpu": DistributedType.NO,
    "ddp": DistributedType.MULTI_GPU,
    "ddp_cpu": DistributedType.MULTI_GPU,
    "fsdp": DistributedType.FSDP,
    "zero3": DistributedType.DEEPSPEED,
}


def test_there_is_a_file_for_each_topology():
    assert {path.stem for path in LAUNCH_FILES.glob("*.yaml")} == KINDS.keys()


@pytest.mark.parametrize("name", KINDS)
def test_accelerate_reads_it_and_knows_every_key(name):
    """Of an unknown key it says so itself; keys within a section it hands on, so they are looked up."""
    path = MachineParams(launch=name).launch_file
    found = load_config_from_file(str(path))
    assert found.distributed_type == KINDS[name] and found.mixed_precision == "no"
    known = {action.dest for action in launch_command_parser()._actions}
    assert found.fsdp_config.keys() <= known
    assert found.deepspeed_config.keys() <= known
    assert found.num_processes == {"one_gpu": 1, "ddp_cpu": 2}.get(name, 8)
    assert path.read_text().startswith("# ")


def test_an_unknown_name_is_an_error_that_lists_the_files():
    words = r"machine\.launch: no 'dpp' in params/accelerate; it has ddp, ddp_cpu, fsdp, one_gpu, zero3"
    with pytest.raises(ParamsError, match=words):
        validate({"machine": {"launch": "dpp"}})
    assert MachineParams(launch="").launch_file is None


def test_the_launch_is_in_no_command_and_tracked_by_no_stage():
    root = Path(__file__).parents[2]
    for stage in read_mapping(root / "dvc.yaml")["stages"].values():
        assert "machine" not in stage.get("params", []) and "launch" not in stage["cmd"]
