"""What a run is: seven frozen sections, one per question, every key checked.

The file layout is `model / data / privacy / method / run / output`, and `setting` where it is not one machine. `sotto
init` writes a commented example. Unknown keys are refused, because a misspelt key that is silently ignored is the
commonest way to lose a guarantee.

Sections are plain frozen pydantic models: build them in Python, or read them with `Config.load`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from sotto import config_file
from sotto.config_federated import FederatedSetting, agree
from sotto.config_method import MethodSection
from sotto.config_split import CentralSetting, SplitSetting
from sotto.config_types import (
    Count,
    Fraction,
    Memory,
    Natural,
    Positive,
    Real,
    Section,
    bytes_of,
    whole_number_as_text,
)
from sotto.config_unused import unused


def _central_by_default(value: Any) -> Any:
    return {"kind": "central", **value} if isinstance(value, dict) else value


Setting = Annotated[
    CentralSetting | SplitSetting | FederatedSetting,
    Field(discriminator="kind"),
    BeforeValidator(_central_by_default),
]


class ModelSection(Section):
    """Which pretrained model."""

    name: str
    """A local folder or a Hub name. Safetensors weights only; code from the Hub is never run."""
    revision: str | None = None
    """A Hub commit, so that the same bytes are used again."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the forward and backward pass. Trained weights, clipping and noise stay in float32."""
    pooling: Literal["model", "mean"] = "model"
    """Classification only. `mean` averages the token vectors (sentence encoders); `model` uses the model's own head."""


class DataSection(Section):
    """Which text, and which columns of it."""

    train: str
    """A CSV, TSV, JSON-lines or Parquet file, a folder of .txt files, or a Hub dataset."""
    eval: str | None = None
    """A held-out file of the same shape. Never used for training."""
    public: str | None = None
    """A file of the same shape, of text that nobody needs protected: what `run.patience` looks at. Not `eval`."""
    subset: str | None = None
    """Hub datasets: the configuration name."""
    split: str = "train"
    """Hub datasets: the split that is trained on."""
    eval_split: str | None = None
    """Hub datasets: the split that is evaluated on."""
    text: str | None = None
    """Column of the text to classify, or of the plain text to learn from."""
    text_pair: str | None = None
    """Column of a second text, for pair classification."""
    label: str | None = None
    """Column of the class. Its presence makes the task classification."""
    labels: tuple[Annotated[str, BeforeValidator(whole_number_as_text)], ...] | None = None
    """The classes, in order. They are public: they come from you, not from the data."""
    prompt: str | None = None
    """Column of the prompt, for generation. No loss is taken on it."""
    completion: str | None = None
    """Column of the text that the model learns to write after the prompt."""
    max_length: Count = 128
    """Tokens per example. Longer texts are cut (classification, prompts) or split (plain text), and counted."""
    bad_rows: Literal["skip", "stop"] = "skip"
    """What to do with rows that cannot be used. They are listed by line number either way."""

    @property
    def task(self) -> Literal["classification", "generation"]:
        return "classification" if self.label is not None else "generation"

    @model_validator(mode="after")
    def _one_task(self) -> DataSection:
        if self.label is not None:
            if self.text is None:
                raise ValueError("label is given but text is not: name the column that holds the text")
            if self.prompt or self.completion:
                raise ValueError("label (classification) and prompt/completion (generation) exclude each other")
        elif self.completion is not None:
            if self.text is not None:
                raise ValueError("text and completion exclude each other: use prompt and completion, or text alone")
        elif self.text is None:
            raise ValueError("name the columns: text and label (classification), prompt and completion, or text alone")
        if self.prompt is not None and self.completion is None:
            raise ValueError("prompt is given but completion is not")
        if self.labels is not None and len(set(self.labels)) != len(self.labels):
            raise ValueError("labels holds the same class twice")
        return self


