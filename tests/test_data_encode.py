import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from sotto.config import DataSection
from sotto.data.encode import encode
from sotto.data.examples import Examples
from sotto.data.records import BadRow, Table
from sotto.errors import SottoError

WORDS = [f"w{i}" for i in range(20)]
PAD, UNK, EOS, BOS, SEP, FIRST = 0, 1, 2, 3, 4, 5
CUT = "longer than max_length: cut"


def tiny_tokenizer(
    template: str | None = None, pair: str | None = None, eos: str | None = "</s>"
) -> PreTrainedTokenizerFast:
    """One token per word; `w0` is 5."""
    names = ["<pad>", "<unk>", "</s>", "<s>", "[SEP]", *WORDS]
    core = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    if template:
        special = [("<s>", BOS), ("</s>", EOS), ("[SEP]", SEP)]
        core.post_processor = TemplateProcessing(single=template, pair=pair, special_tokens=special)
    kinds = ["input_ids", "token_type_ids", "attention_mask"] if pair else ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token=eos,
        bos_token="<s>" if template else None,
        model_input_names=kinds,
    )


def table(**columns: list[str]) -> Table:
    count = len(next(iter(columns.values())))
    return Table(source="test", columns=columns, lines=list(range(2, count + 2)))


def tokens(examples: Examples) -> list[list[int]]:
    return [examples.input_ids[a:b].tolist() for a, b in zip(examples.offsets, examples.offsets[1:], strict=False)]


CLASSES = DataSection(train="x", text="text", label="label", labels=("no", "yes"), max_length=4)
ANSWERS = DataSection(train="x", prompt="prompt", completion="completion", max_length=6)
PLAIN = DataSection(train="x", text="text", max_length=4)


def test_classification_and_every_reason_to_leave_a_row_out():
    rows = table(
        text=["w0 w1", " \n", "w2", "w3", "w4", "w0 w1 w2 w3 w4 w5", "w6"],
        label=["yes", "no", "", "maybe", " no ", "yes", "no"],
    )
    examples, bad = encode(rows, CLASSES, tiny_tokenizer(), ["a", "a", "a", "a", "b", "b", ""])
    assert tokens(examples) == [[5, 6], [9], [5, 6, 7, 8]]
    assert examples.labels is not None
    assert examples.labels.tolist() == [1, 0, 1]
    assert examples.rows.tolist() == [0, 4, 5]
    assert bad == [
        BadRow(3, "empty text"),
        BadRow(4, "missing label"),
        BadRow(5, "label not in data.labels"),
        BadRow(7, CUT),
        BadRow(8, "missing unit"),
    ]


def test_pairs_have_types_and_keep_their_special_tokens_when_cut():
    section = DataSection(train="x", text="a", text_pair="b", label="label", labels=("no", "yes"), max_length=6)
    tokenizer = tiny_tokenizer("<s> $A [SEP]", "<s>:0 $A:0 [SEP]:0 $B:1 [SEP]:1")
    rows = table(a=["w0", "w0 w1 w2 w3", "w0"], b=["w1", "w4 w5 w6 w7", ""], label=["no", "yes", "no"])
    examples, bad = encode(rows, section, tokenizer, None)
    assert tokens(examples)[0] == [BOS, 5, SEP, 6, SEP]
    assert len(tokens(examples)[1]) == 6
    assert tokens(examples)[1][-1] == SEP
    assert bad == [BadRow(3, CUT), BadRow(4, "empty text")]
    batch = examples.collate(np.array([0, 1]), PAD)
    assert batch["token_type_ids"][0].tolist() == [0, 0, 0, 1, 1, 0]
    assert batch["labels"].tolist() == [0, 1]


def test_prompt_and_completion_take_loss_on_the_completion_alone():
    rows = table(prompt=["w0 w1", "w0"], completion=["w2", "w3 w4"])
    examples, bad = encode(rows, ANSWERS, tiny_tokenizer("<s> $A </s>"), None)
    assert bad == []
    assert tokens(examples) == [[BOS, 5, 6, 7, EOS], [BOS, 5, 8, 9, EOS]]
    batch = examples.collate(np.array([1, 0]), EOS)
    assert batch["labels"].tolist() == [[-100, -100, 8, 9, EOS], [-100, -100, -100, 7, EOS]]
    assert "token_type_ids" not in batch


