"""The audit of a split run: every attack that Sotto has on what a customer would send, and what is left of privacy.

Empirical privacy is the part of the tokens that an attack does *not* recover. It is stated against the strongest of the
attacks, because a number against a weak one says nothing: depth alone, without any noise, looks private to the nearest
neighbour. It bounds nothing. A better attack may do better.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from sotto.auditing.local import audit_promises
from sotto.auditing.report import AuditReport
from sotto.config import Config
from sotto.data.load import load_dataset_for
from sotto.errors import SottoError
from sotto.privacy.noise import NoiseSource, SecureNoise
from sotto.split import bags, exact, inference, inversion, nearest
from sotto.split.customer import Customer, load_bottom, setting_of
from sotto.split.labels import LabelKeeper
from sotto.split.vendor import passes as passes_of
from sotto.split.view import View, look, rare, rouge, success

SEARCHED = 40
"""Texts that the gradient search is tried on: it runs the bottom forwards and backwards many times for each."""

EXACT = 10
"""The same for the exact search, which runs it for every candidate of every place."""


@dataclass(frozen=True)
class SplitReport:
    """What the attacks found.

    Attributes:
      privatizer, layer: what was attacked.
      recovered: attack -> part of the tokens that it recovered; exempt and special ones apart. Where one row was sent
        for several tokens, of the different words of each row.
      rare: the same for tokens that stand in at most one in two hundred of the texts that the attackers know.
      rouge: attack -> ROUGE-L of its guesses; empty where one row was sent for several tokens.
      baseline: the part that naming the commonest token, or words, every time recovers.
      exempt: the part of all tokens that is exempt, and therefore disclosed.
      attribute, attribute_baseline: accuracy of inferring a text's class from what was sent, and of the best guess.
      labels: accuracy of inferring kept labels from all answers; None where they are not kept.
      texts, tokens: attacked.
      promises: lower bounds beside each epsilon that the setting promises.
      notes: what has to be known to read them.
    """

    privatizer: str
    layer: int
    recovered: dict[str, float]
    rare: dict[str, float]
    rouge: dict[str, float]
    baseline: float
    exempt: float
    attribute: float
    attribute_baseline: float
    labels: float | None
    texts: int
    tokens: int
    promises: tuple[AuditReport, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def strongest(self) -> str:
        """The attack that recovered most."""
        return max(self.recovered, key=self.recovered.__getitem__)

    @property
    def empirical_privacy(self) -> float:
        """1 - the success of the strongest attack."""
        return 1 - max(self.recovered.values())

    @property
    def bug(self) -> bool:
        """An epsilon that was promised has been refuted. Nothing else here is a bound."""
        return any(promise.bug for promise in self.promises)

    def to_dict(self) -> dict[str, Any]:
        found = {**asdict(self), "promises": [promise.to_dict() for promise in self.promises]}
        return {**found, "strongest": self.strongest, "empirical_privacy": self.empirical_privacy, "bug": self.bug}

    def render(self) -> str:
        """As text for a terminal."""
        lines = [
            f"attacked         '{self.privatizer}' at layer {self.layer}: {self.texts:,} texts, {self.tokens:,} tokens"
        ]
        for name, part in sorted(self.recovered.items(), key=lambda item: -item[1]):
            order = f", ROUGE-L {self.rouge[name]:.2f}" if name in self.rouge else ""
            lines.append(
                f"  {name:<22} recovered {part:.1%} of the tokens, {self.rare[name]:.1%} of the rare ones{order}"
            )
        lines.append(f"  {'(commonest token)':<22} recovered {self.baseline:.1%}")
        lines.append(f"empirical privacy {self.empirical_privacy:.3f}   against the strongest: {self.strongest}")
        if self.exempt:
            lines.append(f"exempt words     {self.exempt:.1%} of all tokens, disclosed and not counted above")
        lines.append(f"class inferred   {self.attribute:.1%}   (best guess {self.attribute_baseline:.1%})")
        if self.labels is not None:
            lines.append(f"kept labels      {self.labels:.1%} inferred from the answers")
        lines += [f"note             {note}" for note in self.notes]
        for promise in self.promises:
            lines += ["", promise.render()]
        return "\n".join(lines)


def audit_split(
    config: Config, limit: int = 2000, passes: int = 8, noise: NoiseSource | None = None, seed: int = 0
) -> SplitReport:
    """Attacks what a customer with this configuration would send. Nothing is sent or stored.

    Args:
      limit: texts that the attackers know and learn from. A fifth as many others are attacked. Both come from
        `data.train`: an attacker that has texts of the same source.
      passes: over the known texts, each under fresh noise.

    Raises:
      SottoError: SOT800 the configuration is not for a split run, SOT706 there are too few texts.
    """
    bottom, tokenizer = load_bottom(config)
    customer = Customer(config, bottom, tokenizer, noise or SecureNoise())
    customer.settle(load_dataset_for(config, tokenizer, "train"))
    return audit_customer(customer, limit, passes, seed)


def audit_customer(customer: Customer, limit: int, passes: int, seed: int = 0, searched: int = SEARCHED) -> SplitReport:
    """The same for a customer whose privatizer is settled. See `audit_split`.

    Args:
      searched: texts that the searches are tried on; 0: neither they nor the correction by context are tried.
    """
    data, bottom, config = customer.data, customer.bottom, customer.config
    order = np.random.default_rng(seed).permutation(len(data.examples))
    targets = max(1, min(limit // 5, len(order) // 3))
    attacked, known = order[:targets], order[targets : targets + limit]
    if len(known) < 8:
        raise SottoError(
            "SOT706", what=f"{len(order)} texts are too few to attack some with others", where=config.data.train,
            why="an attacker that has learnt from nothing finds nothing, which would look like privacy",
            fix="give a data.train with some hundred texts",
        )  # fmt: skip
    target = look(customer, data.examples, attacked)
    fresh = _drawing(customer, known, passes if target.ids_sent else 0)
    seldom_V = rare(fresh(), len(bottom.table_Vn))
    rows = target.by_segment()
    found = (find_words if rows.pooled else invert)(customer, target, fresh, passes, seed, searched)
    scored = _score(found, rows, seldom_V)
    counted = target.ids_ET[target.counted_ET]
    baseline = float((counted == counted.mode().values).double().mean()) if len(counted) else 0.0
    if rows.pooled:
        baseline = bags.commonest(fresh().by_segment(), rows, len(bottom.table_Vn))
    classes = len(config.data.labels or ())
    return SplitReport(
        privatizer=customer.setting.privatizer,
        layer=customer.setting.layer,
        recovered={name: each.recovered for name, each in scored.items()},
        rare={name: each.rare for name, each in scored.items()},
        rouge={name: each.rouge for name, each in scored.items() if each.rouge is not None},
        baseline=baseline,
        exempt=float(target.exempt_ET.sum() / target.mask_ET.sum()),
        attribute=inference.infer_attribute(fresh, target, bottom.table_Vn, classes, passes, seed),
        attribute_baseline=inference.best_guess(target.labels_E),
        labels=_kept_labels(config, customer),
        texts=len(attacked),
        tokens=len(counted),
        promises=audit_promises(
            customer.setting,
            customer.privatizer,
            bottom.table_Vn.shape[1],
            classes,
            passes_of(config, len(data.examples)),
            customer.noise,
        ),
        notes=_notes(target),
    )


def _drawing(customer: Customer, known: np.ndarray, kept: int) -> Callable[[], View]:
    """Gives views of the known texts, each under noise of its own; of so many that are kept, one after the other.

    Substituted tokens take long to draw and little room, so all attacks learn from the same releases of them.
    """
    views = [look(customer, customer.data.examples, known) for _ in range(kept)]
    if not views:
        return lambda: look(customer, customer.data.examples, known)
    again = itertools.cycle(views)
    return lambda: next(again)


@dataclass(frozen=True)
class _Scored:
    recovered: float
    rare: float
    rouge: float | None


def _score(found: dict[str, torch.Tensor], target: View, seldom_V: torch.Tensor) -> dict[str, _Scored]:
    """What each attack has found: (E, T) tokens, or (E, K) words where one row was sent for several."""
    scored = {}
    for name, given in found.items():
        view = target.part(torch.arange(len(given)))
        if target.pooled:
            truth = bags.bags(view, len(seldom_V))
            scored[name] = _Scored(bags.named(given, truth), bags.named(given, truth, seldom_V), None)
        else:
            guesses = given[:, : view.ids_ET.shape[1]]
            seldom = dataclasses.replace(view, counted_ET=view.counted_ET & seldom_V[view.ids_ET])
            scored[name] = _Scored(success(guesses, view), success(guesses, seldom), rouge(guesses, view))
    return scored


def find_words(
    customer: Customer, target: View, fresh: Callable[[], View], passes: int, seed: int, searched: int
) -> dict[str, torch.Tensor]:
    """Attack -> the words of each row of the target, the likeliest first, where a row stands for several tokens."""
    return bags.recover(customer.bottom, _ordinary(customer), target, fresh, passes, searched, seed)


def _ordinary(customer: Customer) -> torch.Tensor:
    """Tokens that are not special ones."""
    ordinary = torch.ones(len(customer.bottom.table_Vn), dtype=torch.bool)
    ordinary[customer.special] = False
    return torch.nonzero(ordinary).flatten()


def invert(
    customer: Customer, target: View, fresh: Callable[[], View], passes: int, seed: int, searched: int
) -> dict[str, torch.Tensor]:
    """Attack -> the target's tokens as it guesses them; the searches guess those of the first texts."""
    bottom, view = customer.bottom, fresh()
    table, most = bottom.table_Vn, max(target.ids_ET.shape[1], view.ids_ET.shape[1])
    tokens = _ordinary(customer)
    neighbours = nearest.Nearest(bottom, tokens, view)

    def as_rows(view: View) -> torch.Tensor:
        return table[view.values] if view.ids_sent else view.values

    def decoded(view: View) -> torch.Tensor:
        return table[neighbours.guess(view)]

    found = {"nearest neighbour": neighbours.guess(target)}
    learned = inversion.train_inverter(fresh, as_rows, passes, seed, most=most)
    found["learned inversion"] = learned.guess(target)
    if not target.ids_sent:
        mapped = inversion.Linear(bottom, tokens, (fresh() for _ in range(passes)))
        found["linear inversion"] = mapped.guess(target)
    if not target.ids_sent and searched:
        part = target.part(torch.arange(min(searched, len(target.ids_ET))))
        found["search"] = inversion.search(part, bottom, learned)
        # Where ids were sent the learned inverter already corrects them by their context.
        corrector = inversion.train_inverter(fresh, decoded, passes, seed, most=most)
        found["context correction"] = corrector.guess(target)
        if customer.setting.privatizer == "none" and exact.is_causal(bottom):
            some = torch.arange(min(EXACT, len(target.ids_ET)))
            found["exact search"] = exact.search(target.part(some), bottom, learned)
    return found


def _kept_labels(config: Config, customer: Customer) -> float | None:
    """How many labels an attacker infers from the answers that a customer gives, in a rehearsal with the real ones."""
    setting = setting_of(config)
    if setting.labels != "kept":
        return None
    labels = customer.data.examples.labels
    assert labels is not None
    assert setting.label_epsilon is not None
    classes, given = customer.agreement.classes, torch.from_numpy(labels)
    uses = passes_of(config, len(labels))
    keeper = LabelKeeper(given, classes, uses, setting.label_epsilon, setting.delta, customer.noise)
    return inference.infer_labels(keeper, given, classes)


def _notes(target: View) -> tuple[str, ...]:
    notes = ["a better attack may find more; this is no bound", "these numbers are functions of private data"]
    if target.segment != 1:
        those = f"each {target.segment} tokens" if target.segment else "all tokens of a text"
        notes.insert(0, f"one row was sent for {those}: attacks name its words, and are told how many")
    return tuple(notes)
