"""What every test shares: no network, a ledger of its own, one thread per process (tests run side by side)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


@pytest.fixture(autouse=True)
def _own_ledger(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test may charge the ledger of the person who runs it."""
    monkeypatch.setenv("SOTTO_LEDGER_DIR", str(tmp_path_factory.mktemp("ledger")))


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_numbers() -> None:
    """torch's generator begins anew, so that no test draws what follows from those that ran before it by chance."""
    import torch

    torch.manual_seed(0)


@pytest.fixture
def seeded(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Coins, batches and noise of a run that are the same in each run of the tests: for what holds often, not always.

    The noise counts as private, so that there is a promise. A run's name is not new either, so one run of a name only.
    """
    from sotto import session
    from sotto.federated import server
    from sotto.privacy.noise import DebugNoise

    class Unmarked(DebugNoise):
        private = True  # type: ignore[misc]

        def __init__(self) -> None:
            super().__init__(3)

    monkeypatch.setattr("secrets.randbits", lambda bits: 12)
    monkeypatch.setattr("secrets.token_bytes", lambda size: bytes(range(size)))
    for module in (session, server):
        monkeypatch.setattr(module, "SecureNoise", Unmarked)
    return monkeypatch


@pytest.fixture
def shared() -> Path:
    """The folder of real data and models that is not part of the project; tests that want it skip without it."""
    folder = Path(os.environ.get("SOTTO_SHARED", Path(__file__).parents[2] / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip("real data is not at hand: set SOTTO_SHARED to a folder with data/ and models/")
    return folder
