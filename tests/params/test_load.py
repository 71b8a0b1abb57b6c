from pathlib import Path

import pytest
import yaml

from params.load import ParamsError, read, read_preset
from params.render import render
from params.schema import Params

REPOSITORY = Path(__file__).parents[2]


COMPLETE = render(Params(), "x")


def write(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "params.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def check(tmp_path: Path, text: str | bytes) -> Params:
    """A preset: what is not there has the schema's default."""
    return read_preset(write(tmp_path, text))


def test_strings_become_numbers(tmp_path):
    """`dvc exp run -S sft.learning_rate=1e-5` writes 1e-05, which YAML 1.1 reads as a string."""
    assert yaml.safe_load("1e-05") == "1e-05"
    text = "sft: {learning_rate: 1e-05, epochs: '2', batch_rows: '4'}\nreward_eval: {enforce: 'false'}"
    params = check(tmp_path, text)
    assert (params.sft.learning_rate, params.sft.epochs, params.sft.batch_rows) == (1e-5, 2.0, 4)
    assert params.reward_eval.enforce is False


def leaves(values: dict, *place: str):
    for name, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, *place, name)
        else:
            yield (*place, name)


@pytest.mark.parametrize("key", [".".join(leaf) for leaf in leaves(Params().model_dump())])
def test_every_key_must_be_there(tmp_path, key):
    values = Params().model_dump(mode="json")
    *sections, last = key.split(".")
    inner = values
    for name in sections:
        inner = inner[name]
    del inner[last]
    with pytest.raises(ParamsError) as caught:
        read(write(tmp_path, yaml.safe_dump(values)))
    told = f"{key} is missing; `python -m params use <preset>` writes every key"
    assert str(caught.value) == f"{tmp_path / 'params.yaml'}: {told}"


@pytest.mark.parametrize("section", ["ppo", "sft", "register"])
def test_a_section_that_is_cut_to_its_name_lacks_its_first_key(tmp_path, section):
    values = {**Params().model_dump(mode="json"), section: None}
    first = next(iter(Params().model_dump()[section]))
    with pytest.raises(ParamsError, match=rf"{section}\.{first} is missing"):
        read(write(tmp_path, yaml.safe_dump(values)))


def test_a_file_cut_anywhere_is_refused_or_says_the_same(tmp_path):
    """Byte by byte; a cut in the last comment takes nothing away."""
    whole, data = read(write(tmp_path, COMPLETE)), COMPLETE.encode()
    last_value = data.rindex(b"stackrl") + len("stackrl")
    for size in [*range(0, last_value, 211), *range(last_value - 10, len(data))]:
        try:
            found = read(write(tmp_path, data[:size]))
        except ParamsError as error:
            assert "\n" not in str(error) and str(tmp_path / "params.yaml") in str(error)
        else:
            assert found == whole and size > last_value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", " is empty; `python -m params use sample` writes it"),
        (" \n\n", " is empty; "),
        ("# nothing\n", " is empty; "),
        ("null", " is empty; "),
        ("[]", ": a mapping is expected, not list"),
        ("''", ": a mapping is expected, not str"),
        ("0", ": a mapping is expected, not int"),
        ("false", ": a mapping is expected, not bool"),
        ("{}", ": seed is missing; `python -m params use <preset>` writes every key"),
        ("seed: 2024-99-99", ": month must be in 1..12"),  # YAML reads it as a date
        ("pppo: {}", ": pppo: no such key; did you mean ppo?"),  # says more than what is missing
        ("ppo: {updates: many}", ": ppo.updates: input should be a valid integer"),
        # not "ppo.batch_size (3) must be a multiple of …", which nobody wrote
        ("seed: 0\nppo: {mini_batch_size: 2, batch_size: 3}", ": machine.device is missing"),
    ],
)
def test_what_is_no_whole_file(tmp_path, text, message):
    with pytest.raises(ParamsError) as caught:
        read(write(tmp_path, text))
    assert str(caught.value).startswith(f"{tmp_path / 'params.yaml'}{message}")
    assert "\n" not in str(caught.value)


def test_source(tmp_path):
    assert check(tmp_path, "data: {source: sample}").data.source == "sample"
    assert check(tmp_path, "data: {source: [a.7z, b.xml]}").data.source == ("a.7z", "b.xml")


