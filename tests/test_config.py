"""The configuration: what is read, what is refused, and that what is written is read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pydantic
import pytest
import tiny_runs
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sotto import config_file
from sotto.config import Config, Section
from sotto.errors import SottoError

VALUES: dict[str, Any] = {
    "model": {"name": "m"},
    "data": {"train": "x.csv", "text": "t", "label": "l", "labels": ["a", "b"]},
    "privacy": {"unit": "who", "num_units": 100, "epsilon": 3.0},
    "run": {"expected_batch_size": 10, "steps": 20},
}


def make(**changes: dict[str, Any]) -> Config:
    return Config.from_dict(tiny_runs.merge(VALUES, changes))


def refused(**changes: dict[str, Any]) -> str:
    with pytest.raises(SottoError) as caught:
        make(**changes)
    return caught.value.what


def write(folder: Path, text: str) -> Path:
    path = folder / "x.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults_and_derived_values() -> None:
    config = make()
    assert config.steps == 20
    assert config.spare_steps == 1
    assert config.data.task == "classification"
    assert config.not_private is None
    assert make(run={"steps": 500}).spare_steps == 10
    assert make(run={"spare_steps": 0}).spare_steps == 0
    assert make(run={"steps": ..., "epochs": 3}).steps == 30
    assert make(run={"steps": ..., "epochs": 0.01}).steps == 1
    assert make(data={"label": ..., "labels": ...}).data.task == "generation"


def test_it_is_frozen() -> None:
    with pytest.raises(pydantic.ValidationError):
        make().privacy.epsilon = 8.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": {"text": ...}}, "text"),
        ({"data": {"prompt": "p"}}, "exclude each other"),
        ({"data": {"label": ..., "completion": "c"}}, "exclude each other"),
        ({"data": {"label": ..., "text": ..., "prompt": "p"}}, "name the columns"),
        ({"data": {"label": ..., "prompt": "p"}}, "completion is not"),
        ({"data": {"labels": ["a", "a"]}}, "twice"),
        ({"data": {"labels": ["a"]}}, "one class"),
        ({"data": {"labels": ...}}, "labels is missing"),
        ({"data": {"max_length": 0}}, "max_length"),
        ({"data": {"label": ..., "labels": ...}, "method": {"train": "head"}}, "classification"),
        ({"data": {"label": ..., "labels": ...}, "model": {"pooling": "mean"}}, "classification"),
        ({"output": {"export": "adapter"}, "method": {"train": "full"}}, "lora"),
        ({"privacy": {"dataset": "../x"}}, "dataset"),
        ({"privacy": {"delta": 1.0}}, "delta"),
        ({"privacy": {"num_units": True}}, "not true or false"),
        ({"privacy": {"num_units": 10.5}}, "num_units"),
        ({"run": {"steps": ...}}, "exactly one"),
        ({"run": {"microbatch_size": 0}}, "microbatch_size"),
        ({"run": {"ema_decay": 1.0}}, "ema_decay"),
        ({"run": {"expected_batch_size": 101}}, "more units"),
        ({"method": {"lora_init": "eva"}}, "lora_init"),
    ],
)
def test_values_that_are_refused(changes: dict[str, Any], said: str) -> None:
    assert said in refused(**changes)


def test_a_delta_of_zero_is_explained(tmp_path: Path) -> None:
    for method in ({}, {"gradient": "zeroth_order", "zeroth_noise": "laplace"}):
        said = refused(privacy={"delta": 0}, method=method)
        assert "laplace gives delta 0 whatever stands here" in said
        assert "added up with other runs in the ledger. Write 1e-5, or leave it out (got 0)" in said
    for other in (-1e-5, 1.0, True, "x"):
        assert "laplace" not in refused(privacy={"delta": other})
    with pytest.raises(SottoError, match=r"privacy\.delta") as caught:
        Config.load(write(tmp_path, config_file.dump(VALUES).replace("epsilon: 3.0", "epsilon: 3.0\n  delta: 0.0")))
    assert "x.yaml:" in caught.value.where


ZEROTH = {"gradient": "zeroth_order"}
SPLIT = {
    "setting": {"kind": "split", "privatizer": "dx_hidden", "eta": 2.0},
    "privacy": {"unit": "record", "epsilon": "none"},
}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": {"zeroth_preset": "dpzo"}}, {"method.zeroth_preset": "method.gradient is not zeroth_order"}),
        ({"method": {"zeroth_preset": "dpzo", **ZEROTH}}, {}),
        ({"method": {"side_every": 3}}, {"method.side_every": "method.train is not side"}),
        ({"method": {"side_every": 3, "train": "side"}}, {}),
        ({"method": {"reversible_streams": "stored"}}, {"method.reversible_streams": "method.train is not reversible"}),
        ({"method": {"reversible_streams": "stored", "train": "reversible"}}, {}),
        ({"method": {"lora_rank": 4}}, {}),
        ({"method": {"lora_rank": 4, "train": "full"}}, {"method.lora_rank": "method.train is not lora"}),
        ({"method": {"lora_rank": 4, "train": "reversible"}}, {}),
        (
            {"method": {"lora_rank": 4, "train": "reversible", "reversible_train": "full"}},
            {"method.lora_rank": "method.reversible_train is not lora"},
        ),
        ({"method": {"clip_quantile": 0.6}}, {"method.clip_quantile": "method.clipping is not adaptive"}),
        ({"method": {"clip_quantile": 0.6, "clipping": "adaptive"}}, {}),
        ({"run": {"momentum": 0.9}}, {"run.momentum": "run.optimizer is adamw"}),
        ({"run": {"momentum": 0.9}, "method": ZEROTH}, {}),
        ({"method": {"lora_rank": 8, "zeroth_probes": None, "clip_share": 0.01, "train": "full"}}, {}),
        (
            {"setting": {"kind": "federated", "dropouts": 0.1, "local_epochs": 2}},
            {"setting.dropouts": "setting.noise is not clients"},
        ),
        (
            {"setting": {"kind": "federated", "noise": "clients", "dropouts": 0.1, "sites": 3, "local_epochs": 2}},
            {"setting.local_epochs": "setting.sites is set"},
        ),
        ({**SPLIT}, {}),
        ({**SPLIT, "run": {"microbatch_size": 8}}, {"run.microbatch_size": "setting.kind is split"}),
        (
            {**SPLIT, "setting": {**SPLIT["setting"], "delta": 1e-6, "exempt_share": 0.1}},
            {
                "setting.delta": "nothing in setting has a delta",
                "setting.exempt_share": "setting.exempt is not selected",
            },
        ),
        ({**SPLIT, "setting": {**SPLIT["setting"], "delta": 1e-6, "labels": "kept", "label_epsilon": 1.0}}, {}),
    ],
)
def test_what_is_set_for_nothing_is_named_and_no_error(changes: dict[str, Any], said: dict[str, str]) -> None:
    assert make(**changes).unused == said


def test_every_option_of_a_method_that_was_not_chosen_is_named() -> None:
    """Whatever is added to the section, by its name."""
    defaults = make(method={"train": "full"})
    assert not defaults.unused
    names = [
        n for n in type(defaults.method).model_fields if n.startswith(("lora_", "side_", "reversible_", "zeroth_"))
    ]
    assert len(names) > 18
    other = defaults.method.model_copy(update=dict.fromkeys(names, "something else"))
    assert set(defaults.model_copy(update={"method": other}).unused) == {f"method.{name}" for name in names}


def test_the_first_problem_is_explained_and_the_others_counted() -> None:
    with pytest.raises(SottoError) as caught:
        make(privacy={"epsilon": -1, "delta": 7}, run={"steps": -4})
    assert "(2 more after this one)" in caught.value.why


def test_reasons_for_having_no_guarantee() -> None:
    assert "epsilon" in (make(privacy={"epsilon": "none"}).not_private or "")
    assert "debug_noise_seed" in (make(run={"debug_noise_seed": 0}).not_private or "")


def test_yaml_is_read_by_the_rules_of_1_2(tmp_path: Path) -> None:
    text = config_file.dump(VALUES).replace("- a\n", "- yes\n").replace("- b\n", "- no\n  - 3\n  - 2024-01-31\n")
    config = Config.load(write(tmp_path, text))
    assert config.data.labels == ("yes", "no", "3", "2024-01-31")
    text = config_file.dump(VALUES).replace("epsilon: 3.0", "epsilon: 3e0\n  delta: 1e-6")
    config = Config.load(write(tmp_path, text))
    assert (config.privacy.epsilon, config.privacy.delta) == (3.0, 1e-6)


def test_a_section_whose_lines_are_all_comments_is_empty(tmp_path: Path) -> None:
    path = write(tmp_path, config_file.dump(VALUES) + "method:\n  # train: full\noutput:\n")
    assert Config.load(path) == make()
    assert Config.load(path, ["method.train=full"]) == make(method={"train": "full"})


def test_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, config_file.dump(VALUES))
    changed = Config.load(path, ["run.learning_rate=1e-2", "data.labels=[x, y, no]", "privacy.epsilon=none"])
    assert changed.run.learning_rate == 0.01
    assert changed.data.labels == ("x", "y", "no")
    assert changed.privacy.epsilon == "none"
    assert make().with_overrides(["run.learning_rate=1e-2"]).run.learning_rate == 0.01
    assert Config.load(path, ["run.epochs=2"]).run.steps is None, "steps and epochs replace each other"
    assert Config.load(path, ["run.steps=7", "run.epochs=null"]).run.steps == 7, "nothing replaces nothing"
    assert Config.load(path, ["data.text=a=b"]).data.text == "a=b"
    assert make() == Config.load(path), "an override changes nothing but its own copy"


def test_environment_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLACE", "/somewhere")
    text = config_file.dump(tiny_runs.merge(VALUES, {"data": {"train": "${PLACE}/x.csv"}}))
    assert Config.load(write(tmp_path, text)).data.train == "/somewhere/x.csv"


words = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=12)
tricky = st.sampled_from(
    ["1e5", "yes", "no", "null", "~", "0x1F", "1_000", "12:30", "- a", "a: b", "#x", "'", '"', "é"]
)


@settings(max_examples=60, deadline=None)
@given(st.lists(words | tricky, min_size=2, max_size=5, unique=True), words | tricky)
def test_what_is_written_is_read_back(tmp_path_factory: pytest.TempPathFactory, labels: list[str], name: str) -> None:
    if any("${" in word for word in (*labels, name)):
        return
    config = make(data={"labels": labels, "train": name})
    path = write(tmp_path_factory.mktemp("x"), config_file.dump(config.to_dict()))
    assert Config.load(path) == config


@settings(max_examples=200, deadline=None)
@given(words | tricky)
@example("\xa0")
@example("\u2028")
@example("...")
def test_one_line_values_are_read_back(value: str) -> None:
    text = config_file.dump(value, flow=True)
    assert "\n" not in text
    assert yaml.load(f"x: {text}  # comment\n", Loader=config_file._Loader) == {"x": value}


def test_to_dict_and_back() -> None:
    config = make(method={"lora_layers": [1, 2], "lora_targets": ["q", "v"]})
    assert Config.from_dict(config.to_dict()) == config


def test_every_key_is_documented() -> None:
    for name, field in Config.model_fields.items():
        for section in get_args(field.annotation) or (field.annotation,):
            assert isinstance(section, type)
            assert issubclass(section, Section)
            assert section.__doc__, name
            for key, info in section.model_fields.items():
                assert info.description, f"{name}.{key}"
