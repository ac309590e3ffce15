"""What an audit found: the proven upper bound beside the attacked lower bounds."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from sotto.auditing.bounds import LowerBound
from sotto.privacy.accounting import round_up

CERTAINTY = 0.9999


@dataclass(frozen=True)
class AuditReport:
    """The result of one attack.

    Attributes:
      attack: `mechanism` or `membership`.
      claimed: the epsilon that the run's statement promises.
      bounds: what the attack proves; each of them holds with `confidence`.
      certain: the largest lower bound that holds with `CERTAINTY`: an alarm must not be a matter of chance.
      numbers: other figures of the attack, private ones included.
      notes: what has to be known to read them.
    """

    attack: str
    claimed: float
    delta: float
    confidence: float
    bounds: list[LowerBound]
    certain: float
    numbers: dict[str, float]
    notes: list[str] = field(default_factory=list)

    @property
    def lower(self) -> float:
        """The best of the lower bounds."""
        return max((bound.epsilon for bound in self.bounds), default=0.0)

    @property
    def bug(self) -> bool:
        """The attack has refuted the promise: something that the guarantee rests on is broken."""
        return self.certain > self.claimed

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "lower": self.lower, "bug": self.bug}

    def render(self) -> str:
        """As text for a terminal."""
        lines = [
            f"attack           {self.attack}",
            f"promised         epsilon at most {round_up(self.claimed)}   (delta {self.delta:g})",
            f"attacked         epsilon at least {self.lower:.3f}   ({self.confidence:.0%} confidence)",
        ]
        for bound in self.bounds:
            lines.append(f"  {bound.method:<17} {bound.epsilon:<8.3f} if {bound.assumes}")
        for name, value in self.numbers.items():
            shown = f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
            lines.append(f"{name.replace('_', ' '):<16} {shown}")
        lines += [f"note             {note}" for note in self.notes]
        if self.bug:
            lines += ["", "BUG: the attack proves more than was promised. Do not release this model. Please report it."]
        return "\n".join(lines)
