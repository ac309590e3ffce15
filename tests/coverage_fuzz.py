"""Hostile bytes that are bred by what they reach in the code: the readers of test_fuzz_files.py under atheris.

    make fuzz-coverage SECONDS=60
    python tests/coverage_fuzz.py --list
    python tests/coverage_fuzz.py config -max_total_time=60 -rss_limit_mb=3000

Inputs that reach new branches of Sotto are kept and changed further, from valid content on. Anything but a result or a
documented error ends the run, and the input is left in `crash-*`; so do more than five seconds for one input and more
memory than the limit.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import atheris

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
for module in ("torch", "transformers", "datasets", "flwr", "hypothesis", "pyarrow"):
    __import__(module)  # before anything is instrumented: their branches are not what is looked for
with atheris.instrument_imports(include=["sotto"]):
    import test_fuzz_files as readers  # isort: skip
    from sotto.federated import messages  # isort: skip

import numpy as np  # noqa: E402
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict  # noqa: E402
from flwr.supercore.task_identity import TaskIdentity  # noqa: E402

SHAPES = {"w": (3, 2), "b": (4,)}
VECTOR = Array(np.arange(20, dtype=np.float32)).data


def read_update(folder: Path, content: bytes) -> None:
    """A device's answer: a vector, or nothing."""
    sent = Array("float32", (20,), "numpy.ndarray", content)
    order = Message(RecordDict({}), 1, messages.TRAIN)
    reply = Message(RecordDict({"update": ArrayRecord({"0": sent})}), reply_to=order)
    ((_, found),) = messages.vectors_of(reply, [0], 20, "float32")
    assert found is None or (found.dtype == np.float32 and found.shape == (20,))


def read_order(folder: Path, content: bytes) -> None:
    """A server's order, whose weights are these bytes."""
    facts = ConfigRecord({"run": "r", "step": 1, "clip_norm": 1.0, "agreement": "x", "users": [0]})
    weights = ArrayRecord({name: Array("float32", shape, "numpy.ndarray", content) for name, shape in SHAPES.items()})
    messages.read_order(Message(RecordDict({"order": facts, "weights": weights}), 1, messages.TRAIN), SHAPES)


def read_agreement(folder: Path, content: bytes) -> None:
    """What a server asks devices to agree to."""
    record = ConfigRecord({"json": content.decode("utf-8", "replace")})
    messages.read_agreement(Message(RecordDict({"agreement": record}), 1, messages.HELLO))


TARGETS: dict[str, tuple[Any, bytes | str]] = {
    **readers.TARGETS,
    "update": (read_update, VECTOR),
    "order": (read_order, Array(np.ones((3, 2), np.float32)).data),
    "agreement": (read_agreement, b'{"model": "m", "codec": {}, "local": {}, "unit": "who", "steps": 3}'),
}


def main() -> None:
    if "--list" in sys.argv:
        print("\n".join(name.replace(" ", "-") for name in TARGETS))
        return
    name = sys.argv.pop(1).replace("-", " ")
    read, content = TARGETS[name]
    for key in ("_run_id", "_node_id", "_task_id"):  # which Flower sets in the process of an app
        setattr(TaskIdentity, key, 1)
    with tempfile.TemporaryDirectory() as made:
        os.environ["SOTTO_LEDGER_DIR"] = f"{made}/ledger"
        (Path(made) / "x").mkdir()
        (Path(made) / "corpus").mkdir()
        folder = readers.furnished(Path(made) / "x")
        if name == "weight index":
            (folder / "model-1.safetensors").write_bytes(readers.TENSORS)
        whole = (folder / content).read_bytes() if isinstance(content, str) else content
        (Path(made) / "corpus" / "valid").write_bytes(whole)
        readers.outcome(lambda: read(folder, whole))

        def attempt(data: bytes) -> None:
            readers.outcome(lambda: read(folder, data))

        atheris.Setup([sys.argv[0], f"{made}/corpus", "-timeout=5", *sys.argv[1:]], attempt)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
