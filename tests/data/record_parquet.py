#!/usr/bin/env python3
"""Writes rows.parquet, which tests/parquet.rs reads, and bad.parquet, whose third row has no target.

    python tests/data/record_parquet.py      # needs pyarrow; last written with 26.0.1

Two row groups, Snappy (pyarrow's default), nulls, lists, ids, an integer and a date that are only carried through.
"""

import datetime
from pathlib import Path

import pyarrow
import pyarrow.parquet

DATA = Path(__file__).resolve().parent

text = pyarrow.table({
    "set": ["qnli", "sst2", "qnli"],
    "question": ["Is é 🙂?", "good", "Is it, \"so\"?"],
    "target": ["yes", "positive", "no"],
    "references": pyarrow.array([["yes", "Yes"], None, ["no"]], pyarrow.list_(pyarrow.string())),
    "task_id": pyarrow.array([0, None, 0], pyarrow.int64()),
    "day": pyarrow.array([datetime.date(2024, 5, 1), None, None]),
})
pyarrow.parquet.write_table(text, DATA / "rows.parquet", row_group_size=2)
ids = pyarrow.table({
    "task": ["a", "b", "a"],
    "input_ids": pyarrow.array([[5, 6], [7], [8]], pyarrow.list_(pyarrow.int32())),
    "label_ids": pyarrow.array([[9, 1], [1], None], pyarrow.list_(pyarrow.int32())),
})
pyarrow.parquet.write_table(ids, DATA / "bad.parquet")
