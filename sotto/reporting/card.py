"""The model card of an exported model: YAML metadata that machines can filter by, then words."""

from __future__ import annotations

from typing import Any

import yaml
from jinja2 import Environment

_CARD = """---
{{ metadata }}---

# {{ title }}

{% if private -%}
Fine-tuned from `{{ base }}` with differential privacy by Sotto.

{{ statement_block }}
{%- else -%}
**NOT PRIVATE.** Fine-tuned from `{{ base }}` WITHOUT a privacy guarantee ({{ reason }}).
Treat it as you treat the training data.
{%- endif %}

## Use

```python
import sotto

model = sotto.load("path/to/this/folder")
```
{% if plain %}
It is a plain Hugging Face folder: `transformers` loads it too.
{% elif pooled %}
`sotto.load` is needed: the classifier averages token vectors, which `transformers`' own class for this model does not.
{% elif side %}
A side network stands beside the frozen model and cannot be merged into it. `transformers`' Auto classes load it, too,
once `sotto.models.side` is imported.
{% elif reversible %}
Its layers are coupled, which changes what they compute, so the weights do not fit the plain model. `transformers`' Auto
classes load it, too, once `sotto.models.reversible` is imported.
{% else %}
It is a peft adapter for `{{ base }}`.
{% endif %}"""


def render(
    *,
    base: str,
    title: str,
    task: str,
    form: str,
    privacy: dict[str, Any] | None,
    statement: str | None,
    reason: str | None,
) -> str:
    """Returns README.md of the exported folder.

    Args:
      base: public name of the base model, never a path.
      form: `plain` (any Hugging Face loader), `pooled` (needs sotto.load), `side`, `reversible` or `adapter`.
      privacy: content of privacy.json, or None for a run without a guarantee.
      statement: its text, or None.
      reason: why there is none.
    """
    kept = (
        "epsilon",
        "delta",
        "unit",
        "neighboring_relation",
        "accountant",
        "noise_multiplier",
        "sampling_prob",
        "steps",
    )
    dp = {key: privacy[key] for key in kept} if privacy else {"private": False, "reason": reason}
    metadata = {
        "base_model": base,
        "pipeline_tag": "text-classification" if task == "classification" else "text-generation",
        "library_name": "peft" if form == "adapter" else "transformers",
        "tags": ["sotto", "differential-privacy"] if privacy else ["sotto", "not-private"],
        "dp": dp,
    }
    template = Environment(autoescape=False, keep_trailing_newline=True).from_string(_CARD)  # noqa: S701 - Markdown
    return template.render(
        metadata=yaml.safe_dump(metadata, sort_keys=False),
        title=title,
        base=base,
        private=privacy is not None,
        statement_block=f"```text\n{statement}```" if statement else "",
        reason=reason,
        plain=form == "plain",
        pooled=form == "pooled",
        side=form == "side",
        reversible=form == "reversible",
    )
