"""Schemas of the tables a run writes: one row per audited token, one row per intervention and token.

They are public: a study needs only tables of this shape, whoever made them. docs/tables.md describes every column.
"""

from __future__ import annotations

import pyarrow as pa

OUTCOMES = ("delta_loss", "kl", "js", "tv", "top1_flip", "delta_logit", "gap_norm")
REDISTRIBUTION = ("remainder_norm", "gap_cosine", "remainder_norm_shared", "gap_cosine_shared")
REPEATED = ("delta_loss", "kl", "js", "tv", "delta_logit")  # outcomes of a repeat, in columns repeat_<outcome>
UNITS = ("expert", "shared", "set", "identity")

_WORD = pa.dictionary(pa.int8(), pa.string())

TOKENS = pa.schema(
    [
        ("document", pa.int32()),
        ("sequence", pa.int32()),
        ("position", pa.int32()),
        ("sentence", pa.int32()),
        ("domain", _WORD),
        ("token_id", pa.int32()),
        ("target_id", pa.int32()),  # null at the last position of a sequence
        ("baseline_loss", pa.float32()),  # nats; null where target_id is
        ("baseline_entropy", pa.float32()),  # nats
    ]
)

EFFECTS = pa.schema(
    [
        ("document", pa.int32()),
        ("sequence", pa.int32()),
        ("position", pa.int32()),
        ("layer", pa.int16()),
        ("unit", _WORD),
        ("expert", pa.int16()),  # null unless unit is expert
        ("experts", pa.list_(pa.int16())),  # null unless unit is set
        ("slot", pa.int8()),  # rank of the expert in the router's own order; null unless unit is expert
        ("intervention", _WORD),
        (
            "target",
            _WORD,
        ),  # how the experts were selected: each, all, highest, lowest, listed, shared; null for identity
        ("parameter", pa.float32()),  # the factor of scale, the count of highest and lowest; null otherwise
        ("draw", pa.int16()),  # of resample; null otherwise
        ("scope", _WORD),
        ("routing_weight", pa.float32()),  # summed over a set; null for shared experts
        ("contribution_norm", pa.float32()),  # ||c_i||, or ||sum of c over the set||
        ("gap_norm", pa.float32()),  # ||y' - y||
        # Where Engine.measure was asked for them, else null:
        ("attribution", pa.float32()),  # <dL_t/dy_t, -c_i>, nats; of single experts
        ("remainder_norm", pa.float32()),  # ||y'|| of the routed experts under zero
        ("gap_cosine", pa.float32()),  # cos(y - y', y')
        ("remainder_norm_shared", pa.float32()),  # both with the shared experts' output in y and y'
        ("gap_cosine_shared", pa.float32()),
        ("delta_loss", pa.float32()),  # nats; null where there is no next token
        ("kl", pa.float32()),  # nats
        ("js", pa.float32()),  # nats, in [0, ln 2]
        ("tv", pa.float32()),  # in [0, 1]
        ("top1_flip", pa.bool_()),
        ("delta_logit", pa.float32()),  # of the true next token; null where there is none
        ("repeated", pa.bool_()),  # chosen to be computed a second time under another rounding, with these outcomes:
        *((f"repeat_{name}", pa.float32()) for name in REPEATED),  # null too where routed otherwise by that rounding
    ]
)
