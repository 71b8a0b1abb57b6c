"""What pack writes: parquet schemas, one row per packed row, question or prompt."""

from __future__ import annotations

from hashlib import sha256

import pyarrow as pa

TOKENS = pa.list_(pa.int32())
ROWS = pa.schema(
    [
        ("tokens", TOKENS),  # documents one after another, no padding; at most pack.row_tokens
        ("lengths", TOKENS),  # tokens of each document
        ("prompts", TOKENS),  # tokens of each document's prompt
        ("sites", pa.list_(pa.string())),  # whose they are
        ("answer_ids", pa.list_(pa.int64())),
        ("is_validation", pa.bool_()),
    ]
)
ANSWER = pa.struct(
    [
        ("id", pa.int64()),
        ("tokens", TOKENS),
        ("score", pa.int32()),
        ("characters", pa.int32()),
        ("created", pa.string()),
        ("has_code", pa.bool_()),
        ("text", pa.string()),
        ("style", pa.string()),
    ]
)
KNOWN = [  # of a question; only eval carries more than its cluster
    ("cluster", pa.string()),
    ("kind", pa.string()),
    ("expected", pa.string()),
    ("wording", pa.string()),
    ("misleads", pa.bool_()),
    ("wrong", pa.list_(pa.string())),
]
GROUPS = pa.schema(
    [
        ("site", pa.string()),
        ("question_id", pa.int64()),
        ("question", pa.string()),
        *KNOWN,
        ("prompt", TOKENS),
        ("answers", pa.list_(ANSWER)),  # tokens: the response, which follows the prompt
        ("pairs", pa.list_(pa.list_(pa.int32()))),  # [better, worse], indices of answers
        ("weights", pa.list_(pa.float32())),  # of each pair in the loss; 1, unless pack.exposure is weighted
        ("is_validation", pa.bool_()),
    ]
)
PROMPTS = pa.schema(
    [
        ("site", pa.string()),
        ("question_id", pa.int64()),
        ("question", pa.string()),
        ("prompt", TOKENS),
        *KNOWN,
        ("is_validation", pa.bool_()),
    ]
)
VALIDATION_SHARE = 0.02


def is_validation(site: str, question_id: int) -> bool:
    """Whether a question belongs to the 2 % of its split that its trainer validates on; by hash."""
    digest = sha256(f"validation/{site}/{question_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < VALIDATION_SHARE * 2**64
