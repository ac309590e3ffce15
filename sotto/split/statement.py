"""What is promised about what the vendor sees, in words. Metric privacy is never written as (epsilon, delta)."""

from __future__ import annotations

import textwrap
from dataclasses import asdict, dataclass
from typing import Any

from sotto.config_split import SplitSetting
from sotto.privacy.accounting import round_up, round_up_figures
from sotto.split.metric import Meaning

WIDTH = 100


@dataclass(frozen=True)
class Facts:
    """What the statement is written from.

    Attributes:
      setting: the configuration's section.
      examples, rows: how many texts left, and in how many rows of numbers (or token ids) all together.
      bottom: SHA-256 of the part that the customer ran.
      meaning: what eta means, for the metric privatizers.
      epsilon: of one text's release, an upper bound, for the Gaussian privatizers.
      label_epsilon: of one label, for labels that are randomised or kept.
      exempt: words that were sent as they are.
      exempt_epsilon: of the choice of these words, where it was made from private texts.
      max_length: rows of every release of `gaussian`.
    """

    setting: SplitSetting
    examples: int
    rows: int
    bottom: str
    meaning: Meaning | None = None
    epsilon: float | None = None
    label_epsilon: float | None = None
    exempt: tuple[str, ...] = ()
    exempt_epsilon: float | None = None
    max_length: int = 0

    @property
    def protected(self) -> bool:
        return self.setting.privatizer != "none"

    @property
    def delta_of_labels(self) -> float:
        """Of all that is told of one label together: the choice of words, and answers, have one each."""
        deltas = (self.exempt_epsilon is not None) + (self.setting.labels == "kept")
        return deltas * self.setting.delta

    def to_dict(self) -> dict[str, Any]:
        """For machines. `kind_of_privacy` says which of the numbers there are."""
        kind = {"none": "none", "dx": "metric"}.get(self.setting.privatizer.split("_")[0], "local differential privacy")
        values = {"kind_of_privacy": kind, **asdict(self), "setting": self.setting.model_dump(mode="json")}
        return {name: value for name, value in values.items() if value is not None}


def text(facts: Facts) -> str:
    """The statement."""
    setting = facts.setting
    paragraphs = [
        ("NOT PRIVATE" if not facts.protected else "SPLIT STATEMENT", ""),
        ("What left", _what_left(facts)),
        ("Protection of the text", _protection(facts)),
    ]
    if setting.exempt != "none":
        paragraphs.append(("Words sent as they are", _exempt(facts)))
    paragraphs.append(("Labels", _labels(facts)))
    paragraphs.append(("Not covered", _not_covered(facts)))
    lines = []
    for title, words in paragraphs:
        lines.append(title)
        lines += textwrap.wrap(words, WIDTH, initial_indent="  ", subsequent_indent="  ")
        lines.append("")
    return "\n".join(lines)


def _what_left(facts: Facts) -> str:
    what = "token ids" if facts.setting.privatizer == "dx_tokens" else "rows of half-precision numbers"
    blocks = f"{facts.setting.layer} block{'s' if facts.setting.layer != 1 else ''}"
    below = f"the embeddings and {blocks}" if facts.setting.layer else "the embeddings"
    return (
        f"{facts.examples:,} texts left the customer, once each, as {facts.rows:,} {what}: the output of {below} of "
        f"the vendor's model (SHA-256 {facts.bottom[:16]}), privatized by '{facts.setting.privatizer}'. They were "
        "stored, and every pass of the training used the same ones. Queries to the trained model are privatized in "
        "the same way, and every query of a text is one more release of it."
    )


def _protection(facts: Facts) -> str:
    if facts.setting.privatizer == "none":
        return (
            "None. Representations without noise can be turned back into the text, from any depth of the model. "
            "Depth is no protection."
        )
    if facts.meaning is not None:
        return _metric(facts.meaning, facts.setting)
    assert facts.epsilon is not None
    hidden = (
        "the mean of its tokens is all that left"
        if facts.setting.pooled
        else f"always {facts.max_length} rows left, so its length is hidden too"
    )
    return (
        f"Local differential privacy: epsilon {round_up(facts.epsilon)}, delta {facts.setting.delta:g}, for the "
        f"replacement of one whole text by any other ({hidden}). Whatever the vendor does with it, trains from it or "
        "passes on has this guarantee."
    )


