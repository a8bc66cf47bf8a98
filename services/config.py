"""Configuration of a run: typed, frozen, and validated once. The error for an unknown key names the nearest known one.

A configuration has these layers, each of which overrides the one before: defaults, the preset of the algorithm and
environment, a YAML file, command-line flags and `--set key=value`. Run keys and the keys of the algorithm's constructor
have different names, so `--set` accepts both without a prefix.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    TypeAdapter,
    ValidationError,
)

from learner.algorithms import ALGORITHMS
from learner.presets import Preset, load_preset
from replay.errors import ConfigurationError


class RunConfig(BaseModel):
    """Resolved configuration of one run; `squall train --config` with these values repeats the run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    algorithm: str = Field(description="name of the algorithm")
    environment: str = Field(description="Gymnasium id")
    environment_arguments: dict[str, Any] = Field({}, description="keyword arguments of the environment")
    seed: NonNegativeInt = Field(0, description="seed from which all other seeds are derived")
    steps: PositiveInt = Field(1_000_000, description="environment steps of all workers together")
    actors: NonNegativeInt | Literal["auto"] = Field(
        2, description="number of rollout workers; auto; or 0 if all experience comes from external simulators"
    )
    replay_shards: PositiveInt = Field(1, description="number of tables that share the replay")
    learner_gpus: NonNegativeInt | Literal["auto"] = Field(
        "auto", description="GPUs of the learner: 0, 1, or auto, which takes one if there is one"
    )
    learner_threads: PositiveInt | Literal["auto"] = Field(
        "auto", description="CPU threads of the learner; auto takes the CPUs that workers leave, 1 to 4"
    )
    cpus_per_actor: NonNegativeFloat = Field(
        0.0, allow_inf_nan=False, description="CPUs that Ray reserves for each worker; 0 for none"
    )
    eval_every: NonNegativeInt = Field(
        10_000, description="environment steps between evaluations; 0 evaluates at the end only"
    )
    stop_at_return: float | None = Field(
        None,
        allow_inf_nan=False,
        description="end the run when a periodic evaluation reaches this mean return; null for none",
    )
    eval_episodes: PositiveInt = Field(10, description="number of episodes of a periodic evaluation")
    final_eval_episodes: PositiveInt = Field(
        20, description="number of fresh episodes that score the best and the last weights"
    )
    publish_every: PositiveInt = Field(100, description="updates between published versions of the weights")
    checkpoint_every: PositiveInt = Field(5_000, description="updates between step-numbered checkpoints")
    keep_checkpoints: PositiveInt = Field(3, description="number of step-numbered checkpoints to keep")
    precision: str = Field("auto", description="auto, 32-true, bf16-mixed, or 16-mixed")
    replay_deadline: float = Field(
        300.0, gt=0, description="seconds that a process waits for the replay before it fails"
    )
    serve: str | None = Field(
        None,
        description="host:port of the gRPC endpoint for policy and experience, or auto; null for none",
    )
    hyperparameters: dict[str, Any] = Field({}, description="arguments of the algorithm's constructor")

    @property
    def first_actors(self) -> int:
        """Initial number of rollout workers."""
        return 1 if self.actors == "auto" else self.actors

    def save(self, path: Path) -> None:
        """Write the configuration to a YAML file."""
        path.write_text(self.as_yaml())

    def as_yaml(self) -> str:
        """Return the configuration as YAML text."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False)


RUN_KEYS = tuple(name for name in RunConfig.model_fields if name not in ("hyperparameters", "algorithm", "environment"))
_PRECISIONS = ("auto", "32-true", "bf16-mixed", "16-mixed")
_SET_BY_RUN = ("seed",)  # constructor arguments whose value comes from a run key
KEY_ALIASES = {
    "lr": "learning_rate",
    "buffer_size": "replay_size",
    "learning_starts": "warm_start_size",
    "target_update_interval": "sync_rate",
    "n_envs": "num_envs",
    "envs_per_actor": "num_envs",
    "exploration_final_eps": "eps_end",
    "net_arch": "hidden_sizes",
}


def resolve(
    algorithm: str | None,
    environment: str | None,
    *,
    file: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> tuple[RunConfig, Preset | None]:
    """Return the configuration of a run, merged from all layers.

    Args:
        algorithm: name of the algorithm; None takes the file's.
        environment: environment id; None takes the file's.
        file: YAML file of run keys, with the keys of the algorithm's constructor under `hyperparameters`.
        overrides: run keys and keys of the constructor, in one flat mapping.

    Returns:
        The configuration, and the preset it is based on, or None if there is no preset.

    Raises:
        ConfigurationError: an unknown key, a wrong type, a value out of range, or an unreadable file.
    """
    from_file = read_yaml(file) if file is not None else {}
    algorithm = algorithm or from_file.get("algorithm")
    environment = environment or from_file.get("environment")
    for key in ("algorithm", "environment"):
        if overrides and key in overrides:
            raise ConfigurationError(
                f"--set cannot change {key}; name algorithm and environment first: squall train dqn CartPole-v1"
            )
    if not algorithm or not environment:
        raise ConfigurationError("name an algorithm and an environment, such as: squall train dqn CartPole-v1")
    if not isinstance(algorithm, str) or not isinstance(environment, str):
        raise ConfigurationError(f"algorithm and environment must be text, got {algorithm!r} and {environment!r}")
    if algorithm not in ALGORITHMS:
        hint = _nearest(algorithm, ALGORITHMS)
        raise ConfigurationError(f"unknown algorithm {algorithm!r}{hint}; there are {', '.join(ALGORITHMS)}")
    preset = load_preset(algorithm, environment)
    flat: dict[str, Any] = {}
    for layer in (
        ALGORITHMS[algorithm].run_defaults,
        {**preset.run, **preset.hyperparameters} if preset else {},
        {**{k: v for k, v in from_file.items() if k != "hyperparameters"}, **from_file.get("hyperparameters", {})},
        overrides or {},
    ):
        flat.update(layer)
    run = {key: value for key, value in flat.items() if key in RUN_KEYS}
    own = {key: value for key, value in flat.items() if key not in (*RUN_KEYS, "algorithm", "environment")}
    hyperparameters = _hyperparameters(algorithm, own)
    try:
        config = RunConfig(algorithm=algorithm, environment=environment, hyperparameters=hyperparameters, **run)
    except ValidationError as error:
        raise _as_configuration_error(error) from error
    _check(config)
    return config, preset


def _hyperparameters(algorithm: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return all arguments of an algorithm's constructor: the given values, validated, over the defaults."""
    types = ALGORITHMS[algorithm].hyperparameter_types()
    parameters = {name: parameter for name, parameter in types.items() if name not in _SET_BY_RUN}
    hyperparameters = {key: parameter.default for key, parameter in parameters.items()}
    for key, value in values.items():
        if key not in parameters:
            known = KEY_ALIASES.get(key)
            hint = f"; did you mean {known!r}?" if known in parameters else _nearest(key, [*RUN_KEYS, *parameters])
            raise ConfigurationError(f"unknown key {key!r}{hint}; --show-config lists all keys")
        hyperparameters[key] = _validated(key, parameters[key].annotation, value)
    return hyperparameters


