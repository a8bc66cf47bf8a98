from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
GENERATED = ("squall_pb2.py", "squall_pb2.pyi", "squall_pb2_grpc.py")


def test_the_code_beside_the_proto_is_what_protoc_makes_of_it(tmp_path: Path) -> None:
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I.", *outputs, "services/rpc/squall.proto"]
    subprocess.run(command, cwd=ROOT, check=True, timeout=60)
    for name in GENERATED:
        made, kept = tmp_path / "services" / "rpc" / name, ROOT / "services" / "rpc" / name
        assert kept.read_text() == made.read_text(), f"services/rpc/{name} is not of this proto: run `make proto`"
