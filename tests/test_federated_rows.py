"""Partial embedding updates: which rows are trained, sent and noised, and that private text has no say in it."""

from __future__ import annotations

import collections
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import tiny_runs
import torch

import sotto
from sotto import session as sessions
from sotto.config import Config
from sotto.errors import SottoError
from sotto.federated.client import Client, Order
from sotto.federated.cohort import LATENT
from sotto.federated.embedding_rows import ROWS, EmbeddingRows, frequent
from sotto.federated.layout import Layout
from sotto.federated.simulate import simulate
from sotto.losses import forward_losses

SETTING = {"kind": "federated", "local_batch_size": 2, "local_learning_rate": 0.5, "embedding_rows": 10}
TABLE = "bert.embeddings.word_embeddings.weight"


def config(folder: Path, **changes: Any) -> Config:
    method = {"train": "full", **changes.pop("method", {})}
    return tiny_runs.config(folder, setting={**SETTING, **changes.pop("setting", {})}, method=method, **changes)


def small(public: bool = False) -> EmbeddingRows:
    layout = Layout((("before", (3,)), ("table", (7, 2)), ("after", (2, 2))))
    return EmbeddingRows(layout, "table", 3, "key", public)


# ---- the codec


def test_rows_of_the_set_and_all_other_weights_are_sent():
    codec, update = small(), torch.arange(21.0) + 1
    rows = codec.rows_of(4)
    latent = codec.encode(update, 4)
    assert len(latent) == codec.size == 21 - 4 * 2
    expected = update.clone()
    table = expected[3:17].view(7, 2)
    table[[row for row in range(7) if row not in rows.tolist()]] = 0
    assert torch.equal(codec.decode(latent, 4), expected)
    a, b = torch.randn(2, 21)
    torch.testing.assert_close(
        codec.decode((codec.encode(a, 1) + codec.encode(b, 1)) / 2, 1),
        (codec.decode(codec.encode(a, 1), 1) + codec.decode(codec.encode(b, 1), 1)) / 2,
    )


def test_the_set_is_new_in_every_round_uniform_and_the_same_on_both_sides():
    counts = torch.zeros(7)
    for step in range(2000):
        rows = small().rows_of(step)
        assert rows.tolist() == sorted(set(rows.tolist()))
        counts[rows] += 1
    # The variance of a count is that of a draw of 3 of 7, and the 7 counts add up to 6,000.
    assert float(((counts - 2000 * 3 / 7) ** 2 / (2000 * 3 / 7 * 4 / 7)).sum() * 6 / 7) < 28
    assert not torch.equal(small().rows_of(0), small().rows_of(1))


BAD = {
    "none": {},
    "too few": {ROWS: torch.tensor([1.0, 2.0])},
    "twice": {ROWS: torch.tensor([1.0, 1.0, 2.0])},
    "not in order": {ROWS: torch.tensor([2.0, 1.0, 3.0])},
    "outside": {ROWS: torch.tensor([1.0, 2.0, 7.0])},
    "negative": {ROWS: torch.tensor([-1.0, 2.0, 3.0])},
    "no number": {ROWS: torch.tensor([1.0, math.nan, 3.0])},
    "between": {ROWS: torch.tensor([1.0, 2.5, 3.0])},
}


@pytest.mark.parametrize("name", BAD)
def test_only_rows_of_the_table_are_taken_from_others(name: str):
    with pytest.raises(SottoError, match="SOT935"):
        small(public=True).restore(BAD[name])


def test_rows_of_public_text_are_kept_for_all_rounds():
    codec = small(public=True)
    codec.restore({ROWS: torch.tensor([0.0, 4.0, 6.0])})
    assert codec.rows_of(0).tolist() == codec.rows_of(9).tolist() == [0, 4, 6]
    other = small(public=True)
    other.restore(codec.state())
    assert torch.equal(other.rows_of(3), codec.rows_of(3))


