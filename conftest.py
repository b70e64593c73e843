"""Settings of every test: shape checks, hypothesis profiles."""

import os
from collections.abc import Generator
from typing import Any

import pytest
from beartype import BeartypeConf, beartype
from hypothesis import HealthCheck, settings

_check = beartype(conf=BeartypeConf(is_pep484_tower=True))
_CHECKS_ITSELF = (
    "packer.config",
    "packer.plan",
    "navit.model.config",
    "navit.train.config",
    "navit.embed.config",
)


def typecheck(function: Any) -> Any:
    """Check types and shapes in tests (`--jaxtyping-packages`); an int is a fine float.

    Configurations are left out: they check themselves, and tests see the error a user sees.
    """
    module = getattr(function, "__module__", None) or ""
    return function if module.startswith(_CHECKS_ITSELF) else _check(function)


# Before torch loads OpenMP: threads that spin while they wait make tests beside others crawl.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

settings.register_profile(
    "dev", deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("ci", settings.get_profile("dev"), derandomize=True)
settings.register_profile("all", settings.get_profile("dev"), max_examples=100)  # make test-all
_profile = os.environ.get("TEST_PROFILE")
settings.load_profile(_profile or ("ci" if os.environ.get("CI") else "dev"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Escape what no UTF-8 can hold in captured output, which damaged tars put there.

    Processes that share the tests hand reports over as UTF-8.
    """
    report = yield
    report.sections = [
        (name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections
    ]
    return report
