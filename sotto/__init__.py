"""Sotto: fine-tune language models on sensitive text under two budgets, privacy (epsilon, delta) and memory (GiB).

    cfg = sotto.Config.load("recipe.yaml")
    plan = sotto.plan(cfg)      # touches no data
    run = sotto.train(cfg)      # Run(path, model, statement, epsilon)

    engine = sotto.attach(model, clip_norm=1.0)     # per-unit clipped gradients in your own loop
    sotto.privacy.accounting.epsilon(noise_multiplier=1.0, sampling_prob=0.01, steps=1000, delta=1e-5)
    model = sotto.load("runs/.../model")

Names are loaded when they are first used, so that `import sotto` and the command line start at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "Config": "sotto.config",
    "SottoError": "sotto.errors",
    "BudgetExceeded": "sotto.errors",
    "ClippedSum": "sotto.gradients.base",
    "attach": "sotto.gradients.engine",
    "Plan": "sotto.privacy.plan",
    "load": "sotto.models.export",
    **dict.fromkeys(
        (
            "Run",
            "init",
            "check",
            "plan",
            "train",
            "resume",
            "evaluate",
            "audit",
            "generate",
            "export",
            "ls",
            "show",
            "ledger",
            "memory",
            "report",
            "doctor",
        ),
        "sotto.commands",
    ),
    "sweep": "sotto.sweeping",
}
_RENAMED = {"load": "load_exported"}

__all__ = [*sorted(_WHERE), "privacy"]

if TYPE_CHECKING:
    from sotto import privacy as privacy
    from sotto.commands import (
        Run as Run,
    )
    from sotto.commands import (
        audit as audit,
    )
    from sotto.commands import (
        check as check,
    )
    from sotto.commands import (
        doctor as doctor,
    )
    from sotto.commands import (
        evaluate as evaluate,
    )
    from sotto.commands import (
        export as export,
    )
    from sotto.commands import (
        generate as generate,
    )
    from sotto.commands import (
        init as init,
    )
    from sotto.commands import (
        ledger as ledger,
    )
    from sotto.commands import (
        ls as ls,
    )
    from sotto.commands import (
        memory as memory,
    )
    from sotto.commands import (
        plan as plan,
    )
    from sotto.commands import (
        report as report,
    )
    from sotto.commands import (
        resume as resume,
    )
    from sotto.commands import (
        show as show,
    )
    from sotto.commands import (
        train as train,
    )
    from sotto.config import Config as Config
    from sotto.errors import BudgetExceeded as BudgetExceeded
    from sotto.errors import SottoError as SottoError
    from sotto.gradients.base import ClippedSum as ClippedSum
    from sotto.gradients.engine import attach as attach
    from sotto.models.export import load_exported as load  # noqa: F401
    from sotto.privacy.plan import Plan as Plan


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        value = getattr(importlib.import_module(_WHERE[name]), _RENAMED.get(name, name))
    elif name == "privacy":
        value = importlib.import_module("sotto.privacy")
        importlib.import_module("sotto.privacy.accounting")
    else:
        raise AttributeError(f"module 'sotto' has no attribute '{name}'")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
