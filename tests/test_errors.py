"""Exit codes of the error tree, and what an unknown name is answered with."""

from __future__ import annotations

import pytest

from trim_export import errors
from trim_export.errors import (
    ArtifactError,
    CheckFailed,
    EnvironmentLacks,
    ModelError,
    TrimExportError,
    UsageError,
    choose,
)

KNOWN = {"wanda": 1, "magnitude": 2, "trim": 3}


@pytest.mark.parametrize(
    ("error", "code"),
    [(UsageError, 2), (ModelError, 2), (ArtifactError, 2), (EnvironmentLacks, 3), (CheckFailed, 1)],
)
def test_every_failure_has_its_exit_code(error: type[TrimExportError], code: int) -> None:
    assert error("what is wrong").exit_code == code


def test_every_error_of_the_module_is_in_the_tree() -> None:
    classes = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
    assert len(classes) == 6
    assert all(issubclass(error, TrimExportError) for error in classes)
    assert {error.__name__ for error in classes} <= set(errors.__all__)


@pytest.mark.parametrize("error", [ModelError, ArtifactError])
def test_bad_models_and_artifacts_are_bad_requests(error: type[TrimExportError]) -> None:
    with pytest.raises(UsageError, match=r"^the reason$"):
        raise error("the reason")


@pytest.mark.parametrize("error", [EnvironmentLacks, CheckFailed])
def test_lacking_environment_and_failed_checks_are_not(error: type[TrimExportError]) -> None:
    assert not issubclass(error, UsageError)


@pytest.mark.parametrize("name", KNOWN)
def test_a_known_name_is_looked_up(name: str) -> None:
    assert choose("score", name, KNOWN) == KNOWN[name]


def test_a_falsy_value_is_found_too() -> None:
    assert choose("thing", "none", {"none": None}) is None


@pytest.mark.parametrize(("name", "close"), [("wand", "wanda"), ("magnitud", "magnitude"), ("trm", "trim")])
def test_an_unknown_name_is_answered_with_the_closest(name: str, close: str) -> None:
    with pytest.raises(UsageError) as raised:
        choose("score", name, KNOWN)
    assert str(raised.value) == f"unknown score '{name}' (did you mean {close}?); known: magnitude, trim, wanda"


@pytest.mark.parametrize("name", ["", "zzzzzzz"])
def test_a_name_like_no_other_is_answered_with_the_list_only(name: str) -> None:
    with pytest.raises(UsageError) as raised:
        choose("score", name, KNOWN)
    assert str(raised.value) == f"unknown score '{name}'; known: magnitude, trim, wanda"
