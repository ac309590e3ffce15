"""The section `setting` of a split run: what the customer computes, and what is done to it before it leaves."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from sotto.config_types import Count, Natural, Positive, Real, Section, not_bool

Privatizer = Literal["none", "dx_tokens", "dx_hidden", "dx_pooled", "gaussian", "gaussian_pooled"]


class SplitSetting(Section):
    """A customer holds the text, a vendor holds the model; privatized representations leave the customer once."""

    kind: Literal["split"]
    """Where data and compute live: `split` between a customer and a vendor."""
    role: Literal["vendor", "customer"] | None = None
    """Whose configuration this is. `sotto split simulate` plays both."""
    layer: Natural = 0
    """Blocks that the customer runs: 0 is the embeddings alone."""
    privatizer: Privatizer
    """What is done to representations before they leave. `none` protects nothing. `dx_tokens` replaces tokens,
    `dx_hidden` noises representations, `dx_pooled` their mean: metric privacy. `gaussian` and `gaussian_pooled` clip
    and noise all rows or their mean: differential privacy of the whole text."""
    segment: Annotated[int, BeforeValidator(not_bool), Field(ge=2)] | None = None
    """`dx_pooled`: tokens that one row stands for, their mean, in the order of the text; a rest joins the last ones.
    Default: one row for the whole text."""
    eta: Positive | None = None
    """Metric privatizers: the noise has mean length width / eta. `sotto split meaning` shows what a value means."""
    epsilon: Positive | None = None
    """Gaussian privatizers: the budget of one text's only release."""
    delta: Annotated[Real, Field(gt=0, lt=1)] = 1e-5
    """Gaussian privatizers: the probability with which epsilon may fail to hold."""
    clip_norm: Positive = 1.0
    """Gaussian privatizers: bound on the norm of what leaves of one text."""
    labels: Literal["sent", "randomised", "kept"] = "sent"
    """`sent` as they are; `randomised` with `label_epsilon`; `kept`: the customer answers scores with noised gradients,
    `label_epsilon` for all epochs together."""
    label_epsilon: Positive | None = None
    """The budget of one label."""
    exempt: Literal["none", "list", "selected"] = "none"
    """Tokens that leave unchanged. `list`: those of a public word list. `selected`: those that tell most about the
    class, chosen from noisy counts of the private texts. Layer 0 and metric privatizers only."""
    exempt_file: str | None = None
    """A public word list, one word a line."""
    exempt_share: Annotated[Real, Field(gt=0, lt=1)] = 0.01
    """`selected`: the part of the vocabulary that is chosen for each class at most."""
    exempt_epsilon: Positive = 1.0
    """`selected`: what the choice costs, at `delta`."""
    chunk_examples: Count = 256
    """Examples in one piece of the upload. A piece is the least that is sent again after a break."""

    @model_validator(mode="after")
    def _privatizer_has_its_numbers(self) -> SplitSetting:
        metric = self.privatizer.startswith("dx_")
        if metric != (self.eta is not None):
            raise ValueError("eta belongs to privatizer: dx_tokens, dx_hidden or dx_pooled, and they need it")
        if self.privatizer.startswith("gaussian") != (self.epsilon is not None):
            raise ValueError("epsilon belongs to privatizer: gaussian or gaussian_pooled, and both need it")
        if (self.labels != "sent") != (self.label_epsilon is not None):
            raise ValueError("label_epsilon belongs to labels: randomised or kept, and both need it")
        if self.segment is not None and self.privatizer != "dx_pooled":
            raise ValueError("segment belongs to privatizer: dx_pooled; dx_hidden is one row for each token")
        if self.privatizer == "dx_tokens" and self.layer != 0:
            raise ValueError("privatizer: dx_tokens sends tokens, so it needs layer: 0")
        if self.exempt != "none" and not (self.privatizer in ("dx_tokens", "dx_hidden") and self.layer == 0):
            raise ValueError(
                "exempt needs privatizer: dx_tokens or dx_hidden, and layer: 0; above the embeddings, an unchanged row "
                "would disclose the tokens around it as well"
            )
        if (self.exempt == "list") != (self.exempt_file is not None):
            raise ValueError("exempt_file belongs to exempt: list, which needs it")
        return self

    @property
    def pooled(self) -> bool:
        """Whether one row leaves for all tokens of a text together."""
        return self.privatizer.endswith("_pooled") and self.segment is None

    def most_rows(self, max_length: int) -> int:
        """Rows that leave of one text at most."""
        return 1 if self.pooled else max(1, max_length // (self.segment or 1))


class CentralSetting(Section):
    """Data and model lie on one machine."""

    kind: Literal["central"] = "central"
    """Where data and compute live: on one machine."""
