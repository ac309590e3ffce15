"""The customer's side: runs the bottom on the text, privatizes, and stores what may leave.

Shape legend: B examples, T positions, V tokens of the vocabulary, n width.
"""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sotto.config import Config
from sotto.config_split import SplitSetting
from sotto.data.examples import Examples
from sotto.data.load import LoadedData, load_dataset_for
from sotto.errors import SottoError
from sotto.models import load as models_load
from sotto.privacy.noise import NoiseSource
from sotto.split import importance, labels, privatizers
from sotto.split.cache import Outbox, other_release, write_private
from sotto.split.metric import Meaning, meaning
from sotto.split.parts import Bottom
from sotto.split.statement import Facts
from sotto.split.wire import Agreement, Piece

BATCH = 32
QUERIES = 1 << 40
"""Names the draws of queries apart from those of the training data, for a noise source that repeats."""


def setting_of(config: Config) -> SplitSetting:
    """The section `setting` of a split run.

    Raises:
      SottoError: SOT800, the configuration is not for a split run.
    """
    if isinstance(config.setting, SplitSetting):
        return config.setting
    raise SottoError(
        "SOT800", what="this is not the configuration of a split run", where="setting.kind",
        why="the commands of 'sotto split' need to know where the model is cut and what is done at the cut",
        fix="write setting: {kind: split, layer: 0, privatizer: ...}",
    )  # fmt: skip


@dataclass(frozen=True)
class Exempt:
    """Tokens that leave unchanged: (V,) mask, and what their choice cost."""

    mask_V: torch.Tensor | None = None
    epsilon: float | None = None


