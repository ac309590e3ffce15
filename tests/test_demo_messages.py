"""The synthetic bank messages: reproducible, plausible in shape, hard enough, and clearly invented."""

from __future__ import annotations

import csv
import difflib
import hashlib
import itertools
import re
from collections import Counter
from datetime import date

import pytest

from sotto.demo import messages, phrases, words, writer
from sotto.demo.messages import INTENTS, Message, generate, split_by_customer, write_csv
from sotto.errors import SottoError

GOLDEN = "0c34b302830776c86c462670f3ce99951cb315dd318c3c764dd22ce279f938cb"
IBAN_LIKE = re.compile(r"xx\d\d(?: \d{4})+", re.IGNORECASE)


@pytest.fixture(scope="module")
def everything() -> list[Message]:
    return generate()


def by_customer(rows: list[Message]) -> dict[str, list[Message]]:
    out: dict[str, list[Message]] = {}
    for row in rows:
        out.setdefault(row.customer_id, []).append(row)
    return out


def passes_iban_check(text: str) -> bool:
    compact = text.replace(" ", "").upper()
    return int("".join(str(int(c, 36)) for c in compact[4:] + compact[:4])) % 97 == 1


def test_the_same_seed_gives_the_same_bytes(everything, tmp_path):
    write_csv(everything, tmp_path / "messages.csv")
    assert hashlib.sha256((tmp_path / "messages.csv").read_bytes()).hexdigest() == GOLDEN


def test_another_seed_gives_other_messages():
    first, second = generate(20, 60, seed=1), generate(20, 60, seed=2)
    assert first == generate(20, 60, seed=1)
    assert len({m.text for m in first} & {m.text for m in second}) < 5


def test_counts(everything):
    assert len(everything) == 10_000
    assert len({m.message_id for m in everything}) == 10_000
    assert [m.message_id for m in everything] == sorted(m.message_id for m in everything)
    assert len({m.customer_id for m in everything}) == 1500
    assert len({m.text for m in everything}) >= 9_500


def test_every_row_says_that_it_is_synthetic(everything):
    assert {m.source for m in everything} == {"synthetic"}


def test_dates_are_iso_and_in_order(everything):
    dates = [date.fromisoformat(m.date) for m in everything]
    assert dates == sorted(dates)


def test_every_intent_is_present_and_none_is_rare(everything):
    counts = Counter(m.intent for m in everything)
    assert tuple(sorted(counts)) == tuple(sorted(INTENTS))
    assert len(INTENTS) == 12
    assert min(counts.values()) >= 300
    assert max(counts.values()) <= 3 * min(counts.values())