@pytest.mark.parametrize("text", ["[1.0, 0.5, 0.2]", "'1,.5, 0.2'", "'[1, .5, .2]'", "['1', '.5', .2]"])
def test_temperatures_are_a_list_however_they_are_written(tmp_path, text):
    """As YAML; and as one text, which `params use policy_eval.temperatures=1,.5` hands on."""
    found = check(tmp_path, f"policy_eval: {{temperatures: {text}}}")
    assert found.policy_eval.temperatures == (1.0, 0.5, 0.2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ppo: {init_kl_coeff: 1}", "ppo.init_kl_coeff: no such key; did you mean ppo.init_kl_coef?"),
        ("pppo: {}", "pppo: no such key; did you mean ppo?"),
        ("data: {split: {evals: 8}}", "data.split.evals: no such key; did you mean data.split.eval?"),
        ("zzz: 1", "zzz: no such key"),
        ("zzz: 1\nsft: {epochs: -1}", "zzz: no such key (and 1 more)"),
        ("sft: {learning_rate: 0}", "sft.learning_rate: input should be greater than 0, not 0"),
        ("sft: {learning_rate: fast}", "sft.learning_rate: input should be a valid number, unable to parse"),
        ("ppo: {updates: 1.5}", "ppo.updates: input should be a valid integer"),
        ("ppo: {select: worst}", "ppo.select: input should be 'last' or 'best', not 'worst'"),
        ("ppo: 3", "ppo: a section is expected, not 3"),
        ("seed: true", "seed: a number is expected, not True"),
        ("sft: {learning_rate: yes}", "sft.learning_rate: a number is expected, not True"),
        ("seed: {a: 1}", "seed: input should be a valid integer, not a section"),
        ("data: {source: a.7z}", "data.source: 'sample' or a list of file names is expected, not 'a.7z'"),
        ("data: {source: [1]}", "data.source: 'sample' or a list of file names is expected, not [1]"),
        ("data: {source: []}", "data.source is empty"),
        ("data: {eval_sites: [a]}", "data.eval_sites holds out a, but data.split_by is question"),
        (
            "data: {source: [a.7z, b.7z], split_by: site}",
            "data.split_by is site, but data.eval_sites names no site to hold out",
        ),
        (
            "data: {split_by: site, eval_sites: [a]}",
            "data.split_by is site, but data.source is the sample, which is a single site",
        ),
        ("data: {source: [a.7z], split_by: site, eval_sites: [a, b, a]}", "data.eval_sites: a stands there"),
        ("data: {source: [a.7z], split_by: site, eval_sites: [a, ' ']}", "data.eval_sites: a blank names no"),
        ("data: {source: [a.7z], split_by: site, eval_sites: ['']}", "data.eval_sites: a blank names no"),
        (
            "data: {source: [a.7z], split_by: site, eval_sites: a.b}",
            "data.eval_sites: a list of sites is expected, [a.example, b.example], not 'a.b'",
        ),
        ("data: {source: [a.7z], split_by: site, eval_sites: [1]}", "data.eval_sites: a list of sites is"),
        ("data: {split_by: sites}", "data.split_by: input should be 'question' or 'site', not 'sites'"),
        ("data: {split: {rl: 0}}", "data.split.rl must be positive"),
        ("ppo: {batch_size: 100, mini_batch_size: 64}", "ppo.batch_size (100) must be a multiple of"),
        ("ppo: {optimizer: lion}", "ppo.optimizer: input should be 'adam', 'adamw', 'adamw_8bit', 'muon' or"),
        ("sft: {optimizer: adam}", "sft.optimizer: input should be 'adamw', 'adamw_8bit', 'muon' or 'sgd'"),
        ("ppo: {weight_decay: 0.1}", "ppo.weight_decay is 0.1, and ppo.optimizer adam takes none"),
        ("model: {quantize: 2bit}", "model.quantize: input should be 'none', '8bit' or '4bit'"),
        ("model: {quantize: 4bit}", "model.quantize needs model.base"),
        ("model: {base: a/b, quantize: 4bit}\nsft: {lora_rank: 1}", "reward.lora_rank is 0, but model.quan"),
        (
            "model: {base: a/b, quantize: 8bit}\nsft: {lora_rank: 1}\nreward: {lora_rank: 1}\n"
            "ppo: {lora_rank: 1, num_value_layers_unfrozen: 1}",
            "ppo.num_value_layers_unfrozen: blocks of a quantised base cannot be copied",
        ),
        ("policy_eval: {temperatures: []}", "policy_eval.temperatures is empty"),
        ("policy_eval: {temperatures: [1, 0]}", "policy_eval.temperatures: 0 is greedy, always evaluated"),
        ("policy_eval: {temperatures: [Greedy]}", "policy_eval.temperatures: greedy is always evaluated"),
        ("policy_eval: {temperatures: [-0.5]}", "policy_eval.temperatures: -0.5 is below 0.01"),
        ("policy_eval: {temperatures: [1e-9]}", "policy_eval.temperatures: 1e-09 is below 0.01"),
        ("policy_eval: {temperatures: [1, 0.5, '1.0']}", "policy_eval.temperatures: 1 stands there twice"),
        ("policy_eval: {temperatures: [true]}", "policy_eval.temperatures: True is no number"),
        ("policy_eval: {temperatures: [.nan]}", "policy_eval.temperatures: input should be a finite"),
        ("policy_eval: {temperatures: [warm]}", "policy_eval.temperatures: input should be a valid number"),
        ("policy_eval: {temperatures: 1}", "policy_eval.temperatures: input should be a valid tuple"),
        ("policy_eval: {best_of: 17}", "policy_eval.best_of (17) exceeds policy_eval.best_of_samples (16)"),
        ("policy_eval: {best_of: 0}", "policy_eval.best_of: input should be greater than or equal to 1"),
        ("pack: {row_tokens: 64, document_tokens: 65}", "pack.document_tokens (65) exceeds pack.row"),
        ("model: {config: {max_position_embeddings: 9}}", "model.config.max_position_embeddings (9)"),
        ("seed: 1\nppo: {}\nseed: 2", "key 'seed' is given twice in"),
        ("ppo: {updates: 1, updates: 2}", "key 'updates' is given twice in"),
        ("a: [", "while parsing a flow node"),
        ("- 1", "a mapping is expected, not list"),
        ("text", "a mapping is expected, not str"),
        ("seed: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        (b"\xff\xfe\xff", "'utf-8' codec can't decode"),
        ("seed: \x01", "unacceptable character"),
    ],
)
def test_mistakes_are_one_line_with_the_key(tmp_path, text, message):
    with pytest.raises(ParamsError) as caught:
        check(tmp_path, text)
    assert str(caught.value).startswith(f"{tmp_path / 'params.yaml'}: {message}")
    assert "\n" not in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(ParamsError, match=r"params\.yaml is missing; `python -m params use sample`"):
        read(tmp_path / "params.yaml")


def test_the_committed_file_is_the_rendered_default():
    text = (REPOSITORY / "params.yaml").read_text()
    sample = read_preset(REPOSITORY / "params/presets/sample.yaml")
    assert text == render(sample, "python -m params use sample")
    assert read(REPOSITORY / "params.yaml") == sample