def test_the_most_frequent_tokens():
    tokens = np.random.default_rng(3).integers(0, 12, 400).astype(np.int32)
    common = sorted(collections.Counter(tokens.tolist()).items(), key=lambda pair: (-pair[1], pair[0]))[:5]
    assert frequent(tokens, 5, 20).tolist() == sorted(token for token, _ in common)
    assert frequent(np.zeros(0, dtype=np.int32), 2, 20).tolist() == [0, 1]


def test_a_set_larger_than_the_table_is_refused(tmp_path: Path):
    with pytest.raises(SottoError, match="SOT932"):
        sessions.load_parts(config(tmp_path, setting={"embedding_rows": 101}), "key")


# ---- what a device computes


def by_hand(parts: Any, order: Order, user: int) -> dict[str, torch.Tensor]:
    """Name -> start minus end of plain SGD in which the other rows never move."""
    engine, data = parts.engine, parts.data
    client = engine.carrier.__closure__[0].cell_contents
    named = {name: w.clone().requires_grad_() for name, w in order.weights.items()}
    rows, keep = engine.codec.rows_of(order.step), torch.zeros(100, 1)
    keep[rows] = 1
    for some in client._compute._batches(order.step, 0, data.units.members_of(np.array([user]))[0]):
        batch = data.examples.collate(some, parts.tokenizer.pad_token_id)
        holder = torch.nn.ModuleDict({"model": parts.model})

        def run(*_: Any, batch: Any = batch) -> torch.Tensor:
            return forward_losses(parts.model, batch, "classification").mean()

        holder.forward = run  # type: ignore[method-assign]
        loss = torch.func.functional_call(holder, {f"model.{n}": w for n, w in named.items()}, ())
        gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        for (name, weight), gradient in zip(list(named.items()), gradients, strict=True):
            if gradient is not None:
                moved = gradient * keep if name == TABLE else gradient
                named[name] = (weight - 0.5 * moved).detach().requires_grad_()
    return {name: (order.weights[name] - w).detach() for name, w in named.items()}


def test_a_device_trains_the_rows_of_the_round_and_leaves_the_others(tmp_path: Path):
    parts: Any = sessions.load_parts(config(tmp_path, setting={"embedding_rows": 60}), "key")
    tiny_models.perturb(parts.model, 0.3)  # a head of zeros gives the layers below no gradient
    engine, client = parts.engine, parts.engine.carrier.__closure__[0].cell_contents
    order = Order(2, 1e9, {n: w.clone() for n, w in engine.order(2).weights.items()})
    expected = by_hand(parts, order, 7)
    decoded = engine.codec.decode(client.answer(order, 7), 2)
    found = Layout.of(engine.parameters).split(decoded)
    others = [row for row in range(100) if row not in engine.codec.rows_of(2).tolist()]
    assert float(found[TABLE][others].abs().max()) == 0
    assert float(found[TABLE].norm()) > 1e-3
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-6)


def test_a_gradient_that_is_not_finite_does_not_leave_its_row():
    codec, table = small(), torch.nn.Parameter(torch.zeros(7, 2))
    rows = codec.rows_of(0).tolist()
    table.grad = torch.full((7, 2), math.nan)
    table.grad[rows] = 1.0
    codec.freeze_others({"table": table}, 0)
    assert torch.equal(table.grad.sum(1), torch.tensor([2.0 if row in rows else 0.0 for row in range(7)]))


def test_what_leaves_is_bounded_as_a_whole(tmp_path: Path):
    parts: Any = sessions.load_parts(config(tmp_path), "key")
    client: Client = parts.engine.carrier.__closure__[0].cell_contents
    order = Order(0, 1e-3, {n: w.clone() for n, w in parts.engine.order(0).weights.items()})
    sent = client.answer(order, 3)
    assert len(sent) == parts.engine.codec.size < Layout.of(parts.engine.parameters).size
    assert 0.99e-3 < float(sent.double().norm()) <= 1e-3


# ---- whose text decides


