"""What version 0.1.0 left on disk and printed still holds: files load, commands answer, and nothing has vanished."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from google.protobuf.descriptor_pb2 import DescriptorProto, EnumDescriptorProto, FileDescriptorProto
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import learner
from learner.algorithms import ALGORITHMS
from learner.checkpoints import load_algorithm
from services.cli.main import main
from services.rpc.squall_pb2 import DESCRIPTOR
from tests.services.redis_server import RedisServer
from tests.services.running import Run, squall
from tests.upgrade.make_artifacts import ARTIFACTS, act, learn_on, questions


def read(file: str) -> Any:
    """Return the content of a JSON artifact."""
    return json.loads((ARTIFACTS / file).read_text())


@pytest.fixture
def old_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy of the old runs' folder, which commands take for their own."""
    shutil.copytree(ARTIFACTS / "home", tmp_path / "runs")
    monkeypatch.setenv("SQUALL_HOME", str(tmp_path / "runs"))
    monkeypatch.delenv("SQUALL_STORE", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


@pytest.fixture
def redis_store(tmp_path: Path) -> Iterator[str]:
    """Yield the URL of a Redis server that was started with the old dump."""
    folder = tmp_path / "redis"
    folder.mkdir()
    shutil.copy(ARTIFACTS / "dump.rdb", folder)
    with RedisServer(folder, "--appendonly", "no") as server:
        yield server.url


def ask(capfd: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """Return the JSON that a command prints."""
    assert main([*arguments, "--json"]) == 0, capfd.readouterr().err
    return json.loads(capfd.readouterr().out)


def recorded_part(now: Any, before: Any) -> Any:
    """Return what an answer has of a recorded one: keys may be added, none may vanish, and no value may change."""
    if isinstance(now, dict) and isinstance(before, dict):
        return {key: recorded_part(now[key], before[key]) for key in before if key in now}
    if isinstance(now, list) and isinstance(before, list) and len(now) == len(before):
        return [recorded_part(one, other) for one, other in zip(now, before, strict=True)]
    return now


def tensors(state: dict[str, Any]) -> dict[str, list[Any]]:
    return {name: tensor.tolist() for name, tensor in state.items()}


# Checkpoints.

CHECKPOINTS = read("outputs.json")
checkpoints = pytest.mark.parametrize("name", CHECKPOINTS)


def test_each_algorithm_of_then_is_one_of_now() -> None:
    assert set(CHECKPOINTS) <= set(ALGORITHMS)
    assert {path.stem for path in (ARTIFACTS / "checkpoints").iterdir()} == set(CHECKPOINTS)


@checkpoints
def test_a_checkpoint_loads_and_acts_as_it_did(name: str) -> None:
    path, recorded = ARTIFACTS / "checkpoints" / f"{name}.ckpt", CHECKPOINTS[name]
    kind = getattr(learner, recorded["class"])
    loaded = load_algorithm(path)
    assert type(loaded) is kind
    assert ALGORITHMS[name] is kind
    observation = np.array(recorded["observation"], np.float32)
    for algorithm in (loaded, kind.load_from_checkpoint(path, weights_only=True)):
        answers = act(algorithm, observation)
        for output, before in zip(answers["output"], recorded["output"], strict=True):
            np.testing.assert_allclose(output, before, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(answers["action"], recorded["action"], rtol=1e-4, atol=1e-5)


@checkpoints
def test_a_checkpoint_of_now_has_the_keys_of_then(name: str) -> None:
    path = ARTIFACTS / "checkpoints" / f"{name}.ckpt"
    saved = torch.load(path, weights_only=True)
    algorithm = load_algorithm(path)
    assert tensors(algorithm.state_dict()) == tensors(saved["state_dict"])
    assert saved["hyper_parameters"].items() <= dict(algorithm.hparams).items()
    written: dict[str, Any] = {}
    algorithm.on_save_checkpoint(written)
    assert written["squall"] == saved["squall"]


@checkpoints
def test_learning_goes_on_from_a_checkpoint_and_logs_under_the_same_names(name: str) -> None:
    path = ARTIFACTS / "checkpoints" / f"{name}.ckpt"
    before, algorithm = torch.load(path, weights_only=True), load_algorithm(path)
    trainer = learn_on(algorithm, path)
    assert trainer.global_step == before["global_step"] + 2
    assert set(CHECKPOINTS[name]["metrics"]) <= set(trainer.callback_metrics)
    # With the optimizer's state of then; an algorithm has one.
    (old,), (new,) = before["optimizer_states"], [optimizer.state_dict() for optimizer in trainer.optimizers]
    assert old["state"].keys() == new["state"].keys()
    assert {float(state["step"]) for state in new["state"].values()} == {
        float(state["step"]) + 2 for state in old["state"].values()
    }


def test_networks_for_images_have_the_names_and_shapes_of_then() -> None:
    module = learner.DQN("PongNoFrameskip-v4", hidden_sizes=[8], replay_size=1000, warm_start_size=100)
    assert {name: list(tensor.shape) for name, tensor in module.state_dict().items()} == read("image-networks.json")


# Runs and their stores.


@pytest.mark.parametrize("question", [name for name in questions() if name != "plot"])
def test_an_old_file_answers_as_it_did(question: str, old_runs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = read(f"answers/sqlite/{question}.json")
    assert recorded_part(ask(capfd, *questions()[question]), before) == before


def test_an_old_redis_server_answers_as_it_did(redis_store: str, capfd: pytest.CaptureFixture[str]) -> None:
    for question in questions().keys() - {"plot"}:
        answer, before = (
            ask(capfd, *questions()[question], "--store", redis_store),
            read(f"answers/redis/{question}.json"),
        )
        assert recorded_part(answer, before) == before, question


@pytest.mark.parametrize("store", ["sqlite", "redis"])
def test_old_runs_are_plotted(store: str, old_runs: Path, redis_store: str, capfd: pytest.CaptureFixture[str]) -> None:
    flag = ("--store", redis_store) if store == "redis" else ()
    answer, before = ask(capfd, *questions()["plot"], *flag), read(f"answers/{store}/plot.json")
    assert Path(answer.pop("output")).name == Path(before.pop("output")).name
    assert answer == before


def test_an_old_run_is_evaluated_as_it_was(old_runs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    figures, before = ask(capfd, "evaluate", "finished", "--episodes", "3"), read("answers/evaluate.json")
    assert Path(figures.pop("checkpoint")) == old_runs / "finished" / "checkpoints" / "best.ckpt"
    del before["checkpoint"]
    assert recorded_part(figures, before) == pytest.approx(before)


@pytest.mark.parametrize("run", ["finished", "stopped", "sac", "a2c"])
def test_an_old_configuration_resolves_as_it_did(run: str, old_runs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = old_runs / run / "config.yaml"
    config, before = ask(capfd, "train", "--config", str(file), "--show-config"), read(f"answers/config-{run}.json")
    assert before == yaml.safe_load(file.read_text())
    own, own_before = config.pop("hyperparameters"), before.pop("hyperparameters")
    assert {key: config.get(key, "gone") for key in before} == before
    assert {key: own.get(key, "gone") for key in own_before} == own_before


@pytest.mark.parametrize("case", read("answers/exit-statuses.json"), ids=lambda case: " ".join(case["arguments"]))
def test_a_refusal_has_the_exit_status_it_had(
    case: dict[str, Any], old_runs: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    try:
        status: Any = main(case["arguments"])
    except SystemExit as end:
        status = end.code
    assert status == case["status"], capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_an_old_stopped_run_is_resumed(old_runs: Path) -> None:
    before = json.loads((old_runs / "stopped" / "summary.json").read_text())
    checkpoint = old_runs / "stopped" / "checkpoints" / "last.ckpt"
    old = torch.load(checkpoint, weights_only=True)
    run = Run(old_runs, "stopped", "--resume", "stopped", "--steps", str(before["env_steps"] + 2000))
    try:
        summary = run.finish(300)
        status = run.status()
    finally:
        run.kill_everything()
    assert summary["stopped_because"] == "steps"
    assert summary["env_steps"] >= before["env_steps"] + 2000
    assert summary["updates"] > before["updates"]
    check_same_form(read("answers/train.json"), summary)
    check_same_form(read("answers/sqlite/status-finished.json"), status)
    assert "resume" in [event["kind"] for event in status["events"]]
    new = torch.load(checkpoint, weights_only=True)
    for part in ("state_dict", "squall", "hyper_parameters"):
        assert new[part].keys() >= old[part].keys(), part
    assert new["squall"]["run"].keys() >= old["squall"]["run"].keys()
    board = EventAccumulator(str(old_runs / "stopped" / "tensorboard")).Reload()
    assert set(read("answers/metrics.json")) <= set(board.Tags()["scalars"])
    assert [row["name"] for row in json.loads(squall(old_runs, "runs", "--json").stdout)] == [
        row["name"] for row in read("answers/sqlite/runs.json")
    ]


def check_same_form(before: Any, now: Any, where: str = "answer") -> None:
    """Assert that a JSON value has the keys and types of an earlier one, whatever the values; null goes with any."""
    if before is None or now is None:
        return
    assert type(now) is type(before), f"{where} was {before!r} and is {now!r}"
    if isinstance(before, dict) and not where.endswith(".waiting"):  # whose keys are processes
        assert now.keys() >= before.keys(), where
        for key in before:
            check_same_form(before[key], now[key], f"{where}.{key}")
    if isinstance(before, list) and before:
        for item in now:
            check_same_form(before[0], item, f"{where}[]")


@pytest.mark.parametrize("now", [{}, {"a": 1, "b": []}, {"a": 1.0}, {"a": [{"b": 1}, {"b": "1"}]}, {"a": [{"c": 1}]}])
def test_another_form_is_noticed(now: Any) -> None:
    check_same_form({"a": [{"b": 1}]}, {"a": [{"b": 2, "c": 1}, {"b": None}]})
    with pytest.raises(AssertionError):
        check_same_form({"a": [{"b": 1}]}, now)


# The command line.

HELP = sorted(path.stem for path in (ARTIFACTS / "help").iterdir())


@pytest.mark.parametrize("command", HELP)
def test_a_command_takes_what_it_took(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as end:
        main(["--help"] if command == "squall" else [command, "--help"])
    assert end.value.code == 0
    before, now = (ARTIFACTS / "help" / f"{command}.txt").read_text(), capsys.readouterr().out
    assert options(before).items() <= options(now).items()
    assert {"--help", "-h"} <= options(before).keys()
    if command == "squall":
        assert set(HELP) - {"squall"} == set(commands(before)) <= set(commands(now))
    else:
        assert positionals(now) == positionals(before)


def options(text: str) -> dict[str, str]:
    """Return what each option in a help text takes: "", "X", "[X]" or the choices."""
    found = {}
    for line in re.findall(r"^  (-\S.*?)(?:  .*)?$", text, re.MULTILINE):
        parts = [re.fullmatch(r"(--?[\w-]+)(?: (.+))?", part) for part in re.split(r", (?=-)", line)]
        value = next((part[2] for part in parts if part and part[2]), "")
        for part in parts:
            assert part is not None, line
            found[part[1]] = re.sub(r"[^\[\]{}]+", "X", value) if "{" not in value else value
    return found


def positionals(text: str) -> list[str]:
    """Return what a help text's usage says of arguments without a dash: "X", "[X]" or "X [X ...]"."""
    usage = " ".join(text.partition("usage: squall ")[2].partition("\n\n")[0].split()[1:])
    usage = re.sub(r"\[-\w[^\[\]]*(\[[^\[\]]*\])?\]|\[--\w[^\[\]]*(\[[^\[\]]*\])?\]|(?<!\[)--[\w-]+ [A-Z]+", "", usage)
    return re.sub(r"[\w.-]+", "X", usage).split()


def commands(text: str) -> list[str]:
    """Return the commands that the top help lists."""
    return re.findall(r"^    ([a-z]+)  ", text.partition("\ncommands:")[2], re.MULTILINE)


# gRPC.


def test_every_message_and_method_is_still_there_unchanged() -> None:
    before, now = FileDescriptorProto(), FileDescriptorProto()
    before.ParseFromString((ARTIFACTS / "squall.proto.bin").read_bytes())
    now.ParseFromString(DESCRIPTOR.serialized_pb)
    assert now.syntax == before.syntax
    described, description = dict(contents(before)), dict(contents(now))
    assert len(described) > 100
    assert {name: description.get(name, "gone") for name in described} == described


def contents(file: FileDescriptorProto) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Yield everything in a proto by its full name, with what callers rely on."""
    for message in file.message_type:
        yield from message_contents(file.package, message)
    for enum in file.enum_type:
        yield from enum_contents(file.package, enum)
    for service in file.service:
        for method in service.method:
            name = f"/{file.package}.{service.name}/{method.name}"
            yield name, (method.input_type, method.output_type, method.client_streaming, method.server_streaming)


def message_contents(prefix: str, message: DescriptorProto) -> Iterator[tuple[str, tuple[Any, ...]]]:
    name = f"{prefix}.{message.name}"
    yield name, ("message", message.options.map_entry)
    for field in message.field:
        oneof = message.oneof_decl[field.oneof_index].name if field.HasField("oneof_index") else ""
        kind = (field.number, field.type, field.type_name, field.label, oneof, field.proto3_optional)
        yield f"{name}.{field.name}", kind
    for nested in message.nested_type:
        yield from message_contents(name, nested)
    for enum in message.enum_type:
        yield from enum_contents(name, enum)


def enum_contents(prefix: str, enum: EnumDescriptorProto) -> Iterator[tuple[str, tuple[Any, ...]]]:
    for value in enum.value:
        yield f"{prefix}.{enum.name}.{value.name}", (value.number,)
