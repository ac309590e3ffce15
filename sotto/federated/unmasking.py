"""The server's part in a masked round: it carries keys and shares between users, and takes the masks off the sum.

See `masking` for the protocol. What a user sends in a stage is looked at for kind and length, and one who sends
something else, or nothing, has dropped out. After each stage at least `threshold` users must be left; else the round is
given up, and nothing of it is known. Secrets that were put together from shares are compared with what their owners
committed to, so wrong shares are noticed, and others are tried.

What is lost to masks: the server cannot bound a single message any more. Users who follow their orders are bounded by
their own devices, and their guarantee stands; one who does not can spoil the sum, by as much as it likes up to the
bound on all messages together, which is checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from sotto.federated import mask_keys as keys
from sotto.federated.masking import BOX, KEYS, REVEALED, Party, Word, pair_mask, purpose_of, self_mask, threshold
from sotto.federated.shares import Shares

TRIES = 8
"""Sets of shares that are tried for a secret, if the first do not give it."""


class MaskedRound:
    """One round: `take_keys`, `take_shares`, `take_messages`, `take_reveals`, in this order.

    Each takes (user, answer) as they come, and returns whether enough users are left. Then `total` is there.

    Attributes:
      label: names run and round.
      users: who were drawn.
      roster: the public keys of those who sent some; their positions in it stand for them from then on.
      present, survivors: positions of those who sent shares, and of those whose messages are in the sum.
      refused: why answers did not count -> how often.
      moved: bytes of the protocol in each stage, of all users together, up and down.
      total: (k,) float64 whole numbers, the sum of the survivors' messages; None if there is none.
    """

    def __init__(self, label: str, users: Sequence[int], shares: Shares, size: int):
        """Begins a round.

        Args:
          users: who were drawn.
          shares: of the noise.
          size: k, of a message.
        """
        self.label, self.shares, self.size = label, shares, size
        self.users, self._members = sorted(users), list[int]()
        self.roster: list[bytes] = []
        self.present: list[int] = []
        self.survivors: list[int] = []
        self.refused: dict[str, int] = {}
        self.moved: dict[str, int] = {}
        self.total: torch.Tensor | None = None
        self._sent: dict[int, bytes] = {}
        self._sum = np.zeros(0, dtype=np.uint32)

    @property
    def worth_asking(self) -> bool:
        """Whether so many were drawn that a sum can come of it."""
        return len(self.users) >= threshold(len(self.users), self.shares.least)

    @property
    def threshold(self) -> int:
        return threshold(len(self.roster), self.shares.least)

    @property
    def word(self) -> Word:
        """Of a masked message in this round."""
        return self.shares.word(len(self.roster))

    def users_at(self, positions: Iterable[int]) -> list[int]:
        """Numbers in the register of those at these positions."""
        return [self._members[position] for position in positions]

    def take_keys(self, answers: Iterable[tuple[int, Any]]) -> bool:
        """Takes the users' public keys: (64,) bytes each."""
        found, seen = dict[int, bytes](), set[bytes]()
        for user, answer in self._once(answers, self.users, "keys up"):
            if not (isinstance(answer, bytes) and len(answer) == KEYS):
                self._refuse("no keys")
                continue
            halves = {answer[: keys.PUBLIC], answer[keys.PUBLIC :]}
            if len(halves) != 2 or halves & seen or not all(keys.is_public_key(half) for half in halves):
                self._refuse("keys that are none, or another's")
                continue
            seen |= halves
            found[user] = answer
        self._members = sorted(found)
        self.roster = [found[user] for user in self._members]
        return self._enough(len(self.roster), "keys")

    def take_shares(self, answers: Iterable[tuple[int, Any]]) -> bool:
        """Takes a commitment and encrypted shares of each user."""
        self._count("keys down", KEYS * len(self.roster) ** 2)
        length = keys.COMMITMENT + BOX * len(self.roster)
        for user, answer in self._once(answers, self._members, "shares up"):
            if isinstance(answer, bytes) and len(answer) == length:
                self._sent[self._members.index(user)] = answer
            else:
                self._refuse("no shares")
        self.present = sorted(self._sent)
        return self._enough(len(self.present), "shares")

    def boxes_for(self, position: int) -> dict[int, bytes]:
        """What those who are present sent to one of them."""
        start = keys.COMMITMENT + BOX * position
        found = {sender: self._sent[sender][start : start + BOX] for sender in self.present if sender != position}
        self._count("shares down", BOX * len(found))
        return found

    def take_messages(self, answers: Iterable[tuple[int, Any]]) -> bool:
        """Adds masked messages as they come: (k,) of this round's word each."""
        members, word = self.users_at(self.present), np.dtype(self.word)
        self._sum = np.zeros(self.size, dtype=word)
        for user, answer in self._once(answers, members, "messages up"):
            if isinstance(answer, np.ndarray) and answer.dtype == word and answer.shape == (self.size,):
                self._sum += answer
                self.survivors.append(self._members.index(user))
            else:
                self._refuse("not a vector of whole numbers")
        self.survivors.sort()
        return self._enough(len(self.survivors), "messages")

    def take_reveals(self, answers: Iterable[tuple[int, Any]]) -> bool:
        """Takes the survivors' shares of what is left on the sum, and takes it off."""
        self._count("survivors down", 4 * len(self.survivors) ** 2)
        shares: dict[int, dict[int, bytes]] = {position: {} for position in self.present}
        revealed = 0
        for user, answer in self._once(answers, self.users_at(self.survivors), "shares revealed"):
            if not (isinstance(answer, bytes) and len(answer) == REVEALED * len(self.present)):
                self._refuse("no revealed shares")
                continue
            revealed += 1
            for rank, position in enumerate(self.present):
                one = answer[rank * REVEALED : (rank + 1) * REVEALED]
                if one[0] == 1:
                    shares[position][self._members.index(user)] = one[1:]
        return self._enough(revealed, "reveals") and self._unmask(shares)

    # ----

    def _unmask(self, shares: dict[int, dict[int, bytes]]) -> bool:
        purpose, left, word = purpose_of(self.label, self.roster), set(self.survivors), self.word
        for position, some in shares.items():
            seed = self._secret(position, some, position in left, purpose)
            if seed is None:
                return self._give_up("a secret could not be put together")
            if position in left:
                self._sum -= self_mask(seed, purpose, self.size, word)
                continue
            private = keys.private_key(seed)
            for other in self.survivors:  # what each of them shared with one whose message is missing
                common = pair_mask(private, self.roster[other], purpose, self.size, word)
                if position > other:
                    self._sum -= common
                else:
                    self._sum += common
        signed = np.int32 if self._sum.dtype == np.uint32 else np.int64
        total = torch.from_numpy(self._sum.view(signed).astype(np.float64))
        if float(total.norm()) > len(self.survivors) * self.shares.longest(self.size):
            return self._give_up("the sum is longer than bounds and noise together")
        self.total = total
        return True

    def _secret(self, position: int, shares: dict[int, bytes], survived: bool, purpose: bytes) -> bytes | None:
        """A user's own secret if it survived, else its mask key's; None if no shares give the right one."""
        need, holders = self.threshold, sorted(shares)
        for start in range(min(TRIES, len(holders) - need + 1)):
            seed = keys.combined({holder: shares[holder] for holder in holders[start : start + need]})
            if survived:
                right = keys.commitment(seed, purpose) == self._sent[position][: keys.COMMITMENT]
            else:
                right = keys.public_key(keys.private_key(seed)) == self.roster[position][: keys.PUBLIC]
            if right:
                return seed
        return None

    def _once(self, answers: Iterable[tuple[int, Any]], asked: Sequence[int], what: str) -> Iterator[tuple[int, Any]]:
        """The first answer of each who was asked; silence is none."""
        waiting = set(asked)
        for user, answer in answers:
            if user not in waiting:
                self._refuse("from nobody who was asked, or a second time")
            elif answer is not None:
                waiting.remove(user)
                self._count(what, len(answer) if isinstance(answer, bytes) else getattr(answer, "nbytes", 0))
                yield user, answer

    def _enough(self, count: int, what: str) -> bool:
        return count >= self.threshold or self._give_up(f"too few {what}")

    def _give_up(self, why: str) -> bool:
        self._refuse(f"round given up: {why}")
        return False

    def _refuse(self, why: str) -> None:
        self.refused[why] = self.refused.get(why, 0) + 1

    def _count(self, what: str, count: int) -> None:
        self.moved[what] = self.moved.get(what, 0) + count


def play(round: MaskedRound, messages: Callable[[list[int]], Iterable[tuple[int, torch.Tensor]]]) -> bool:
    """A whole round with all users in this process, who do what they are asked. Returns whether there is a sum.

    Args:
      round: just begun.
      messages: users -> (user, (k,) int32), one at a time.
    """
    if not round.worth_asking:
        return round.take_keys(())
    parties = {user: Party(round.label, round.shares.least) for user in round.users}
    if not round.take_keys((user, party.keys()) for user, party in parties.items()):
        return False
    if not round.take_shares((user, party.shares(round.roster)) for user, party in parties.items()):
        return False
    for position, user in zip(round.present, round.users_at(round.present), strict=True):
        parties[user].admit(round.present, round.boxes_for(position))
    asked = round.users_at(round.present)
    if not round.take_messages((user, parties[user].mask(message, round.word)) for user, message in messages(asked)):
        return False
    left = round.users_at(round.survivors)
    return round.take_reveals((user, parties[user].reveal(round.survivors)) for user in left)
