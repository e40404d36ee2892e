"""Which model, trainer, loss and data go together, and what no single group can check alone."""

from collections.abc import Callable, Collection
from dataclasses import fields
from typing import cast

from newllm.config.kinds import kinds_of, schema_of
from newllm.config.problems import listed
from newllm.config.schema import GroupConfig, LossConfig, ModelConfig, TrainConfig, TrainerConfig


def check_model(config: TrainConfig) -> list[str]:
    """Return what is wrong between the model and its layers."""
    return [*config.model.check(config), *config.layers.check(config)]


def check_run(config: TrainConfig, given: Collection[str] = ()) -> list[str]:
    """Return every rule between two groups that the configuration breaks.

    Args:
        given: keys and groups the user set; what would have no effect is refused only where it was asked for.
    """
    groups = [getattr(config, field.name) for field in fields(config)]
    own = [problem for group in groups if isinstance(group, GroupConfig) for problem in group.check(config)]
    evaluations = [problem for evaluation in config.evaluation.values() for problem in evaluation.check(config)]
    return [
        *own,
        *evaluations,
        *_evaluations_of_one_run(config),
        *_model_with_trainer(config),
        *_trainer_with_loss(config),
        *_model_with_data(config),
        *_data_with_tokenizer(config, given),
        *_shares(config),
        *_steps(config),
        *_root(config),
    ]


def _evaluations_of_one_run(config: TrainConfig) -> list[str]:
    return [
        f"evaluation=[{name}]: compares finished runs, this one has yet to be trained. Allowed: in evaluate.py. Leave it out here, "
        f"then type python evaluate.py run=<folder of one of the runs> 'evaluation=[{name}]'."
        for name, evaluation in config.evaluation.items()
        if evaluation.across_runs
    ]


def _model_with_trainer(config: TrainConfig) -> list[str]:
    trainer, model = config.trainer, config.model
    can_switch = hasattr(model, "feedback")
    which = f"model.feedback={getattr(model, 'feedback', None)}" if can_switch else f"a model of kind {model.kind}"
    if model.needs_trainer not in (None, trainer.kind):
        return [
            f"trainer={trainer.kind}: does not train all of this model (kind {model.kind}). "
            f"Allowed with it: {model.needs_trainer}. Choose trainer={model.needs_trainer}."
        ]
    if trainer.only_model not in (None, model.kind):
        others = _trainers_of(model, can_switch=can_switch)
        return [
            f"trainer={trainer.kind}: is for model={trainer.only_model}, not for a model of kind {model.kind}. Allowed with this model: "
            f"trainer={listed(others)}. Choose one of these, or model={trainer.only_model}."
        ]
    if _suits(trainer, model):
        return []
    others = _trainers_of(model, can_switch=False)
    if not model.has_feedback:
        advice = "Leave model.feedback to the trainer, or choose" if can_switch else "Choose"
        return [
            f"trainer={trainer.kind}: trains a recurrence, {which} has none. "
            f"Allowed without one: trainer={listed(others)}. {advice} another trainer."
        ]
    return [
        f"trainer={trainer.kind}: cannot train a recurrence, {which} is one. "
        f"Allowed with one: trainer={listed(others)}. Choose another trainer."
    ]


def _suits(trainer: TrainerConfig | type[TrainerConfig], model: ModelConfig) -> bool:
    """Whether a trainer takes the model's recurrence, or does without one as the model does."""
    return trainer.allows_feedback if model.has_feedback else not trainer.needs_feedback


def _trainers_of(model: ModelConfig, *, can_switch: bool) -> list[str]:
    """Return the kinds of trainer that train a model: as it is, or with its feedback switched on or off as they need it."""
    has_last_position = hasattr(model, "max_positions")
    return _trainers(
        lambda schema: (
            schema.only_model in (None, model.kind)
            and (can_switch or _suits(schema, model))
            and not (has_last_position and schema.reads_in_lanes)
        )
    )


def _trainers(is_wanted: Callable[[type[TrainerConfig]], bool]) -> list[str]:
    """Return the kinds of trainer whose schema is wanted."""
    schemas = {kind: cast(type[TrainerConfig], schema_of(TrainerConfig, kind)) for kind in kinds_of(TrainerConfig)}
    return [kind for kind, schema in schemas.items() if is_wanted(schema)]


def _trainer_with_loss(config: TrainConfig) -> list[str]:
    trainer, loss = config.trainer, config.loss
    if loss.reads == trainer.gives:
        return []
    schemas = {kind: cast(type[LossConfig], schema_of(LossConfig, kind)) for kind in kinds_of(LossConfig)}
    fitting = [kind for kind, schema in schemas.items() if schema.reads == trainer.gives]
    others = _trainers(lambda schema: schema.gives == loss.reads)
    return [
        f"loss={loss.kind}: trainer={trainer.kind} cannot minimise it, it reads {loss.reads} and the trainer gives {trainer.gives}. "
        f"Allowed with this trainer: {listed(fitting)}. Choose one of these, or a trainer for this loss: {listed(others)}."
    ]


def _model_with_data(config: TrainConfig) -> list[str]:
    length, positions = config.data.block_length, getattr(config.model, "max_positions", None)
    if positions is None or length <= positions:
        return []
    return [
        f"data.block_length={length}: is more than model.max_positions={positions}. Allowed: 1 to {positions}. "
        "Shorten the blocks or raise model.max_positions."
    ]


def _data_with_tokenizer(config: TrainConfig, given: Collection[str]) -> list[str]:
    asked = [key for key in given if key == "tokenizer" or key.startswith("tokenizer.")]
    if config.data.needs_tokenizer or not asked:
        return []
    return [
        f"{sorted(asked)[0]}: data={config.data.kind} gives token ids, not text. "
        "Allowed with this data: no choice of tokenizer. Leave it out or choose another data."
    ]


def _shares(config: TrainConfig) -> list[str]:
    data = config.data
    if data.validation_share + data.test_share < 1:
        return []
    return [
        f"data.validation_share={data.validation_share:g}: with data.test_share={data.test_share:g} leaves nothing to "
        "train on. Allowed: a sum below 1. Lower one of them."
    ]


def _steps(config: TrainConfig) -> list[str]:
    steps, problems = config.trainer.max_steps, []
    if config.schedule.warmup_steps > steps:
        problems.append(
            f"schedule.warmup_steps={config.schedule.warmup_steps}: is more than trainer.max_steps={steps}. "
            f"Allowed: 0 to {steps}. Lower it or train longer."
        )
    if config.trainer.validate_every_steps > steps:
        problems.append(
            f"trainer.validate_every_steps={config.trainer.validate_every_steps}: is more than "
            f"trainer.max_steps={steps}: the run would never be validated. Allowed: 1 to {steps}. Lower it or train longer."
        )
    return problems


def _root(config: TrainConfig) -> list[str]:
    if not config.output_dir.strip():
        return [
            f"output_dir={config.output_dir or repr('')}: names no folder. Allowed: a path. Name one, `.` for the current folder."
        ]
    if config.name.strip() and not set(config.name) & set('/\\:*?"<>|') and config.name not in (".", ".."):
        return []
    return [
        f"name={config.name or repr('')}: cannot name a folder. "
        'Allowed: letters, digits, and other signs except / \\ : * ? " < > |. Choose another name.'
    ]
