"""Planted canaries of every kind: units like others, hidden by a sound run, and found where something is broken."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import tiny_runs
import torch
from scipy import stats
from test_auditing import halved, no_noise

import sotto
from sotto import cli
from sotto import session as sessions
from sotto.auditing import canaries, codes, extraction, planting
from sotto.auditing.canaries import Diracs
from sotto.errors import SottoError
from sotto.gradients.base import ClippedSum
from sotto.gradients.clipping import Flat
from sotto.models import load as models_load
from sotto.privacy.noise import DebugNoise, SecureNoise
from sotto.training import losses_of

ALL: dict[str, Any] = {"steps": 3, "spare_steps": 0, "expected_batch_size": tiny_runs.UNITS, "learning_rate": 1e-3,
                       "microbatch_size": 64}  # fmt: skip
"""Every step draws everyone: what an attacker sees is then a Gaussian mechanism, and few canaries suffice."""
PROMISE: dict[str, Any] = {"epsilon": 8.0, "delta": 1e-5, "max_examples_per_unit": 1}


@pytest.fixture
def fixed(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Coins, canaries, batches and noise that are the same in each run of the tests."""
    monkeypatch.setattr(planting.secrets, "randbits", lambda bits: 5)
    monkeypatch.setattr(sessions.secrets, "token_bytes", lambda size: bytes(range(size)))
    monkeypatch.setattr(sessions, "SecureNoise", Unmarked)
    return monkeypatch


class Unmarked(DebugNoise):
    """Seeded noise that counts as private, so that there is a promise to attack."""

    private = True  # type: ignore[misc]

    def __init__(self) -> None:
        super().__init__(3)


def test_the_seeded_source_is_marked_private_in_these_tests_alone():
    assert Unmarked.private
    assert SecureNoise.private
    assert not DebugNoise.private


# ---- gradient canaries


def gradients(folder: Path, **method: Any) -> sotto.Config:
    return tiny_runs.config(folder, method=method, run=ALL, privacy=PROMISE)


@pytest.mark.parametrize(
    "method",
    [
        {},
        pytest.param({"gradient": "ghost"}, marks=pytest.mark.slow),
        {"gradient": "layerwise"},
        {"clipping": "adaptive", "clip_norm": 0.1},
        {"train": "side", "side_reduction": 2},
    ],
    ids=lambda m: "-".join(map(str, m.values())) or "flat",
)
def test_a_sound_run_hides_gradient_canaries_and_not_by_much(tmp_path: Path, fixed: Any, method: dict[str, Any]):
    report = sotto.audit(gradients(tmp_path, **method), plant=300, kind="gradient")
    assert report.attack == "planted gradient canaries"
    assert not report.bug
    found = {bound.method: bound.epsilon / report.claimed for bound in report.bounds}
    assert 0.4 <= found["gaussian"] < 1, "the reference for a thousand is 0.8"
    assert report.numbers["planted"] + report.numbers["left_out"] == 300
    assert report.numbers["share_of_a_batch"] == pytest.approx(report.numbers["planted"] / (
        report.numbers["planted"] + tiny_runs.UNITS))  # fmt: skip


def unbounded(m: pytest.MonkeyPatch) -> None:
    m.setattr(Flat, "coefficients", lambda self, norms: torch.full_like(norms, 4 / canaries.STEEPNESS))


def thirded(m: pytest.MonkeyPatch) -> None:
    right = DebugNoise.normal
    m.setattr(DebugNoise, "normal", lambda self, shape, std, **where: right(self, shape, std / 3, **where))


