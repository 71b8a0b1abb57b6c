"""What the stage writes: Parquet, one row per question, answers nested."""

from __future__ import annotations

import pyarrow as pa

ANSWER = pa.struct(
    [
        pa.field("id", pa.int64(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("score", pa.int32(), nullable=False),
        pa.field("votes", pa.int32(), nullable=False),
        pa.field("accepted", pa.bool_(), nullable=False),
        pa.field("created", pa.string(), nullable=False),
        pa.field("owner_id", pa.int64()),
        pa.field("licence", pa.string(), nullable=False),
        pa.field("style", pa.string()),  # known on the sample site's eval split alone, as all below `cluster`
    ]
)
SCHEMA = pa.schema(
    [
        pa.field("site", pa.string(), nullable=False),
        pa.field("id", pa.int64(), nullable=False),
        pa.field("title", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("created", pa.string(), nullable=False),
        pa.field("owner_id", pa.int64()),
        pa.field("licence", pa.string(), nullable=False),
        pa.field("tags", pa.list_(pa.string()), nullable=False),
        pa.field("cluster", pa.string()),  # of look-alikes, or one thing to know: resampled together
        pa.field("kind", pa.string()),
        pa.field("expected", pa.string()),  # the right answer
        pa.field("wording", pa.string()),  # known, or new: in no training split
        pa.field("misleads", pa.bool_()),  # a misconception is more frequent than the truth
        pa.field("wrong", pa.list_(pa.string())),  # every other value that the site answers with
        pa.field("answers", pa.list_(ANSWER), nullable=False),
    ]
)


KNOWN_LATER = ("cluster", "kind", "expected", "wording", "misleads", "wrong")
# While the splits are unknown: with what decides them.
UNSPLIT = SCHEMA.append(pa.field("pairs", pa.int32())).append(pa.field("marks", pa.list_(pa.int64())))
KEYS = pa.schema([UNSPLIT.field(name) for name in ("site", "id", "marks")])
