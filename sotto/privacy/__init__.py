"""THE GUARANTEE: events and their accounting, noise, the mechanism, the plan, the ledger and the statement."""

from sotto.privacy import accounting as accounting
