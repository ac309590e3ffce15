"""Fine-tuning where the text stays with its users, and a server sees one bounded vector of each who takes part.

One round is one step of the training loop: the server draws users, sends them the trained weights, gets back what each
would change, bounded and encoded, adds noise to the sum and updates. `codec` says what is sent, `client` what a user's
device computes, `policy` what its owner allows, `cohort` what the server accepts, `server` and `simulate` make a run of
it, and `strategy` carries it over Flower.
"""
