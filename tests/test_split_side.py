"""A side network beside the vendor's blocks: it starts at their function, its gradients are those of its formula on
what the customer sent, and nothing goes back to the customer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_runs
import torch
import torch.nn.functional as F
from test_split_parts import FAMILIES, LAYERS, batch_of, make
from test_split_run import NONE, config
from torch import nn

from sotto.errors import SottoError
from sotto.models import load as models_load
from sotto.models.side import SideOptions, add_side
from sotto.split import simulate as module
from sotto.split.cache import Inbox
from sotto.split.parts import Bottom, Top
from sotto.split.simulate import simulate
from sotto.split.vendor import Vendor

SIDE: dict[str, Any] = {"train": "side", "side_reduction": 2, "side_every": 1}


def rows(batch: int = 3, tokens: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T, n) rows as a customer could have sent them, and a mask (B, T) with a shorter last row."""
    hidden_BTn = torch.randn(batch, tokens, 32, generator=torch.Generator().manual_seed(4))
    mask_BT = torch.ones(batch, tokens, dtype=torch.int64)
    mask_BT[-1, tokens - 2 :] = 0
    return hidden_BTn, mask_BT


def with_side(model: nn.Module, layer: int, **options: Any) -> Top:
    return Top(add_side(model, SideOptions(**{"reduction": 2, "every": 1, "first": layer, **options}), 0), layer)


def wake(top: Top) -> None:
    """Draws the projection that starts at zero, so that the side network is heard."""
    nn.init.normal_(top.model.side.up.weight, std=0.3, generator=torch.Generator().manual_seed(9))  # type: ignore[union-attr,arg-type]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("block", ["layer", "light"])
def test_it_starts_at_the_frozen_tops_function_bit_for_bit(family: str, block: str, tmp_path: Path) -> None:
    hidden_BTn, mask_BT = rows()
    depth = 2 if family == "pooled" else LAYERS
    for layer in range(depth):
        plain, top = Top(make(family, tmp_path), layer), with_side(make(family, tmp_path), layer, block=block).eval()
        with torch.no_grad():
            for stride in (1, 3):
                assert torch.equal(top(hidden_BTn, mask_BT, stride), plain(hidden_BTn, mask_BT, stride)), layer
            wake(top)
            assert not torch.allclose(top(hidden_BTn, mask_BT), plain(hidden_BTn, mask_BT), atol=1e-3), "it is heard"


