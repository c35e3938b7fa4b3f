import pytest

from train.lit import GPTModule, schedule_factor
from train.model import GPTConfig


def test_matrices_decay_and_vectors_do_not() -> None:
    module = GPTModule(GPTConfig(context=8, n_layer=2, n_head=2, n_embd=8), weight_decay=0.3)
    decayed, free = module.parameter_groups()
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.3, 0.0)
    names = {id(parameter): name for name, parameter in module.model.named_parameters()}
    in_groups = [names[id(parameter)] for parameter in decayed["params"] + free["params"]]
    assert sorted(in_groups) == sorted(names.values())
    assert all(
        names[id(p)].endswith("bias") or ".norm" in f".{names[id(p)]}" for p in free["params"]
    )
    assert not any("bias" in names[id(p)] or "norm" in names[id(p)] for p in decayed["params"])


def test_the_schedule_warms_up_and_decays_to_a_tenth() -> None:
    factors = [schedule_factor(step, warmup_steps=10, total_steps=110) for step in range(111)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == factors[10] == 1.0
    assert factors[60] == pytest.approx(0.55)
    assert factors[110] == pytest.approx(0.1)
    assert factors[10:] == sorted(factors[10:], reverse=True)
