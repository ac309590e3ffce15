"""Masked rounds: the sum is that of the messages, to the bit, and nothing else can be told from what is sent."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import sympy
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from scipy import stats
from torch import nn

from sotto.errors import SottoError
from sotto.federated import mask_keys as keys
from sotto.federated import masking, secret_sharing, unmasking
from sotto.federated.codec import Identity
from sotto.federated.cohort import LATENT, Cohort
from sotto.federated.masking import BOX, KEYS, REVEALED, Party, threshold
from sotto.federated.shares import Shares
from sotto.federated.unmasking import MaskedRound
from sotto.gradients.clipping import Flat
from sotto.privacy.noise import DebugNoise, keyed_words

SIZE = 16
USERS = [3, 8, 20, 21, 40]
STAGES = ("keys", "shares", "messages", "reveals")
SHARES = Shares.of(1.0, 1.0, 5, 0.4)  # three of five carry the noise


def messages(users: Iterable[int], size: int = SIZE) -> dict[int, torch.Tensor]:
    """(k,) int32 of each user, of the size that messages have."""
    generator = np.random.default_rng(5)
    return {user: torch.from_numpy(generator.integers(-9000, 9000, size).astype(np.int32)) for user in users}


Tamper = Callable[[str, int, Any], Any]


@dataclass
class Played:
    """A round of parties, some of whom fall silent in some stage, or whose answers somebody changes."""

    silent: dict[str, set[int]] = field(default_factory=dict[str, set[int]])
    tamper: Tamper = lambda stage, user, answer: answer
    users: list[int] = field(default_factory=lambda: list(USERS))
    shares: Shares = SHARES
    size: int = SIZE
    sent: dict[str, dict[int, Any]] = field(default_factory=dict[str, dict[int, Any]])

    def __post_init__(self):
        self.round = MaskedRound("run/0", self.users, self.shares, self.size)
        self.parties = {user: Party("run/0", self.shares.least) for user in self.users}
        self.messages = messages(self.users, self.size)

    def answers(self, stage: str, users: Iterable[int], ask: Callable[[int], Any]) -> list[tuple[int, Any]]:
        """What comes back of those who have not fallen silent in this or an earlier stage."""
        before = STAGES[: STAGES.index(stage) + 1]
        gone = set[int]().union(*(self.silent.get(name, set()) for name in before))
        self.sent[stage] = {user: ask(user) for user in users if user not in gone}
        return [(user, self.tamper(stage, user, answer)) for user, answer in self.sent[stage].items()]

    def play(self) -> torch.Tensor | None:
        r, p = self.round, self.parties
        if not r.take_keys(self.answers("keys", self.users, lambda u: p[u].keys())):
            return r.total
        members = r.users_at(range(len(r.roster)))
        if not r.take_shares(self.answers("shares", members, lambda u: p[u].shares(r.roster))):
            return r.total
        present = r.users_at(r.present)
        for position, user in zip(r.present, present, strict=True):
            boxes = {s: self.tamper("boxes", user, box) for s, box in r.boxes_for(position).items()}
            p[user].admit(r.present, boxes)
        if not r.take_messages(self.answers("messages", present, lambda u: p[u].mask(self.messages[u], r.word))):
            return r.total
        survivors = r.users_at(r.survivors)
        r.take_reveals(self.answers("reveals", survivors, lambda u: p[u].reveal(r.survivors)))
        return r.total

    @property
    def expected(self) -> torch.Tensor:
        """The sum without masks of those who sent a message."""
        gone = set[int]().union(*(self.silent.get(name, set()) for name in STAGES[:3]))
        return sum((self.messages[u].double() for u in self.users if u not in gone), torch.zeros(self.size).double())


# ---- the sum


FOUR = USERS[:4]


def patterns() -> list[dict[str, set[int]]]:
    """Every way in which four users can fall silent: each of them in one of the stages, or never."""
    ways = itertools.product((None, *STAGES), repeat=len(FOUR))
    return [{s: {u for u, at in zip(FOUR, way, strict=True) if at == s} for s in STAGES} for way in ways]


def test_the_sum_is_exact_for_every_pattern_of_dropouts_and_none_below_the_threshold():
    """All 5^4 patterns. Who is left must be at least the threshold after every stage."""
    exact = given_up = 0
    for silent in patterns():
        played = Played(silent, users=FOUR, shares=Shares.of(1.0, 1.0, 4, 0.5))
        total = played.play()
        left = len(FOUR) - np.cumsum([len(silent[s]) for s in STAGES])
        enough = all(left >= threshold(left[0], 2))
        assert (total is not None) == enough, silent
        if total is None:
            given_up += 1
            assert any("given up" in why for why in played.round.refused)
        else:
            exact += 1
            assert torch.equal(total, played.expected)
    assert exact >= 50
    assert given_up >= 100


def test_fewer_than_carry_the_noise_are_never_summed():
    """A majority is not enough where the plan's noise needs more of them."""
    most = Shares.of(1.0, 1.0, 5, 0.2)  # four of five
    assert Played({"messages": {3}}, shares=most).play() is not None
    assert Played({"messages": {3, 8}}, shares=most).play() is None
    assert Played({"reveals": {3, 8}}, shares=most).play() is None
    assert Played({"messages": {3, 8}}).play() is not None  # its twin: three are


