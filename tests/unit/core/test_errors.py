"""Errors hold what happened, why and the fix, have an exit code, and can be pickled."""

import pickle

import pytest

from orchestrator.core import errors
from orchestrator.core.errors import ConfigError, Exit, OrchestratorError, OutOfMemory, WorkerLost

KINDS = [
    kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, OrchestratorError)
]


def test_the_message_is_what_why_fix():
    error = ConfigError("batch.effective is 0", why="a step needs an example", fix="set it to 256")
    assert str(error) == "batch.effective is 0\n  why: a step needs an example\n  fix: set it to 256"
    assert str(ConfigError("no model")) == "no model"


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("ConfigError", 78),
        ("DataError", 65),
        ("MissingInput", 66),
        ("NotEnoughResources", 69),
        ("OutputError", 73),
        ("Diverged", 70),
        ("Interrupted", 75),
        ("WorkerLost", 75),
        ("WorkerFailed", 70),
        ("OutOfMemory", 69),
        ("CheckpointError", 65),
    ],
)
def test_exit_codes_are_those_of_sysexits(name, code):
    assert getattr(errors, name).exit_code == code


def test_every_exit_code_but_success_is_a_sysexits_one():
    assert [code for code in Exit if code and not 64 <= code <= 78] == []
    assert len(KINDS) == 16


@pytest.mark.parametrize("kind", KINDS)
def test_errors_survive_pickling(kind):
    error = pickle.loads(pickle.dumps(kind("what", why="why", fix="fix")))
    assert type(error) is kind
    assert (error.what, error.why, error.fix, error.exit_code) == ("what", "why", "fix", kind.exit_code)


def test_what_was_set_after_it_was_made_survives_too():
    """A worker says whether its step can be replayed in place, and names what no restart helps against."""
    memory, lost = OutOfMemory("no room"), WorkerLost("gone")
    memory.in_place, lost.repeats = False, "a place"
    assert pickle.loads(pickle.dumps(memory)).in_place is False
    assert pickle.loads(pickle.dumps(lost)).repeats == "a place"


def test_recovery_is_a_property_of_the_kind():
    """And what continues by itself has an exit code that says so, or is cut finer."""
    recovered = {kind.__name__: kind.recovery for kind in KINDS if kind.recovery != "none"}
    assert recovered == {"WorkerLost": "restart", "OutOfMemory": "finer_cut"}
    assert all(kind.exit_code is Exit.RESUMABLE for kind in KINDS if kind.recovery == "restart")
