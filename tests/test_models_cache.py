"""The activation cache: what it gives back, who may read it, and what a kill costs."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gradient_oracle import check
from test_models_side import CONFIGS, LAYERS, V, with_side

from sotto.errors import SottoError
from sotto.models import activation_cache
from sotto.models.activation_cache import ActivationCache, fill, fingerprint

LENGTHS = [5, 7, 3, 4, 6, 1, 7]
LAYERS_KEPT, WIDTH = (0, 2), 4


def ids_and_mask(rows: list[int]) -> dict[str, torch.Tensor]:
    """Row r of a made-up dataset, padded on the right to the longest of `rows`."""
    longest = max(LENGTHS[r] for r in rows)
    ids, mask = torch.zeros(len(rows), longest, dtype=torch.long), torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : LENGTHS[row]] = (torch.arange(LENGTHS[row]) * 7 + row * 11) % (V - 3) + 3
        mask[i, : LENGTHS[row]] = 1
    return {"input_ids": ids, "attention_mask": mask}


def made_up(rows: list[int], scale: float = 1.0) -> dict[int, torch.Tensor]:
    """Outputs of layers 0 and 2, different for each row and token."""
    longest = max(LENGTHS[r] for r in rows)
    base = torch.arange(longest * WIDTH).view(longest, WIDTH) / 64
    return {layer: torch.stack([(base + row + layer) * scale for row in rows]) for layer in LAYERS_KEPT}


def open_cache(folder: Path, **changed: Any) -> ActivationCache:
    arguments: dict[str, Any] = {"lengths": LENGTHS, "layers": LAYERS_KEPT, "width": WIDTH, **changed}
    return ActivationCache.open(folder / "activations", **arguments)


@pytest.mark.parametrize(("dtype", "scale"), [("float16", 1.0), ("bfloat16", 1e6)])
def test_rows_come_back_without_what_lay_behind_their_end(dtype: str, scale: float, tmp_path: Path):
    cache = open_cache(tmp_path)
    cache.write([4, 0, 2], made_up([4, 0, 2], scale))
    found = cache.read([2, 4])
    assert set(found) == set(LAYERS_KEPT)
    for layer, x_BTd in found.items():
        assert x_BTd.dtype == torch.float32
        assert x_BTd.shape == (2, 6, WIDTH)
        expected = made_up([2, 4], scale)[layer].to(getattr(torch, dtype)).float()
        expected[0, 3:] = 0
        torch.testing.assert_close(x_BTd, expected, rtol=0, atol=0)


def test_missing_rows_come_shortest_first(tmp_path: Path):
    cache = open_cache(tmp_path)
    assert cache.missing() == [5, 2, 3, 0, 4, 1, 6]
    cache.write([2, 1], made_up([2, 1]))
    assert cache.missing() == [5, 3, 0, 4, 6]
    with pytest.raises(SottoError, match=r"SOT352.*1 of 2 rows"):
        cache.read([2, 3])


def test_it_is_there_when_opened_again_and_damage_is_noticed(tmp_path: Path):
    cache = open_cache(tmp_path)
    cache.write(list(range(7)), made_up(list(range(7))))
    before = cache.read([3])[2]
    cache.close()
    again = open_cache(tmp_path)
    assert again.missing() == []
    torch.testing.assert_close(again.read([3])[2], before, rtol=0, atol=0)
    again.close()
    file = tmp_path / "activations" / activation_cache.HIDDEN
    content = bytearray(file.read_bytes())
    content[again._offset(3) * 2 + 1] ^= 1
    file.write_bytes(content)
    assert open_cache(tmp_path).missing() == [3]


@pytest.mark.parametrize(
    "changed",
    [
        {"fingerprint": "other weights"}, {"layers": (0, 1)}, {"lengths": [*LENGTHS[:-1], 6]},
        {"lengths": LENGTHS[::-1]}, {"width": 2},
    ],
    ids=str,
)  # fmt: skip
def test_what_was_stored_for_something_else_is_wiped(changed: dict[str, Any], tmp_path: Path):
    cache = open_cache(tmp_path)
    cache.write([0], made_up([0]))
    cache.close()
    other = open_cache(tmp_path, **changed)
    assert len(other.missing()) == len(LENGTHS)
    assert not (tmp_path / "activations" / activation_cache.HIDDEN).read_bytes().strip(b"\0")


def test_only_the_owner_may_read_it(tmp_path: Path):
    before = os.umask(0)
    try:
        cache = open_cache(tmp_path)
        cache.write([0], made_up([0]))
    finally:
        os.umask(before)
    folder = tmp_path / "activations"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    files = list(folder.iterdir())
    assert {f.name for f in files} == {activation_cache.ABOUT, activation_cache.HIDDEN, activation_cache.ROWS}
    assert all(stat.S_IMODE(f.stat().st_mode) == 0o600 for f in files)


def test_no_link_is_followed(tmp_path: Path):
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (tmp_path / "activations").mkdir()
    (tmp_path / "activations" / activation_cache.HIDDEN).symlink_to(precious)
    with pytest.raises(SottoError, match="SOT350"):
        open_cache(tmp_path)
    assert precious.read_text() == "mine"


def test_wipe_deletes_all_of_it_and_nothing_else(tmp_path: Path):
    (tmp_path / "other").write_text("stays")
    cache = open_cache(tmp_path)
    cache.write([0], made_up([0]))
    cache.wipe()
    assert [f.name for f in tmp_path.iterdir()] == ["other"]


def test_the_size_is_known_and_taken_before_anything_is_computed(tmp_path: Path):
    cache = open_cache(tmp_path)
    assert cache.bytes == 2 * sum(LENGTHS) * len(LAYERS_KEPT) * WIDTH
    assert (tmp_path / "activations" / activation_cache.HIDDEN).stat().st_size == cache.bytes


def test_no_room(tmp_path: Path):
    with pytest.raises(SottoError, match=r"SOT350.*GiB are free"):
        open_cache(tmp_path, lengths=[10**9] * 1000, width=4096)


@pytest.mark.parametrize("value", [1e6, float("nan"), float("inf")])
def test_a_value_beyond_float16_changes_nothing_for_other_rows(value: float, tmp_path: Path):
    rows, outputs = [0, 1, 3], made_up([0, 1, 3], 1 / 3)
    plain = open_cache(tmp_path)
    plain.write(rows, outputs)
    before = plain.read(rows)
    plain.wipe()
    outputs[2][1, 2, 3] = value
    cache = open_cache(tmp_path)
    cache.write(rows, outputs)
    found = cache.read(rows)
    for layer in LAYERS_KEPT:
        torch.testing.assert_close(found[layer][[0, 2]], before[layer][[0, 2]], rtol=0, atol=0)
    assert_near = {"rtol": 2**-7, "atol": 0.0, "equal_nan": True}
    torch.testing.assert_close(found[2][1, : LENGTHS[1]], outputs[2][1, : LENGTHS[1]], **assert_near)
    cache.close()
    assert len(open_cache(tmp_path).missing()) == len(LENGTHS) - 3


def test_large_padding_does_not_matter(tmp_path: Path):
    outputs = made_up([0, 1])
    outputs[0][0, LENGTHS[0] :] = float("nan")  # attention may leave nan where there is no text
    cache = open_cache(tmp_path)
    cache.write([0, 1], outputs)
    assert bool(torch.isfinite(cache.read([0, 1])[0]).all())


def test_an_empty_dataset(tmp_path: Path):
    assert open_cache(tmp_path, lengths=[]).missing() == []


@pytest.mark.parametrize("family", [f for f in (*LAYERS, "bloom", "deberta") if f in CONFIGS])
def test_a_model_without_its_layers_gives_the_same_scores_from_the_cache(family: str, tmp_path: Path):
    whole = with_side(family)
    rows = [1, 0, 6]
    batch = ids_and_mask(rows)
    live = whole(**batch).logits.detach()
    cache = ActivationCache.open(tmp_path / "activations", LENGTHS, whole.side.kept, 16)
    assert fill(cache, whole, ids_and_mask, rows_at_once=2) == len(LENGTHS)
    assert fill(cache, whole, ids_and_mask, rows_at_once=2) == 0
    whole.release_layers()
    assert all(p.is_meta for p in whole.stack.layers.parameters())
    with pytest.raises(SottoError, match="SOT344"):
        whole(**batch)
    with whole.fed(cache.read(rows)):
        stored = whole(**batch).logits.detach()
    if live.dim() == 3:
        live, stored = live[batch["attention_mask"].bool()], stored[batch["attention_mask"].bool()]
    scale = float(live.abs().max())
    torch.testing.assert_close(stored, live, rtol=0, atol=2e-3 * scale)  # float16 keeps eleven bits


def test_gradients_from_the_cache_are_those_of_the_stored_outputs(tmp_path: Path):
    whole = with_side("gpt2").train()
    cache = ActivationCache.open(tmp_path / "activations", LENGTHS, whole.side.kept, 16)
    fill(cache, whole, ids_and_mask, rows_at_once=3)
    whole.release_layers()
    everyone = list(range(len(LENGTHS)))
    batch = ids_and_mask(everyone)

    def losses(rows: torch.Tensor) -> torch.Tensor:
        longest = int(batch["attention_mask"][rows].sum(1).max())
        given = {name: x[rows, :longest] for name, x in batch.items()}
        with whole.fed(cache.read(rows.tolist())):
            logits = whole(**given).logits
        each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), given["input_ids"], reduction="none")
        return (each * given["attention_mask"]).sum(1)

    check(whole, losses, len(LENGTHS), algorithm="book_keeping", tolerance=1e-3, slow=set())


def test_the_side_network_does_not_run_while_outputs_are_noted():
    whole = with_side("bert")
    batch = ids_and_mask([0, 1])
    with torch.no_grad():
        for parameter in whole.side.parameters():
            parameter.fill_(torch.nan)
    outputs = whole.backbone_outputs(**batch)
    assert sorted(outputs) == whole.side.kept
    assert all(bool(torch.isfinite(x).all()) and x.shape == (2, 7, 16) for x in outputs.values())
    assert whole.side.noted is None


def test_the_fingerprint_is_of_the_frozen_weights_and_the_data():
    whole = with_side("bert")
    first = fingerprint(whole, "data")
    with torch.no_grad():
        whole.side.up.weight.add_(1)
    assert fingerprint(whole, "data") == first
    assert fingerprint(whole, "other") != first
    with torch.no_grad():
        whole.stack.layers[0].attention.output.dense.bias[3] += 1
    assert fingerprint(whole, "data") != first


KILLED = """
import os, sys
from pathlib import Path
from test_models_cache import LENGTHS, ids_and_mask
from test_models_side import with_side
from sotto.models import activation_cache as module
whole = with_side("bert")
cache = module.ActivationCache.open(Path(sys.argv[1]), LENGTHS, whole.side.kept, 16)
writes, plain = 0, module._write_all
def counted(descriptor, content, offset):
    global writes
    writes += 1
    if writes == int(sys.argv[2]):
        plain(descriptor, content[: len(content) // 2], offset)  # torn in the middle
        os._exit(9)
    plain(descriptor, content, offset)
module._write_all = counted
module.fill(cache, whole, ids_and_mask, rows_at_once=2)
"""


@pytest.mark.parametrize("at", [2, pytest.param(3, marks=pytest.mark.slow), 6])
def test_a_kill_costs_what_was_not_marked(at: int, tmp_path: Path):
    """Killed while values are written (2, 6) and while a mark is (3). Four writes finish two rows."""
    whole = with_side("bert")
    folder = tmp_path / "activations"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(folder), str(at)], env=environment, capture_output=True, check=False
    )
    assert done.returncode == 9, done.stderr.decode()[-500:]
    cache = ActivationCache.open(folder, LENGTHS, whole.side.kept, 16)
    finished = len(LENGTHS) - len(cache.missing())
    assert finished == {2: 0, 3: 0, 6: 2}[at]
    assert fill(cache, whole, ids_and_mask, rows_at_once=2) == len(LENGTHS) - finished
    fresh = ActivationCache.open(tmp_path / "fresh", LENGTHS, whole.side.kept, 16)
    fill(fresh, whole, ids_and_mask, rows_at_once=2)
    everyone = list(range(len(LENGTHS)))
    for layer, values in fresh.read(everyone).items():
        torch.testing.assert_close(cache.read(everyone)[layer], values, rtol=0, atol=0)


def test_nothing_private_stands_in_its_description(tmp_path: Path):
    open_cache(tmp_path, fingerprint="f00")
    about = json.loads((tmp_path / "activations" / activation_cache.ABOUT).read_text())
    assert set(about) == {"version", "layers", "width", "lengths", "made_for"}
    assert not any(isinstance(value, list) and len(value) == len(LENGTHS) for value in about.values())