class PrivacySection(Section):
    """Who is protected, and how well."""

    unit: str
    """`record`, or the column that names the person (or account, or ward) whose whole contribution is protected."""
    num_units: Count
    """How many units the training data has. Public: it sets the sampling probability, and is in the statement."""
    epsilon: Positive | Literal["none"]
    """The budget of this run. `none` trains WITHOUT privacy, says so everywhere, and writes no statement."""
    delta: Annotated[Real, Field(gt=0, lt=1)] = 1e-5
    """The probability with which epsilon may fail to hold. Keep it well below 1/num_units. `zeroth_noise: laplace`
    gives delta 0 whatever this is: what its noise costs is then also stated at this delta, at which runs add up."""
    max_examples_per_unit: Count = 1
    """Contribution bound: how many examples of one unit are used at most. For unit: record it is 1."""
    dataset: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}$")] | None = None
    """Name of the dataset in the ledger. Runs under one name add up, also when rows are added later or the file is
    split. Default: a fingerprint of the text."""
    neighboring_relation: Literal["add_or_remove_one", "replace_one"] = "add_or_remove_one"
    """Which pairs of datasets must be hard to tell apart."""
    exact_noise: bool = False
    """Round sums to a public grid and add exact integer noise, so that no last bit of a float tells of the data. The
    same epsilon, and noise up to a thousandth larger. Numbers of zeroth-order gradients always get it."""

    @field_validator("delta", mode="before")
    @classmethod
    def _zero_is_what_laplace_gives(cls, value: Any) -> Any:
        if isinstance(value, int | float) and value == 0 and not isinstance(value, bool):
            raise ValueError(
                "Gaussian noise never has delta 0, and method.zeroth_noise: laplace gives delta 0 whatever stands "
                "here; with laplace this is the delta at which its cost is also stated, and added up with other runs "
                "in the ledger. Write 1e-5, or leave it out"
            )
        return value

    @model_validator(mode="after")
    def _record_is_one(self) -> PrivacySection:
        if self.unit == "record" and self.max_examples_per_unit != 1:
            raise ValueError("unit: record protects single examples, so max_examples_per_unit must be 1")
        return self

    @property
    def private(self) -> bool:
        return self.epsilon != "none"


class RunSection(Section):
    """How long, how fast, how large."""

    expected_batch_size: Count
    """Units per step on average. Part of the guarantee."""
    steps: Count | None = None
    """Number of optimizer steps; or give epochs."""
    epochs: Positive | None = None
    """Steps as passes over the units: steps = round(epochs * num_units / expected_batch_size)."""
    spare_steps: Natural | None = None
    """Steps that are paid for in advance, so that a crash (whose lost steps are charged again) does not shorten the
    run. Default: 2 % of the steps, at least one."""
    learning_rate: Positive | None = None
    """The largest rate of the schedule. Noise asks for larger batches and larger rates than usual training. Default:
    1e-3; with zeroth_order and sgd, a base for what is trained, less where there are fewer directions, over
    `method.clip_norm` (`sotto plan` prints it)."""
    optimizer: Literal["auto", "adamw", "sgd", "yogi"] = "auto"
    """What turns a noised gradient into an update. Post-processing: it costs no privacy. `auto` is sgd with
    zeroth_order, else adamw. `yogi` is AdamW whose scale falls slowly after a large update, for federated runs."""
    weight_decay: Annotated[Real, Field(ge=0)] = 0.0
    """Pulls trained weights towards zero: each step takes away the learning rate times this part of them."""
    momentum: Fraction = 0.0
    """SGD only."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """How the rate falls after the warm-up: not at all, linearly to zero, or along half a cosine to zero."""
    warmup_ratio: Fraction = 0.0
    """The part of the steps in which the rate rises from zero."""
    ema_decay: Fraction = 0.0
    """Exponential moving average of the weights; 0 switches it off. It is post-processing and costs no privacy."""
    microbatch_size: Count | Literal["auto"] = "auto"
    """Examples per forward pass. Performance only; never changes epsilon."""
    memory: Memory | None = None
    """The memory budget, such as `8GiB`: `microbatch_size: auto` stays below it, and a run that cannot is refused. It
    is the whole process's on a CPU, and the tensors' on a GPU. Default: what is free, without refusing."""
    checkpoint_every: Count | None = None
    """Steps between checkpoints. Default: chosen from the run's length and the checkpoint's size."""
    patience: Count | None = None
    """Ends the run when so many looks in a row have not lowered the loss on `data.public`: public text alone decides.
    All planned steps count in epsilon, taken or not, because how many they are is a release."""
    look_every: Count | None = None
    """Steps between looks at `data.public`. Default: a twentieth of the steps."""
    seed: int = 0
    """Initialises new weights and chooses which examples of a unit are kept. Never touches sampling or noise."""
    debug_noise_seed: int | None = None
    """FOR TESTS. Draws noise and batches from this seed. Such a run is NOT PRIVATE and says so everywhere."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs; `auto` takes CUDA where there is one."""

    @model_validator(mode="after")
    def _steps_or_epochs(self) -> RunSection:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of steps and epochs")
        return self

    @property
    def memory_bytes(self) -> int | None:
        """`memory` in bytes."""
        return None if self.memory is None else bytes_of(self.memory)


