import pyarrow as pa
import pytest
from pyarrow import parquet

from tasks.run.parquet import ROWS_PER_GROUP, TableWriter

SCHEMA = pa.schema([("number", pa.int64()), ("texts", pa.list_(pa.string()))])


def table(start: int, stop: int) -> pa.Table:
    rows = [{"number": n, "texts": [str(n)] * (n % 3)} for n in range(start, stop)]
    return pa.Table.from_pylist(rows, schema=SCHEMA)


@pytest.mark.parametrize("step", [1, 700, 1024, 5000])
def test_how_rows_come_does_not_show(tmp_path, step):
    total = 2 * ROWS_PER_GROUP + 300
    with TableWriter(tmp_path / "whole.parquet", SCHEMA) as writer:
        writer.write(table(0, total))
    with TableWriter(tmp_path / "parts.parquet", SCHEMA) as writer:
        for start in range(0, total, step):
            writer.write(table(start, min(total, start + step)))
    assert writer.rows == total
    assert (tmp_path / "parts.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    assert parquet.read_table(tmp_path / "parts.parquet") == table(0, total)
    assert parquet.read_metadata(tmp_path / "parts.parquet").num_row_groups == 3


def test_no_rows_are_a_file_too(tmp_path):
    with TableWriter(tmp_path / "none.parquet", SCHEMA):
        pass
    assert parquet.read_table(tmp_path / "none.parquet") == table(0, 0)
