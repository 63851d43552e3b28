"""The one-call interface: text in, effect table out, and a sentence for what cannot be measured."""

from __future__ import annotations

import numpy as np
import pytest
from families import build, ready
from transformers import PreTrainedTokenizerFast

import audit
from audit.effects import EFFECTS
from audit.engine import Engine
from audit.models import prepare

IDS = [5, 17, 99, 3, 42]


def test_every_active_expert_everywhere_by_default() -> None:
    model = ready("deepseek_v3")
    table = audit.measure(model, IDS)
    assert table.schema.equals(EFFECTS)
    frame = table.to_pandas()
    experts = frame[frame["unit"] == "expert"]
    assert len(experts) == 5 * 3 * 2  # positions, MoE layers, slots
    assert set(experts["layer"]) == set(model.description.moe_layers) == {1, 2, 3}
    assert set(experts["intervention"]) == {"zero"}
    assert set(experts["scope"]) == {"token"}


def test_the_same_numbers_as_the_engine() -> None:
    model = ready("deepseek_v3")
    asked = [audit.Intervention("reroute"), audit.Intervention("zero", audit.Target("shared"))]
    read = audit.sequences(model, [IDS, IDS[:2]])
    ours = audit.measure(model, [IDS, IDS[:2]], layers=[2], interventions=asked, scope="sequence")
    engine = Engine(model, memory=4 * 2**30)
    theirs = engine.measure(read, [np.arange(5), np.arange(2)], layers=[2], interventions=asked, scope="sequence")
    assert ours.equals(theirs.effects)
    assert ours.num_rows > 14


def test_chosen_experts_positions_and_layers() -> None:
    model = ready("deepseek_v3")
    whole = audit.measure(model, IDS, layers=[2]).to_pandas()
    expert = int(whole[(whole["position"] == 3) & (whole["unit"] == "expert")]["expert"].iloc[0])
    some = audit.measure(model, IDS, layers=[2], experts=[expert], positions=[3, 1, 3]).to_pandas()
    some = some[some["unit"] == "expert"]
    assert set(some["expert"]) == {expert}
    assert set(some["position"]) <= {1, 3}
    want = whole[(whole["expert"] == expert) & (whole["position"] == 3)]["kl"].item()
    assert some[some["position"] == 3]["kl"].item() == pytest.approx(want, rel=1e-5)


def test_text_is_read_with_the_models_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    model = prepare(build("olmoe", 0, vocab_size=400), tokenizer)
    text = "The cat sat on the mat."
    ids = tokenizer(text)["input_ids"]
    one, same = audit.sequences(model, text)[0], audit.sequences(model, ids)[0]
    assert one.token_ids.tolist() == ids
    assert one.special.tolist() == [True] + [False] * (len(ids) - 1)
    assert audit.measure(model, text, layers=[1]).equals(audit.measure(model, ids, layers=[1]))
    two = audit.sequences(model, [text, ids[:3]])
    assert [(s.index, s.document, len(s)) for s in two] == [(0, 0, len(ids)), (1, 1, 3)]
    assert same.domain == "text"


def test_calibration_goes_into_mean_and_resample() -> None:
    model = ready("deepseek_v3")
    corpus = [[int(i) for i in np.random.default_rng(n).integers(3, 128, 40)] for n in range(3)]
    calibration = audit.calibrate(model, corpus, stored_outputs=4)
    asked = [audit.Intervention("mean"), audit.Intervention("resample", draws=2)]
    found = audit.measure(model, IDS, layers=[2], interventions=asked, calibration=calibration).to_pandas()
    real = found[found["unit"] == "expert"]
    assert (real["intervention"] == "resample").sum() == 2 * (real["intervention"] == "mean").sum() > 0
    with pytest.raises(ValueError, match="mean needs a calibration"):
        audit.measure(model, IDS, layers=[2], interventions=asked[:1])


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("words", {}, "this model has no tokenizer"),
        ([3, 128], {}, "each from 0 to 127"),
        ([-1, 5], {}, "each from 0 to 127"),
        ([IDS, []], {}, "0 token ids; at least one is needed"),
        (IDS, {"positions": [5]}, "positions: 5 is not a position; the text has 0 to 4"),
        (IDS, {"positions": [-1, 2]}, "positions: -1 is not a position"),
        (IDS, {"layers": [0]}, "layers: 0 is not an MoE layer; those are 1, 2, 3"),
        (IDS, {"experts": [8]}, "8 is not an expert; the layer has 0 to 7"),
        (IDS, {"experts": [1], "interventions": []}, "interventions carry their own targets"),
        (IDS, {"memory": 1}, "engine.memory: 0 MiB do not hold the weights"),
        ([3] * 300, {}, "has 300 tokens, the model reads at most 256"),
        ([], {}, "text: 0 token ids; at least one is needed"),
    ],
)
def test_what_cannot_be_measured(text: object, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        audit.measure(ready("deepseek_v3"), text, **options)  # type: ignore[arg-type]
