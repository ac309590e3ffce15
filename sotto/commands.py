"""One sub-command of `sotto` = one function here = one public Python function of the same name.

Heavy libraries are imported inside, so that `plan` answers in a second and `--help` at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sotto.config import Config
from sotto.errors import SottoError

if TYPE_CHECKING:
    from sotto.auditing.report import AuditReport
    from sotto.auditing.split import SplitReport
    from sotto.data import DataReport
    from sotto.memory_budget import MemoryTable
    from sotto.privacy.plan import Plan

ConfigLike = Config | str | Path


@dataclass
class Run:
    """A finished (or interrupted) run.

    Attributes:
      path: the run folder.
      model: the trained model, in memory, in eval mode.
      statement: the guarantee in words, or None for a run without one.
      epsilon: what the run earned, an upper bound; None without a guarantee.
      finished: False if it was stopped and can be resumed.
      steps: steps taken.
      notes: anything that did not go as planned.
    """

    path: Path
    model: Any
    statement: str | None
    epsilon: float | None
    finished: bool
    steps: int
    notes: list[str]


def _config(config: ConfigLike) -> Config:
    return config if isinstance(config, Config) else Config.load(config)


def plan(config: ConfigLike) -> Plan:
    """What a run will do and cost, from the configuration alone. Reads no data and no weights.

    Returns:
      The plan: noise_multiplier, sampling_prob, steps, planned epsilon, memory, and `plan.frontier()`.

    Raises:
      SottoError: a value is out of range, or the model's files are missing or unsafe.
    """
    from sotto import memory_estimate
    from sotto.models import source
    from sotto.privacy.plan import make_plan

    config = _config(config)
    made = make_plan(config)
    facts = source.inspect(source.resolve(config.model.name, config.model.revision))
    return dataclasses.replace(made, memory=memory_estimate.of_plan(config, facts))


def memory(
    config: ConfigLike, progress: Callable[[int, int], None] = lambda done, of: None, workers: int = 1
) -> MemoryTable:
    """What every method would need, by part, and the largest microbatch that fits. Reads the model's config.json alone.

    Args:
      config: a Config, or the path of a YAML file.
      progress: called with the number of methods that are done, and of all; each takes some seconds.
      workers: processes that share the work of a large model. More than one only in a script whose work begins below
        `if __name__ == "__main__":`, for they import it.

    Returns:
      The table: `rows`, the `pick` for the budget, and the budget, which is `run.memory` or what is free.

    Raises:
      SottoError: the model's config.json is missing or unsafe.
    """
    from sotto import memory_budget
    from sotto.devices import choose_device

    config = _config(config)
    return memory_budget.table(config, choose_device(config.run.device), progress, workers)


def train(config: ConfigLike, progress: Callable[[int, dict[str, Any]], None] | None = None) -> Run:
    """Fine-tunes a model within its privacy budget.

    Args:
      config: a Config, or the path of a YAML file.
      progress: called after each step with (steps done, numbers); some of the numbers are private.

    Raises:
      SottoError: bad input; nothing has been written and nothing charged.
      BudgetExceeded: the dataset's own budget does not allow the run.
    """
    from sotto import distributed, session

    stem = Path(config).stem if isinstance(config, str | Path) else "run"
    config = _config(config)
    session.require_central(config)
    if distributed.follows():
        return _followed(config)
    return run_session(session.start(config, stem, group=distributed.lead(config)), progress)


def resume(path: str | Path, progress: Callable[[int, dict[str, Any]], None] | None = None) -> Run:
    """Continues a run after a crash or a stop. Steps that have to be done again are charged again.

    A run that has finished is only opened: nothing is trained, written or charged.
    """
    from sotto import distributed, session
    from sotto.rundir import RunDir

    if (done := _finished(path)) is not None:
        return done
    config = RunDir.open(path).config()
    if distributed.follows():
        return _followed(config)
    return run_session(session.resume(path, group=distributed.lead(config)), progress)


def _followed(config: Config) -> Run:
    """The run as a process that is not the first of several sees it: it writes nothing, and states nothing."""
    from sotto import distributed

    done = distributed.follow(config)
    return Run(done.path, done.model, None, None, finished=True, steps=done.steps, notes=[])


def _finished(path: str | Path) -> Run | None:
    """A run that has nothing left to do, or None."""
    from sotto.rundir import RunDir

    run = RunDir.open(path)
    if not run.finished:
        return None
    from sotto.finish import finished_again
    from sotto.session import require_one_loop

    require_one_loop(run.config())
    model, facts, statement = finished_again(run)
    steps = facts.get("steps", run.read_json("plan.json")["steps"])
    return Run(run.path, model, statement, facts.get("epsilon"), finished=True, steps=steps, notes=[])


def run_session(
    session: Any,
    progress: Callable[[int, dict[str, Any]], None] | None,
    loop: Callable[[Any, Any], bool] | None = None,
) -> Run:
    """Runs what `sotto.session` built to its end, or until it is stopped.

    Args:
      loop: takes all steps, given session and metrics, and says whether it came to the end; default: `train_loop`.
    """
    from safetensors import SafetensorError

    from sotto import activations
    from sotto.finish import finish
    from sotto.losses import autocast
    from sotto.metrics import Metrics
    from sotto.training import graceful_stop, train_loop

    if progress is not None:
        session.progress = progress
    with session.held:
        try:
            metrics = Metrics(session.run.path, session.config.output.tensorboard)
            try:
                if session.config.method.side_cache and not session.done:
                    session.activations = activations.fill(session, autocast(session.config, session.device))
                with graceful_stop(session):
                    finished = (loop or train_loop)(session, metrics)
                if session.followers is not None:
                    session.followers.dismiss()
            finally:
                metrics.close()
            guarantee, statement = finish(session) if finished else (None, None)
        except (OSError, SafetensorError) as error:
            # safetensors reports a full disk in an exception of its own
            where = str(getattr(error, "filename", None) or session.run.path)
            raise SottoError(
                "SOT505", what=f"cannot write: {getattr(error, 'strerror', None) or error}", where=where,
                why="the disk is full or read-only; the last good checkpoint is untouched",
                fix=f"make room, then: sotto resume {session.run.path}",
            ) from error  # fmt: skip
        finally:
            session.engine.detach()
    return Run(
        path=session.run.path,
        model=session.model.eval(),
        statement=statement,
        epsilon=guarantee.epsilon if guarantee else None,
        finished=finished,
        steps=session.step,
        notes=session.notes,
    )


def evaluate(
    path: str | Path,
    data: str | None = None,
    batch_size: int = 64,
    epsilon: float | None = None,
    delta: float | None = None,
) -> dict[str, float]:
    """Scores a run on held-out data: exactly, or with noise and at a price (see `sotto.noisy_scores`).

    Args:
      path: a run folder.
      data: a file of the shape of the training data; default: `data.eval` of the run.
      epsilon, delta: of a noisy score, charged to the ledger of that data. Without epsilon the score is exact.

    Returns:
      classification: accuracy, loss, examples. generation: nats_per_token, perplexity, examples, tokens. A noisy one:
      accuracy or nats_per_token, the mean over units; margin_95, of the noise; units; epsilon, delta.
    """
    from sotto import evaluation, noisy_scores

    if epsilon is None:
        return evaluation.evaluate_run(Path(path), data, batch_size)
    return noisy_scores.noisy_score(Path(path), data, epsilon, delta, batch_size)


def audit(
    target: ConfigLike | str | Path,
    canaries: int = 5000,
    plant: int | None = None,
    limit: int = 2000,
    confidence: float = 0.95,
    kind: Literal["secret", "input", "new_token", "gradient"] = "input",
) -> AuditReport | SplitReport:
    """Attacks one's own training, and sets what the attack proves beside what was promised.

    Args:
      target: a configuration: a whole run's releases are attacked with canaries, without touching data or model. Or a
        run folder: its model is attacked with the training data and `data.eval`; the numbers are private. Or the
        configuration of a split run: what the customer would send is attacked; these numbers are private too.
      canaries: how many, for a configuration.
      plant: for a configuration: trains it instead, charged like any run, with half of so many canaries among the
        units, and attacks the result.
      limit: examples of each kind, for a run; texts that the attackers know, for a split run.
      confidence: of the lower bounds.
      kind: of planted canaries: sentences with a secret code, which a language model is then prompted for; random
        tokens; tokens that the model did not know before; or gradients of known direction, which are the worst case.

    Returns:
      The report; `report.bug` says that the attack refutes the promise.
    """
    if not isinstance(target, Config) and Path(target).is_dir():
        from sotto.auditing.membership import audit_membership

        return audit_membership(Path(target), limit, confidence)
    config = _config(target)
    if config.setting.kind == "split":
        from sotto.auditing.split import audit_split

        return audit_split(config, limit)
    if plant is not None:
        from sotto.auditing.planting import audit_by_planting

        return audit_by_planting(config, plant, confidence, kind)
    from sotto.auditing.mechanism import audit_mechanism

    return audit_mechanism(config, canaries, confidence)


def generate(
    path: str | Path, prompt: str, max_new_tokens: int = 64, temperature: float = 0.0, seed: int | None = None
) -> str:
    """Continues a prompt with a trained model. Greedy when temperature is 0.

    Args:
      path: a run folder or an exported model folder.
    """
    from sotto.evaluation import generate_text

    return generate_text(Path(path), prompt, max_new_tokens, temperature, seed)


def export(path: str | Path, to: str | Path, mode: Literal["merged", "adapter"] = "merged") -> Path:
    """Writes a run's model as a Hugging Face folder (`merged`) or a peft adapter, with its card, and reads it back.

    Args:
      path: a run folder that has finished.
      to: the folder to write; it must not exist.
    """
    from sotto.finish import export_run

    return export_run(Path(path), Path(to), mode)


def check(config: ConfigLike) -> DataReport:
    """The dataset doctor: rows, units, duplicates across units, classes. Counts and line numbers only, never text."""
    from sotto.data.load import load_dataset_for
    from sotto.models import load as models_load
    from sotto.models import source

    config = _config(config)
    tokenizer = models_load.load_tokenizer(source.resolve(config.model.name, config.model.revision))
    return load_dataset_for(config, tokenizer, "train").report


def ls(directory: str | Path = "runs") -> list[dict[str, Any]]:
    """The runs in a folder: name, state (finished, unfinished or damaged), steps, epsilon."""
    from sotto.rundir import list_runs

    return list_runs(Path(directory))


def show(path: str | Path) -> str:
    """The statement of a run, or what is known of an unfinished one."""
    from sotto.rundir import RunDir

    run = RunDir.open(path)
    planned = run.read_json("plan.json")
    if planned["not_private"]:
        return f"NOT PRIVATE: {planned['not_private']}.\nThis run has no guarantee and no statement.\n"
    if run.finished:
        return run.read("statement.txt")
    if planned.get("kind") == "split":
        through, step = run.split_progress(planned["steps"])
        if through:
            return f"The vendor's side, trained for {step} steps. What is promised is in the customer's statement.\n"
        return f"Unfinished, with no statement yet. Go on with: sotto split ... --resume {run.path}\n"
    return f"Unfinished: it has no statement yet. Continue it with: sotto resume {run.path}\n"


def report(path: str | Path, to: str | Path | None = None, audits: tuple[str | Path, ...] = ()) -> Path:
    """Writes one page about a finished run, as a single HTML file, for whoever has to sign it.

    It holds public facts alone, so it can be handed over with the model.

    Args:
      path: a run folder.
      to: the file to write; default: `report.html` in the run folder, where every run has one from its end on.
      audits: files of what `sotto audit CONFIG --json` printed, to be set beside the promise.
    """
    from sotto.reporting.page import write_report

    return write_report(Path(path), Path(to or Path(path) / "report.html"), tuple(map(Path, audits)))


def ledger(
    config: ConfigLike, epsilon: float | None = None, delta: float | None = None, close: str | None = None
) -> dict[str, Any]:
    """What has been spent on a configuration's dataset, over all runs; with epsilon, sets the dataset's own budget.

    Args:
      epsilon, delta: a budget for the dataset as a whole; a run that would pass it is refused.
      close: name of a run that will not go on. What it had planned and not spent becomes free; what it spent stays.
    """
    from sotto.spending import spending

    return spending(_config(config), epsilon, delta, close)


def init(
    model: str,
    data: str,
    text: str | None = None,
    label: str | None = None,
    unit: str | None = None,
    epsilon: float = 4.0,
    prompt: str | None = None,
    completion: str | None = None,
) -> str:
    """Writes a commented configuration for a model and a data file. Reads the data to count units and list classes.

    Returns:
      YAML text.
    """
    from sotto.initialise import write_yaml

    return write_yaml(
        model=model, data=data, text=text, label=label, unit=unit, epsilon=epsilon, prompt=prompt, completion=completion
    )


def doctor() -> list[tuple[str, bool, str]]:
    """Checks this machine: versions, devices, the noise generator, folders, and the hosts that Sotto may contact."""
    from sotto.diagnosis import examine

    return examine()