def _check(config: RunConfig) -> None:
    """Raise `ConfigurationError` for values that the model's types do not exclude."""
    if config.precision not in _PRECISIONS:
        raise ConfigurationError(f"precision must be one of {', '.join(_PRECISIONS)}, got {config.precision!r}")
    if config.learner_gpus not in ("auto", 0, 1):
        raise ConfigurationError(
            f"the learner uses at most one GPU: learner_gpus must be auto, 0, or 1, got {config.learner_gpus}"
        )
    if config.stop_at_return is not None and not 0 < config.eval_every < config.steps:
        raise ConfigurationError(
            f"stop_at_return needs a periodic evaluation before the run's end: "
            f"eval_every is {config.eval_every:,} and the run has {config.steps:,} steps"
        )


def _validated(key: str, kind: Any, value: Any) -> Any:
    try:
        typed = TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        raise _as_configuration_error(error, key) from error
    return list(typed) if isinstance(typed, tuple) else typed


def _as_configuration_error(error: ValidationError, key: str = "") -> ConfigurationError:
    first = error.errors()[0]
    key = key or str(first["loc"][0])
    return ConfigurationError(f"{key}: {first['msg'][:1].lower()}{first['msg'][1:]}, got {first['input']!r}")


def _nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint that names the known name most similar to an unknown one, or an empty text."""
    similar = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {similar[0]!r}?" if similar else ""


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file.

    Raises:
        ConfigurationError: the file cannot be read, or contains something else.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except FileNotFoundError as error:
        raise ConfigurationError(f"there is no file {path}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigurationError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    own = content.get("hyperparameters", {}) if isinstance(content, dict) else None
    if not isinstance(own, dict) or not all(isinstance(key, str) for key in [*content, *own]):
        raise ConfigurationError(f"{path} must contain a mapping of names to values")
    mapping: dict[str, Any] = content
    return mapping


def parse_assignment(text: str) -> tuple[str, Any]:
    """Return the key and value of `key=value`; the value is parsed as YAML, so `[64, 64]` and `null` work.

    Raises:
        ConfigurationError: there is no `=`, or the value is not valid YAML.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigurationError(f"--set takes key=value, got {text!r}")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigurationError(f"--set {key}: {value!r} is not a valid YAML value") from error
