"""Builds the Python code of the contract into clients/src/tally/v1 (`make gen`).

buf compiles the contract; this script then drops the validation annotations, which Python clients
do not evaluate, so that `import tally` needs no annotation runtime; protoc and the mypy plugins
turn the rest into code and type stubs. The output is not committed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import grpc_tools
from google.protobuf import descriptor_pb2

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "clients" / "src"
PACKAGE = OUT / "tally" / "v1"
ANNOTATIONS = "buf/validate/validate.proto"
SEARCH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"


def strip_annotations(image: bytes) -> tuple[bytes, list[str]]:
    """Drops ANNOTATIONS from a compiled contract; returns it and the names of our own files."""
    files = descriptor_pb2.FileDescriptorSet.FromString(image)
    kept = descriptor_pb2.FileDescriptorSet()
    ours = []
    for file in files.file:
        if file.name == ANNOTATIONS:
            continue
        # The annotations are extensions that this process never registered: unknown fields.
        file.DiscardUnknownFields()
        if ANNOTATIONS in file.dependency:
            file.dependency.remove(ANNOTATIONS)
        kept.file.append(file)
        if file.package == "tally.v1":
            ours.append(file.name)
    return kept.SerializeToString(), ours


def tool(name: str) -> str:
    """Where a tool of this environment is.

    Raises:
        SystemExit: it is not there.
    """
    found = shutil.which(name, path=SEARCH)
    if found is None:
        raise SystemExit(f"{name} is not installed: run `make setup`")
    return found


def main() -> None:
    with tempfile.TemporaryDirectory() as tmp:
        image = Path(tmp) / "contract.binpb"
        subprocess.run([tool("buf"), "build", ROOT / "protos", "-o", image], check=True)
        stripped, names = strip_annotations(image.read_bytes())
        image.write_bytes(stripped)
        shutil.rmtree(PACKAGE, ignore_errors=True)
        subprocess.run(
            [
                sys.executable,
                "-m",
                "grpc_tools.protoc",
                f"--descriptor_set_in={image}",
                f"--plugin=protoc-gen-mypy={tool('protoc-gen-mypy')}",
                f"--plugin=protoc-gen-mypy_grpc={tool('protoc-gen-mypy_grpc')}",
                f"--python_out={OUT}",
                f"--grpc_python_out={OUT}",
                f"--mypy_out=quiet:{OUT}",
                f"--mypy_grpc_out=quiet:{OUT}",
                *names,
            ],
            check=True,
            cwd=Path(grpc_tools.__file__).parent,
        )
    (PACKAGE / "__init__.py").write_text('"""Generated from protos/tally/v1; see `make gen`."""\n')
    print(f"generated {len(names)} contract files into {PACKAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
