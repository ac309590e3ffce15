"""Faults in what leaves a run, in what it starts from, and in what it reads."""

from __future__ import annotations

import contextlib
import importlib
import json
from typing import Any

import pytest
import torch
import yaml
from mutant import caught_by, wrapped

from sotto import checkpoint, config_file, finish, metrics, rundir, sweeping, training
from sotto import session as sessions
from sotto.data.sampling import PoissonSampler
from sotto.models import config_json, lora, source
from sotto.privacy.noise import SecureNoise
from sotto.reporting import card, page

NEIGHBOUR = "test_replay.py::test_a_neighbouring_dataset_shows_nowhere_in_public[classification-full-flat"
RELEASED = "test_training.py::test_nothing_private_is_in_what_is_released[classification"
PUBLIC = "test_training.py::test_public_metrics_hold_only_public_numbers"


# ---- 21: public numbers


def also_public(m: pytest.MonkeyPatch, name: str) -> None:
    """Puts one of the private numbers of a step among the public ones."""
    last: dict[str, Any] = {}

    def private_numbers(right: Any, *args: Any) -> dict[str, Any]:
        last.update(right(*args))
        return dict(last)

    wrapped(m, training, "private_numbers", private_numbers)
    wrapped(m, training, "public_numbers", lambda right, *args: {**right(*args), name: last[name]})


@caught_by("test_sweep.py::test_what_is_released_does_not_tell_how_many_trials_there_were", 21)
def a_sweep_tells_what_the_ledger_knew(m: pytest.MonkeyPatch) -> None:
    """What all trials had cost when the best of them ended says how many there were, which has to be secret."""
    m.setattr("sotto.privacy.ledger.Ledger.secretive", False)
    wrapped(m, sweeping, "_facts", lambda right, planned, trial: {**trial, **right(planned, trial)})


@caught_by(PUBLIC, 21)
def the_size_of_a_batch_is_public(m: pytest.MonkeyPatch) -> None:
    """Without it, nobody can tell who was drawn."""
    also_public(m, "units")


@caught_by(PUBLIC, 21)
def the_clipped_fraction_is_public(m: pytest.MonkeyPatch) -> None:
    """A favourite of dashboards."""
    also_public(m, "clipped_fraction")


@caught_by(NEIGHBOUR, 21)
def the_norm_before_noise_is_public(m: pytest.MonkeyPatch) -> None:
    """Under the name of the noised one, where no list of names would notice."""
    last: dict[str, float] = {}

    def clipped_sum(right: Any, session: Any, units: Any, step: int) -> Any:
        total = right(session, units, step)
        last["norm"] = float(sum(g.square().sum() for g in total.gradients.values()))
        return total

    wrapped(m, training, "clipped_sum", clipped_sum)
    m.setattr(training, "norm_of", lambda update: last["norm"])


@caught_by(NEIGHBOUR, 21)
def the_learning_rate_follows_the_loss(m: pytest.MonkeyPatch) -> None:
    """A schedule that looks at the private data; its value is public."""
    last = {"loss": 1.0}

    def losses_of(right: Any, session: Any, examples: Any) -> torch.Tensor:
        values = right(session, examples)
        last["loss"] = float(values.detach().mean())
        return values

    wrapped(m, training, "losses_of", losses_of)
    wrapped(m, training, "learning_rate", lambda right, *args: right(*args) * last["loss"])


@caught_by(NEIGHBOUR, 21)
def the_run_stops_when_the_loss_is_low(m: pytest.MonkeyPatch) -> None:
    """Early stopping on training data: the number of steps tells of the loss."""

    def losses_of(right: Any, session: Any, examples: Any) -> torch.Tensor:
        values = right(session, examples)
        session.stop_requested = session.stop_requested or float(values.detach().mean()) < 1.1
        return values

    wrapped(m, training, "losses_of", losses_of)


@caught_by(NEIGHBOUR, 21)
def the_number_of_units_that_were_found_is_stated(m: pytest.MonkeyPatch) -> None:
    """The statement counts the data instead of repeating what was declared."""

    def steps_of(right: Any, session: Any, budget: Any) -> Any:
        guarantee = right(session, budget)
        object.__setattr__(guarantee, "dataset_runs", len(session.data.units))
        return guarantee

    wrapped(m, finish, "_guarantee", steps_of)


@caught_by("test_training.py::test_private_files_are_for_the_owner_alone", 21)
def private_numbers_can_be_read_by_all(m: pytest.MonkeyPatch) -> None:
    """A file mode of 0644."""
    wrapped(m, metrics, "_append", lambda right, path, mode: right(path, 0o644))


@caught_by(RELEASED, 21)
def the_card_names_the_training_file(m: pytest.MonkeyPatch) -> None:
    """Where the data lies, and often whose it is."""
    wrapped(m, card, "render", lambda right, **kw: right(**kw) + "\n\nTrained on notes.csv.\n")


@caught_by(RELEASED, 21)
def the_export_carries_an_example(m: pytest.MonkeyPatch) -> None:
    """A sample input, as some formats have one."""

    def write_model(right: Any, trained: Any, folder: Any, *args: Any) -> None:
        right(trained, folder, *args)
        (folder / "sample.json").write_text(json.dumps({"text": "Zanzibar-7319"}))

    wrapped(m, finish, "write_model", write_model)


@caught_by("test_training.py::test_a_run_that_is_not_private_says_so_everywhere[epsilon_none", 21)
def without_noise_the_norm_of_the_update_is_public(m: pytest.MonkeyPatch) -> None:
    """A run without a guarantee shows an exact function of the text."""

    def log(right: Any, self: Any, step: int, public: Any, private: Any) -> None:
        right(self, step, {**public, "update_norm": private.get("update_norm", 0.0)}, private)

    wrapped(m, metrics.Metrics, "log", log)


