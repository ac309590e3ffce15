"""`sotto report`: one page about a run, for whoever has to sign it.

The page is a single HTML file: styles and charts are inside, nothing is fetched, nothing is a script. It shows public
facts alone, those of the statement, the plan and the configuration: no counts of the data, no scores, no paths, so that
it can be handed over with the model. Its numbers are computed again from the plan, never read from a text.
"""

from __future__ import annotations

import datetime
import json
import math
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment

import sotto
from sotto.auditing.bounds import LowerBound
from sotto.auditing.report import AuditReport
from sotto.config import Config
from sotto.errors import SottoError
from sotto.privacy import accounting, statement
from sotto.privacy.accounting import round_up
from sotto.privacy.plan import Plan
from sotto.privacy.statement import Guarantee
from sotto.reporting.charts import Axis, Line, line_chart, round_ticks
from sotto.rundir import RunDir

TEMPLATE = "page.html.j2"
FEWEST_ALARMS = 0.0001
"""The least share of false alarms on the chart of what an attacker finds."""
MOST_AUDIT_BYTES = 1 << 20
AGAIN = "sotto audit CONFIG --json > audit.json, with the configuration of the run"


@dataclass(frozen=True)
class Fact:
    """A row of a table."""

    name: str
    value: str


def write_report(path: Path, to: Path, audits: tuple[Path, ...] = ()) -> Path:
    """Writes the page of a finished run.

    Args:
      path: the run folder.
      to: the file to write; an older one is replaced.
      audits: what `sotto audit CONFIG --json` printed, to be set beside the promise.

    Raises:
      SottoError: SOT509, the run has not finished; SOT516, its files are damaged; SOT525, an audit cannot be used, or
        is of another configuration; SOT503, the page cannot be written.
    """
    run = RunDir.open(path)
    if not run.finished:
        raise SottoError(
            "SOT509", what="the run has not finished", where=str(run.path), why="its guarantee is not settled yet",
            fix=f"sotto resume {run.path}",
        )  # fmt: skip
    run.verify_model()
    read = tuple(read_audit(file) for file in audits)
    for file, audit in zip(audits, read, strict=True):
        _require_same_promise(run.plan(), audit, file)
    return save(render(run, run.read_json("privacy.json"), read), to)


def save(html: str, to: Path) -> Path:
    """Writes a page. Raises SOT503."""
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_text(html, encoding="utf-8")
    except OSError as error:
        raise SottoError(
            "SOT503", what=f"cannot write: {error.strerror or error}", where=str(to),
            why="the page needs a place; the run itself is untouched", fix="choose a writable file with --to",
        ) from None  # fmt: skip
    return to


def render(run: RunDir, facts: dict[str, Any], audits: tuple[AuditReport, ...] = ()) -> str:
    """The page as HTML.

    Args:
      run: its folder, with everything that the end of a run writes but privacy.json.
      facts: what privacy.json says, or will say.
    """
    plan, config = run.plan(), run.config()
    values: dict[str, Any] = {
        "title": run.id,
        "version": sotto.__version__,
        "written": datetime.date.today().isoformat(),
        "private": facts["private"],
        "reason": plan.not_private,
        "recipe": _recipe(config, plan),
        "files": [Fact(name, digest) for name, digest in sorted(run.released().items())],
        "audits": audits,
        "round_up": round_up,
    }
    if facts["private"]:
        values |= _promised(Guarantee.from_facts(plan, facts), facts)
    source = (resources.files("sotto.reporting") / TEMPLATE).read_text(encoding="utf-8")
    return Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(source).render(values)


def _promised(g: Guarantee, facts: dict[str, Any]) -> dict[str, Any]:
    plan = g.plan
    return {
        "epsilon": round_up(g.epsilon),
        "budget": f"{plan.epsilon:g}",
        "spent": min(100.0, 100 * g.epsilon / (plan.epsilon or 1.0)),
        "delta": f"{g.delta:g}",
        "unit": plan.unit,
        "promise": statement.promise(g),
        "how": statement.how(g),
        "lost": statement.lost_steps(g),
        "dataset": statement.dataset(g),
        "released": statement.RELEASED,
        "not_covered": statement.not_covered(plan),
        "found": round_up(100 * g.detection_rate(0.01), 1),
        "adversaries": [(a, statement.bound_of(a)) for a in g.adversaries],
        "terms": _terms(g),
        "charts": [_attack_chart(g), *([] if plan.whole else [_steps_chart(g)]), *_delta_charts(g)],
        "versions": [Fact(name, value) for name, value in facts["versions"].items()],
    }


def _terms(g: Guarantee) -> list[Fact]:
    plan = g.plan
    also = [Fact("also", f"epsilon {round_up(g.epsilon_at_delta)} at delta {plan.delta:g}")] if plan.pure else []
    return [
        Fact("protected unit", f"{plan.unit}: {statement.who(plan)}"),
        Fact(
            "neighbouring datasets", f"{statement.RELATIONS[plan.neighboring_relation]} ({plan.neighboring_relation})"
        ),
        Fact("epsilon", f"{round_up(g.epsilon)}, an upper bound, rounded up; budget {plan.epsilon:g}"),
        Fact("delta", f"{g.delta:g}" + (" (pure)" if plan.pure else "")),
        *also,
        Fact("for comparison", f"a Gaussian mechanism of this epsilon and delta has mu {round_up(g.mu)}"),
        Fact("Renyi accounting", "not available" if plan.rdp_epsilon is None else round_up(plan.rdp_epsilon)),
        Fact("without amplification by sampling", round_up(g.unamplified_epsilon)),
        Fact("noise multiplier", f"{plan.noise_multiplier:.6g} ({plan.noise})"),
        Fact("sampling probability", f"{plan.sampling_prob:.6g}, each unit by itself (Poisson)"),
        Fact("steps", f"{g.steps_taken:,} taken, {g.steps_charged:,} charged"),
        Fact("public count of units", f"{plan.num_units:,}"),
    ]