def test_messages_of_any_size_of_integer_are_added_exactly():
    """Where 32 bits could wrap, a round takes 64; -2^31 and 2^31 - 1 of everybody come out right."""
    wide = Shares(1.0, 1.0, 3, reach=1e5)
    assert (SHARES.word(5), wide.word(5)) == (np.uint32, np.uint64)
    assert SHARES.word(1 << 30) == np.uint64
    for value in (2**31 - 1, -(2**31), -1, 0):
        played = Played({"messages": {40}}, shares=wide)
        played.messages = {user: torch.full((SIZE,), value, dtype=torch.int32) for user in USERS}
        played.round.shares = Shares(1.0, 1.0, 3, reach=1e9)
        for party in played.parties.values():
            party.least = 3
        assert played.play().tolist() == [4.0 * value] * SIZE


@pytest.mark.parametrize("users", [2, 40, 5000])
def test_no_honest_sum_leaves_the_word_of_its_round(users: int):
    """The bound that is checked, against the largest sum that honest users can make, noise at twelve deviations."""
    for multiplier, dropouts in ((0.3, 0.0), (2.0, 0.5), (40.0, 0.9)):
        shares = Shares.of(0.7, multiplier, max(2, users), dropouts)
        largest = users * (shares.clip_norm / shares.unit + 1) + 12 * np.sqrt(users) * shares.std / shares.unit
        assert largest < 2.0 ** (8 * np.dtype(shares.word(users)).itemsize - 1)


# ---- what a single message tells


def chi_square(words: np.ndarray) -> float:
    """p-value of uniform top and bottom bytes."""
    top = words >> np.array(8 * words.itemsize - 8, dtype=words.dtype)
    bottom = words & np.array(255, dtype=words.dtype)
    return min(float(stats.chisquare(np.bincount(b.astype(int), minlength=256)).pvalue) for b in (top, bottom))