def test_too_long_loses_the_completions_end_then_the_prompts_beginning():
    long = " ".join(WORDS[:8])
    rows = table(prompt=["w0 w1", long, "w0", "w0"], completion=[long, "w9 w10", " ", "w1"])
    examples, bad = encode(rows, ANSWERS, tiny_tokenizer(), None)
    assert tokens(examples) == [[5, 6, 5, 6, 7, 8], [8, 9, 10, 11, 12, 14], [5, 6, EOS]]
    assert examples.prompt_lengths.tolist() == [2, 5, 1]
    assert bad == [BadRow(2, CUT), BadRow(3, CUT), BadRow(4, "empty text")]


@pytest.mark.parametrize("limit", [None, 3])
@pytest.mark.parametrize("texts", [["w0", "w1"], ["w0", "w1 w2 w3 w4 w5 w6 w7 w8 w9 w10"]], ids=["short", "cut"])
def test_the_tokenizer_is_left_as_it_was(texts, limit):
    """Its settings are exported with the model: they must not tell whether a private text was too long."""
    tokenizer = tiny_tokenizer()
    if limit is not None:
        tokenizer.backend_tokenizer.enable_truncation(limit)
        tokenizer.backend_tokenizer.enable_padding(length=limit)
    before = tokenizer.backend_tokenizer.to_str()
    _, bad = encode(table(text=texts, label=["no", "yes"]), CLASSES, tokenizer, None)
    assert [row.reason for row in bad] == ([CUT] if len(texts[1]) > 2 else [])
    assert tokenizer.backend_tokenizer.to_str() == before
    tokenizer("w0 w1 w2", truncation=True, max_length=2)
    assert tokenizer.backend_tokenizer.to_str() != before, "a call alone leaves a trace"


def test_completion_without_prompt():
    section = DataSection(train="x", completion="completion", max_length=6)
    examples, _ = encode(table(completion=["w0 w1"]), section, tiny_tokenizer("<s> $A"), None)
    assert tokens(examples) == [[BOS, 5, 6, EOS]]
    assert examples.prompt_lengths.tolist() == [1]


def test_plain_text_is_packed_within_a_unit_and_never_across():
    rows = table(text=["w0 w1", "w2", "w3 w4 w5 w6", "", "w7"])
    examples, bad = encode(rows, PLAIN, tiny_tokenizer(), ["a", "b", "a", "a", "b"])
    assert tokens(examples) == [[5, 6, EOS, 8], [9, 10, 11, EOS], [7, EOS, 12, EOS]]
    assert examples.rows.tolist() == [0, 2, 1]
    assert bad == [BadRow(5, "empty text")]
    alone, _ = encode(rows, PLAIN, tiny_tokenizer(), None)
    # The last chunk of row 2 would be the end-of-text token alone: it has nothing to predict.
    assert tokens(alone) == [[5, 6, EOS], [7, EOS], [8, 9, 10, 11], [12, EOS]]
    assert alone.rows.tolist() == [0, 1, 2, 4]
    assert alone.labels is None
    # A chunk that begins where a document begins belongs to that document.
    even, _ = encode(table(text=["w0 w1 w2", "w3"]), PLAIN, tiny_tokenizer(), ["a", "a"])
    assert even.rows.tolist() == [0, 1]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 9)), min_size=1, max_size=12), st.integers(2, 7))
@settings(max_examples=60, deadline=None)
def test_chunks_of_a_unit_depend_on_that_unit_alone(documents, max_length):
    section = DataSection(train="x", text="text", max_length=max_length)
    tokenizer = tiny_tokenizer()
    texts = [" ".join(["w" + str(ord(unit) - 97)] * length) for unit, length in documents]
    units = [unit for unit, _ in documents]
    everyone, _ = encode(table(text=texts), section, tokenizer, units)
    for unit in set(units):
        mine = [i for i, u in enumerate(units) if u == unit]
        alone, _ = encode(table(text=[texts[i] for i in mine]), section, tokenizer, [unit] * len(mine))
        together = [t for t, row in zip(tokens(everyone), everyone.rows, strict=True) if units[row] == unit]
        assert together == tokens(alone)
    assert all(2 <= len(t) <= max_length for t in tokens(everyone))
    assert all(len(set(t) - {EOS}) <= 1 for t in tokens(everyone))


