"""The schema of the pruning table; docs/tables.md describes the columns."""

from __future__ import annotations

import pyarrow as pa

_NAMES = pa.dictionary(pa.int32(), pa.string())

PRUNING = pa.schema(
    [
        ("criterion", _NAMES),
        ("order", _NAMES),
        ("draw", pa.int32()),  # null but for random
        ("share", pa.float64()),
        ("where", _NAMES),
        ("layers", pa.list_(pa.int16())),
        ("document", pa.int32()),
        ("tokens", pa.int64()),  # with a true next token: what all sums are over
        ("loss_sum", pa.float64()),
        ("baseline_loss_sum", pa.float64()),
        ("kl_sum", pa.float64()),
    ]
)