def _recipe(config: Config, plan: Plan) -> list[Fact]:
    """How the model was made, without names of the owner's folders, files and columns other than the unit's."""
    name = config.model.name
    how = {"auto": "book_keeping"}.get(config.method.gradient, config.method.gradient)
    return [
        Fact("base model", Path(name).name if Path(name).exists() or Path(name).is_absolute() else name),
        Fact("task", config.data.task),
        Fact("what was trained", config.method.train),
        Fact("gradients", how),
        Fact("clipping", f"{plan.clipping}, norm {plan.clip_norm:g}"),
        Fact("where text and model were", config.setting.kind),
        Fact("what the model folder holds", plan.result),
    ]


def _attack_chart(g: Guarantee) -> str:
    alarms = _between(FEWEST_ALARMS, 1.0, 65)  # so close that no chord can be seen to lie below the bound
    bound = [(100 * a, 100 * g.detection_rate(a)) for a in alarms]
    percent = [(value, f"{value:g}") for value in (0.01, 0.1, 1.0, 10.0, 100.0)]
    return line_chart(
        "Members that an attacker finds, at most, by the false alarms that the attacker accepts",
        Axis("false alarms, %", 100 * FEWEST_ALARMS, 100.0, percent, log=True),
        Axis("members found, at most, %", 0, 100, round_ticks(0, 100)),
        [Line("", [(100 * a, 100 * a) for a in alarms], faint=True), Line("", bound)],
    )


def _steps_chart(g: Guarantee) -> str:
    plan, last = g.plan, max(1, g.steps_charged)
    steps = sorted({1} | {max(1, round(last * share)) for share in (0.02, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8)})
    spent = [(0.0, 0.0)] + [
        (
            float(n),
            accounting.pure_epsilon([(plan.event, n)]) if plan.pure else plan.epsilon_at(n, plan.delta, "coarse"),
        )
        for n in steps
        if n < last
    ]
    spent.append((float(last), g.epsilon))
    budget = plan.epsilon or g.epsilon
    top = 1.1 * max(budget, g.epsilon, 1e-3)
    return line_chart(
        "Epsilon spent after each step, and the budget",
        Axis("steps", 0, last, round_ticks(0, last)),
        Axis("epsilon", 0, top, round_ticks(0, top)),
        [Line("budget", [(0.0, budget), (float(last), budget)], faint=True), Line("", spent)],
    )


def _delta_charts(g: Guarantee) -> list[str]:
    """Epsilon over delta: there is no one pair, but a curve of them."""
    if g.plan.pure or not g.steps_charged:
        return []
    deltas = sorted({10.0**-power for power in range(1, 10)} | {g.delta})
    points = [(d, g.epsilon if d == g.delta else g.plan.epsilon_at(g.steps_charged, d, "coarse")) for d in deltas]
    top = 1.05 * max(max(epsilon for _, epsilon in points), 1e-3)
    return [
        line_chart(
            "Epsilon by delta: every point of the curve holds",
            Axis("delta", 1e-9, 0.1, [(10.0**-n, f"1e-{n}") for n in (9, 7, 5, 3, 1)], log=True),
            Axis("epsilon", 0, top, round_ticks(0, top)),
            [Line("", points)],
        )
    ]


def _between(low: float, high: float, count: int) -> list[float]:
    """Numbers in equal ratios, both ends included."""
    return [low * (high / low) ** (n / (count - 1)) for n in range(count)]


def read_audit(file: Path) -> AuditReport:
    """What `sotto audit CONFIG --json` printed.

    Raises:
      SottoError: SOT525, it is not that, or its figures are private.
    """
    try:
        if file.stat().st_size > MOST_AUDIT_BYTES:
            raise ValueError("too large")
        values = json.loads(file.read_text(encoding="utf-8"))
        bounds = [LowerBound(**bound) for bound in values["bounds"]]
        kept = {key: values[key] for key in ("attack", "claimed", "delta", "confidence", "certain", "numbers", "notes")}
        report = AuditReport(bounds=bounds, **kept)
        if not all(isinstance(v, int | float) for v in (report.claimed, report.lower, report.certain, report.delta)):
            raise TypeError("a figure is no number")
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise SottoError(
            "SOT525", what="this is not a report of an audit" if file.exists() else "there is no such file",
            where=str(file), why="the page would show what it says",
            fix=AGAIN,
        ) from None  # fmt: skip
    if report.attack != "mechanism":
        raise SottoError(
            "SOT525", what=f"figures of the attack '{report.attack}' are functions of private data", where=str(file),
            why="the page is there to be handed over", fix="use an audit of the configuration: it touches no data",
        )  # fmt: skip
    return report


def _require_same_promise(plan: Plan, audit: AuditReport, file: Path) -> None:
    """What was found of one configuration says nothing about the promise of another one. Raises SOT525."""
    promised = plan.epsilon_after(plan.steps) if plan.private else math.inf
    delta = 0.0 if plan.pure else plan.delta
    if audit.delta != delta or not math.isclose(audit.claimed, promised, rel_tol=1e-3):
        raise SottoError(
            "SOT525",
            what=f"the audit is of a promise of epsilon {round_up(audit.claimed)} at delta {audit.delta:g}, which is "
            "not this run's",
            where=str(file), why="the page would set it beside the promise of this run", fix=AGAIN,
        )  # fmt: skip
