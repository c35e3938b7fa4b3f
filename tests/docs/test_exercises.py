"""The exercises' tests pass the solutions and fail empty and wrong answers."""

import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from docs.exercises.conftest import load_answers

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "docs" / "exercises"
NAMES = [path.stem for path in sorted(FOLDER.glob("exercise_*.py"))]


def functions(module: ModuleType) -> dict[str, Callable[..., Any]]:
    """Functions that the module itself defines."""
    members = inspect.getmembers(module, inspect.isfunction)
    return {name: f for name, f in members if f.__module__ == module.__name__}


def failures(name: str, answers: ModuleType) -> dict[str, Exception]:
    """Exceptions that an exercise's tests raise for these answers, by test."""
    raised = {}
    for test, run in functions(load_answers(FOLDER, f"test_{name}")).items():
        if test.startswith("test_"):
            try:
                run(answers)
            except Exception as error:
                raised[test] = error
    return raised


def wrong_answers() -> list[Any]:
    cases = []
    for name in NAMES:
        module = load_answers(Path(__file__).parent / "wrong_answers", name)
        for wrong, function in functions(module).items():
            if "__" in wrong:
                cases.append(pytest.param(name, wrong, function, id=f"{name}-{wrong}"))
    return cases


@pytest.mark.parametrize("name", NAMES)
def test_solutions_pass(name: str) -> None:
    assert failures(name, load_answers(FOLDER / "solutions", name)) == {}


@pytest.mark.parametrize("name", NAMES)
def test_empty_exercises_fail(name: str) -> None:
    raised = failures(name, load_answers(FOLDER, name))
    tests = [test for test in functions(load_answers(FOLDER, f"test_{name}")) if "test_" in test]
    assert sorted(raised) == sorted(tests)
    assert all(type(error) is NotImplementedError for error in raised.values())


@pytest.mark.parametrize(("name", "wrong", "function"), wrong_answers())
def test_wrong_answers_fail(name: str, wrong: str, function: Callable[..., Any]) -> None:
    """At least one test fails by a comparison, which shows the reader the wrong result."""
    answers = load_answers(FOLDER / "solutions", name)
    assert hasattr(answers, wrong.split("__")[0])
    setattr(answers, wrong.split("__")[0], function)
    raised = failures(name, answers)
    assert any(isinstance(error, AssertionError) for error in raised.values()), raised


@pytest.mark.parametrize("name", NAMES)
def test_every_function_has_a_solution_and_wrong_answers(name: str) -> None:
    empty = functions(load_answers(FOLDER, name))
    solved = functions(load_answers(FOLDER / "solutions", name))
    for function in empty:  # as text, since each module defines its own classes
        assert str(inspect.signature(solved[function])) == str(inspect.signature(empty[function]))
    wrong = functions(load_answers(Path(__file__).parent / "wrong_answers", name))
    assert {f.split("__")[0] for f in wrong if "__" in f} == set(empty)


@pytest.mark.parametrize(
    ("options", "outcomes"),
    [((), {"failed"}), (("--answers", "docs/exercises/solutions"), {"passed"})],
    ids=["empty", "solutions"],
)
def test_command_of_the_readme(options: tuple[str, ...], outcomes: set[str]) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "docs/exercises"]
    result = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True)
    assert set(re.findall(r"\d+ (\w+)", result.stdout.splitlines()[-1])) == outcomes, result.stdout
