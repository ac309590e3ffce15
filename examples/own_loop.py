"""A private training loop of your own, with Sotto's parts: 500 people, two sequences each, one person protected.

python examples/own_loop.py
"""

import secrets

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import sotto
from sotto.data.sampling import PoissonSampler
from sotto.losses import forward_losses
from sotto.privacy import accounting
from sotto.privacy.accounting import round_up
from sotto.privacy.mechanism import GaussianMechanism
from sotto.privacy.noise import SecureNoise

PEOPLE, EXPECTED_BATCH, STEPS, EPSILON, DELTA, VOCAB = 500, 50, 20, 4.0, 1e-4, 32

# Data: each sequence counts upwards from a random token. Person p owns the rows 2p and 2p + 1.
torch.manual_seed(0)
tokens_NT = (torch.randint(VOCAB, (2 * PEOPLE, 1)) + torch.arange(12)) % VOCAB
shape = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 16, "bos_token_id": 0, "eos_token_id": 0}
model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, **shape)).eval()

# Everything that the guarantee depends on: a sampling probability, a noise multiplier, a number of steps.
sampling_prob = EXPECTED_BATCH / PEOPLE
noise_multiplier = accounting.noise_multiplier(EPSILON, sampling_prob, STEPS, DELTA)
sampler = PoissonSampler(PEOPLE, sampling_prob, key=secrets.token_bytes(16))
mechanism = GaussianMechanism(noise_multiplier, divisor=EXPECTED_BATCH, noise=SecureNoise())
engine = sotto.attach(model, clip_norm=1.0)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)

for step in range(STEPS):
    people = torch.from_numpy(sampler.draw(step))
    total = engine.zeros()  # an empty batch is released too: noise around zero
    if len(people):
        rows = torch.cat([2 * people, 2 * people + 1])
        batch = {"input_ids": tokens_NT[rows], "labels": tokens_NT[rows]}
        losses_B = forward_losses(model, batch, "generation")
        total = engine.backward(losses_B, units=people.repeat(2))
    update = mechanism.privatize(total, step)  # from here on everything is post-processing
    for name, parameter in engine.parameters.items():
        parameter.grad = update[name]
    optimizer.step()

engine.detach()
with torch.no_grad():  # on training data, so this number is private: look at it here, do not publish it
    loss = forward_losses(model, {"input_ids": tokens_NT, "labels": tokens_NT}, "generation").mean()
spent = accounting.epsilon(noise_multiplier, sampling_prob, STEPS, DELTA)
print(f"epsilon <= {round_up(spent)} at delta {DELTA:g}, per person; loss {loss:.2f} nats per token")