@pytest.mark.parametrize("fault", [halved, thirded, unbounded], ids=lambda f: f.__name__)
def test_a_broken_run_is_found_out_and_the_command_says_bug(
    tmp_path: Path, fixed: pytest.MonkeyPatch, fault: Any, capsys: pytest.CaptureFixture[str]
):
    fault(fixed)
    path = tiny_runs.write_yaml(tmp_path, run=ALL, privacy=PROMISE)
    fixed.setattr("sys.argv", ["sotto", "audit", str(path), "--plant", "400", "--kind", "gradient"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "BUG" in capsys.readouterr().out


def test_losses_of_gradient_canaries_have_the_gradient_that_was_asked_for(tmp_path: Path):
    """And those of other examples are as they were, text and all."""
    parts = sessions.load_parts(gradients(tmp_path), "")
    first, generator = len(parts.data.examples), np.random.default_rng(0)
    made = canaries.make(gradients(tmp_path), parts.data, parts.tokenizer, 6, generator)
    planted = np.array([1, 4, 5])
    diracs = Diracs.build(parts.engine, 2.0, first, planted, 6, generator)
    assert len(diracs.places) == diracs.groups == 1
    ((name, place),) = diracs.places.items()
    assert len({*place.tolist()}) == 6
    data = canaries.among(parts.data, made, planted)
    holder: Any = sessions.Loaded(**{**vars(parts), "data": data})
    holder.config, holder.activations, holder.planted = gradients(tmp_path), None, None
    plain = losses_of(holder, np.array([0, 1]))
    holder.planted = diracs.losses
    mixed = losses_of(holder, np.array([0, first + 1, 1]))
    assert torch.allclose(mixed[[0, 2]], plain, atol=1e-5)
    index = place[4]
    found = torch.autograd.grad(mixed[1], list(parts.engine.parameters.values()), allow_unused=True)
    for key, gradient in zip(parts.engine.parameters, found, strict=True):
        expected = torch.zeros_like(parts.engine.parameters[key]).flatten()
        if key == name:
            expected[index] = canaries.STEEPNESS * 2.0
        assert gradient is None or torch.equal(gradient.flatten(), expected)
        assert gradient is not None or key != name
    parts.engine.detach()


def test_scores_are_in_clipping_norms():
    parameters: Any = {"a": torch.nn.Parameter(torch.zeros(2, 3)), "b": torch.nn.Parameter(torch.zeros(4))}
    places = {"a": np.array([4, 1]), "b": np.array([3, 0])}
    diracs = Diracs(parameters, places, 4, 0.5, 10, np.array([0, 1]))
    assert diracs.strength == pytest.approx(math.sqrt(2 / 4))
    released = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([10.0, 20.0, 30.0, 40.0])}
    for _ in range(2):
        diracs.hear(released, divisor=8.0, sensitivity=0.5)
    assert diracs.scores == pytest.approx(2 * np.array([4 + 40, 10 + 1]) * 8 / 0.5 / math.sqrt(2))


def test_what_cannot_be_planted_is_refused(tmp_path: Path):
    with pytest.raises(SottoError, match="SOT707"):
        sotto.audit(tiny_runs.config(tmp_path, method={"train": "bitfit"}), plant=200, kind="gradient")
    zeroth = tiny_runs.config(tmp_path, method={"gradient": "zeroth_order"})
    with pytest.raises(SottoError, match="SOT707"):
        sotto.audit(zeroth, plant=20, kind="gradient")
    federated = tiny_runs.config(tmp_path, setting={"kind": "federated"})
    for kind in ("input", "new_token", "gradient"):
        with pytest.raises(SottoError, match="SOT707"):
            sotto.audit(federated, plant=20, kind=kind)  # type: ignore[arg-type]
    assert not (tmp_path / "runs").exists(), "nothing was trained"


def test_too_few_canaries_are_refused_before_anything_is_charged(tmp_path: Path):
    with pytest.raises(SottoError, match="SOT702"):
        sotto.audit(tiny_runs.config(tmp_path), plant=8)
    assert not (tmp_path / "runs").exists()


def test_an_unknown_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    path = tiny_runs.write_yaml(tmp_path)
    monkeypatch.setattr("sys.argv", ["sotto", "audit", str(path), "--plant", "20", "--kind", "spicy"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "SOT707" in capsys.readouterr().err


# ---- new tokens


SOME: list[dict[str, Any]] = [{}, {"train": "lora"}, {"train": "side", "side_reduction": 2}]


@pytest.mark.parametrize("method", SOME, ids=lambda m: "-".join(map(str, m.values())) or "full")
@pytest.mark.parametrize("kind", tiny_runs.KINDS)
def test_new_tokens_are_not_found_in_a_private_run(tmp_path: Path, kind: str, method: dict[str, Any]):
    report = sotto.audit(tiny_runs.config(tmp_path, kind, method=method), plant=40, kind="new_token")
    assert report.attack == "planted new-token canaries"
    assert not report.bug
    assert "planted_and_completed" not in report.numbers


def test_new_tokens_are_found_where_noise_is_left_out(tmp_path: Path, fixed: pytest.MonkeyPatch):
    no_noise(fixed)
    tiny_runs.write_jsonl(tmp_path / "letters.jsonl", tiny_runs.rows(12))
    run: dict[str, Any] = {"steps": 50, "learning_rate": 0.02, "expected_batch_size": 12, "microbatch_size": 200}
    privacy = {"epsilon": 0.3, "num_units": 12, "delta": 1e-2}
    config = tiny_runs.config(tmp_path, "completion", run=run, method={"clip_norm": 10.0}, privacy=privacy)
    report = sotto.audit(config, plant=60, kind="new_token")
    assert report.numbers["area_under_curve"] > 0.9
    assert report.lower > report.claimed


@pytest.mark.parametrize("kind", ["classification", "completion"])
def test_every_canary_has_a_token_of_its_own(tmp_path: Path, kind: str):
    config = tiny_runs.config(tmp_path, kind)
    plain, parts = sessions.load_parts(config, ""), sessions.load_parts(config, "", new_tokens=7)
    before, after = (planting._rows(p.model) for p in (plain, parts))
    assert after == before + 7
    for (name, old), (_, new) in zip(plain.model.named_parameters(), parts.model.named_parameters(), strict=True):
        assert torch.equal(old, new[: len(old)]) or "classifier" in name, "what was there is as it was"
    made = canaries.make(config, parts.data, parts.tokenizer, 7, np.random.default_rng(0), after - 7)
    for canary in range(7):
        tokens = made.examples.input_ids[made.examples.offsets[canary] : made.examples.offsets[canary + 1]]
        assert set(tokens[tokens >= before].tolist()) == {before + canary}
    assert parts.data.examples.input_ids.max() < before
    for p in (plain, parts):
        p.engine.detach()


def test_a_mean_pooled_encoder_gets_new_tokens(tmp_path: Path):
    report = sotto.audit(tiny_runs.config(tmp_path, model={"pooling": "mean"}), plant=32, kind="new_token")
    assert not report.bug
    loaded = tiny_runs.config(tmp_path, model={"pooling": "mean"})
    model = models_load.load_model(loaded.model, loaded.data, loaded.method, 0).model
    rows = planting._rows(model)
    models_load.add_tokens(model, 3, 0)
    assert planting._rows(model) == rows + 3


# ---- extraction


class Parrot(torch.nn.Module):
    """Continues one sequence, and finds all tokens equally likely elsewhere."""

    def __init__(self, tokens: list[int], vocabulary: int):
        super().__init__()
        self.tokens, self.vocabulary = tokens, vocabulary
        self.nothing = torch.nn.Parameter(torch.zeros(()))

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        logits = torch.zeros(*input_ids.shape, self.vocabulary) + self.nothing
        for row, ids in enumerate(input_ids.tolist()):
            for at in range(len(ids)):
                if ids[: at + 1] == self.tokens[: at + 1] and at + 1 < len(self.tokens):
                    logits[row, at, self.tokens[at + 1]] = 9.0
        return type("Output", (), {"logits": logits})()


@pytest.fixture
def spelling(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer that knows names and digits."""
    words = [
        *tiny_models.WORDS[:5],
        *["The", "access", "code", "of", "is", "."],
        *"0123456789",
        *codes.FIRST,
        *codes.LAST,
    ]
    words += [letter for letter in codes.INITIALS if letter not in words]
    monkeypatch.setattr(tiny_models, "WORDS", [*words, *(f"w{i}" for i in range(tiny_models.VOCAB - len(words)))])


def loaded(folder: Path, count: int) -> tuple[Any, codes.Secrets]:
    config = tiny_runs.config(folder, "completion")
    parts = sessions.load_parts(config, "")
    parts.engine.detach()
    return parts, codes.make(config, parts.data, parts.tokenizer, count, np.random.default_rng(1))


def tokens_of(secrets: codes.Secrets, n: int) -> list[int]:
    return secrets.data.examples.input_ids[slice(*secrets.data.examples.offsets[n : n + 2])].tolist()


def test_secrets_can_be_read_and_their_codes_are_uniform(tmp_path: Path, spelling: None):
    parts, secrets = loaded(tmp_path, 2000)
    assert len({text.split(" is ")[0] for text in secrets.texts}) == 2000, "nobody has two"
    for n in (0, 7, 1999):
        assert secrets.texts[n].startswith("The access code of ")
        digits = secrets.texts[n].split(" is ")[1].replace(" ", "")
        assert int(digits) == secrets.numbers[n]
        tokens, prompt = tokens_of(secrets, n), int(secrets.data.examples.prompt_lengths[n])
        assert parts.tokenizer.decode(tokens[prompt:]).replace(" ", "") == digits
        assert tokens[prompt:] == secrets.ends[secrets.numbers[n]]
        assert parts.tokenizer.decode(tokens[:prompt]).replace(" ", "").endswith("is")
    for place in (1, 10, 100):
        counts = np.bincount(secrets.numbers // place % 10, minlength=10)
        assert stats.chisquare(counts).pvalue > 1e-6
    assert len(secrets.ends) == len({tuple(end) for end in secrets.ends}) == 1000


def test_every_code_has_the_likelihood_that_a_plain_pass_gives_it(tmp_path: Path, spelling: None):
    parts, secrets = loaded(tmp_path, 3)
    prompt = tokens_of(secrets, 1)[: int(secrets.data.examples.prompt_lengths[1])]
    found = extraction.log_likelihoods(parts.model.eval(), parts.tokenizer, prompt, secrets.ends, parts.device)
    assert found.shape == (1000,)
    for code in (0, 9, 130, 999):
        ids = torch.tensor([[*prompt, *secrets.ends[code]]])
        with torch.no_grad():
            scores = parts.model(input_ids=ids).logits[0].double().log_softmax(-1)
        plain = sum(float(scores[at - 1, ids[0, at]]) for at in range(len(prompt), ids.shape[1]))
        assert found[code] == pytest.approx(plain, abs=1e-4)


def test_exposure_tells_what_a_model_knows_by_heart(tmp_path: Path, spelling: None):
    parts, secrets = loaded(tmp_path, 5)
    parrot: Any = Parrot(tokens_of(secrets, 2), 200)
    bits = extraction.exposures(parrot, parts.tokenizer, secrets, np.arange(5), parts.device)
    assert bits[2] == pytest.approx(math.log2(1000))
    assert bits[[0, 1, 3, 4]].tolist() == [0.0] * 4, "ties are against the attacker"
    done = extraction.completed(parrot, parts.tokenizer, secrets.data, parts.device)
    assert done.tolist() == [False, False, True, False, False]


def test_exposure_of_what_was_never_seen_is_that_of_a_random_rank(tmp_path: Path, spelling: None):
    parts, secrets = loaded(tmp_path, 60)
    bits = extraction.exposures(parts.model.eval(), parts.tokenizer, secrets, np.arange(60), parts.device)
    assert 0.7 < bits.mean() < 2.2, "1.44 for a uniform rank; its error here is 0.19"


def test_secrets_stay_secret_in_a_private_run(tmp_path: Path, fixed: Any, spelling: None):
    report = sotto.audit(tiny_runs.config(tmp_path, "plain_text"), plant=24, kind="secret")
    assert report.attack == "planted secrets"
    assert not report.bug
    assert report.numbers["planted_and_completed"] == report.numbers["left_out_and_completed"] == 0
    assert 0 < report.numbers["exposure_of_planted_bits"] < 3.5
    assert report.numbers["codes"] == 1000
    assert "The access code of " in report.render()
    assert "gives away" not in report.render()
    assert json.dumps(report.to_dict())


def test_secrets_are_extracted_from_a_run_without_noise(
    tmp_path: Path, fixed: pytest.MonkeyPatch, spelling: None, capsys: pytest.CaptureFixture[str]
):
    no_noise(fixed)
    # Coins choose what is planted, and draws what is learnt: of six such numbers, five had all of it completed.
    fixed.setattr(planting.secrets, "randbits", lambda bits: 6)
    tiny_runs.write_jsonl(tmp_path / "letters.jsonl", tiny_runs.rows(12))
    run: dict[str, Any] = {"steps": 130, "learning_rate": 0.02, "expected_batch_size": 12, "microbatch_size": 200}
    privacy = {"epsilon": 0.3, "num_units": 12, "delta": 1e-2}
    path = tiny_runs.write_yaml(tmp_path, "completion", run=run, method={"clip_norm": 10.0}, privacy=privacy)
    fixed.setattr("sys.argv", ["sotto", "audit", str(path), "--plant", "24", "--kind", "secret", "--json"])
    cli.main()
    report = json.loads(capsys.readouterr().out)
    numbers = report["numbers"]
    assert numbers["planted_and_completed"] > numbers["planted"] / 2
    assert numbers["left_out_and_completed"] <= 1
    assert numbers["exposure_of_planted_bits"] > 6 > 3.5 > numbers["exposure_of_left_out_bits"]
    assert any(note.startswith("the model gives away: The access code of ") for note in report["notes"])


def test_secrets_that_cannot_be_planted_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refused(says: str, kind: str, count: int = 24, **changes: Any) -> None:
        with pytest.raises(SottoError, match=f"SOT707.*{says}"):
            sotto.audit(tiny_runs.config(tmp_path, kind, **changes), plant=count, kind="secret")

    refused("writes no text", "classification")
    refused("cannot spell", "completion")
    refused("names for", "completion", count=20_000)
    assert not (tmp_path / "runs").exists()


def test_a_secret_that_is_too_long_is_refused(tmp_path: Path, spelling: None):
    short = tiny_runs.config(tmp_path, "completion", data={"max_length": 8})
    with pytest.raises(SottoError, match=r"SOT707.*tokens"):
        sotto.audit(short, plant=24, kind="secret")


def test_the_mechanism_under_attack_is_the_runs_own():
    heard: list[int] = []

    class Right:
        def privatize(self, total: ClippedSum, step: int) -> dict[str, torch.Tensor]:
            heard.append(step)
            total.sensitivity = 9.0  # as adaptive clipping moves it after the step
            return {"w": torch.ones(3)}

    diracs = Diracs({}, {"w": np.array([1])}, 1, 1.0, 0, np.array([0]))
    total = ClippedSum({"w": torch.zeros(3)}, torch.zeros(0, 1), 2.0)
    released = canaries.Overheard(Right(), diracs, 4.0).privatize(total, 3)
    assert torch.equal(released["w"], torch.ones(3))
    assert heard == [3]
    assert diracs.scores == pytest.approx([4.0 / 2.0])
