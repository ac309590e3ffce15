"""Rows to tokens. Three tasks: classification, prompt and completion, plain text.

Rules that hold for all of them:
  - A text is empty if nothing is left of it after `strip()`. Rows with an empty text, and with a missing unit, are not
    used; they are reported here, not in `units.py`.
  - No example holds tokens of two units, so that removing a unit removes all that came from it and nothing else.
  - What is cut is counted, and the row is still used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from sotto.config import DataSection
from sotto.data.examples import Examples
from sotto.data.records import CUT, EMPTY, NO_LABEL, NO_TOKENS, NO_UNIT, NOT_TOKENISED, UNKNOWN_LABEL, BadRow, Table
from sotto.errors import SottoError

TOKENISER_BATCH = 2048
Ids = Sequence[int]


def encode(
    table: Table, section: DataSection, tokenizer: PreTrainedTokenizerBase, unit_values: list[str] | None
) -> tuple[Examples, list[BadRow]]:
    """Tokenises every usable row.

    Classification: the tokenizer's own form of one text or a pair, cut to `max_length`. Classes are indices into
    `section.labels`; white space around a label does not count.

    Prompt and completion: beginning-of-text (if the tokenizer adds one), prompt, completion, end-of-text. The two texts
    are tokenised apart, so that the boundary is exact, and nothing is put between them: where a space or a newline
    belongs there, the data must hold it. What is too long loses the completion's end; if not even one token of it would
    fit, the prompt's beginning.

    Plain text: the documents of one unit, each followed by end-of-text, are joined in the order of the table and
    split into chunks of `max_length`. A last chunk of a single token is left out, for it has nothing to predict.

    Args:
      table: holds the columns that `section` names.
      section: the task, its columns, `labels` and `max_length`.
      tokenizer: must have an end-of-text token for generation.
      unit_values: the unit of each row as `clean_units` gives them, or None if each row is its own.

    The tokenizer is left as it was found.

    Returns:
      The examples, and the rows that were not used or were cut, by line.

    Raises:
      SottoError: SOT220 the tokenizer has no end-of-text token; SOT221 max_length leaves no room.
    """
    rows, bad = _usable_rows(table, section, unit_values)
    with _left_as_it_was(tokenizer):
        if section.task == "classification":
            examples, more = _classification(table, section, tokenizer, rows)
        else:
            _check_generation(section, tokenizer)
            if section.completion is not None:
                examples, more = _completions(table, section, tokenizer, rows)
            else:
                examples, more = _plain_text(table, section, tokenizer, rows, unit_values)
    return examples, sorted(bad + more, key=lambda row: row.line)


@contextmanager
def _left_as_it_was(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Takes back what calls change in a fast tokenizer.

    A call that cuts leaves its limit in the tokenizer, and `save_pretrained` writes that into tokenizer.json: whoever
    gets the exported model would see whether any private text had been too long.
    """
    fast: Any = getattr(tokenizer, "backend_tokenizer", None)
    truncation, padding = (fast.truncation, fast.padding) if fast is not None else (None, None)
    try:
        yield
    finally:
        if fast is not None:
            fast.enable_truncation(**truncation) if truncation else fast.no_truncation()
            fast.enable_padding(**padding) if padding else fast.no_padding()


def _usable_rows(table: Table, section: DataSection, unit_values: list[str] | None) -> tuple[list[int], list[BadRow]]:
    texts = [table.columns[c] for c in (section.text, section.text_pair, section.prompt, section.completion) if c]
    labels = [label.strip() for label in table.columns[section.label]] if section.label else None
    known = set(section.labels or ())
    rows: list[int] = []
    bad: list[BadRow] = []
    for row, line in enumerate(table.lines):
        if not all(column[row].strip() for column in texts):
            bad.append(BadRow(line, EMPTY))
        elif labels is not None and labels[row] not in known:
            bad.append(BadRow(line, UNKNOWN_LABEL if labels[row] else NO_LABEL))
        elif unit_values is not None and not unit_values[row]:
            bad.append(BadRow(line, NO_UNIT))
        else:
            rows.append(row)
    return rows, bad


