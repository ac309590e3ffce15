"""What has been spent on a configuration's dataset, over all runs, and the dataset's own budget."""

from __future__ import annotations

from typing import Any

from sotto.config import Config
from sotto.data.load import ledger_id, load_dataset_for
from sotto.errors import SottoError
from sotto.models import load as models_load
from sotto.models import source
from sotto.privacy.ledger import Ledger


def spending(config: Config, epsilon: float | None, delta: float | None, close: str | None) -> dict[str, Any]:
    """See `sotto.ledger`."""
    relation = config.privacy.neighboring_relation
    if delta is not None and epsilon is None:
        raise SottoError("SOT401", what="a budget's delta was given without its epsilon", where="budget_delta",
                         why="a budget is a pair of both", fix="give budget_epsilon as well")  # fmt: skip
    tokenizer = models_load.load_tokenizer(source.resolve(config.model.name, config.model.revision))
    book = Ledger.open(ledger_id(config, load_dataset_for(config, tokenizer, "train").fingerprint))
    if epsilon is not None:
        book.set_budget(epsilon, delta if delta is not None else config.privacy.delta, relation)
    if close is not None:
        book.close_run(close)
    total = book.spent(config.privacy.delta, relation)
    return {**book.summary(), "total": total, "total_delta": config.privacy.delta}
