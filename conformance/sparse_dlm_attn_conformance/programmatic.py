"""The suite without pytest: run laws from Python, and run one law again on one problem."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import settings

import sparse_dlm_attn_conformance
from sparse_dlm_attn import Backend, InvalidArgumentError, get_policy
from sparse_dlm_attn_conformance.checks import ConformanceFailure
from sparse_dlm_attn_conformance.clauses import check_clauses, matches
from sparse_dlm_attn_conformance.contenders import Contender
from sparse_dlm_attn_conformance.laws import OPTIONS, clauses_of
from sparse_dlm_attn_conformance.session import register_profiles
from sparse_dlm_attn_conformance.subjects import Subject, load_backend

__all__ = ["Finding", "check_backend", "laws", "reproduce", "reproduce_denoising"]


@dataclass(frozen=True)
class Finding:
    """A law that does not hold: its name, its clauses and what was found."""

    law: str
    clauses: tuple[str, ...]
    text: str


def laws(clauses: tuple[str, ...] = ()) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Yield ``(name, law, fixed arguments)`` for every law of the given clauses or groups.

    Laws of policies are left out: they take a policy, which `check_backend` hands in.
    """
    for module in pkgutil.iter_modules(sparse_dlm_attn_conformance.__path__):
        if not module.name.startswith("test_"):
            continue
        loaded = importlib.import_module(f"{sparse_dlm_attn_conformance.__name__}.{module.name}")
        for name, function in vars(loaded).items():
            if not name.startswith("test_") or not hasattr(function, "body"):
                continue
            if not any(matches(clause, clauses) for clause in clauses_of(function)):
                continue
            for fixed in parameters(function):
                yield f"{module.name}::{name}", function, fixed


def parameters(function: Any) -> Iterator[dict[str, Any]]:
    """Yield the arguments that a law's ``parametrize`` mark gives it."""
    marks = [mark for mark in function.pytestmark if mark.name == "parametrize"]
    if not marks:
        yield {}
    for mark in marks[:1]:
        for value in mark.args[1]:
            yield {mark.args[0]: value}


def check_backend(
    backend: str | Backend,
    *,
    clauses: tuple[str, ...] = (),
    dtypes: tuple[str, ...] = (),
    policies: tuple[Any, ...] = (),
    profile: str = "quick",
    first_only: bool = False,
    shrink: bool = True,
) -> list[Finding]:
    """Run the laws and return those that do not hold; an empty list is a proof, as far as it goes.

    Parameters
    ----------
    backend : str or Backend
        Name, ``"module:attr"`` or instance.
    clauses : tuple of str
        Clauses or groups to restrict the run to.
    dtypes : tuple of str
        Dtypes to test; default: all that the backend declares.
    policies : tuple
        Policies (or their names) for the laws of policies; none runs no such law.
    profile : str
        "quick", "ci" or "nightly".
    first_only : bool
        Whether to stop at the first law that does not hold.
    shrink : bool
        Whether to look for a smaller failing problem.

    Raises
    ------
    InvalidArgumentError
        If the backend does not load.
    UnknownNameError
        If there is no such backend, clause or policy.
    """
    check_clauses(clauses, "clauses")
    instance, error = load_backend(backend)
    if instance is None:
        raise InvalidArgumentError("backend", "must load", error)
    register_profiles()
    spec = backend if isinstance(backend, str) else f"{type(backend).__module__}:{type(backend).__qualname__}"
    subjects = [Subject(spec, dtype, instance) for dtype in dtypes or instance.capabilities.dtypes]
    chosen = settings.get_profile(f"sda-{profile}")
    token = OPTIONS.set(replace(OPTIONS.get(), shrink=shrink, profile=chosen))
    findings: list[Finding] = []
    try:
        for name, function, fixed in laws(clauses):
            for subject, arguments in runs(function, subjects, policies, fixed):
                try:
                    function(subject, **arguments)
                except pytest.skip.Exception:
                    continue
                except ConformanceFailure as failure:
                    findings.append(Finding(name, clauses_of(function), str(failure)))
                    if first_only:
                        return findings
    finally:
        OPTIONS.reset(token)
    return findings


def runs(
    function: Any, subjects: list[Subject], policies: tuple[Any, ...], fixed: dict[str, Any]
) -> Iterator[tuple[Subject, dict[str, Any]]]:
    """Yield each subject and the arguments of a law."""
    if "policy" not in function.__signature__.parameters:
        yield from ((subject, fixed) for subject in subjects)
        return
    for policy in policies:
        contender = Contender(policy if isinstance(policy, str) else repr(policy), get_policy(policy))
        yield subjects[0], {**fixed, "policy": contender}


def reproduce(backend: str | Backend, law: str, *, dtype: str, **arguments: Any) -> None:
    """Run one law on one problem, as the snippet of a failure says.

    Parameters
    ----------
    backend : str or Backend
        Name, ``"module:attr"`` or instance.
    law : str
        ``"module::function"``.
    dtype : str
        Dtype of q, K and V.
    **arguments
        The problem: what the law draws, and a policy where it takes one.

    Raises
    ------
    ConformanceFailure
        If the law does not hold.
    InvalidArgumentError
        If there is no such law, or the backend does not load.
    """
    found = {name: function for name, function, _ in laws()}
    if law not in found:
        raise InvalidArgumentError("law", "must be the name of a law, module::function", repr(law))
    instance, error = load_backend(backend)
    if instance is None:
        raise InvalidArgumentError("backend", "must load", error)
    if isinstance(arguments.get("policy"), str):
        arguments["policy"] = Contender(arguments["policy"], get_policy(arguments["policy"]))
    subject = Subject(backend if isinstance(backend, str) else instance.name, dtype, instance)
    found[law].body(subject, **arguments)


def reproduce_denoising(backend: str | Backend, policy: str, *, dtype: str) -> Any:
    """Return the state machine over denoising, to take the steps that a failure prints.

    Parameters
    ----------
    backend : str or Backend
        Name, ``"module:attr"`` or instance.
    policy : str
        Policy by name, with its parameters.
    dtype : str
        Dtype of q, K and V.

    Raises
    ------
    InvalidArgumentError
        If the backend does not load.
    """
    from sparse_dlm_attn_conformance.denoising import Denoising

    instance, error = load_backend(backend)
    if instance is None:
        raise InvalidArgumentError("backend", "must load", error)
    subject = Subject(backend if isinstance(backend, str) else instance.name, dtype, instance)
    return type("Machine", (Denoising,), {"subject": subject, "policy": get_policy(policy)})()