def _classification(
    table: Table, section: DataSection, tokenizer: PreTrainedTokenizerBase, rows: list[int]
) -> tuple[Examples, list[BadRow]]:
    assert section.text is not None
    assert section.label is not None
    columns = [table.columns[c] for c in (section.text, section.text_pair) if c]
    special = tokenizer.num_special_tokens_to_add(pair=len(columns) == 2)
    if section.max_length < special + len(columns):
        raise SottoError(
            "SOT221", what=f"data.max_length is {section.max_length}", where="data.max_length",
            why=f"the tokenizer adds {special} tokens of its own, so nothing of a text would be left",
            fix=f"set it to {special + len(columns)} or more; 128 is usual",
        )  # fmt: skip
    typed = "token_type_ids" in tokenizer.model_input_names

    def tokenise(batch: list[int], **options: Any) -> list[tuple[Ids, Ids]]:
        texts: list[Any] = [[column[row] for row in batch] for column in columns]
        # verbose=False: a text longer than the model's limit is our business, and is counted below.
        out = tokenizer(*texts, padding=False, return_attention_mask=False, verbose=False, **options)
        return list(zip(out["input_ids"], out["token_type_ids"] if typed else out["input_ids"], strict=True))

    encoded, bad = _in_batches(tokenise, rows, table)
    too_long = [i for i, (_, (ids, _)) in enumerate(encoded) if len(ids) > section.max_length]
    cut, not_cut = _in_batches(
        lambda batch: tokenise(batch, truncation=True, max_length=section.max_length),
        [encoded[i][0] for i in too_long],
        table,
    )
    # Only the few long texts are tokenised twice; the tokenizer knows which special tokens must survive a cut.
    short = dict(cut)
    bad += not_cut + [BadRow(table.lines[row], CUT) for row in short]
    silent = [row for row, (ids, _) in encoded if len(ids) == 0]
    bad += [BadRow(table.lines[row], NO_TOKENS) for row in silent]
    lost = {encoded[i][0] for i in too_long} - short.keys() | set(silent)
    final = [(row, short.get(row, pair)) for row, pair in encoded if row not in lost]
    class_of = {label: index for index, label in enumerate(section.labels or ())}
    names = table.columns[section.label]
    labels = np.asarray([class_of[names[row].strip()] for row, _ in final], dtype=np.int64)
    examples = Examples.build(
        [ids for _, (ids, _) in final],
        rows=[row for row, _ in final],
        token_type_ids=[types for _, (_, types) in final] if typed else None,
        labels=labels,
    )
    return examples, bad


def _completions(
    table: Table, section: DataSection, tokenizer: PreTrainedTokenizerBase, rows: list[int]
) -> tuple[Examples, list[BadRow]]:
    assert section.completion is not None
    prompts = table.columns[section.prompt] if section.prompt else None
    completions = table.columns[section.completion]
    first, last = _first_token(tokenizer), _eos(tokenizer)

    def tokenise(batch: list[int]) -> list[tuple[Ids, Ids]]:
        answers = _plain(tokenizer, [completions[row] for row in batch])
        questions = _plain(tokenizer, [prompts[row] for row in batch]) if prompts else [[]] * len(batch)
        return list(zip(questions, answers, strict=True))

    encoded, bad = _in_batches(tokenise, rows, table)
    sequences: list[Ids] = []
    kept: list[int] = []
    prompt_lengths: list[int] = []
    for row, (question, answer) in encoded:
        if len(answer) == 0:
            bad.append(BadRow(table.lines[row], NO_TOKENS))
            continue
        prompt, completion = [*first, *question], [*answer, last]
        if len(prompt) + len(completion) > section.max_length:
            bad.append(BadRow(table.lines[row], CUT))
            completion = completion[: max(1, section.max_length - len(prompt))]
            prompt = prompt[max(0, len(prompt) + len(completion) - section.max_length) :]
        sequences.append(prompt + completion)
        kept.append(row)
        prompt_lengths.append(len(prompt))
    return Examples.build(sequences, rows=kept, prompt_lengths=prompt_lengths), bad


