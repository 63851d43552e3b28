from __future__ import annotations

import pytest

from benchmarks.faults.trial import Trial, tables
from cluster.worker import Output


def test_a_table_of_other_columns_is_no_output() -> None:
    found = tables(Trial(folder="", state="").measure()[0])
    assert Output({}, found).tables == found
    with pytest.raises(ValueError, match=r"^the effects table is not of its schema, in columns or order: kl, tv$"):
        Output({}, found | {"effects": found["effects"].drop_columns(["kl", "tv"])})
    with pytest.raises(ValueError, match=r"^the tokens table is not of its schema"):
        Output({}, {"tokens": found["tokens"].select(found["tokens"].column_names[::-1])})
