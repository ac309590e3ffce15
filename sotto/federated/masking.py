"""One user's part in a masked round: after it the server knows the sum of all messages, and none of them.

The protocol is that of Bonawitz et al. 2017 (CCS), figure 4, for a server that follows it (honest but curious):

    keys      a user makes two fresh key pairs, one for masks and one for shares, and a secret of its own
    shares    it shares its mask key and its own secret with all others, each share encrypted to one of them
    message   it adds to its message a mask that it has in common with each other user (who subtracts it), and a mask of
              its own secret
    reveal    told who sent a message, it reveals shares: of the own secret of those who did, of the mask key of those
              who did not, which leaves nothing of their masks in the sum

Against a server that follows this, and up to threshold - 1 of the users who tell it all they know, only the sum of the
other users' messages is known. The threshold is more than half of the users, and at least as many as must answer for
the sum to carry the noise of the plan.

Of a server that does not follow it a device can notice this much: each request comes once for a set of keys and in this
order, so one user's two kinds of shares are never both revealed; there are at least as many users, by number, as the
owner asked for; all have different keys; and whoever was shown another list has other keys, so that no sum comes out.
With more than half of the users needed, a server cannot show two halves different lists of survivors either, unless
some of them help it. What cannot be noticed is a server that invents users, or exchanges their keys: keys are not
signed.

Positions are ranks in the list of a round, so users do not learn each other's numbers in the register.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from sotto.errors import SottoError
from sotto.federated import mask_keys as keys

Word = type[np.uint32] | type[np.uint64]
Stage = Literal["fresh", "keys", "shares", "admitted", "message", "done"]
KEYS = 2 * keys.PUBLIC
BOX = 2 * keys.SHARE + keys.TAG
REVEALED = 1 + keys.SHARE
"""Lengths in bytes: both public keys of a user; two encrypted shares; a revealed share, or that it is not known."""


def threshold(users: int, least: int) -> int:
    """Users who must be left in every stage of a round: t of the protocol.

    Args:
      users: on the list of the round.
      least: whose shares of the noise are all of the plan's.
    """
    return max(2, least, users // 2 + 1)


def purpose_of(label: str, roster: Sequence[bytes]) -> bytes:
    """(32 bytes) that bind every key of a round to its name and its list of users."""
    return hashlib.sha256(label.encode() + b"|" + b"".join(roster)).digest()


def self_mask(seed: bytes, purpose: bytes, size: int, word: Word) -> np.ndarray:
    """(size,) the mask of a user's own secret."""
    return keys.mask(seed, b"self|" + purpose, size, word)


def pair_mask(private: Any, other: bytes, purpose: bytes, size: int, word: Word) -> np.ndarray:
    """(size,) the mask that the holder of a private mask key has in common with another user.

    Args:
      other: that one's public keys.

    Raises:
      ValueError: they are none.
    """
    seed = keys.agreed_key(private, other[: keys.PUBLIC], b"pair|" + purpose)
    return keys.mask(seed, b"stream", size, word)


