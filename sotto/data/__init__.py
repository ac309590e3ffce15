"""WHO is protected, and how batches are drawn.

Data goes through here in one direction: `read_table` (files to rows), `encode` (rows to tokens), `Units.build` (which
examples belong to one person, and how many of them count), `check` (what was left out, and why), all of them behind
`load_dataset_for`; then `PoissonSampler` draws the units of each step and `microbatches` cuts them to what fits in
memory. Nothing here knows of models, gradients or noise, and no report of this package holds text of the data.
"""

from sotto.data.checks import BadRows, DataReport, check
from sotto.data.encode import encode
from sotto.data.examples import Examples
from sotto.data.load import LoadedData, fingerprint, has_eval, ledger_id, load_dataset_for
from sotto.data.records import BadRow, Table, read_table, require_there
from sotto.data.sampling import PoissonSampler, microbatches
from sotto.data.units import Units, clean_units

__all__ = [
    "BadRow",
    "BadRows",
    "DataReport",
    "Examples",
    "LoadedData",
    "PoissonSampler",
    "Table",
    "Units",
    "check",
    "clean_units",
    "encode",
    "fingerprint",
    "has_eval",
    "ledger_id",
    "load_dataset_for",
    "microbatches",
    "read_table",
    "require_there",
]
