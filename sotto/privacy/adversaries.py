"""Who could attack a federated run, and what each is kept from: three adversaries, three numbers.

A guarantee about the released model says nothing about a server that saw what every user sent. So each is named:
whoever gets the model, or the weights of a round, that is also every other user; the server, where it only ever learns
sums; and the server that sees each message by itself. With masks the second is the server as it is, and there are those
who know some of the noise, because it is their own.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from sotto.privacy import accounting
from sotto.privacy.accounting import Gaussian, PoissonGaussian
from sotto.privacy.plan import Plan


@dataclass(frozen=True)
class Adversary:
    """What one adversary is kept from.

    Attributes:
      who: in words.
      sees: in words.
      epsilon: at the plan's delta, an upper bound; None where nothing is promised.
      because: where epsilon comes from, or why there is none.
    """

    who: str
    sees: str
    epsilon: float | None
    because: str

    def to_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)


def share_multiplier(noise_multiplier: float, expected_users: int, dropouts: float) -> float:
    """Standard deviation of one user's share of the noise over the clip norm.

    The sum of the shares of (1 - dropouts) * expected_users users has `noise_multiplier`: variances add up.
    """
    return noise_multiplier / least_answers(expected_users, dropouts) ** 0.5


def least_answers(expected_users: int, dropouts: float) -> int:
    """The number of answers whose shares are all of the noise. With fewer the server adds what is missing."""
    return max(1, int((1 - dropouts) * expected_users))


def most_answers(registered: int, sampling_prob: float) -> int:
    """The number of users that a round does not draw more of, but with probability below 10^-12."""
    return int(importlib.import_module("scipy.stats").binom.isf(1e-12, registered, sampling_prob))


def most_draws(steps: int, sampling_prob: float) -> int:
    """The number of rounds that one user is not drawn in more of, but with probability below 10^-12."""
    return int(importlib.import_module("scipy.stats").binom.isf(1e-12, steps, sampling_prob))


def lost_rounds(plan: Plan) -> float:
    """Probability that a round draws fewer users than can be unmasked: masks need as many as carry the noise.

    Zero without masks, and for sites, all of which are asked.
    """
    if not plan.setting or not plan.setting.get("masks") or plan.setting["sites"]:
        return 0.0
    least = max(2, least_answers(plan.expected_batch_size, plan.setting["dropouts"]))
    return float(importlib.import_module("scipy.stats").binom.cdf(least - 1, plan.num_units, plan.sampling_prob))


def adversaries(plan: Plan, epsilon: float, rounds: int) -> list[Adversary]:
    """The three of a federated plan.

    Args:
      epsilon: the central guarantee of the run.
      rounds: that were charged.
    """
    assert plan.setting is not None
    shared = plan.setting["noise"] == "clients"  # who adds a share of the noise can subtract it
    outside = Adversary(
        "whoever gets the released model" + ("" if shared else ", and every other user"),
        "the weights of every round",
        epsilon,
        "the noise on every sum, and sampling that nobody outside the server sees",
    )
    sender = "site's sum" if plan.setting["sites"] is not None else "drawn user's vector"
    if not shared:
        return [
            outside,
            Adversary("the server, where it learns sums alone", "sums, and adds the noise to them itself", None,
                      "the noise is its own, so it knows the sum without it"),
            Adversary("the server as it is", f"each {sender}, bounded and not noised", None,
                      "it is trusted with these vectors; on the way they are encrypted"),
        ]  # fmt: skip
    if plan.setting.get("masks"):
        return [outside, *_with_masks(plan, rounds)]
    if plan.setting["sites"] is not None:
        return [outside, *_against_sites(plan, epsilon, rounds, plan.setting["sites"])]
    share = share_multiplier(plan.noise_multiplier, plan.expected_batch_size, plan.setting["dropouts"])
    # The server draws the users itself, so nothing is amplified for it; a user may be drawn in every round.
    central, local = _noised(plan, plan.noise_multiplier, rounds), _noised(plan, share, rounds)
    least = least_answers(plan.expected_batch_size, plan.setting["dropouts"])
    return [
        outside,
        Adversary("the server, where it learns sums alone (secure aggregation: setting.masks)",
                  "sums that carry the users' noise", central,
                  f"the shares of {least} users together, in rounds that so many answer; it knows whom it drew"),
        Adversary("the server as it is, and other users, who know their own shares",
                  "each drawn user's vector with that user's share of the noise", local,
                  f"the share alone, for a user who is drawn in all of {rounds:,} rounds"),
    ]  # fmt: skip


def _against_sites(plan: Plan, epsilon: float, rounds: int, sites: int) -> list[Adversary]:
    """Sites draw their own units in secret, so sampling amplifies against the server too."""
    assert plan.setting is not None
    share = share_multiplier(plan.noise_multiplier, sites, plan.setting["dropouts"])
    least = least_answers(sites, plan.setting["dropouts"])
    local = _noised(plan, share, rounds)
    return [
        Adversary("the server, where it learns sums alone (secure aggregation: setting.masks)",
                  "sums that carry the sites' noise", epsilon,
                  f"the shares of {least} sites together, in rounds that so many answer; only a site knows its draw"),
        Adversary("the server as it is, and other sites, which know their own shares",
                  "each site's sum with that site's share of the noise", local,
                  "the share alone, and the site's own sampling"),
    ]  # fmt: skip


def _with_masks(plan: Plan, rounds: int) -> list[Adversary]:
    """Devices unmask no sum of fewer than `least` messages, so these numbers hold in every round."""
    assert plan.setting is not None
    sites: int | None = plan.setting["sites"]
    expected, dropouts = sites or plan.expected_batch_size, plan.setting["dropouts"]
    least, share = least_answers(expected, dropouts), share_multiplier(plan.noise_multiplier, expected, dropouts)
    half, (one, many) = least // 2, ("site", "sites") if sites else ("user", "users")
    hidden = "each site draws in secret" if sites else "nothing but texts is taken to be hidden from it"

    def against(known: int) -> float:
        """Whose own share is in a sum subtracts it; that of the user who is protected is always left."""
        return _noised(plan, share * max(1, least - known) ** 0.5, rounds)

    drawn = "only a site knows its draw" if sites else "it knows whom it drew"
    return [
        Adversary(f"any one other {one}", "the weights of every round, its own message, and how many take part",
                  against(1), f"the shares of the others; {hidden}"),
        Adversary("the server, if it follows the protocol of masks", "sums, by masks, and never a single message",
                  against(0), f"the shares of {least} {many} at least are in every sum; {drawn}"),
        Adversary(f"that server together with {half} of the {many} of each round",
                  "the same, less the noise that these have added", against(half), "the shares of the others in a sum"),
        Adversary(f"a server that breaks the protocol, or together with all other {many}",
                  f"at worst each {one}'s message with that {one}'s share of the noise", against(least - 1),
                  "the share alone; keys are not signed, so a server that invents users can learn a message"),
    ]  # fmt: skip


def _noised(plan: Plan, noise_multiplier: float, rounds: int) -> float:
    """Epsilon of so many sums with this noise, for who knows which users, or sites, are in them."""
    assert plan.setting is not None
    event: Gaussian | PoissonGaussian = Gaussian(noise_multiplier)
    if plan.setting["sites"] is not None:
        event = PoissonGaussian(noise_multiplier, plan.sampling_prob)
    return accounting.composed_epsilon([(event, rounds)], plan.delta, plan.neighboring_relation)
