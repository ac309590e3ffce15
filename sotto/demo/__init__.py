"""`make demo`: synthetic messages of bank customers, and a private run on them."""