def _metric(m: Meaning, setting: SplitSetting) -> str:
    one, many = "token", "public tokens"
    scope = "for each row by itself" if setting.layer else "for each token by itself"
    summed = "Over a text these exponents add up. "
    if setting.pooled:
        one, many, summed = "text", "sentences of random tokens", ""
        scope = "for the mean of a text's tokens, which is all that left of it"
    elif setting.layer:
        summed += "Another token changes the rows of the tokens around it as well, and those exponents add up too. "
    if setting.segment is not None:
        one, many = "segment", "segments of random tokens"
        scope = (
            f"for the mean of each segment of {setting.segment} tokens by itself (the last of a text has up to "
            f"{2 * setting.segment - 1})"
        )
        if not setting.layer:
            summed += f"One token in another's place moves the mean by at most 1/{setting.segment} of their distance. "
    close, median = round_up_figures(m.close_ratio), round_up_figures(m.median_ratio)
    return (
        f"Metric privacy (d_X) with eta {m.eta:g}, {scope}. This is not differential privacy of the text, and eta is "
        f"no epsilon. The noise on a {one} has mean length {m.noise_length:.3g}; the nearest other {one} lies at "
        f"{m.nearest_distance:.3g} (median). After the noise a {one} was still the nearest to its own representation "
        f"in {m.survival:.1%} of {m.probes:,} trials on {many}. What was sent is at most e^{close} times "
        f"likelier under one {one} than under another that is as close as the closest 1 % of pairs (eta times "
        f"distance), and at most e^{median} times at the median distance. {summed}Measure what an attacker "
        "recovers with 'sotto audit --split'."
    )


def _exempt(facts: Facts) -> str:
    shown = ", ".join(facts.exempt[:40]) + (", ..." if len(facts.exempt) > 40 else "")
    chosen = "a public list"
    if facts.exempt_epsilon is not None:
        cost = f"epsilon {round_up(facts.exempt_epsilon)}, delta {facts.setting.delta:g}, for the choice alone"
        chosen = f"noisy counts of the private texts ({cost})"
    return (
        f"Every occurrence of these {len(facts.exempt):,} words and its place are disclosed, without any noise. They "
        f"come from {chosen}, and are the same for all texts: {shown}"
    )


def _labels(facts: Facts) -> str:
    if facts.setting.labels == "sent":
        return "The vendor has every label as it is."
    assert facts.label_epsilon is not None
    epsilon = round_up(facts.label_epsilon)
    chosen = ""
    if facts.exempt_epsilon is not None:
        total = round_up(facts.label_epsilon + facts.exempt_epsilon)
        chosen = f" The choice of words used the labels too: together epsilon {total}, delta {facts.delta_of_labels:g}."
    if facts.setting.labels == "randomised":
        together = ""
        if facts.epsilon is not None:
            together = (
                f" Text and label together: epsilon {round_up(facts.epsilon + facts.label_epsilon)}, delta "
                f"{facts.setting.delta:g}."
            )
        return f"Each label went through randomised response: epsilon {epsilon} for one label.{together}{chosen}"
    return (
        f"Labels stayed with the customer. What its answers to the vendor tell of one label, over all epochs: epsilon "
        f"{epsilon}, delta {facts.setting.delta:g}.{chosen}"
    )


def _not_covered(facts: Facts) -> str:
    length = "" if facts.setting.pooled or facts.epsilon is not None else "the length of each text in tokens, "
    if facts.setting.segment is not None:
        length = "the number of segments of each text, "
    return (
        f"Still open: {length}the number of texts, when they were sent, and what several texts of one person tell "
        "together. The trained model is a function of what was sent and carries no guarantee beyond that."
    )