@caught_by(NEIGHBOUR, 21)
def a_checkpoint_holds_the_last_loss(m: pytest.MonkeyPatch) -> None:
    """Checkpoints are released under the same guarantee as the final weights, with all that is in them."""
    last = [0.0]

    def losses_of(right: Any, session: Any, examples: Any) -> torch.Tensor:
        values = right(session, examples)
        last[0] = float(values.detach().mean())
        return values

    def save(right: Any, folder: Any, state: Any) -> Any:
        state.extra["loss"] = last[0]
        return right(folder, state)

    wrapped(m, training, "losses_of", losses_of)
    wrapped(m, checkpoint, "save", save)


@caught_by("test_data_encode.py::test_the_tokenizer_is_left_as_it_was[cut-None", 21)
def the_tokenizer_remembers_that_a_text_was_cut(m: pytest.MonkeyPatch) -> None:
    """Cutting sets a limit in the tokenizer, which is exported with the model."""
    m.setattr(importlib.import_module("sotto.data.encode"), "_left_as_it_was", contextlib.nullcontext)


# ---- 23: what training starts from


@caught_by(NEIGHBOUR, 23)
def the_head_starts_from_class_frequencies(m: pytest.MonkeyPatch) -> None:
    """A usual trick for unbalanced classes: exact counts enter the first weights."""

    def assemble(right: Any, config: Any, plan: Any, run: Any, parts: Any, secret: Any) -> Any:
        counts = torch.bincount(torch.from_numpy(parts.data.examples.labels), minlength=3)
        with torch.no_grad():
            dict(parts.model.named_parameters())["classifier.bias"].copy_((counts / counts.sum()).log())
        return right(config, plan, run, parts, secret)

    wrapped(m, sessions, "_assemble", assemble)


@caught_by("test_models_trainable.py::test_other_initialisations_are_refused_even_past_the_configuration[eva", 23)
def adapters_start_from_the_data(m: pytest.MonkeyPatch) -> None:
    """EVA takes singular vectors of activations on the training data."""
    m.setattr(lora, "_INITS", {**lora._INITS, "eva": True})


# ---- 27: files


@caught_by("test_models_source.py::test_pickled_weights[model.pkl", 27)
def pickled_weights_are_taken(m: pytest.MonkeyPatch) -> None:
    """Opening them runs what their author put in."""
    m.setattr(source, "_PICKLED", ())


@caught_by("test_models_source.py::test_config_that_asks_for_code[values0", 27)
def a_model_may_bring_its_own_code(m: pytest.MonkeyPatch) -> None:
    """`auto_map` is left to transformers."""
    m.setattr(config_json, "_CODE_KEYS", config_json._CODE_KEYS - {"auto_map"})


@caught_by("test_bad_input.py::test_a_configuration_cannot_run_code", 27)
def yaml_may_make_any_object(m: pytest.MonkeyPatch) -> None:
    """A loader that is not safe."""
    m.setattr(config_file, "_Loader", yaml.UnsafeLoader)


# ---- 28: secrets


@caught_by(RELEASED, 28)
def the_sampling_key_stands_in_the_plan(m: pytest.MonkeyPatch) -> None:
    """Whoever has it knows which steps each unit was in."""

    def create(right: Any, self: Any, config: Any, plan: Any, private: Any) -> None:
        right(self, config, {**plan, "key": json.loads(private["secrets.json"])["sampling_key"]}, private)

    wrapped(m, rundir.RunDir, "create", create)


@caught_by(RELEASED, 28)
def the_fingerprint_of_the_data_is_released(m: pytest.MonkeyPatch) -> None:
    """A hash of the text confirms a guess of it."""

    def guarantee(right: Any, session: Any, budget: Any) -> Any:
        m.setattr(finish, "_environment", lambda: {"data": budget.ledger.dataset_id})
        return right(session, budget)

    wrapped(m, finish, "_guarantee", guarantee)


@caught_by("test_data_sampling.py::test_the_key_is_not_shown", 28)
def the_key_is_shown_with_the_sampler(m: pytest.MonkeyPatch) -> None:
    """In a log, or in a traceback."""
    m.setattr(PoissonSampler, "__repr__", lambda self: f"PoissonSampler(debug={self.debug}, key={self._key!r})")


@caught_by("test_privacy_noise.py::test_it_is_never_copied_or_stored", 28)
def a_noise_source_can_be_pickled(m: pytest.MonkeyPatch) -> None:
    """And with it whatever it may hold one day."""
    m.setattr(SecureNoise, "__reduce_ex__", object.__reduce_ex__)


@caught_by("test_training.py::test_private_files_are_for_the_owner_alone", 28)
def the_sampling_key_can_be_read_by_all(m: pytest.MonkeyPatch) -> None:
    """private/secrets.json has the mode of public files."""
    wrapped(m, rundir.RunDir, "_replace", lambda right, self, name, text, private=False: right(self, name, text))


@caught_by("test_training.py::test_a_run_that_is_not_private_says_so_everywhere[debug_noise_seed", 28)
def a_seeded_run_has_a_guarantee(m: pytest.MonkeyPatch) -> None:
    """Noise that follows from a stored seed is stated as if nobody knew it."""
    m.setattr("sotto.config.Config.not_private", property(lambda self: None))


@caught_by("test_report.py::test_a_run_ends_with_a_page_that_says_what_its_statement_says", 24)
def a_page_finds_fewer_members_than_the_statement(m: pytest.MonkeyPatch) -> None:
    """A share is shown where the page says per cent."""

    def promised(right: Any, *args: Any) -> Any:
        told = right(*args)
        return {**told, "found": f"{float(told['found']) / 10:.1f}"}

    wrapped(m, page, "_promised", promised)
