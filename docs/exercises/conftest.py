"""The option ``--answers FOLDER``: which answers the tests of the exercises check."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).parent


def load_answers(folder: Path, exercise: str) -> ModuleType:
    """Import the file of an exercise from a folder."""
    spec = spec_from_file_location(f"answers_{exercise}", folder / f"{exercise}.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option."""
    parser.addoption("--answers", type=Path, default=HERE, help="folder of the files filled in")


@pytest.fixture(scope="module")
def answers(request: pytest.FixtureRequest) -> ModuleType:
    """The answers to check: the module exercise_1 for test_exercise_1.py."""
    exercise = request.path.stem.removeprefix("test_")
    return load_answers(request.config.getoption("answers"), exercise)
