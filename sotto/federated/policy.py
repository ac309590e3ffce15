"""What the owner of a device allows, checked by the device itself before it computes anything.

A server could ask for more than its users were told: less noise, more rounds, another model. So the device recomputes
what its part would cost from the numbers of the order, and counts the rounds it took part in, in a file of its own.
What a policy cannot do is check that the server really adds the noise it announces; that is what `noise: clients` is
for, and what the statement says.
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

from pydantic import ValidationError

from sotto.config_types import Count, Positive, Section
from sotto.errors import SottoError
from sotto.federated.server import Agreement
from sotto.privacy import accounting


class Policy(Section):
    """The owner's limits. Those that are not given are not checked.

    A file of these keys is YAML, named by `policy` in the configuration of the SuperNode.
    """

    max_epsilon: Positive
    """The most that a run may cost at its own delta, whether it announces it or not."""
    max_rounds: Count
    """The most rounds in which a user of this device answers, per run."""
    min_noise_multiplier: Positive | None = None
    """The least noise, in clip norms."""
    max_delta: Positive = 1e-4
    """The largest delta of a run."""
    model: str | None = None
    """Fingerprint of the model. `sotto federated fingerprint CONFIG` prints it."""
    codec: str | None = None
    """Name of the only codec that is allowed."""
    masks: bool = False
    """Whether this device answers masked rounds alone, of which the server learns the sum."""
    min_others: Count | None = None
    """The least number of other users in such a sum, by the keys that the server shows; implies `masks`."""


def refuse(what: str, where: str, fix: str) -> SottoError:
    """What a device answers to a server that asks for what its owner does not allow."""
    return SottoError("SOT940", what=what, where=where, why="the owner of this device does not allow it", fix=fix)


def check(policy: Policy, agreement: Agreement, own_model: str) -> None:
    """Compares what a server announces with the owner's limits and with this device's own model.

    Raises:
      SottoError: SOT940, it is outside the limits; SOT941, the models differ.
    """
    if agreement.model != own_model:
        raise SottoError(
            "SOT941", what=f"the server trains another model ({agreement.model[:12]}…)", where="agreement.model",
            why=f"this device has {own_model[:12]}…, and an update of one is none of the other",
            fix="use the same model folder and the same section method on both sides",
        )  # fmt: skip
    limits = [
        (policy.model in (None, agreement.model), "the model is another", "policy.model"),
        (policy.codec in (None, agreement.codec.get("codec")), "the codec is another", "policy.codec"),
        (
            not (policy.masks or policy.min_others) or agreement.local.get("masks") is True,
            "messages are not masked",
            "policy.masks",
        ),
        (agreement.delta <= policy.max_delta, f"delta is {agreement.delta:g}", "policy.max_delta"),
        (
            agreement.noise_multiplier >= (policy.min_noise_multiplier or 0),
            f"the noise multiplier is {agreement.noise_multiplier:g}",
            "policy.min_noise_multiplier",
        ),
    ]
    for allowed, what, where in limits:
        if not allowed:
            raise refuse(what, where, "ask the server's operator, or change the policy")
    # Not the epsilon that the server claims: what its numbers give.
    epsilon = accounting.epsilon(
        agreement.noise_multiplier, agreement.sampling_prob, agreement.steps, agreement.delta, precision="coarse"
    )
    if not epsilon <= policy.max_epsilon * 1.02:  # coarse accounting is up to 1 % above fine
        what = f"the run would cost epsilon {accounting.round_up(epsilon)} at delta {agreement.delta:g}"
        raise refuse(what, "policy.max_epsilon", "more noise, fewer rounds, or a larger max_epsilon")


class Attendance:
    """In which rounds of which run a user answered: a file at the device, written before anything is computed."""

    def __init__(self, path: Path):
        self._path = path

    def enter(self, run: str, user: int, step: int, most: int) -> None:
        """Notes that a user answers a round.

        Raises:
          SottoError: SOT942, the round is not after the last one; SOT940, it would be one more than `most`; SOT943, the
            file cannot be read or written.
        """
        try:
            with open(self._path.with_suffix(".lock"), "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                self._enter(f"{run}/{user}", step, most)
        except (OSError, ValueError, TypeError) as error:
            raise SottoError(
                "SOT943", what=f"attendance cannot be kept: {type(error).__name__}", where=str(self._path),
                why="without it this device cannot tell how often it has answered",
                fix="make the file readable and writable, or remove it if no run is going on",
            ) from None  # fmt: skip

    def _enter(self, key: str, step: int, most: int) -> None:
        known = json.loads(self._path.read_text()) if self._path.exists() else {}
        count, last = known.get(key, (0, -1))
        if step < last:
            raise SottoError(
                "SOT942", what=f"round {step} was asked for after round {last}", where=f"run and user {key}",
                why="a stale order would make this user answer a round that is over",
                fix="start the server again from its newest checkpoint",
            )  # fmt: skip
        if count >= most:
            raise refuse(f"this user has answered {count} rounds", "policy.max_rounds", "raise it, or end the run")
        known[key] = (count + 1, step)
        temporary = self._path.with_suffix(f".{os.getpid()}.tmp")
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            json.dump(known, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self._path)


def load(path: Path) -> Policy:
    """Reads a policy.

    Raises:
      SottoError: SOT944, the file is missing, or is no policy.
    """
    import yaml

    try:
        return Policy(**yaml.safe_load(path.read_text()))
    except (OSError, TypeError, ValueError, ValidationError, yaml.YAMLError) as error:
        raise SottoError(
            "SOT944", what=f"this is not a policy: {str(error).splitlines()[0]}", where=str(path),
            why="a device answers only within its owner's limits",
            fix="write max_epsilon and max_rounds, and what else docs/federated.md lists",
        ) from None  # fmt: skip
