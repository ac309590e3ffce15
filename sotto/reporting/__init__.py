"""What people read: the plan, the progress line, the ledger and the model card, as text."""
