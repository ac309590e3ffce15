"""What changes on a CUDA device: kernels, random numbers and memory. Run with `make test-gpu`; skipped without one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import test_gradients_engine as families
import test_models_frozen as frozen
import test_models_reversible as reversible
import test_models_side as side
import test_zeroth_directions as zeroth
import tiny_runs
import torch
from gradient_oracle import differences, oracle
from torch import nn

import sotto
from sotto import training
from sotto.config import MethodSection
from sotto.gradients.engine import attach
from sotto.memory_forecast import MemoryLaw
from sotto.models import support
from sotto.models.reversible import ReversibleOptions, make_reversible
from sotto.models.trainable import prepare
from sotto.privacy.noise import DebugNoise, SecureNoise
from sotto.zeroth_order import kernels
from sotto.zeroth_order.directions import Directions
from sotto.zeroth_order.perturb import Perturbed, Side
from sotto.zeroth_order.small import Group, Room, groups

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.filterwarnings("ignore:.*deprecated and will be removed in v6:FutureWarning"),  # within peft
]
CUDA, CPU = torch.device("cuda"), torch.device("cpu")
DEBUG = {"debug_noise_seed": 5}


def on_gpu(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: x.to(CUDA) for name, x in batch.items()}


def check(model: nn.Module, *, algorithm: str, tolerance: float, autocast: bool = False) -> None:
    """The engine on the device, in two steps, against plain autograd one unit at a time on the same device."""
    plain = families.losses_of(model.to(CUDA), on_gpu(families.batch_of()))

    def losses(rows: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            return plain(rows.to(CUDA))

    expected = oracle(model, losses, families.B, families.UNITS)
    engine = attach(model, clip_norm=expected.clip_norm, algorithm=algorithm)  # type: ignore[arg-type]
    for _ in range(2):
        total = engine.backward(losses(torch.arange(families.B)), families.UNITS.to(CUDA))
        assert total.norms.device.type == "cuda"
        assert max(differences(total, expected)) < tolerance
    engine.detach()


# ---- gradients


@pytest.mark.parametrize("algorithm", ["per_example", "ghost", "book_keeping"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "mamba"])
def test_families_are_exact(family: str, algorithm: str):
    check(families.build(family), algorithm=algorithm, tolerance=1e-6)


@pytest.mark.parametrize("train", ["lora", "bitfit", "head", "side"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_methods_are_exact(family: str, train: str):
    if train == "side":
        model: Any = side.with_side(family)
    elif (family, train) in (("llama", "bitfit"), ("gpt2", "head"), ("llama", "head")):
        pytest.skip("has none")
    else:
        model = prepare(side.build(family), MethodSection(train=train, lora_rank=3), seed=0)  # type: ignore[arg-type]
        side.tiny_models.perturb(model)
    check(model.double().train(), algorithm="book_keeping", tolerance=1e-6)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_under_bfloat16_autocast(family: str):
    for algorithm in ("ghost", "book_keeping"):
        check(families.build(family, torch.float32), algorithm=algorithm, tolerance=5e-2, autocast=True)


@pytest.mark.parametrize("streams", ["fixed", "float64", "stored"])
def test_reversible_networks_are_exact(streams: str):
    options = ReversibleOptions(streams=streams, **reversible.STREAMS[streams])  # type: ignore[arg-type]
    whole = make_reversible(side.build("llama").double().train(), options)
    check(whole, algorithm="book_keeping", tolerance=1e-6)


@pytest.mark.parametrize("streams", ["fixed", "stored"])
def test_dropout_on_the_device_is_repeated(streams: str):
    whole, plain = reversible.reversible_and_oracle(
        reversible.deep(6, torch.float64, hidden_dropout_prob=0.3), streams, **reversible.STREAMS[streams]
    )
    batch = on_gpu(families.batch_of())
    found = []
    for model, seed in ((whole.to(CUDA), 9), (plain.to(CUDA), 9), (plain, 10)):
        torch.manual_seed(seed)
        losses = families.losses_of(model, batch)(torch.arange(families.B))
        state = torch.cuda.get_rng_state()
        found.append(reversible.gradients(model, losses))
        assert torch.equal(torch.cuda.get_rng_state(), state)
    assert reversible.difference(found[0], found[1]) < 1e-8
    assert reversible.difference(found[0], found[2]) > 1e-2


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_rounded_layers_compute_what_they_do_on_the_cpu(kind: str):
    ours, _ = frozen.both("gpt2", "lora", kind)
    batch = support.dummy_batch(side.build("gpt2"), rows=4)
    with torch.no_grad():
        here = ours(**batch).logits
        there = ours.to(CUDA)(**on_gpu(batch)).logits
    torch.testing.assert_close(there.cpu(), here, rtol=1e-9, atol=1e-9)


# ---- noise and directions


def test_noise_arrives_on_the_device_and_seeded_noise_is_that_of_the_cpu():
    for method in ("normal", "rounded"):
        here, there = (
            getattr(DebugNoise(3), method)((1000,), 50.0, step=1, name="w", device=device) for device in (CPU, CUDA)
        )
        assert there.device.type == "cuda"
        assert torch.equal(there.cpu(), here)
    drawn = SecureNoise().normal((100_000,), 2.0, step=0, name="w", device=CUDA)
    assert drawn.dtype == torch.float64
    assert abs(float(drawn.std()) - 2) < 0.05


@pytest.mark.parametrize("law", zeroth.ALL, ids=str)
def test_directions_are_the_same_bits(law: Any):
    made: Directions = zeroth.make(law)
    for name in zeroth.SHAPES:
        here, there = (made.tensor(name, 3, 5, device=device) for device in (CPU, CUDA))
        assert torch.equal(there.cpu(), here)


def test_one_kernel_moves_weights_as_a_chain_of_operations_does(monkeypatch: pytest.MonkeyPatch):
    """With kernels and without: every parameter of a model, rows of a table, and a whole pass."""
    shapes = {"w": torch.Size((300, 1000)), "b": torch.Size((1000,)), "e": torch.Size((500, 130))}
    rows_n = torch.randint(500, (40,), device=CUDA)
    for law in zeroth.LAWS:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            weights = {n: torch.randn(s, device=CUDA).to(dtype) for n, s in shapes.items()}
            made, side = Directions("00" * 16, shapes, 4, zeroth.Law(law)), Side(2, 1e-2)
            assert kernels.kernel_for(made.stream("w", 7, 2), weights["w"]) is not None
            small = groups(weights, made)
            assert {id(weights["b"]), id(weights["e"])} == set(Room(small).moved(7, [(2, 1e-2)])[0])

            def moved(small: list[Group], w: Any = weights, made: Any = made, side: Any = side) -> list[torch.Tensor]:
                context = Perturbed(w, made, 7, [side], small)
                with context:
                    return [w["w"] * 1, w["b"] * 1, w["e"] * 1, torch.nn.functional.embedding(rows_n, w["e"])]

            found, alone = moved(small), moved([])
            with monkeypatch.context() as without:
                without.setattr(kernels, "_compiled", lambda device: None)
                expected = moved([])
            for x, y, z in zip(found, alone, expected, strict=True):
                if law in ("rademacher", "orthogonal"):
                    assert torch.equal(x, z)
                    assert torch.equal(y, z)
                else:  # a product is rounded before it is added, or not
                    torch.testing.assert_close(x, z, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
                    torch.testing.assert_close(y, z, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
                assert not torch.equal(z, weights["w"]) or z.shape != weights["w"].shape


def test_derivatives_along_directions(tmp_path: Path):
    here, there = (
        trained(tmp_path, device, method={"train": "full", "gradient": "zeroth_order", "zeroth_smoothing": 0})
        for device in ("cpu", "cuda")
    )
    tiny_runs.assert_same(here.model.state_dict(), {n: x.cpu() for n, x in there.model.state_dict().items()}, 2e-3)


# ---- whole runs


def trained(folder: Path, device: str, kind: str = "classification", **changes: Any) -> Any:
    run = {"device": device, **DEBUG, **changes.pop("run", {})}
    return sotto.train(tiny_runs.config(folder, kind, run=run, output={"name": device}, **changes))


RUNS: list[dict[str, Any]] = [
    {"method": {"train": "full"}},
    {"method": {"train": "lora", "gradient": "layerwise"}},
    {"method": {"train": "lora", "frozen_weights": "int8"}},
    {"method": {"train": "side", "side_reduction": 2}},
    {"method": {"train": "side", "side_reduction": 2, "side_cache": True}},
    {"method": {"train": "reversible"}},
    {"method": {"train": "full", "gradient": "zeroth_order"}},
    {"method": {"train": "full", "clipping": "adaptive"}},
]


@pytest.mark.parametrize("kind", ["classification", "completion"])
@pytest.mark.parametrize("changes", RUNS, ids=lambda c: "-".join(str(v) for v in c["method"].values()))
def test_a_run_gives_what_it_gives_on_the_cpu(tmp_path: Path, changes: dict[str, Any], kind: str):
    here, there = (trained(tmp_path, device, kind, **changes) for device in ("cpu", "cuda"))
    assert next(there.model.parameters()).device.type == "cuda"
    first, second = (
        {n: x.float().cpu() for n, x in done.model.state_dict().items() if x.is_floating_point()}
        for done in (here, there)
    )
    tiny_runs.assert_same(first, second, 2e-3)
    assert here.epsilon == there.epsilon


def test_a_stopped_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    straight = trained(tmp_path, "cuda")
    log = training.Metrics.log

    def stop_after_two(self: Any, step: int, *rest: Any) -> None:
        log(self, step, *rest)
        if step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(training.Metrics, "log", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        sotto.train(tiny_runs.config(tmp_path, run={"device": "cuda", **DEBUG}, output={"name": "stopped"}))
    monkeypatch.undo()
    (path,) = (tmp_path / "runs").glob("*stopped*")
    done = sotto.resume(path)
    assert done.finished
    # Sums of embedding gradients have no fixed order on a GPU, so the last bits may differ.
    tiny_runs.assert_same(straight.model.state_dict(), done.model.state_dict(), 1e-4)


@pytest.mark.parametrize("preset", ["dpzero", "dpzo", "dpzopo", "aggzo"])
def test_a_zeroth_order_log_replays_to_the_same_bits_on_the_cpu(tmp_path: Path, preset: str):
    relation = {"neighboring_relation": "replace_one"} if preset == "dpzero" else {}
    done = trained(
        tmp_path, "cuda", method={"train": "full", "gradient": "zeroth_order", "zeroth_preset": preset},
        privacy=relation,
    )  # fmt: skip
    there = {name: p.detach().cpu() for name, p in done.model.named_parameters()}
    exported = sotto.load(sotto.export(done.path, tmp_path / "again"))
    here = {name: p.detach().cpu() for name, p in exported.named_parameters()}
    assert there.keys() == here.keys()
    tiny_runs.assert_same(there, here)


def test_private_noise_differs_from_run_to_run(tmp_path: Path):
    first, second = (
        sotto.train(tiny_runs.config(tmp_path, run={"device": "cuda"}, output={"name": name})) for name in "ab"
    )
    assert any(not torch.equal(x, y) for x, y in zip(first.model.parameters(), second.model.parameters(), strict=True))


# ---- memory


def test_a_budget_of_memory_is_kept(tmp_path: Path):
    config = tiny_runs.config(tmp_path, run={"device": "cuda", "memory": "1GiB", "microbatch_size": "auto"})
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    done = sotto.train(config)
    assert done.finished
    assert torch.cuda.max_memory_allocated() - before < 2**30
    assert json.loads((done.path / "plan.json").read_text())


@pytest.mark.parametrize("changes", RUNS, ids=lambda c: "-".join(str(v) for v in c["method"].values()))
def test_a_forecast_is_made_on_the_device(tmp_path: Path, changes: dict[str, Any]):
    found = MemoryLaw(tiny_runs.config(tmp_path, run={"device": "cuda"}, **changes), CUDA).at(8)
    assert found.peak > found.parts["weights"]
