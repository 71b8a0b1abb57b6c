import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from params.load import read
from params.render import render
from params.schema import Params, Section


def leaves(section: Section) -> dict[str, object]:
    found = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        inner = leaves(value) if isinstance(value, Section) else {}
        found |= {f"{name}.{key}": leaf for key, leaf in inner.items()} or {name: value}
    return found


def flat(values: dict[str, object]) -> dict[str, object]:
    found = {}
    for name, value in values.items():
        inner = flat(value) if isinstance(value, dict) else {}
        found |= {f"{name}.{key}": leaf for key, leaf in inner.items()} or {name: value}
    return found


def test_every_number_stands_there_with_its_type():
    written = flat(yaml.safe_load(render(Params(), "x")))
    wanted = leaves(Params.model_validate(yaml.safe_load(render(Params(), "x"))))
    wanted = {key: list(value) if isinstance(value, tuple) else value for key, value in wanted.items()}
    assert written == wanted
    assert list(map(type, written.values())) == list(map(type, wanted.values()))
    assert len(written) > 60


def test_comments_are_the_descriptions():
    lines = render(Params(), "python -m params use sample").splitlines()
    assert lines[0] == "# Written by `python -m params use sample`."
    (line,) = [line for line in lines if line.startswith("  init_kl_coef: ")]
    assert line.endswith("  # price of KL at the start, score units per nat")
    (section,) = [line for line in lines if line.startswith("pack:")]
    assert section.endswith("# Tokens: tokenizer, template and every length.")


@pytest.mark.parametrize("source", ["sample", ("a b.7z",), ("x.7z", "y: z #.xml", "-1", "é", "'q'", "null")])
@pytest.mark.parametrize("base", ["", "org/name", "null", "1e5", "- x", "true", "~", "é: #"])
def test_what_is_written_reads_back(tmp_path, source, base):
    held_out = {} if source == "sample" else {"split_by": "site", "eval_sites": source}  # any names will do
    params = Params.model_validate({"data": {"source": source, **held_out}, "model": {"base": base}})
    (tmp_path / "params.yaml").write_text(render(params, "x"), encoding="utf-8")
    assert read(tmp_path / "params.yaml") == params


@given(st.floats(min_value=1e-300, max_value=1e300))
def test_yaml_reads_floats_as_floats(value):
    params = Params.model_validate({"sft": {"learning_rate": value}})
    assert yaml.safe_load(render(params, "x"))["sft"]["learning_rate"] == value


def test_a_whole_number_is_written_one_way():
    """Else DVC would see a change where there is none; defaults in the schema may be written as 5."""
    (text,) = {render(Params.model_validate({"sft": {"epochs": epochs}}), "x") for epochs in (5, 5.0, "5")}
    assert "  epochs: 5.0 " in text
    default = render(Params(), "x")
    assert render(Params.model_validate(yaml.safe_load(default)), "x") == default
