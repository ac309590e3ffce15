"""`sotto init`: a commented configuration, with the public numbers counted once from the file."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import PydanticUndefined

from sotto import config_file
from sotto.config import Config, DataSection, Section
from sotto.data.records import Table, read_table
from sotto.errors import SottoError
from sotto.privacy.accounting import suggest_delta

MAX_CLASSES = 200


def write_yaml(
    *,
    model: str,
    data: str,
    text: str | None,
    label: str | None,
    unit: str | None,
    epsilon: float,
    prompt: str | None,
    completion: str | None,
) -> str:
    """See `sotto.init`."""
    if unit is None:
        raise SottoError(
            "SOT106", what="--unit is missing", where="sotto init",
            why="epsilon means nothing without saying who is protected",
            fix="--unit <column that names the person>, or --unit record",
        )  # fmt: skip
    columns = {"text": text, "label": label, "prompt": prompt, "completion": completion}
    given = {key: value for key, value in columns.items() if value is not None}
    try:
        section = DataSection.model_validate({"train": data, **given})
    except ValidationError as error:
        raise SottoError("SOT107", what=str(error.errors()[0]["msg"]).removeprefix("Value error, "), where="sotto init",
                         why="the task follows from the columns",
                         fix="--text and --label, or --prompt and --completion, or --text alone") from None  # fmt: skip
    wanted = [*given.values(), *([unit] if unit != "record" else [])]
    table = read_table(section, data, section.split, wanted)
    values: dict[str, dict[str, Any]] = {"data": {"train": data, **given}}
    if label is not None:
        values["data"]["labels"] = _classes(table, label)
    counts = Counter(v for v in table.columns[unit] if v.strip()) if unit != "record" else None
    num_units = len(counts) if counts is not None else len(table.lines)
    if num_units == 0:
        raise SottoError("SOT211", what="not one row can be used", where=table.source,
                         why=f"the file holds no rows, or none with a value in '{unit}'",
                         fix="check the file and --unit")  # fmt: skip
    batch = min(num_units, max(16, round(num_units / 16)))
    values["privacy"] = {"unit": unit, "num_units": num_units, "epsilon": epsilon, "delta": suggest_delta(num_units)}
    if counts:
        typical = sorted(counts.values())[math.ceil(0.9 * len(counts)) - 1]
        values["privacy"]["max_examples_per_unit"] = min(typical, 16)
    values["model"] = {"name": model, "pooling": _pooling(model)} if label is not None else {"name": model}
    values["method"] = {"train": "lora", "clip_norm": 1.0}
    values["run"] = {"expected_batch_size": batch, "epochs": 10, "learning_rate": 1e-3}
    values["output"] = {"dir": "runs"}
    config = config_file.validate(Config, values, config_file.Source(name="sotto init"))
    return render(config, values, Path(data).stem)


def note_on(model: str) -> str | None:
    """What is worth saying of the model's name before a run looks for it."""
    if Path(model).is_dir():
        return None
    return f"note: there is no folder '{model}' here, so a run takes it for the name of a model on the Hub"


def _pooling(model: str) -> str:
    """Sentence encoders say so in a file of their own; their token average means more than their first token."""
    return "mean" if (Path(model) / "1_Pooling").is_dir() else "model"


def _classes(table: Table, label: str) -> list[str]:
    classes = sorted({value for value in table.columns[label] if value.strip()})
    if len(classes) > MAX_CLASSES:
        raise SottoError(
            "SOT108", what=f"column '{label}' holds {len(classes)} different values", where=table.source,
            why="that looks like text or an identifier, not a class", fix="name the column of the class with --label",
        )  # fmt: skip
    return classes


def render(config: Config, given: dict[str, dict[str, Any]], name: str) -> str:
    """The configuration as YAML: what is set, then every other key as a comment with its default and its meaning."""
    lines = [
        f"# sotto train {name}.yaml",
        "# Written by 'sotto init'. num_units and labels were counted from the data and become public:",
        "# they are named in the statement. Round num_units if even the count is sensitive.",
        "",
    ]
    for section_name in type(config).model_fields:
        section: Section = getattr(config, section_name)
        lines += [f"# {'-' * 4} {(type(section).__doc__ or '').strip().splitlines()[0]}", f"{section_name}:"]
        written = given.get(section_name, {})
        for key, info in type(section).model_fields.items():
            comment = " ".join((info.description or "").split())
            if key in written:
                value = _inline(section.model_dump(mode="json")[key])
                lines.append(f"  {key}: {value}" + (f"  # {comment}" if comment else ""))
            elif info.default is not PydanticUndefined:
                lines.append(f"  # {key}: {_inline(_plain(info.default))}" + (f"  # {comment}" if comment else ""))
        lines.append("")
    return "\n".join(lines)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _inline(value: Any) -> str:
    if value is None:
        return "null"
    return config_file.dump(value, flow=True)