def masked_of(user: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(sent, without its self mask, without its common masks): what is left to a server that learns the others."""
    played = Played(size=1 << 16)
    seeds: dict[int, tuple[bytes, bytes]] = {}

    def tap(stage: str, who: int, answer: Any) -> Any:
        if stage == "messages":
            seeds[who] = (played.parties[who].self_seed, played.parties[who].mask_seed)
        return answer

    played.tamper = tap
    played.play()
    sent, r = played.sent["messages"][user], played.round
    purpose, size, word = masking.purpose_of("run/0", r.roster), played.size, r.word
    own, private = unmasking.self_mask(seeds[user][0], purpose, size, word), keys.private_key(seeds[user][1])
    me, without = r.users_at(r.present).index(user), sent.copy()
    for other in r.present:
        if other != me:
            common = unmasking.pair_mask(private, r.roster[other], purpose, size, word)
            without = without - common if other > me else without + common
    return sent, sent - own, without


def test_a_message_is_uniform_also_for_who_knows_one_of_its_two_kinds_of_masks():
    """The own mask protects a message that came late, after its common masks were revealed; and the other way round."""
    for left in masked_of(20):
        assert chi_square(left) > 1e-8


def test_negative_twin_without_its_own_mask_a_late_message_is_open(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(masking, "self_mask", lambda seed, purpose, size, word: np.zeros(size, word))
    assert chi_square(masked_of(20)[2]) < 1e-12


def test_negative_twin_without_common_masks_a_survivor_is_open(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(masking, "pair_mask", lambda private, other, purpose, size, word: np.zeros(size, word))
    assert chi_square(masked_of(20)[1]) < 1e-12


def test_no_mask_is_used_twice():
    """The same messages in the same round, begun again: nothing of what is sent is the same."""
    first, second = Played(size=1 << 12), Played(size=1 << 12)
    assert torch.equal(first.play(), second.play())
    for stage in ("keys", "shares", "messages"):
        for user in USERS:
            assert not np.array_equal(first.sent[stage][user], second.sent[stage][user])
    difference = first.sent["messages"][3] - second.sent["messages"][3]
    assert abs(np.mean(difference == 0)) < 0.01


def test_one_colluder_less_than_the_threshold_cannot_put_a_secret_together():
    played = Played()
    r, p = played.round, played.parties
    r.take_keys([(u, p[u].keys()) for u in USERS])
    r.take_shares([(u, p[u].shares(r.roster)) for u in USERS])
    for position, user in zip(r.present, USERS, strict=True):
        p[user].admit(r.present, r.boxes_for(position))
    need, target = threshold(5, 3), p[3]
    shares = {p[u].position: p[u].held[target.position][keys.SHARE :] for u in USERS[1:]}
    some = dict(list(shares.items())[:need])
    assert keys.combined(some) == target.self_seed
    some.popitem()
    assert keys.combined(some) != target.self_seed
    assert r._secret(target.position, some, True, masking.purpose_of("run/0", r.roster)) is None


def test_the_stream_of_a_key_is_aes_128_in_counter_mode():
    """Against another library, block by block."""
    key = bytes(range(16))
    blocks = b"".join(counter.to_bytes(16, "little") for counter in range(5))
    encryptor = Cipher(algorithms.AES128(key), modes.ECB()).encryptor()  # blocks of a counter
    expected = encryptor.update(blocks)
    assert keyed_words(key, 20, np.uint32).tobytes() == expected
    assert keyed_words(key, 9, np.uint64).tobytes() == expected[:72]
    assert keyed_words(key, 7, np.uint32).tobytes() == expected[:28]
    with pytest.raises(ValueError, match="16"):
        keyed_words(key[:8], 7, np.uint32)


# ---- a server that asks otherwise


def after_messages() -> Played:
    """A round whose users have sent their messages and not been asked to reveal anything."""
    played = Played()
    r, p = played.round, played.parties
    r.take_keys([(u, p[u].keys()) for u in USERS])
    r.take_shares([(u, p[u].shares(r.roster)) for u in USERS])
    for position, user in zip(r.present, USERS, strict=True):
        p[user].admit(r.present, r.boxes_for(position))
        p[user].mask(played.messages[user], r.word)
    return played


def test_nobody_reveals_both_shares_of_one_user():
    """The mask key and the own secret of one user together would open its message."""
    party = after_messages().parties[3]
    revealed = party.reveal([0, 1, 2, 3])
    assert [revealed[i * REVEALED] for i in range(5)] == [1] * 5
    with pytest.raises(SottoError, match="SOT950"):
        party.reveal([0, 1, 2, 4])
    assert not party.held
    assert {party.mask_seed, party.self_seed, party.share_seed} == {b""}


def test_negative_twin_two_answers_would_open_a_message(monkeypatch: pytest.MonkeyPatch):
    """With devices that answer twice, a server learns the message of position 4."""
    played = after_messages()
    monkeypatch.setattr(Party, "_enter", lambda self, due: None)
    both = []
    for survivors in ([0, 1, 2, 3], [0, 1, 2, 3, 4]):
        shares = {}
        for position, user in enumerate(USERS[:4]):
            party = played.parties[user]
            kept = Party.from_dict(party.to_dict())
            answer = kept.reveal(survivors)
            shares[position] = answer[4 * REVEALED + 1 : 5 * REVEALED]
        both.append(keys.combined(dict(list(shares.items())[:3])))
    target = played.parties[40]
    assert both == [target.mask_seed, target.self_seed]


SURVIVORS = {
    "too few": [0, 1],
    "not this one": [1, 2, 3],
    "in another order": [1, 0, 2],
    "one twice": [0, 1, 1, 2],
    "nobody who was there": [0, 1, 2, 9],
    "a negative position": [-1, 0, 1, 2],
    "none": [],
}


@pytest.mark.parametrize("name", SURVIVORS)
def test_a_device_reveals_nothing_for_a_list_that_cannot_be(name: str):
    with pytest.raises(SottoError, match="SOT950"):
        after_messages().parties[3].reveal(SURVIVORS[name])


def test_a_device_masks_nothing_for_too_few():
    played = Played()
    r, p = played.round, played.parties
    r.take_keys([(u, p[u].keys()) for u in USERS])
    p[3].shares(r.roster)
    with pytest.raises(SottoError, match="SOT950"):
        p[3].admit([0, 1], {})
    with pytest.raises(SottoError, match="SOT950"):
        p[3].mask(played.messages[3], r.word)


REQUESTS: dict[str, Callable[[Party], Any]] = {
    "keys": lambda party: party.keys(),
    "shares": lambda party: party.shares([party._own]),
    "admit": lambda party: party.admit([0, 1, 2], {}),
    "mask": lambda party: party.mask(torch.zeros(3, dtype=torch.int32), np.uint32),
    "reveal": lambda party: party.reveal([0, 1, 2]),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_every_request_comes_once_and_in_order(name: str):
    done = after_messages().parties[3]
    if name != "reveal":
        with pytest.raises(SottoError, match="SOT950"):
            REQUESTS[name](done)
    done = after_messages().parties[3]
    done.reveal([0, 1, 2, 3, 4])
    with pytest.raises(SottoError, match="SOT950"):
        REQUESTS[name](done)
    if name != "keys":
        with pytest.raises(SottoError, match="SOT950"):
            REQUESTS[name](Party("run/0", 3))


def roster_of(count: int) -> tuple[Party, list[bytes]]:
    parties = [Party("run/0", 3) for _ in range(count)]
    return parties[0], [party.keys() for party in parties]


ROSTERS: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "without this one": lambda r: r[1:],
    "with two that are the same": lambda r: [*r, r[1]],
    "with one key of another": lambda r: [*r[:-1], r[1][:32] + r[-1][32:]],
    "too short": lambda r: r[:2],
    "keys that are none": lambda r: [*r[:-1], b"short"],
    "a key of low order": lambda r: [*r[:-1], r[-1][:32] + bytes(32)],
}


@pytest.mark.parametrize("name", ROSTERS)
def test_a_device_refuses_a_list_of_users_that_is_none(name: str):
    party, roster = roster_of(5)
    with pytest.raises(SottoError, match="SOT950"):
        party.shares(ROSTERS[name](roster))


def test_a_device_refuses_fewer_others_than_its_owner_asks_for():
    party, roster = roster_of(5)
    party.others = 5
    with pytest.raises(SottoError, match="SOT950"):
        party.shares(roster)
    party, roster = roster_of(5)
    party.others = 4
    party.shares(roster)
    with pytest.raises(SottoError, match="SOT950"):
        party.admit([0, 1, 2, 3], {})


def test_users_who_were_shown_other_lists_do_not_understand_each_other():
    played = Played()
    r, p = played.round, played.parties
    r.take_keys([(u, p[u].keys()) for u in USERS])
    false = [*r.roster[:-1], Party("run/0", 3).keys()]
    one = p[3].shares(false)
    p[8].shares(r.roster)
    p[8].admit([0, 1, 2], {0: one[keys.COMMITMENT + BOX : keys.COMMITMENT + 2 * BOX]})
    assert sorted(p[8].held) == [1]


# ---- users who answer otherwise


def flip(blob: bytes, bit: int) -> bytes:
    changed = bytearray(blob)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_a_share_that_was_changed_on_its_way_is_not_used():
    """Every bit of a box, and every other purpose."""
    key, purpose = keys.new_seed(), b"from 1 to 2"
    box = keys.sealed(key, b"s" * 32, purpose)
    assert keys.opened(key, box, purpose) == b"s" * 32
    for bit in range(8 * len(box)):
        assert keys.opened(key, flip(box, bit), purpose) is None
    for other in (b"", box[:-1], box + b"x", bytes(BOX)):
        assert keys.opened(key, other, purpose) is None
    assert keys.opened(key, box, b"from 2 to 1") is None
    assert keys.opened(keys.new_seed(), box, purpose) is None


def test_with_shares_changed_on_their_way_the_sum_is_right_or_there_is_none():
    def to_one(stage: str, user: int, answer: Any) -> Any:
        return flip(answer, 77) if stage == "boxes" and user == 8 else answer

    def to_all(stage: str, user: int, answer: Any) -> Any:
        return flip(answer, 77) if stage == "boxes" else answer

    one = Played(tamper=to_one)
    assert torch.equal(one.play(), one.expected)  # four others have theirs
    assert Played(tamper=to_all).play() is None


def test_wrong_shares_are_noticed_and_others_tried():
    """A share has no mark of being right; what is put together from it is compared with what its owner committed to."""

    def lie(liars: set[int]) -> Tamper:
        return lambda stage, user, answer: (
            b"".join(b"\1" + flip(answer[i + 1 : i + REVEALED], 5) for i in range(0, len(answer), REVEALED))
            if stage == "reveals" and user in liars
            else answer
        )

    for liars in ({3}, {40}):
        played = Played({"messages": {21}}, tamper=lie(liars))
        total = played.play()
        assert total is not None
        assert torch.equal(total, played.expected)
    assert Played({"messages": {21}}, tamper=lie(set(USERS))).play() is None


JUNK: list[Any] = [None, b"", b"short", bytes(KEYS), bytes(10_000), 7, "text", [1], {}, np.zeros(3), torch.zeros(SIZE),
                   np.zeros(SIZE, np.int32), np.zeros((1, SIZE), np.uint32), np.zeros(SIZE, np.uint64),
                   np.full(SIZE, np.nan)]  # fmt: skip


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("number", range(len(JUNK)))
def test_an_answer_that_is_none_is_a_dropout(stage: str, number: int):
    played = Played(tamper=lambda at, user, answer: JUNK[number] if (at, user) == (stage, 20) else answer)
    total = played.play()
    gone = {"keys": {"keys": {20}}, "shares": {"shares": {20}}, "messages": {"messages": {20}}, "reveals": {}}[stage]
    assert torch.equal(total, Played(gone).expected)
    assert not played.round.refused or max(played.round.refused.values()) == 1


@pytest.mark.parametrize("stage", STAGES)
def test_answers_of_strangers_and_second_answers_do_not_count(stage: str):
    played = Played()
    right = played.answers

    def answers(at: str, users: Iterable[int], ask: Callable[[int], Any]) -> list[tuple[int, Any]]:
        found = right(at, users, ask)
        return [(99, found[0][1]), *found, found[0], (-1, b"")] if at == stage else found

    played.answers = answers  # type: ignore[method-assign]
    assert torch.equal(played.play(), played.expected)
    assert sum(played.round.refused.values()) == 3


def test_keys_of_another_user_or_of_low_order_are_not_taken():
    """With them, a user could be made to agree with itself, or with nobody on a key that is known."""
    honest = [Party("run/0", 3).keys() for _ in range(4)]
    for bad in (honest[0], honest[1][32:] + honest[0][:32], bytes(64), honest[1][:32] + bytes(32), honest[1][:32] * 2):
        r = MaskedRound("run/0", USERS, SHARES, SIZE)
        r.take_keys([*zip(USERS, honest, strict=False), (40, bad)])
        assert r.roster == honest
        assert sum(r.refused.values()) == 1


def test_a_sum_that_no_honest_users_can_make_is_not_released():
    played = Played()
    right = played.answers

    def answers(at: str, users: Iterable[int], ask: Callable[[int], Any]) -> list[tuple[int, Any]]:
        found = right(at, users, ask)
        return [(u, a + np.uint32(1 << 29) if at == "messages" and u == 8 else a) for u, a in found]

    played.answers = answers  # type: ignore[method-assign]
    assert played.play() is None
    assert any("longer" in why for why in played.round.refused)


def test_a_round_of_too_few_is_not_begun():
    r = MaskedRound("run/0", [1, 2], SHARES, SIZE)
    assert not r.worth_asking
    assert not unmasking.play(r, lambda users: pytest.fail("asked"))


def test_what_is_kept_between_requests_is_all_that_is_needed():
    played = after_messages()
    again = {user: Party.from_dict(json.loads(json.dumps(p.to_dict()))) for user, p in played.parties.items()}
    assert again == played.parties
    for party in again.values():
        for secret in (party.mask_seed, party.self_seed, party.share_seed):
            assert secret.hex() not in repr(party)
            assert str(secret) not in repr(party)


# ---- the server's engine


def engine(size: int = 2000, users: int = 5, masked: bool = True, **silent: Any) -> Cohort:
    shares, noise = Shares.of(1.0, 1.0, users, 0.4), DebugNoise(3)

    def carry(order: Any, asked: np.ndarray) -> Iterable[tuple[int, torch.Tensor]]:
        for user in asked.tolist():
            vector = torch.zeros(size)
            vector[user % size] = 1.0
            if user not in silent.get("silent", ()):
                yield user, shares.message(vector, noise, order.step, f"share of {user}")

    made = Cohort({"w": nn.Parameter(torch.zeros(size))}, Flat(1.0), Identity(size), carry)
    made.shares, made.noise, made.masked = shares, noise, masked
    return made


@pytest.mark.parametrize("silent", [(), (8,), (8, 21)])
def test_masks_change_nothing_that_the_loop_sees(silent: tuple[int, ...]):
    masked, plain = engine(silent=silent), engine(masked=False, silent=silent)
    sums = [each.collect(np.array(USERS), 3).gradients[LATENT] for each in (masked, plain)]
    assert torch.equal(*sums)
    assert masked.heard.answered == plain.heard.answered == 5 - len(silent)
    assert plain.heard.moved == {"messages up": 4 * 2000 * plain.heard.answered}
    assert masked.heard.moved["messages up"] == 4 * 2000 * masked.heard.answered


def test_a_round_that_is_given_up_is_noise_alone():
    """As if nobody had answered: the server's own noise, all of the plan's, so that no release is without."""
    lost = engine(silent=(8, 21, 40))
    total = lost.collect(np.array(USERS), 3).gradients[LATENT]
    assert lost.heard.answered == 0
    assert torch.equal(total, engine(masked=False, silent=USERS).collect(np.array(USERS), 3).gradients[LATENT])
    assert float(total.std()) == pytest.approx(1.0, rel=0.1)


def test_bytes_of_every_stage_are_counted():
    made, n, k = engine(), 5, 2000
    made.collect(np.array(USERS), 0)
    assert made.heard.moved == {
        "keys up": 64 * n, "keys down": 64 * n * n, "shares up": (32 + 50 * n) * n, "shares down": 50 * n * (n - 1),
        "messages up": 4 * k * n, "survivors down": 4 * n * n, "shares revealed": 18 * n * n,
    }  # fmt: skip


def test_shares_give_the_secret_back_from_any_set_and_nothing_from_fewer() -> None:
    secret = bytes(range(16))
    shares = secret_sharing.split(secret, 3, 6)
    assert len({*shares}) == 6
    for some in itertools.combinations(range(6), 3):
        chosen = {position: shares[position] for position in some}
        assert secret_sharing.combine(chosen, secret_sharing.weights(some)) == secret
    two = {position: shares[position] for position in (0, 4)}
    assert secret_sharing.combine(two, secret_sharing.weights((0, 4))) != secret
    # Whatever the secret, two shares are uniform: for each of two secrets every pair of shares is as likely.
    p = 97
    for secret_value in (5, 80):
        seen = {((secret_value + a + b) % p, (secret_value + 2 * a + 4 * b) % p) for a in range(p) for b in range(p)}
        assert len(seen) == p * p


def test_the_field_of_the_shares_is_one() -> None:
    assert sympy.isprime(secret_sharing.PRIME)
    assert secret_sharing.PRIME > 1 << (8 * secret_sharing.SECRET_BYTES)
    assert secret_sharing.PRIME < 1 << (8 * secret_sharing.SHARE_BYTES)


def test_shares_are_the_values_of_a_polynomial(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = iter([7, 11])
    monkeypatch.setattr(secret_sharing.secrets, "randbelow", lambda below: next(drawn))
    shares = secret_sharing.split((3).to_bytes(16, "big"), 3, 4)
    assert [int.from_bytes(share, "big") for share in shares] == [3 + 7 * x + 11 * x * x for x in (1, 2, 3, 4)]