class Customer:
    """Holds the text.

    Attributes:
      agreement: what it expects the vendor to have.
      outbox: what leaves for training, once `prepare` has been called.
    """

    def __init__(self, config: Config, bottom: Bottom, tokenizer: Any, noise: NoiseSource):
        """Takes the bottom that the vendor gave, and reads no data yet."""
        self.config, self.setting = config, setting_of(config)
        self.bottom, self.tokenizer, self.noise = bottom, tokenizer, noise
        self.agreement = agreement(config, bottom)
        self.outbox: Outbox | None = None
        self._queried = 0
        self._exempt = Exempt()
        self._privatizer: privatizers.Privatizer | None = None

    def prepare(self, folder: Path) -> Outbox:
        """Privatizes the training data into `folder`, or finds it there.

        Raises:
          SottoError: those of reading the data; SOT822, SOT823.
        """
        data = load_dataset_for(self.config, self.tokenizer, "train")
        count, size = len(data.examples), self.setting.chunk_examples
        sizes = [min(size, count - start) for start in range(0, count, size)]
        about = {"data": _digest(data), "setting": self.setting.model_dump(mode="json", exclude={"role"})}
        self.settle(data, folder.with_name(folder.name + ".choice.json"))
        self.outbox = Outbox.fill(
            folder, self.agreement, about, sizes, lambda i: self._piece(data.examples, i * size, sizes[i])
        )
        return self.outbox

    @property
    def privatizer(self) -> privatizers.Privatizer:
        """What is done to texts before they leave; known once `settle` was called."""
        assert self._privatizer is not None
        return self._privatizer

    def settle(self, data: LoadedData, stored: Path | None = None) -> None:
        """Fixes which words are exempt, and with that the privatizer. Nothing leaves by it.

        Args:
          stored: where a private choice is kept, or None where it is for this process alone.
        """
        self.data = data
        self._exempt = self._choose(data, stored)
        self._privatizer = self._make()

    def query(self, examples: Examples, chosen: np.ndarray) -> Piece:
        """Privatizes texts that are to be classified, without their labels.

        Every call is a new release of them: what leaves goes through `queries.QueryBook`, which calls once for a text.
        """
        assert self._privatizer is not None, "prepare first: the exempt words are those of the training"
        lengths, values = self._release(examples, chosen, step=QUERIES + self._queried)
        self._queried += len(chosen)
        return Piece(lengths, None, values)

    def _piece(self, examples: Examples, start: int, count: int) -> Piece:
        chosen = np.arange(start, start + count)
        lengths, values = self._release(examples, chosen, step=start)
        assert examples.labels is not None
        sent = examples.labels[chosen]
        if self.setting.labels == "kept":
            return Piece(lengths, None, values)
        if self.setting.labels == "randomised":
            assert self.setting.label_epsilon is not None
            sent = np.array(labels.randomise(sent.tolist(), self.agreement.classes, self.setting.label_epsilon))
        return Piece(lengths, sent.astype(np.int32), values)

    def _release(self, examples: Examples, chosen: np.ndarray, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Runs bottom and privatizer over examples, in batches of like length, and puts them back in order."""
        assert self._privatizer is not None
        order = np.argsort(examples.lengths[chosen], kind="stable")
        parts: list[Any] = [None] * len(chosen)
        waiting = []
        with ThreadPoolExecutor(1) as pool:  # noise is drawn for one batch while the bottom runs on the next
            for start in range(0, len(order), BATCH):
                places = order[start : start + BATCH]
                batch = examples.collate(chosen[places], self.tokenizer.pad_token_id)
                hidden = None if self._privatizer.sends_ids else self.bottom.hidden(batch)
                given = privatizers.Batch(batch["input_ids"], batch["attention_mask"], hidden)
                waiting.append((places, pool.submit(self._privatizer.release, given, self.noise, step + start)))
        for places, done in waiting:
            out = done.result()
            rows = out.rows.numpy()
            ends = np.cumsum(out.lengths_B.numpy())
            for place, end, length in zip(places, ends, out.lengths_B.numpy(), strict=True):
                parts[place] = rows[end - length : end]
        lengths = np.array([len(part) for part in parts], dtype=np.int32)
        return lengths, np.concatenate(parts)

    def _make(self) -> privatizers.Privatizer:
        return privatizers.make(
            self.setting, self.bottom.table_Vn, self.special, self.config.data.max_length, self._exempt.mask_V
        )

    @property
    def special(self) -> list[int]:
        """Tokens that are never replaced and never chosen: the tokenizer's own, and rows without a token."""
        vocabulary = self.tokenizer.get_vocab()
        unused = set(range(len(self.bottom.table_Vn))) - set(vocabulary.values())
        unused |= {i for token, i in vocabulary.items() if token.startswith("[unused")}
        return sorted(set(self.tokenizer.all_special_ids) | unused)

    def _choose(self, data: LoadedData, stored: Path | None) -> Exempt:
        """Which tokens are exempt. A private choice is made once and stored, as the noise of the texts is."""
        if self.setting.exempt == "none":
            return Exempt()
        if self.setting.exempt == "list":
            assert self.setting.exempt_file is not None
            return Exempt(self._mask(self._listed(Path(self.setting.exempt_file))))
        if stored is not None and stored.exists():
            known = json.loads(stored.read_text())
            if known["data"] != _digest(data):
                # A second choice in its place would be a second release, which the statement would not count.
                raise other_release(stored)
            return Exempt(self._mask(known["tokens"]), known["epsilon"])
        examples = data.examples
        assert examples.labels is not None
        texts = [
            examples.input_ids[examples.offsets[e] : examples.offsets[e + 1]].astype(np.int64)
            for e in range(len(examples))
        ]
        chosen = importance.select_privately(
            texts,
            examples.labels.tolist(),
            self.agreement.classes,
            len(self.bottom.table_Vn),
            share=self.setting.exempt_share,
            special=self.special,
            epsilon=self.setting.exempt_epsilon,
            delta=self.setting.delta,
            noise=self.noise,
        )
        values = {"data": _digest(data), "tokens": chosen.tokens.tolist(), "epsilon": chosen.epsilon}
        if stored is not None:
            write_private(stored, json.dumps(values).encode())
        return Exempt(self._mask(values["tokens"]), chosen.epsilon)

    def _mask(self, tokens: list[int]) -> torch.Tensor:
        mask = torch.zeros(len(self.bottom.table_Vn), dtype=torch.bool)
        mask[tokens] = True
        return mask

    def _listed(self, path: Path) -> list[int]:
        try:
            words = path.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise SottoError(
                "SOT803", what=f"the word list cannot be read: {error}", where="setting.exempt_file",
                why="it says which words leave unchanged", fix="name a UTF-8 file with one word a line",
            ) from None  # fmt: skip
        ids = {
            token
            for word in words
            if word.strip()
            for token in self.tokenizer(word.strip(), add_special_tokens=False)["input_ids"]
        }
        return sorted(ids - set(self.special))

    # ---- what can be said about it

    def meaning(self) -> Meaning | None:
        """What eta means, measured on public representations: the embedding, or sentences of random tokens."""
        if self.setting.eta is None:
            return None
        return meaning(self.probe(), self.setting.eta, self.noise)

    def probe(self, sentences: int = 100, length: int = 20) -> torch.Tensor:
        """(V, n) public representations at the cut, without noise: of tokens, of segments, or of whole sentences."""
        excluded = set(self.special)
        known = [i for i in range(len(self.bottom.table_Vn)) if i not in excluded]
        if self.setting.privatizer == "dx_tokens":
            return self.bottom.table_Vn[known]
        if self.setting.pooled:
            sentences *= 10
        segment = length if self.setting.pooled else self.setting.segment or 1
        length = max(length, segment) // segment * segment
        generator = torch.Generator().manual_seed(0)
        picked = torch.tensor(known)[torch.randint(len(known), (sentences, length), generator=generator)]
        batches = ({"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in picked.split(BATCH))
        parts = [self.bottom.hidden(batch) for batch in batches]
        hidden = torch.cat(parts)
        return hidden.unflatten(1, (-1, segment)).mean(dim=2).flatten(0, 1)

    def facts(self) -> Facts:
        """For the statement."""
        assert self.outbox is not None
        epsilon = None
        if isinstance(self._privatizer, privatizers.GaussianRelease):
            epsilon = self._privatizer.epsilon(self.setting.delta)
        mask = self._exempt.mask_V
        exempt = [] if mask is None else self.tokenizer.convert_ids_to_tokens(torch.nonzero(mask).flatten().tolist())
        return Facts(
            setting=self.setting,
            examples=self.outbox.manifest.examples,
            rows=self.outbox.manifest.rows,
            bottom=self.agreement.bottom,
            meaning=self.meaning(),
            epsilon=epsilon,
            label_epsilon=self.setting.label_epsilon,
            exempt=tuple(exempt),
            exempt_epsilon=self._exempt.epsilon,
            max_length=self.config.data.max_length,
        )

    @property
    def exempt_V(self) -> torch.Tensor:
        """(V,) True for the tokens that leave unchanged."""
        mask = self._exempt.mask_V
        return torch.zeros(len(self.bottom.table_Vn), dtype=torch.bool) if mask is None else mask


def load_bottom(config: Config) -> tuple[Bottom, Any]:
    """The bottom of the model that the configuration names, and the tokenizer."""
    loaded = models_load.load_model(config.model, config.data, config.method, config.run.seed)
    return Bottom(loaded.model, setting_of(config).layer), loaded.tokenizer


def agreement(config: Config, bottom: Bottom) -> Agreement:
    """What this configuration and this bottom lead a side to expect of the other."""
    setting = setting_of(config)
    return Agreement(
        bottom=bottom.sha256(),
        layer=setting.layer,
        width=bottom.width,
        values="ids" if setting.privatizer == "dx_tokens" else "float16",
        vocabulary=len(bottom.table_Vn),
        classes=len(config.data.labels or ()),
        labels=setting.labels,
        segment=0 if setting.pooled else setting.segment or 1,
        max_rows=setting.most_rows(config.data.max_length),
    )


def _digest(data: LoadedData) -> str:
    """The texts and labels, in their order."""
    digest = hashlib.sha256()
    for array in (data.examples.input_ids, data.examples.offsets, data.examples.labels):
        digest.update(b"" if array is None else array.tobytes())
        digest.update(b"|")
    return digest.hexdigest()
