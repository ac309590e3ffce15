"""What a training says and leaves outside its run folder: nothing. Numbers of single texts easily end up in logs."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

import pytest
import tiny_runs

import sotto
from sotto.privacy.ledger import ledger_dir

RUNS: dict[str, dict[str, Any]] = {
    "gradients": {"method": {"train": "lora", "clipping": "adaptive"}},
    "zeroth order": {"method": {"gradient": "zeroth_order", "zeroth_probes": 2}},
    "side network": {"method": {"train": "side", "side_reduction": 2, "side_cache": True}},
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("kind", ["classification", "completion"])
def test_a_training_prints_logs_and_leaves_nothing_elsewhere(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    kind: str,
    name: str,
) -> None:
    config = tiny_runs.config(tmp_path, kind, **RUNS[name])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    elsewhere = tmp_path / "elsewhere"
    for variable in ("HOME", "TMPDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "HF_HOME"):
        (elsewhere / variable).mkdir(parents=True)
        monkeypatch.setenv(variable, str(elsewhere / variable))
    monkeypatch.setattr(tempfile, "tempdir", None)  # asks the environment again
    (elsewhere / "here").mkdir()
    monkeypatch.chdir(elsewhere / "here")
    capfd.readouterr()
    with caplog.at_level(logging.DEBUG):
        done = sotto.train(config)
    said = capfd.readouterr()
    monkeypatch.setattr(tempfile, "tempdir", None)
    assert (said.out, said.err) == ("", "")
    assert [record for record in caplog.records if record.name.startswith("sotto")] == []
    for record in caplog.records:
        assert tiny_runs.CANARY not in record.getMessage(), record.name
        assert not any(isinstance(value, float) for value in (record.args or ())), (record.name, record.getMessage())
    assert [path for path in elsewhere.rglob("*") if path.is_file()] == []
    allowed = (done.path, ledger_dir())
    after = {path for path in tmp_path.rglob("*") if path.is_file() and not any(a in path.parents for a in allowed)}
    assert after == set(before)
    assert all(path.read_bytes() == content for path, content in before.items())
