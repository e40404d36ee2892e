import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from newllm.config.schema import OptimizerConfig, ScheduleConfig
from newllm.models.create import create_model
from newllm.trainers.optimization import build_optimizer, learning_rate_factor, parameter_groups

OPTIMIZER = OptimizerConfig(lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, gate_lr_factor=10.0)
COSINE = ScheduleConfig(kind="cosine", warmup_steps=10, min_lr_ratio=0.1, decay_share=0.2)


def test_every_parameter_is_in_one_group_and_only_matrices_are_decayed():
    model = create_model(
        "infini", vocab_size=11, dim=16, num_layers=2, num_heads=2, feedback="gated", num_memory_banks=2
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    groups = {group["name"]: [names[id(p)] for p in group["params"]] for group in parameter_groups(model, OPTIMIZER)}

    assert sorted(name for group in groups.values() for name in group) == sorted(names.values())
    assert groups["gates"] == ["layers.0.memory_gate", "layers.0.bank_gate"]
    assert all("norm" in name or "bias" in name for name in groups["plain"])
    assert "feedback.feedback_gate.weight" in groups["decayed"]


def test_gates_learn_faster_and_are_not_decayed():
    model = create_model("infini", vocab_size=11, dim=16, num_layers=2, num_heads=2)

    groups = {group["name"]: group for group in build_optimizer(model, OPTIMIZER).param_groups}

    assert groups["gates"]["lr"] == pytest.approx(1e-2)
    assert groups["gates"]["weight_decay"] == groups["plain"]["weight_decay"] == 0
    assert groups["decayed"]["weight_decay"] == 0.1


def test_cosine_warms_up_and_ends_at_its_minimum():
    factor = learning_rate_factor(COSINE, 110)

    assert [factor(step) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert factor(60) == pytest.approx(0.1 + 0.9 * 0.5)
    assert factor(110) == pytest.approx(0.1)


def test_wsd_stays_until_its_last_share_and_then_falls_in_a_line():
    factor = learning_rate_factor(dataclasses.replace(COSINE, kind="wsd"), 100)

    assert [factor(step) for step in (10, 79, 90, 100)] == pytest.approx([1, 1, 0.55, 0.1])


@given(
    kind=st.sampled_from(["constant", "cosine", "wsd"]),
    warmup=st.integers(0, 20),
    steps=st.integers(20, 60),
    step=st.integers(0, 100),
)
def test_the_factor_stays_between_nothing_and_one(kind: str, warmup: int, steps: int, step: int):
    schedule = ScheduleConfig(kind=kind, warmup_steps=warmup, min_lr_ratio=0.0, decay_share=0.3)

    assert 0 <= learning_rate_factor(schedule, steps)(step) <= 1