def _plain_text(
    table: Table,
    section: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[int],
    unit_values: list[str] | None,
) -> tuple[Examples, list[BadRow]]:
    assert section.text is not None
    texts = table.columns[section.text]
    first, last = _first_token(tokenizer), _eos(tokenizer)
    encoded, bad = _in_batches(lambda batch: _plain(tokenizer, [texts[row] for row in batch]), rows, table)
    documents: dict[str | int, list[tuple[int, list[int]]]] = {}
    for row, ids in encoded:
        if len(ids) == 0:
            bad.append(BadRow(table.lines[row], NO_TOKENS))
            continue
        unit = row if unit_values is None else unit_values[row]
        documents.setdefault(unit, []).append((row, [*first, *ids, last]))
    chunks: list[Ids] = []
    chunk_rows: list[int] = []
    for unit_documents in documents.values():
        joined = list(chain.from_iterable(ids for _, ids in unit_documents))
        ends = np.cumsum([len(ids) for _, ids in unit_documents])
        starts = range(0, len(joined) - 1, section.max_length)
        chunks.extend(joined[start : start + section.max_length] for start in starts)
        owners = np.searchsorted(ends, np.asarray(starts), side="right")
        chunk_rows.extend(unit_documents[owner][0] for owner in owners)
    return Examples.build(chunks, rows=chunk_rows), bad


def _in_batches(
    tokenise: Callable[[list[int]], list[Any]], rows: list[int], table: Table
) -> tuple[list[tuple[int, Any]], list[BadRow]]:
    """Applies `tokenise` to many rows at once; where that raises, row by row, so that one row costs only itself."""
    done: list[tuple[int, Any]] = []
    bad: list[BadRow] = []
    for start in range(0, len(rows), TOKENISER_BATCH):
        batch = rows[start : start + TOKENISER_BATCH]
        try:
            done.extend(zip(batch, tokenise(batch), strict=True))
        except Exception:
            for row in batch:
                # Whatever a tokenizer raises, its message may quote the text: only the line number is kept.
                try:
                    done.append((row, tokenise([row])[0]))
                except Exception:
                    bad.append(BadRow(table.lines[row], NOT_TOKENISED))
    return done, bad


def _plain(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids without special tokens."""
    options: dict[str, Any] = {"padding": False, "return_attention_mask": False, "verbose": False}
    return tokenizer(texts, add_special_tokens=False, **options)["input_ids"]  # pyright: ignore[reportReturnType]


def _first_token(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The beginning-of-text token, if this tokenizer puts one before a text; else nothing."""
    ids = list(tokenizer("")["input_ids"])  # pyright: ignore[reportArgumentType]
    return ids[:1] if tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id] else []


def _eos(tokenizer: PreTrainedTokenizerBase) -> int:
    eos = tokenizer.eos_token_id
    assert isinstance(eos, int)
    return eos


def _check_generation(section: DataSection, tokenizer: PreTrainedTokenizerBase) -> None:
    if not isinstance(tokenizer.eos_token_id, int):
        raise SottoError(
            "SOT220",
            what="the tokenizer has no end-of-text token",
            where="model.name",
            why="without one the model cannot learn where a text ends",
            fix="take the tokenizer that belongs to the model, or set eos_token in its tokenizer_config.json",
        )
    if section.max_length < 2:
        raise SottoError(
            "SOT221",
            what=f"data.max_length is {section.max_length}",
            where="data.max_length",
            why="a language model needs a token to start from and one to predict",
            fix="set it to 2 or more; 128 is usual",
        )