class OutputSection(Section):
    """Where results go."""

    dir: str = "runs"
    """The folder that gets one folder for each run."""
    name: str | None = None
    """Prefix of the run folder; default: taken from the configuration file's name."""
    export: Literal["merged", "adapter", "none"] = "merged"
    """What `model/` holds in the end: a plain Hugging Face folder, a peft adapter, or nothing."""
    tensorboard: bool = False
    """Also write public metrics for TensorBoard (needs the `board` extra)."""


class Config(Section):
    """A whole run. `Config.load(path)` reads YAML; `with_overrides` applies `section.key=value`."""

    model: ModelSection
    data: DataSection
    privacy: PrivacySection
    method: MethodSection = MethodSection()
    run: RunSection
    output: OutputSection = OutputSection()
    setting: Setting = CentralSetting()

    @model_validator(mode="after")
    def _sections_agree(self) -> Config:
        if self.run.expected_batch_size > self.privacy.num_units:
            raise ValueError(
                f"run.expected_batch_size ({self.run.expected_batch_size}) asks for more units than "
                f"privacy.num_units ({self.privacy.num_units}) says there are"
            )
        if self.data.task == "classification" and not self.data.labels:
            raise ValueError(
                "data.labels is missing: list the classes (they are public, so they cannot be read from the data)"
            )
        if self.data.labels is not None and len(self.data.labels) < 2:
            raise ValueError("data.labels holds one class: there is nothing to learn")
        if self.data.task == "generation" and self.method.train == "head":
            raise ValueError("method.train: head is for classification; use lora, bitfit or full")
        if self.output.export == "adapter" and self.method.train != "lora":
            raise ValueError("output.export: adapter needs method.train: lora; use merged")
        if self.method.zeroth_order:
            self._zeroth_order_agrees()
        if self.method.side_cache and self.method.train != "side":
            raise ValueError("method.side_cache stores a frozen model's outputs: it needs method.train: side")
        if self.data.task == "generation" and self.model.pooling == "mean":
            raise ValueError("model.pooling: mean is for classification")
        if self.data.public or self.run.patience or self.run.look_every:
            self._looks_agree()
        if self.method.frozen_weights != "float32" and not isinstance(self.setting, CentralSetting):
            raise ValueError("method.frozen_weights is for runs on one machine: set float32, or setting.kind: central")
        if isinstance(self.setting, SplitSetting):
            self._split_agrees(self.setting)
        if isinstance(self.setting, FederatedSetting):
            agree(self.setting, self)
        return self

    def _looks_agree(self) -> None:
        patience = self.run.patience
        if self.data.public is None or patience is None:
            raise ValueError("data.public (what to look at) and run.patience (when to end) need each other")
        if self.setting.kind != "central":
            raise ValueError("data.public and run.patience are for setting.kind: central")
        if (patience + 1) * (every := self.stepping.look_every or 1) >= self.steps:
            raise ValueError(f"run.patience: {patience} looks, one every {every} steps, end no shorter run")

    def _zeroth_order_agrees(self) -> None:
        relation, method = self.privacy.neighboring_relation, self.method
        if method.zeroth_preset == "dpzero" and relation != "replace_one":
            raise ValueError(
                "method.zeroth_preset: dpzero was published for privacy.neighboring_relation: replace_one. Set it, or "
                "take dpzo, which is the same step under add_or_remove_one"
            )
        if self.run.optimizer == "yogi":
            raise ValueError("run.optimizer: yogi is not for method.gradient: zeroth_order: use adamw or sgd")
        if method.laplace and relation != "add_or_remove_one":
            raise ValueError("method.zeroth_noise: laplace needs privacy.neighboring_relation: add_or_remove_one")

    def _split_agrees(self, setting: SplitSetting) -> None:
        if self.data.task != "classification":
            raise ValueError("setting.kind: split is for classification: give data.label and data.labels")
        if self.privacy.private or self.privacy.unit != "record":
            raise ValueError(
                "setting.kind: split protects what leaves the customer, by setting.privatizer, each text by itself: "
                "write privacy.epsilon: none and privacy.unit: record"
            )
        if self.method.zeroth_order:
            raise ValueError("setting.kind: split trains the upper part by its gradient: set method.gradient: auto")
        if setting.segment is not None and setting.segment > self.data.max_length // 2:
            raise ValueError(
                "setting.segment leaves one row of any text: set it to half of data.max_length at most, or leave it out"
            )
        if self.method.train == "reversible":
            raise ValueError(
                "setting.kind: split trains the upper part by method.train: lora, side, full, bitfit or head"
            )
        if self.method.side_cache:
            raise ValueError(
                "method.side_cache keeps what texts give on one machine, and in a split run the vendor has none: "
                "set method.side_cache: false"
            )

    @property
    def sampling_prob(self) -> float:
        """The probability with which a unit joins a step: of two public numbers, never of the data."""
        return self.run.expected_batch_size / self.privacy.num_units

    @property
    def steps(self) -> int:
        """Optimizer steps, whichever way they were given."""
        if self.run.steps is not None:
            return self.run.steps
        assert self.run.epochs is not None
        return max(1, round(self.run.epochs * self.privacy.num_units / self.run.expected_batch_size))

    @property
    def stepping(self) -> RunSection:
        """`run`, with what it leaves open of optimizer, learning rate and looks filled in."""
        run, optimizer = self.run, self.run.optimizer
        if optimizer == "auto":
            optimizer = "sgd" if self.method.zeroth_order else "adamw"
        rate = run.learning_rate
        if rate is None:
            rate = self.method.zeroth_rate if self.method.zeroth_order and optimizer == "sgd" else 1e-3
        looks = run.look_every or max(1, self.steps // 20)
        return run.model_copy(update={"optimizer": optimizer, "learning_rate": rate, "look_every": looks})

    @property
    def spare_steps(self) -> int:
        """Steps that are accounted for beyond `steps`, for those that a crash makes Sotto do again."""
        return self.run.spare_steps if self.run.spare_steps is not None else max(1, math.ceil(self.steps / 50))

    @property
    def exact_noise(self) -> bool:
        """Whether releases get exact noise on a grid: asked for, or so few numbers that it costs nothing."""
        shares = self.setting.kind == "federated" and self.setting.noise == "clients"
        return self.method.laplace or self.privacy.exact_noise or (self.method.zeroth_order and not shares)

    @property
    def not_private(self) -> str | None:
        """Why this run has no guarantee, or None if it has one. That of a split run is its privatizer's."""
        if isinstance(self.setting, SplitSetting):
            if self.setting.privatizer == "none":
                return "setting.privatizer is 'none'"
        elif not self.privacy.private:
            return "privacy.epsilon is 'none'"
        if self.run.debug_noise_seed is not None:
            return "run.debug_noise_seed is set, so the noise can be recomputed"
        return None

    @property
    def unused(self) -> dict[str, str]:
        """Keys that were set and change nothing here, and why."""
        return unused(self)

    @classmethod
    def load(cls, path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
        """Reads a YAML file. Errors name the file and the line.

        Args:
          path: the file.
          overrides: strings `section.key=value`, applied over the file; the value is YAML.

        Raises:
          SottoError: the file is missing, is not YAML, has an unknown key or a bad value.
        """
        return config_file.load(cls, Path(path), overrides)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Config:
        """Builds a configuration from nested dictionaries, with the same errors as `load`."""
        return config_file.validate(cls, values, config_file.Source(name="<python>"))

    def with_overrides(self, overrides: list[str]) -> Config:
        """Returns a copy with `section.key=value` strings applied."""
        values = config_file.override(self.to_dict(), overrides)
        return config_file.validate(type(self), values, config_file.Source(name="--set"))

    def to_dict(self) -> dict[str, Any]:
        return self.model_dump(mode="json", exclude_none=True)