@pytest.mark.parametrize("layer", [0, 1])
def test_its_blocks_see_rows_of_segments_where_their_tokens_stood(layer: int) -> None:
    """Against a text of three times the length with holes between the rows; attention of the side blocks made sharp."""
    top = with_side(make("llama", Path()), layer).eval()
    wake(top)
    sharp = [p for n, p in top.named_parameters() if ".side." in n and (".q_proj." in n or ".k_proj." in n)]
    assert sharp
    hidden_BTn, mask_BT = rows(3, 4)
    wide_BTn, wide_mask_BT = torch.zeros(3, 12, 32), torch.zeros(3, 12, dtype=torch.int64)
    wide_BTn[:, ::3], wide_mask_BT[:, ::3] = hidden_BTn, mask_BT
    with torch.no_grad():
        for weight in sharp:
            weight.mul_(30)
        expected = top(wide_BTn, wide_mask_BT)
        assert torch.allclose(top(hidden_BTn, mask_BT, 3), expected, atol=1e-5)
        assert not torch.allclose(top(hidden_BTn, mask_BT), expected, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_cut_where_the_model_is_cut(family: str, tmp_path: Path) -> None:
    """Bottom, then top, are the whole model with its side network, trained weights included."""
    ids_BT = torch.randint(3, 60, (3, 7), generator=torch.Generator().manual_seed(1))
    mask_BT = torch.ones_like(ids_BT)
    for layer in range(2):
        whole = add_side(make(family, tmp_path), SideOptions(reduction=2, every=1, first=layer), 0).eval()
        top = with_side(make(family, tmp_path), layer).eval()
        for around in (whole, top.model):
            nn.init.normal_(around.side.up.weight, std=0.3, generator=torch.Generator().manual_seed(9))  # type: ignore[union-attr,arg-type]
        hidden = Bottom(make(family, tmp_path), layer).hidden({"input_ids": ids_BT, "attention_mask": mask_BT})
        with torch.no_grad():
            expected = whole(input_ids=ids_BT, attention_mask=mask_BT).logits
            assert torch.allclose(top(hidden, mask_BT), expected, atol=1e-6)
            assert not torch.allclose(top(hidden.flip(-1), mask_BT), expected, atol=1e-4)


def by_formula(vendor: Vendor, hidden_BTn: torch.Tensor, mask_BT: torch.Tensor, enters: bool = True) -> torch.Tensor:
    """(B, K) scores by the formula at the head of `sotto/models/side.py`, with light blocks, from a frozen top of its
    own and the vendor's side weights.

    Args:
      enters: False is the twin: a side network that looks, in place of what was sent, at the zeros that stand in for
        embeddings in a top.
    """
    loaded = models_load.load_model(vendor.config.model, vendor.config.data, vendor.config.method, 0)
    layer, side = vendor.setting.layer, vendor.top.model.side  # type: ignore[union-attr]
    frozen: Any = Top(loaded.model, layer)
    frozen.requires_grad_(False)
    seen: list[torch.Tensor] = []
    layers = frozen.model.bert.encoder.layer
    hooks = [block.register_forward_hook(lambda _, __, out: seen.append(_hidden(out))) for block in layers[layer:]]
    frozen(hidden_BTn, mask_BT)
    for hook in hooks:
        hook.remove()

    def n(x: torch.Tensor) -> torch.Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()

    def norm(x: torch.Tensor, m: Any) -> torch.Tensor:
        return n(x) * m.weight + m.bias

    z = n(hidden_BTn if enters else torch.zeros_like(hidden_BTn)) @ side.entry.weight.T + side.entry.bias  # type: ignore[union-attr]
    for h, ladder, gate, block in zip(seen, side.ladders, side.gates, side.blocks, strict=True):  # type: ignore[union-attr,arg-type]
        g = 1 / (1 + torch.exp(-gate.a / 0.1))
        z = g * z + (1 - g) * (n(h) @ ladder.weight.T + ladder.bias)
        inner = F.gelu(norm(z, block.norm) @ block.up.weight.T + block.up.bias)
        z = z + inner @ block.down.weight.T + block.down.bias
    size = seen[-1].square().mean(-1, keepdim=True).sqrt()
    last = seen[-1] + size * (norm(z, side.norm) @ side.up.weight.T + side.up.bias)  # type: ignore[union-attr,operator]
    pooled = torch.tanh(last[:, 0] @ frozen.model.bert.pooler.dense.weight.T + frozen.model.bert.pooler.dense.bias)
    head = vendor.top.model.backbone.classifier  # type: ignore[union-attr]
    return pooled @ head.weight.T + head.bias  # type: ignore[union-attr]


def _hidden(out: Any) -> torch.Tensor:
    return out[0] if isinstance(out, tuple) else out


def formula_gradients(vendor: Vendor, sent: Any, chosen: np.ndarray, **how: Any) -> dict[str, torch.Tensor]:
    scores = by_formula(vendor, *sent.batch(chosen), **how)
    loss = F.cross_entropy(scores, sent.labels_E[chosen])
    parameters = {name: p for name, p in vendor.top.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(parameters.items(), found, strict=True)}


def step_gradients(vendor: Vendor, monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> dict[str, torch.Tensor]:
    """What the vendor hands to its optimizer in one step."""
    taken: list[dict[str, torch.Tensor]] = []
    monkeypatch.setattr(vendor.optimizer, "step", lambda update, step: taken.append(update))
    for parameter in vendor.top.parameters():
        parameter.grad = None
    vendor._one(*arguments)
    return {name: value.clone() for name, value in taken[0].items()}


@pytest.mark.parametrize("layer", [0, 1])
def test_gradients_of_a_step_are_those_of_the_formula(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layer: int
) -> None:
    made = config(tmp_path, {"privatizer": "none", "layer": layer}, method=SIDE | {"side_block": "light"})
    run = simulate(made)
    sent = Inbox(run.path / "private" / "inbox", run.customer.outbox.manifest).open_all()  # type: ignore[union-attr]
    vendor, chosen = Vendor(made), np.arange(12)
    wake(vendor.top)
    nn.init.normal_(vendor.top.model.backbone.classifier.weight, generator=torch.Generator().manual_seed(3))  # type: ignore[union-attr,arg-type]
    # Layer 0 with privatizer none sends ids or rows; the formula is written for rows.
    assert sent.agreement.values != "ids"
    got = step_gradients(vendor, monkeypatch, sent, chosen, None)
    expected = formula_gradients(vendor, sent, chosen)
    assert set(got) == set(expected)
    assert not [name for name, g in got.items() if float(g.abs().max()) == 0], "every trained weight learns"
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-3, atol=1e-6, msg=name)
    twin = formula_gradients(vendor, sent, chosen, enters=False)
    entry = next(name for name in got if name.endswith("side.entry.weight"))
    assert not torch.allclose(got[entry], twin[entry], rtol=0.1, atol=1e-6), "it begins with what was sent"

    # Labels that are kept: the answer of a customer without noise takes the same step.
    def answer(examples_B: torch.Tensor, scores_BK: torch.Tensor) -> torch.Tensor:
        return scores_BK.softmax(-1) - F.one_hot(sent.labels_E[examples_B], scores_BK.shape[1])  # type: ignore[index]

    kept = step_gradients(vendor, monkeypatch, sent, chosen, answer)
    for name, value in got.items():
        torch.testing.assert_close(kept[name], value, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layer", [0, 1])
def test_only_the_side_network_and_the_head_are_trained_and_nothing_goes_back(
    family: str, layer: int, tmp_path: Path
) -> None:
    top = with_side(make(family, tmp_path), layer).train()
    wake(top)
    hidden_BTn, mask_BT = rows()
    hidden_BTn.requires_grad_()
    F.cross_entropy(top(hidden_BTn, mask_BT), torch.tensor([0, 1, 0])).backward()
    assert hidden_BTn.grad is None, "no gradient below the cut"
    trained = {name for name, p in top.named_parameters() if p.requires_grad}
    assert {name for name, p in top.named_parameters() if p.grad is not None} == trained
    assert all(name.startswith(("model.side.", "model.backbone.")) for name in trained)
    heads = {name.split(".")[2] for name in trained if name.startswith("model.backbone.")}
    assert heads in ({"classifier"}, {"score"})
    held = {name for name, p in top.named_parameters() if p.numel()}
    assert not any(f".{where}.{i}." in n for n in held for where in ("layer", "layers", "h") for i in range(layer)
                   if n.startswith("model.backbone."))  # fmt: skip
    assert len(top.model.side.kept) == len(top.trained_layers), "nothing stands beside the customer's blocks"  # type: ignore[union-attr,arg-type]


@pytest.mark.parametrize("family", ["bert", "llama", "pooled"])
def test_stored_outputs_stand_in_for_the_layers_from_the_first_on(family: str, tmp_path: Path) -> None:
    whole = add_side(make(family, tmp_path), SideOptions(reduction=2, every=1, first=1), 0).eval()
    nn.init.normal_(whole.side.up.weight, std=0.3, generator=torch.Generator().manual_seed(9))
    batch = batch_of(whole)
    with torch.no_grad():
        expected, outputs = whole(**batch).logits, whole.backbone_outputs(**batch)
        assert set(outputs) == set(range(1, len(whole.stack.layers)))
        whole.release_layers()
        with whole.fed(outputs):
            assert torch.equal(whole(**batch).logits, expected)
        with pytest.raises(SottoError) as caught:
            whole(**batch)
    assert caught.value.code == "SOT344"


def test_a_side_network_needs_layers_from_its_first_on() -> None:
    with pytest.raises(ValueError, match="none is left"):
        add_side(make("bert", Path()), SideOptions(first=LAYERS, block="light"), 0)


def test_it_learns_what_was_sent(tmp_path: Path) -> None:
    changes = {"method": SIDE, "run": {"epochs": 25, "learning_rate": 0.01}}
    assert (simulate(config(tmp_path, **changes)).accuracy or 0) > 0.9
    blind = simulate(config(tmp_path, {"privatizer": "dx_hidden", "eta": 0.5, "layer": 1}, **changes))
    assert (blind.accuracy or 0) < 0.6


@pytest.mark.parametrize(
    "setting",
    [
        {"privatizer": "dx_tokens", "eta": 50.0},
        {
            "privatizer": "dx_pooled",
            "segment": 3,
            "eta": 300.0,
            "layer": 1,
        },
        {"privatizer": "gaussian_pooled", "epsilon": 8.0, "layer": 1, "labels": "kept", "label_epsilon": 4.0},
    ],
    ids=lambda s: s["privatizer"],
)
def test_a_run_that_was_broken_off_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: dict[str, Any]
) -> None:
    made = config(tmp_path, setting, method=SIDE, run={"debug_noise_seed": 3, "checkpoint_every": 1})
    whole = simulate(made)
    start = dict(Vendor(made).top.state_dict())
    after = dict(whole.vendor.top.state_dict())
    moved = {name for name in start if not torch.equal(start[name], after[name])}
    trained = {name for name, p in whole.vendor.top.named_parameters() if p.requires_grad}
    # With one row for each text, attention has nothing to choose from: its gradient is zero, or on some processors the
    # rounding of two sums that are the same.
    idle = {n for n in trained if setting["privatizer"] == "gaussian_pooled" and _chooses(n)}
    assert trained - idle <= moved <= trained
    original, calls, path = Vendor._save, iter(range(1000)), tmp_path / "runs" / "broken"

    def crash(self: Vendor, folder: Path) -> None:
        if next(calls) == 3:
            raise KeyboardInterrupt
        original(self, folder)

    monkeypatch.setattr(Vendor, "_save", crash)
    monkeypatch.setattr(module.RunDir, "planned", lambda config, stem: module.RunDir(path))
    with pytest.raises(KeyboardInterrupt):
        simulate(made)
    monkeypatch.undo()
    later = simulate(made, path=path)
    tiny_runs.assert_same(dict(later.vendor.top.state_dict()), after)
    assert later.accuracy == whole.accuracy
    other = simulate(config(tmp_path, setting, method=SIDE, run={"debug_noise_seed": 3, "seed": 1}))
    assert any(not torch.equal(value, after[name]) for name, value in other.vendor.top.state_dict().items())


def _chooses(name: str) -> bool:
    return ".self.query." in name or ".self.key." in name


def test_a_cut_above_all_blocks_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(SottoError) as caught:
        Vendor(config(tmp_path, {**NONE, "layer": 2}, method=SIDE))
    assert caught.value.code == "SOT811"
    words = str(caught.value)
    assert "setting.layer" in words
    assert "method.train: head" in words
