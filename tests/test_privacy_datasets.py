"""One dataset has one ledger, whatever it is called."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest
import tiny_runs

import sotto
from sotto.errors import SottoError
from sotto.privacy.accounting import PoissonGaussian
from sotto.privacy.datasets import require_one_name
from sotto.privacy.ledger import Ledger, ledger_dir


@pytest.mark.parametrize(("first", "second"), [(None, "clinic"), ("clinic", None), ("clinic", "practice")])
def test_the_same_texts_under_a_second_name_are_refused(tmp_path: Path, first: str | None, second: str | None) -> None:
    def named(name: str | None, **changes: Any) -> Any:
        changes["privacy"] = {**({} if name is None else {"dataset": name}), **changes.get("privacy", {})}
        return tiny_runs.config(tmp_path, method={"train": "head"}, **changes)

    done = sotto.train(named(first))
    with pytest.raises(SottoError, match="SOT417") as caught:
        sotto.train(named(second))
    assert len(sotto.ls(tmp_path / "runs")) == 1, "nothing is left of it"
    assert len([*ledger_dir().glob("*.jsonl")]) == 1, "nor of its ledger"
    old = str(caught.value).rpartition("privacy.dataset: ")[2].strip()
    again = sotto.train(named(old))
    assert json.loads((again.path / "privacy.json").read_text())["dataset_runs"] == 2, "the advice leads there"
    sotto.train(named(second, privacy={"unit": "record", "max_examples_per_unit": 1}))  # whose ledger is another
    assert stat.S_IMODE((ledger_dir() / "contents").stat().st_mode) == 0o600
    assert done.epsilon


def test_a_name_that_nothing_was_charged_under_is_no_obstacle(tmp_path: Path) -> None:
    require_one_name("clinic.who", "f" * 64, tmp_path)
    require_one_name("practice.who", "f" * 64, tmp_path)
    ledger = Ledger.open("practice.who", tmp_path)
    ledger.open_run("r", PoissonGaussian(1.0, 0.01), 2, delta=1e-5)
    require_one_name("practice.who", "f" * 64, tmp_path)
    require_one_name("clinic.who", "e" * 64, tmp_path)
    require_one_name("clinic.row", "f" * 64, tmp_path)
    with pytest.raises(SottoError, match="SOT417"):
        require_one_name("clinic.who", "f" * 64, tmp_path)