@dataclass
class Party:
    """One user in one round. Secrets live here from the first request to the last, and are forgotten after it.

    Attributes:
      label: names run and round.
      least: of the noise: see `threshold`.
      others: the least number of other users that the device's owner asks for.
    """

    label: str
    least: int
    others: int = 0
    stage: Stage = "fresh"
    mask_seed: bytes = field(default=b"", repr=False)
    share_seed: bytes = field(default=b"", repr=False)
    self_seed: bytes = field(default=b"", repr=False)
    roster: list[bytes] = field(default_factory=list[bytes])
    present: list[int] = field(default_factory=list[int])
    held: dict[int, bytes] = field(default_factory=dict[int, bytes], repr=False)

    def keys(self) -> bytes:
        """(64 bytes) its public keys: for masks, and for shares.

        Raises:
          SottoError: SOT950, they were asked for before.
        """
        self._enter("fresh")
        self.mask_seed, self.share_seed, self.self_seed = keys.new_seed(), keys.new_seed(), keys.new_seed()
        self.stage = "keys"
        return self._own

    def shares(self, roster: Sequence[bytes]) -> bytes:
        """A commitment to its own secret, and for each position an encrypted share of both secrets; zeros for itself.

        Args:
          roster: the public keys of all users of the round, this one's among them.

        Raises:
          SottoError: SOT950, it is another request than is due, or the list is too short, or not of different keys.
        """
        self._enter("keys")
        self.roster, count = list(roster), len(roster)
        if any(len(both) != KEYS for both in roster) or self._own not in self.roster:
            raise _broken("the list of users is none, or does not hold this one")
        publics = [half for both in roster for half in (both[: keys.PUBLIC], both[keys.PUBLIC :])]
        if len(set(publics)) != 2 * count:
            raise _broken("two users have the same key")
        self._enough(count)
        need, me, purpose = threshold(count, self.least), self.position, self._purpose
        pairs = list(zip(keys.split(self.mask_seed, need, count), keys.split(self.self_seed, need, count), strict=True))
        self.held = {me: pairs[me][0] + pairs[me][1]}
        private = keys.private_key(self.share_seed)
        boxes = [bytes(BOX) if to == me else self._sealed(private, me, to, *pairs[to]) for to in range(count)]
        self.stage = "shares"
        return keys.commitment(self.self_seed, purpose) + b"".join(boxes)

    def admit(self, present: Sequence[int], boxes: Mapping[int, bytes]) -> None:
        """Takes the others' shares. One that does not open was not meant for this user, or was changed: it has none.

        Args:
          present: positions of those who sent shares, in order.
          boxes: what each of the others among them sent to this one, by position.

        Raises:
          SottoError: SOT950, it is another request than is due, or too few are present.
        """
        self._enter("shares")
        self.present = self._subset(present, range(len(self.roster)))
        private, me = keys.private_key(self.share_seed), self.position
        for sender in self.present:
            if sender == me:
                continue
            key, purpose = self._box_key(private, sender, sender, me), self._box_purpose(sender, me)
            plain = None if key is None else keys.opened(key, boxes.get(sender, b""), purpose)
            if plain is not None and len(plain) == 2 * keys.SHARE:
                self.held[sender] = plain
        self.stage = "admitted"

    def mask(self, message_k: torch.Tensor, word: Word) -> np.ndarray:
        """(k,) the message under its masks, modulo 2^32 or 2^64.

        Args:
          message_k: (k,) int32.
          word: of `Shares.word`.

        Raises:
          SottoError: SOT950, another request is due, or somebody's key is none.
        """
        self._enter("admitted")
        size, me, private = len(message_k), self.position, keys.private_key(self.mask_seed)
        purpose = self._purpose
        masked = message_k.numpy().astype(word) + self_mask(self.self_seed, purpose, size, word)
        for other in self.present:
            if other == me:
                continue
            try:
                common = pair_mask(private, self.roster[other], purpose, size, word)
            except ValueError:
                raise _broken("a key of the list is none") from None
            masked = masked + common if other > me else masked - common
        self.stage = "message"
        return masked

    def reveal(self, survivors: Sequence[int]) -> bytes:
        """A share of one secret of each who was present: its own secret if it survived, its mask key if not.

        Everything secret is forgotten, so this is done once.

        Args:
          survivors: positions of those whose messages are in the sum, in order.

        Raises:
          SottoError: SOT950, another request is due, or too few are left, or this one is not among them.
        """
        self._enter("message")
        kept, held = set(self._subset(survivors, self.present)), self.held
        self.held, self.mask_seed, self.share_seed, self.self_seed = {}, b"", b"", b""
        shares = [(held[p][keys.SHARE :] if p in kept else held[p][: keys.SHARE]) if p in held else None
                  for p in self.present]  # fmt: skip
        return b"".join(bytes(REVEALED) if share is None else b"\1" + share for share in shares)

    # ---- kept between requests

    def to_dict(self) -> dict[str, Any]:
        """JSON's types; `from_dict` reads it."""
        found = dict(self.__dict__)
        found |= {name: found[name].hex() for name in ("mask_seed", "share_seed", "self_seed")}
        found["roster"] = [both.hex() for both in self.roster]
        found["held"] = {str(position): both.hex() for position, both in self.held.items()}
        return found

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Party:
        values = dict(found)
        values |= {name: bytes.fromhex(values[name]) for name in ("mask_seed", "share_seed", "self_seed")}
        values["roster"] = [bytes.fromhex(both) for both in values["roster"]]
        values["held"] = {int(position): bytes.fromhex(both) for position, both in values["held"].items()}
        return cls(**values)

    # ----

    @property
    def position(self) -> int:
        """Its rank in the list of the round.

        Raises:
          SottoError: SOT950, it has seen no list.
        """
        if not self.roster:
            raise _broken("no list of users has come")
        return self.roster.index(self._own)

    @property
    def _own(self) -> bytes:
        seeds = (self.mask_seed, self.share_seed)
        return b"".join(keys.public_key(keys.private_key(seed)) for seed in seeds)

    @property
    def _purpose(self) -> bytes:
        return purpose_of(self.label, self.roster)

    def _enter(self, due: Stage) -> None:
        """One request is answered after another; one that is refused is the last."""
        if self.stage != due:
            raise _broken(f"this request comes after '{due}', and the last was '{self.stage}'")
        self.stage = "done"

    def _enough(self, count: int) -> None:
        need = threshold(len(self.roster), self.least)
        if count < need or count - 1 < self.others:
            raise _broken(f"{count} users take part; {max(need, self.others + 1)} are needed")

    def _subset(self, positions: Sequence[int], of: Sequence[int]) -> list[int]:
        """The positions, if they are some of these in order, this one's among them, and enough.

        Raises:
          SottoError: SOT950, they are not.
        """
        found, me = list(positions), self.position
        if found != sorted(set(found)) or not set(found) <= set(of) or me not in found:
            raise _broken("the users who are left are not some of those before, with this one")
        self._enough(len(found))
        return found

    def _sealed(self, private: Any, me: int, to: int, mask_share: bytes, self_share: bytes) -> bytes:
        key = self._box_key(private, to, me, to)
        if key is None:
            raise _broken("a key of the list is none")
        return keys.sealed(key, mask_share + self_share, self._box_purpose(me, to))

    def _box_key(self, private: Any, other: int, sender: int, to: int) -> bytes | None:
        """Of one direction: each key seals one box."""
        try:
            return keys.agreed_key(private, self.roster[other][keys.PUBLIC :], self._box_purpose(sender, to))
        except ValueError:
            return None

    def _box_purpose(self, sender: int, to: int) -> bytes:
        return b"box|" + sender.to_bytes(4, "little") + to.to_bytes(4, "little") + self._purpose


def _broken(what: str) -> SottoError:
    return SottoError(
        "SOT950", what=what, where="masked round",
        why="a server that asks otherwise than the protocol says could learn a single user's message",
        fix="see docs/federated.md; a round that was interrupted begins again with new keys",
    )  # fmt: skip