def public_file(folder: Path, rows: list[dict[str, str]]) -> str:
    return str(tiny_runs.write_csv(folder / "public.csv", rows))


def test_the_users_own_text_is_no_public_text(tmp_path: Path):
    own = config(tmp_path).data.train
    copied = public_file(tmp_path, tiny_runs.rows())
    mostly = tiny_runs.rows()[:60] + tiny_runs.rows(10, seed=9)
    for name in (own, copied):
        with pytest.raises(SottoError, match="SOT937"):
            sessions.load_parts(config(tmp_path, setting={"public_data": name}), "key")
    with pytest.raises(SottoError, match="SOT937"):
        sessions.load_parts(config(tmp_path, setting={"public_data": public_file(tmp_path, mostly)}), "key")
    subspace = {"embedding_rows": None, "codec": "subspace", "latent": 4, "public_data": own}
    with pytest.raises(SottoError, match="SOT937"):
        sessions.load_parts(config(tmp_path, setting=subspace), "key")
    few = tiny_runs.rows()[:5] + tiny_runs.rows(20, seed=9)
    sessions.load_parts(config(tmp_path, setting={"public_data": public_file(tmp_path, few)}), "key")


@pytest.mark.parametrize("public", [False, True])
def test_other_private_text_gives_the_same_rows(public: bool, tmp_path: Path):
    changes = {"public_data": public_file(tmp_path, tiny_runs.rows(40, seed=9))} if public else {}
    sets = []
    for seed in (3, 4):
        (tmp_path / str(seed)).mkdir()
        made = config(tmp_path / str(seed), setting=changes)
        tiny_runs.write_csv(Path(made.data.train), tiny_runs.rows(seed=seed))
        parts: Any = sessions.load_parts(made, "key")
        sets.append([parts.engine.codec.rows_of(step).tolist() for step in range(3)])
    assert sets[0] == sets[1]
    assert (sets[0][0] == sets[0][1]) == public


# ---- whole runs


@pytest.mark.parametrize("train", ["full", "lora"])
def test_a_run_trains_rows_and_says_so(train: str, tmp_path: Path):
    run = simulate(config(tmp_path, method={"train": train}))
    assert "of the token embedding 10 rows" in " ".join(run.statement.split())
    before = tiny_models.build("bert_classifier").bert.embeddings.word_embeddings.weight
    after = dict(sotto.load(run.path / "model").named_parameters())[TABLE]
    moved = (after - before).abs().sum(1) > 0
    assert 10 < int(moved.sum()) <= 40  # four rounds of ten rows; AdamW goes on moving those of earlier rounds


def test_noise_lies_on_every_row_of_the_set(tmp_path: Path):
    session = sessions.start(config(tmp_path), "run")
    session.held.close()
    total = session.engine.zeros()
    assert total.gradients[LATENT].shape == (session.engine.codec.size,)  # type: ignore[union-attr]
    released = session.mechanism.privatize(total, 0)[LATENT]
    expected = session.plan.noise_multiplier * session.plan.clip_norm / session.plan.expected_batch_size
    assert float(released.std()) == pytest.approx(expected, rel=0.05)
    assert int((released == 0).sum()) == 0


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"method": {"train": "bitfit"}}, "embedding_rows needs"),
        ({"method": {"gradient": "zeroth_order"}}, "embedding_rows needs"),
        ({"method": {"train": "lora"}, "output": {"export": "adapter"}}, "embedding_rows needs"),
        ({"setting": {"codec": "srht", "latent": 4}}, "codec: none"),
        ({"setting": {"sites": 2}}, "updates of users"),
        ({"setting": {"embedding_rows": None, "public_data": "x.csv"}}, "public_data belongs"),
        ({"setting": {"embedding_rows": None, "codec": "subspace", "latent": 4}}, "needs public_data"),
    ],
)
def test_what_has_no_meaning_is_refused(changes: dict[str, Any], word: str, tmp_path: Path):
    with pytest.raises(Exception, match=word):
        config(tmp_path, **changes)