def test_customers_write_few_or_many_messages(everything):
    counts = sorted(len(rows) for rows in by_customer(everything).values())
    assert counts[0] == 1
    assert counts[-1] == 25
    mean, median = sum(counts) / len(counts), counts[len(counts) // 2]
    assert median < 0.7 * mean, "the distribution is skewed"


def test_customers_come_back_to_their_subjects(everything):
    busy = [rows for rows in by_customer(everything).values() if len(rows) >= 15]
    top_three = [sum(n for _, n in Counter(m.intent for m in rows).most_common(3)) / len(rows) for rows in busy]
    assert sum(top_three) / len(top_three) > 0.5


def test_no_customer_is_on_both_sides_of_the_split(everything):
    train, test = split_by_customer(everything)
    assert not {m.customer_id for m in train} & {m.customer_id for m in test}
    assert len({m.customer_id for m in test}) == 225
    assert sorted(train + test, key=lambda m: m.message_id) == everything
    assert split_by_customer(everything) == (train, test)
    assert split_by_customer(everything, seed=8)[1] != test


def test_some_messages_are_sent_twice_with_small_edits(everything):
    close = 0
    for rows in by_customer(everything).values():
        for before, after in itertools.pairwise(rows):
            gap = (date.fromisoformat(after.date) - date.fromisoformat(before.date)).days
            if gap <= 3 and before.text != after.text:
                close += difflib.SequenceMatcher(None, before.text, after.text).ratio() > 0.75
    assert 200 <= close <= 800


def test_texts_are_short_and_never_empty(everything):
    lengths = [len(m.text.split()) for m in everything]
    assert min(lengths) >= 3
    assert max(lengths) <= 50
    assert 13 <= sum(lengths) / len(lengths) <= 25
    assert all(m.text == " ".join(m.text.split()) for m in everything)


def test_no_template_is_left_unfilled(everything):
    assert not [m.text for m in everything if re.search(r"[{}\[\]|]", m.text)]


def test_account_numbers_are_invalid(everything):
    numbers = [number for m in everything for number in IBAN_LIKE.findall(m.text)]
    assert len(numbers) > 300
    assert all(number.lower().startswith("xx00") for number in numbers)
    assert not [number for number in numbers if passes_iban_check(number)]
    assert passes_iban_check("GB82 WEST 1234 5698 7654 32"), "the checksum of the standard's example is right"


def test_contact_details_cannot_reach_anyone(everything):
    text = "\n".join(m.text for m in everything)
    assert set(re.findall(r"@([\w.-]+\w)", text)) == {"example.com"}
    phones = re.findall(r"07700[ -]\d+|\+44 7700 \d+", text)
    assert phones
    assert all(re.search(r"7700[ -]900\d{3}$", phone) for phone in phones)


def test_about_three_percent_of_the_labels_are_wrong(everything):
    drafts = messages._drafts(1500, 10_000, 7)
    assert [draft.intent for draft in drafts] == [m.intent for m in everything]
    wrong = [draft for draft in drafts if draft.intent != draft.meant]
    assert 0.02 < len(wrong) / len(drafts) < 0.04
    assert {draft.intent for draft in wrong} == set(INTENTS)


def test_messages_mention_other_subjects_in_passing():
    """A word of each subject turns up in many messages about others, so that keywords alone do not decide."""
    drafts = messages._drafts(1500, 10_000, 7)
    for intent, word in {"login_problem": "password", "loan_question": "loan", "foreign_payment": "exchange"}.items():
        hits = [draft.meant for draft in drafts if word in draft.text.lower()]
        others = sum(meant != intent for meant in hits)
        assert others > 0.1 * len(hits)


@pytest.mark.parametrize("intent", INTENTS)
def test_every_alternative_of_every_template_can_be_filled(intent):
    dice = writer.Dice(3)
    customer = writer.new_customer(dice)
    written = {writer.write(dice, customer, day) for day in range(300)}
    assert len(written) > 250
    parts = phrases.INTENTS[intent]
    for template in (parts.topic, parts.doing, *parts.settled, *parts.says, *parts.asks):
        assert template.count("(") == template.count(")")
        assert not template.endswith(".")
        filled = writer._expand(dice, template).format_map(writer._Facts(dice, customer, writer.FIRST_DAY))
        assert filled
        assert not re.search(r"[{}()|]", filled)


def test_vague_messages_name_known_intents():
    assert {intent for _, intents in words.VAGUE for intent in intents} <= set(INTENTS)


def test_the_file_reads_back(everything, tmp_path):
    write_csv(everything[:50], tmp_path / "some.csv")
    with open(tmp_path / "some.csv", encoding="utf-8", newline="") as file:
        assert [Message(**row) for row in csv.DictReader(file)] == everything[:50]


@pytest.mark.parametrize(("customers", "rows"), [(10, 9), (10, 251), (0, 0), (-1, 5)])
def test_impossible_sizes_are_refused(customers, rows):
    with pytest.raises(SottoError, match="SOT902"):
        generate(customers, rows)


def test_extreme_sizes_work():
    assert len(generate(10, 10)) == 10
    assert set(Counter(m.customer_id for m in generate(4, 100)).values()) == {25}


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, 0.001])
def test_a_split_with_an_empty_side_is_refused(fraction):
    with pytest.raises(SottoError, match="SOT901"):
        split_by_customer(generate(20, 40), test_fraction=fraction)
