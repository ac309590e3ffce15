"""What the owner of a device allows, checked by the device itself before it computes anything.

A server could ask for more than its users were told: less noise, more rounds, another model, or the same once more
under another name. So the device recomputes what its part would cost from the numbers of the order, counts the rounds
it took part in, and remembers the runs, in files of its own. Epsilon is that of one user added or removed.

A server that announces a small sampling probability, so that its rounds seem to cost little, and then asks a user again
and again, is found out by the count: no user is drawn so often by chance. What a policy cannot do is check that the
server really adds the noise it announces; that is what `noise: clients` is for, and what the statement says.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

from sotto.config_types import Count, Positive, Section
from sotto.errors import SottoError
from sotto.federated.server import Agreement
from sotto.privacy import accounting
from sotto.privacy.accounting import PoissonGaussian


class Policy(Section):
    """The owner's limits. Those that are not given are not checked.

    A file of these keys is YAML, named by `policy` in the configuration of the SuperNode.
    """

    max_epsilon: Positive
    """The most that a run may cost at its own delta, whether it announces it or not."""
    max_rounds: Count
    """The most rounds in which a user of this device answers, per run."""
    max_total_epsilon: Positive | None = None
    """The most that all runs together may cost, at `max_delta`. A run counts with all that it announced."""
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
    """In which rounds of which run a user answered: files at the device, written before anything is computed."""

    def __init__(self, path: Path):
        self._path = path

    def admit(self, run: str, agreement: Agreement, policy: Policy) -> None:
        """Notes that a run is going on, with all that it announces.

        Raises:
          SottoError: SOT940, all runs together would cost more than `max_total_epsilon`; SOT943, as for `enter`.
        """
        with self._held():
            path = self._path.with_suffix(".runs.json")
            known = json.loads(path.read_text()) if path.exists() else {}
            key = f"{run}/{agreement.digest[:16]}"  # the same name with other numbers is another run
            if key in known:
                return
            known[key] = (agreement.noise_multiplier, agreement.sampling_prob, agreement.steps)
            if policy.max_total_epsilon is not None:
                events = [(PoissonGaussian(z, q), steps) for z, q, steps in known.values()]
                total = accounting.composed_epsilon(events, policy.max_delta, precision="coarse")
                if not total <= policy.max_total_epsilon * 1.02:
                    what = f"all runs together would cost epsilon {accounting.round_up(total)}"
                    raise refuse(what, "policy.max_total_epsilon", "raise it, or take no part in this run")
            _replace(path, known)

    def enter(self, run: str, user: int, step: int, most: int) -> None:
        """Notes that a user answers a round.

        Raises:
          SottoError: SOT942, the round is not after the last one; SOT940, it would be one more than `most`; SOT943, the
            file cannot be read or written.
        """
        with self._held():
            self._enter(f"{run}/{user}", step, most)

    @contextmanager
    def _held(self) -> Iterator[None]:
        try:
            with open(self._path.with_suffix(".lock"), "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                yield
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
            what = f"this user has answered {count} rounds, the most that it should be asked for"
            raise refuse(what, "policy.max_rounds, or the announced sampling_prob", "raise it, or end the run")
        known[key] = (count + 1, step)
        _replace(self._path, known)


def _replace(path: Path, known: object) -> None:
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        json.dump(known, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


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
