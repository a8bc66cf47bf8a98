"""No retired identifier comes back: each stood for something that has the field's word now."""

from __future__ import annotations

import ast
import io
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Not as any name, whatever it would stand for: class, function, attribute, argument, variable.
RETIRED = {
    "Desk": "PushLedger",
    "ReplayDesk": "ReplayRouter",
    "Teller": "ShardReporter",
    "Holding": "ShardReport",
    "settle": "report",
    "admit": "reserve",
    "AdmitReply": "ReserveReply",
    "take_back": "release",
    "Places": "SamplePlan",
    "PlacesReply": "SamplePlanReply",
    "choose_at": "sample_indices_at",
    "NearFrames": "SharedFrames",
    "FrameLocation": "SharedMemoryHandle",
    "Row": "VectorStep",
    "Lanes": "VectorRunner",
    "OneLane": "SingleEnvironment",
    "make_lanes": "make_runner",
    "_Outbox": "PushSender",
    "hurry": "drain",
    "give_way": "lower_priority",
    "_be_nice": "lower_priority",
    "look_ahead": "precompute_targets",
    "next_values": "target_values_ahead",
    "descend": "minimize_losses",
    "objective": "losses",
    "prepared": "prepare_batch",
    "forget_gradients": "zero_grad",
    "step_by_gradients": "apply_gradients",
    "need_actions": "require_action_space",
    "warn_of_inert": "warn_unused",
    "measure_returns": "track_return_statistics",
    "_take_in_returns": "_update_return_statistics",
    "Crew": "WorkerPool",
    "Staffing": "WorkerManager",
    "Sizing": "Autoscaler",
    "AutoSize": "Autoscaler",
    "see_off": "reap",
    "farewell": "exit_message",
    "Reception": "EndpointProcess",
    "Figures": "RunStatistics",
    "Watcher": "RunObserver",
    "News": "RunUpdate",
    "Scoring": "EvaluationScheduler",
    "bury": "handle_exit",
    "_bury": "_handle_exit",
    "Death": "ProcessExit",
    "describe_death": "describe_exit",
    "last_word": "status_message",
    "last_words": "final_report",
    "open_home_store": "open_default_store",
    "Couriers": "PushPool",
    "_Doorkeeper": "TokenInterceptor",
    "_Translator": "ErrorInterceptor",
    "Listening": "ServerConfig",
    "Offer": "ServiceSpec",
    "hidden_rooms": "hidden_packages",
    "place_of": "package_location",
    "RunAdopted": "RunTakenOver",
    "NOWHERE_YET": "UNPLACED",
    "ALSO_KNOWN_AS": "KEY_ALIASES",
    "INCARNATIONS_A_GENERATION": "INCARNATIONS_PER_RESUME",
    "layout_hash": "parameters_hash",
}
# Not as the name of a class, a function, or a module; as a variable each has its plain meaning.
RETIRED_DEFINITIONS = {
    "Draw": "SampleIndices",
    "choose": "sample_indices",
    "copies": "target_syncs",
    "crew": "worker_pool",
    "desk": "push_ledger, router",
    "figures": "statistics",
    "generation": "resume_count",
    "home": "runs_dir",
    "joining": "starting",
    "leaving": "draining",
    "program": "topology",
    "reception": "endpoint_process",
    "rooms": "installation",
    "scoring": "evaluation",
    "sizing": "autoscaling",
    "staffing": "workers",
    "wire": "codec",
    "word": "status message",
    "words": "final report",
}


def python_files() -> list[Path]:
    folders = [ROOT / name for name in ("replay", "actors", "learner", "services", "docs", "tests")]
    files = [path for folder in folders for path in folder.rglob("*.py")]
    return [path for path in files if "squall_pb2" not in path.name and path != Path(__file__)] + [ROOT / "squall.py"]


def names_in(source: str) -> set[str]:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {token.string for token in tokens if token.type == tokenize.NAME}


def definitions_in(source: str) -> set[str]:
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)}


def test_no_retired_name_is_used() -> None:
    files = python_files()
    assert len(files) > 150
    found = {
        f"{path.relative_to(ROOT)}: {name}, which is called {RETIRED[name]}"
        for path in files
        for name in names_in(path.read_text(encoding="utf-8")) & RETIRED.keys()
    }
    assert not found, "\n".join(sorted(found))


def test_no_retired_name_is_defined() -> None:
    found = {
        f"{path.relative_to(ROOT)}: {name}, which is called {RETIRED_DEFINITIONS[name]}"
        for path in python_files()
        for name in (definitions_in(path.read_text(encoding="utf-8")) | {path.stem}) & RETIRED_DEFINITIONS.keys()
    }
    assert not found, "\n".join(sorted(found))


def test_a_retired_name_is_found() -> None:
    assert "see_off" in names_in("pool.see_off()")
    assert "home" in definitions_in("class A:\n    def home(self): ...")
