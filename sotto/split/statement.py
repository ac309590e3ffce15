"""What is promised about what the vendor sees, in words. Metric privacy is never written as (epsilon, delta).

A plan says as much of it as is known before a model or a text is read, in the same sentences. Nothing here needs torch.
"""

from __future__ import annotations

import textwrap
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from sotto.config_split import SplitSetting
from sotto.privacy.accounting import round_up, round_up_figures
from sotto.privacy.bounds import gaussian_epsilon, gaussian_mu

if TYPE_CHECKING:
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


def planned(setting: SplitSetting, max_length: int) -> list[tuple[str, str]]:
    """(title, words) of what is promised before anything is read: the setting's own part of the statement.

    Args:
      max_length: `data.max_length`.
    """
    epsilon = None
    if setting.epsilon is not None:  # what the noise is worth that will be calibrated to it
        epsilon = gaussian_epsilon(gaussian_mu(setting.epsilon, setting.delta), setting.delta)
    chosen = setting.exempt_epsilon if setting.exempt == "selected" else None
    facts = Facts(
        setting, 0, 0, "", None, epsilon, setting.label_epsilon, exempt_epsilon=chosen, max_length=max_length
    )  # fmt: skip
    what, output, queries = _what_leaves(setting)
    found = [("what leaves", f"Each text leaves once, as {what}: {output}. {queries}"), ("text", _protection(facts))]
    if setting.exempt != "none":
        found.append(("words", f"Some words leave without any noise, with their places. {_chosen(facts)}."))
    return [*found, ("labels", _labels(facts))]


def _what_leaves(setting: SplitSetting) -> tuple[str, str, str]:
    """In what form texts leave, of which part of the model, and what holds for queries."""
    what = "token ids" if setting.privatizer == "dx_tokens" else "rows of half-precision numbers"
    blocks = f"{setting.layer} block{'s' if setting.layer != 1 else ''}"
    below = f"the embeddings and {blocks}" if setting.layer else "the embeddings"
    return (
        what,
        f"the output of {below} of the vendor's model, privatized by '{setting.privatizer}'",
        "Queries to the trained model are privatized in the same way, and every query of a text is one more release "
        "of it.",
    )


def _what_left(facts: Facts) -> str:
    what, output, queries = _what_leaves(facts.setting)
    return (
        f"{facts.examples:,} texts left the customer, once each, as {facts.rows:,} {what}: {output}. They were stored, "
        "and every pass of the training used the same ones. The part of the model that the customer ran has SHA-256 "
        f"{facts.bottom[:16]}. {queries}"
    )


def _protection(facts: Facts) -> str:
    if facts.setting.privatizer == "none":
        return (
            "None. Representations without noise can be turned back into the text, from any depth of the model. "
            "Depth is no protection."
        )
    if facts.setting.eta is not None:
        return _metric(facts.meaning, facts.setting)
    assert facts.epsilon is not None
    hidden = (
        "the mean of its tokens is all that leaves"
        if facts.setting.pooled
        else f"always {facts.max_length} rows leave, so its length is hidden too"
    )
    return (
        f"Local differential privacy: epsilon {round_up(facts.epsilon)}, delta {facts.setting.delta:g}, for the "
        f"replacement of one whole text by any other ({hidden}). Whatever the vendor does with it, trains from it or "
        "passes on has this guarantee."
    )


def _metric(m: Meaning | None, setting: SplitSetting) -> str:
    """What eta promises; and, where it was measured on the model, what it means."""
    one, many = "token", "public tokens"
    scope = "for each row by itself" if setting.layer else "for each token by itself"
    summed = "Over a text these exponents add up. "
    if setting.pooled:
        one, many, summed = "text", "sentences of random tokens", ""
        scope = "for the mean of a text's tokens, which is all that leaves of it"
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
    promise = (
        f"Metric privacy (d_X) with eta {setting.eta:g}, {scope}. This is not differential privacy of the text, and "
        "eta is no epsilon."
    )
    if m is None:
        return (
            f"{promise} Two {one}s at distance d are told apart by a factor of at most e^(eta d). {summed}'sotto split "
            "meaning' shows what this eta means for the model."
        )
    close, median = round_up_figures(m.close_ratio), round_up_figures(m.median_ratio)
    return (
        f"{promise} The noise on a {one} has mean length {m.noise_length:.3g}; the nearest other {one} lies at "
        f"{m.nearest_distance:.3g} (median). After the noise a {one} was still the nearest to its own representation "
        f"in {m.survival:.1%} of {m.probes:,} trials on {many}. What was sent is at most e^{close} times "
        f"likelier under one {one} than under another that is as close as the closest 1 % of pairs (eta times "
        f"distance), and at most e^{median} times at the median distance. {summed}Measure what an attacker "
        "recovers with 'sotto audit --split'."
    )


def _exempt(facts: Facts) -> str:
    shown = ", ".join(facts.exempt[:40]) + (", ..." if len(facts.exempt) > 40 else "")
    return (
        f"Every occurrence of these {len(facts.exempt):,} words and its place are disclosed, without any noise. "
        f"{_chosen(facts)}: {shown}"
    )


def _chosen(facts: Facts) -> str:
    chosen = "a public list"
    if facts.exempt_epsilon is not None:
        cost = f"epsilon {round_up(facts.exempt_epsilon)}, delta {facts.setting.delta:g}, for the choice alone"
        chosen = f"noisy counts of the private texts ({cost})"
    return f"They come from {chosen}, and are the same for all texts"


def _labels(facts: Facts) -> str:
    if facts.setting.labels == "sent":
        return "The vendor has every label as it is."
    assert facts.label_epsilon is not None
    epsilon = round_up(facts.label_epsilon)
    chosen = ""
    if facts.exempt_epsilon is not None:
        total = round_up(facts.label_epsilon + facts.exempt_epsilon)
        chosen = f" The choice of words uses the labels too: together epsilon {total}, delta {facts.delta_of_labels:g}."
    if facts.setting.labels == "randomised":
        together = ""
        if facts.epsilon is not None:
            together = (
                f" Text and label together: epsilon {round_up(facts.epsilon + facts.label_epsilon)}, delta "
                f"{facts.setting.delta:g}."
            )
        return f"Each label goes through randomised response: epsilon {epsilon} for one label.{together}{chosen}"
    return (
        f"Labels stay with the customer. What its answers to the vendor tell of one label, over all epochs: epsilon "
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