def test_a_row_that_breaks_the_tokenizer_costs_only_itself():
    class Fragile(PreTrainedTokenizerFast):
        def __call__(self, text, *args, **options):
            if "boom" in (text if isinstance(text, str) else " ".join(text)):
                raise RuntimeError("secret text boom")
            return super().__call__(text, *args, **options)

    base = tiny_tokenizer()
    tokenizer = Fragile(tokenizer_object=base.backend_tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="</s>")
    for section, column in ((PLAIN, {}), (CLASSES, {"label": ["no", "yes", "no"]})):
        examples, bad = encode(table(text=["w0", "boom", "w1"], **column), section, tokenizer, None)
        assert examples.rows.tolist() == [0, 2]
        assert bad == [BadRow(3, "cannot be tokenised")]


def test_texts_that_leave_no_tokens():
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = None
    from tokenizers.normalizers import Replace

    tokenizer.backend_tokenizer.normalizer = Replace("w0", "")
    examples, bad = encode(table(prompt=["w1", "w1"], completion=["w0", "w2"]), ANSWERS, tokenizer, None)
    assert examples.rows.tolist() == [1]
    assert bad == [BadRow(2, "no tokens")]
    examples, bad = encode(table(text=["w0", "w2"]), PLAIN, tokenizer, None)
    assert examples.rows.tolist() == [1]
    assert bad == [BadRow(2, "no tokens")]
    examples, bad = encode(table(text=["w0", "w2"], label=["no", "no"]), CLASSES, tokenizer, None)
    assert examples.rows.tolist() == [1]
    assert bad == [BadRow(2, "no tokens")]


def test_generation_needs_an_end_token_and_room():
    with pytest.raises(SottoError) as caught:
        encode(table(text=["w0"]), PLAIN, tiny_tokenizer(eos=None), None)
    assert caught.value.code == "SOT220"
    with pytest.raises(SottoError) as caught:
        encode(table(text=["w0"]), DataSection(train="x", text="text", max_length=1), tiny_tokenizer(), None)
    assert caught.value.code == "SOT221"


@pytest.mark.parametrize(("pair", "least"), [(False, 3), (True, 5)])
def test_a_length_that_leaves_nothing_of_a_text(pair: bool, least: int):
    tokenizer = tiny_tokenizer("<s> $A </s>", "<s>:0 $A:0 [SEP]:0 $B:1 </s>:1")
    rows = table(text=["w0 w1 w2"], other=["w3 w4"], label=["yes"])
    section = CLASSES.model_copy(update={"text_pair": "other" if pair else None, "max_length": least - 1})
    with pytest.raises(SottoError, match=f"(?s)SOT221.*set it to {least} or more"):
        encode(rows, section, tokenizer, None)
    assert len(encode(rows, section.model_copy(update={"max_length": least}), tokenizer, None)[0]) == 1


def test_nothing_usable_gives_no_examples():
    for section, columns in ((PLAIN, {}), (CLASSES, {"label": ["no"]})):
        examples, bad = encode(table(text=[" "], **columns), section, tiny_tokenizer(), None)
        assert len(examples) == 0
        assert bad == [BadRow(2, "empty text")]


@given(st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=6), min_size=1, max_size=8), st.data())
@settings(deadline=None)
def test_collate_pads_on_the_right_and_loses_nothing(sequences, data):
    examples = Examples.build(sequences, rows=range(len(sequences)))
    indices = data.draw(st.lists(st.integers(0, len(sequences) - 1), min_size=1, max_size=8))
    batch = examples.collate(np.array(indices), PAD)
    assert batch["input_ids"].shape == (len(indices), max(len(sequences[i]) for i in indices))
    assert batch["input_ids"].dtype == torch.int64
    for ids, mask, labels, i in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], indices, strict=True):
        count = len(sequences[i])
        assert ids[:count].tolist() == sequences[i]
        assert mask.tolist() == [1] * count + [0] * (len(mask) - count)
        assert labels.tolist() == sequences[i] + [-100] * (len(mask) - count)
    assert examples.lengths.tolist() == [len(s) for s in sequences]


def test_an_empty_batch_collates_to_empty_tensors():
    batch = Examples.build([[1, 2]], rows=[0]).collate(np.array([], dtype=np.int64), PAD)
    assert batch["input_ids"].shape == (0, 0)


def test_storage_is_small():
    examples = Examples.build([[1] * 100] * 1000, rows=range(1000))
    assert examples.input_ids.dtype == np.int32
    assert examples.input_ids.nbytes == 400_000
