"""Model classes of transformers by their names: as eager, or refused by name."""

from __future__ import annotations

import pytest

from tests.integrations.transformers import sweep

# Of each way in which models make, read and hand on their masks at least one.
SOME = (
    "AfmoeModel",
    "ViTModel",
    "BartModel",
    "BertForMultipleChoice",
    "BigBirdModel",
    "BloomModel",
    "BridgeTowerModel",
    "CanineModel",
    "CLIPModel",
    "DeepseekV32Model",
    "DogeModel",
    "FalconModel",
    "Gemma3ForSequenceClassification",
    "GPTJModel",
    "GPTNeoModel",
    "LasrEncoder",
    "LEDModel",
    "LlavaForConditionalGeneration",
    "LongformerModel",
    "MptModel",
    "Qwen2VLModel",
    "Qwen3_5ForCausalLM",
    "T5Model",
    "TimesFm2_5ModelForPrediction",
    "Wav2Vec2Model",
    "WhisperModel",
    "XGLMModel",
    "XLNetModel",
)


@pytest.mark.parametrize("name", SOME)
def test_a_model_class_is_as_eager_or_refused_by_name(name: str) -> None:
    """And as the committed outcomes have it."""
    found = sweep.sweep([name], lambda *_: None)[name]
    assert found.split(":")[0] in ("equal", "own attention", "refused"), found
    assert found == sweep.read_outcomes()[name]


def test_no_committed_outcome_is_a_fault() -> None:
    outcomes = sweep.read_outcomes()
    assert set(outcomes) == set(sweep.model_classes())
    faults = {k: v for k, v in outcomes.items() if v.startswith(("different", "error"))}
    assert faults == {}
    for outcome in outcomes.values():
        if outcome.startswith("refused"):
            assert "flashlayer" in outcome
            assert "eager" in outcome or "can't do" in outcome


@pytest.mark.slow
@pytest.mark.parametrize("part", range(1, 13))
def test_every_model_class_is_as_eager_or_refused_by_name(part: int) -> None:
    names = sweep.model_classes()
    names = names[len(names) * (part - 1) // 12 : len(names) * part // 12]
    found = sweep.sweep(names, lambda *_: None)
    outcomes = sweep.read_outcomes()
    assert found == {name: outcomes[name] for name in names}
