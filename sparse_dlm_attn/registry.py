"""Backends and policies by name: entry points, ``"module:attr"`` and instances alike.

Looking a name up loads that one entry point and nothing else, so a broken plug-in never breaks
another one. First- and third-party distributions register in the same way::

    [project.entry-points."sparse_dlm_attn.backends"]
    mine = "my_package:MyBackend"
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import os
import sys
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from sparse_dlm_attn.backend import Backend
from sparse_dlm_attn.errors import (
    InvalidArgumentError,
    InvalidTypeError,
    SparseAttentionError,
    UnavailableError,
    UnknownNameError,
)
from sparse_dlm_attn.policy import PrefixAttentionPolicy

__all__ = [
    "BACKEND_GROUP",
    "CHECK_GROUP",
    "COMMAND_GROUP",
    "POLICY_GROUP",
    "Plugin",
    "checks",
    "commands",
    "get_backend",
    "get_policy",
    "list_backends",
    "list_policies",
    "split_parameters",
]

BACKEND_GROUP = "sparse_dlm_attn.backends"
POLICY_GROUP = "sparse_dlm_attn.policies"
COMMAND_GROUP = "sparse_dlm_attn.commands"
CHECK_GROUP = "sparse_dlm_attn.checks"


@dataclass(frozen=True)
class Plugin:
    """A registered backend, policy or command, not loaded yet.

    Parameters
    ----------
    kind : str
        "backend", "policy", "command" or "check".
    name : str
        Name to ask for it by.
    target : str
        ``"module:attr"``.
    distribution : str
        Distribution that registered it.
    """

    kind: str
    name: str
    target: str
    distribution: str

    def load(self) -> Any:
        """Import and return the class, factory or instance.

        Raises
        ------
        UnavailableError
            If importing it fails, with the reason and the remedy.
        """
        return _import_target(f"{self.kind} {self.name!r}", self.target, self.distribution)

    def why_not(self) -> str:
        """Return why it cannot be loaded, "" if it can; never raises for a broken plug-in."""
        try:
            self.load()
        except SparseAttentionError as error:
            return str(error)
        return ""


def list_backends() -> dict[str, Plugin]:
    """Return the registered backends by name, read from metadata; imports none of them."""
    return _plugins("backend", BACKEND_GROUP)


def list_policies() -> dict[str, Plugin]:
    """Return the registered policies by name, read from metadata; imports none of them."""
    return _plugins("policy", POLICY_GROUP)


def commands() -> dict[str, Plugin]:
    """Return the commands that plug-ins add to the command line, by name; imports none of them."""
    return _plugins("command", COMMAND_GROUP)


def checks() -> dict[str, Plugin]:
    """Return the checks that plug-ins add to the command `doctor`, by name; imports none of them."""
    return _plugins("check", CHECK_GROUP)


def get_backend(backend: str | Backend, **options: Any) -> Backend:
    """Return a backend by name.

    Parameters
    ----------
    backend : str or Backend
        A registered name, ``"name:key=value,key=value"``, ``"module:attr"``, or an instance (returned as
        it is).
    **options
        Keyword arguments of the backend's class or factory; they override those in the string.

    Raises
    ------
    UnknownNameError
        If no such backend is registered; it lists those that are.
    UnavailableError
        If it is registered but cannot be loaded here.
    InvalidTypeError
        If what was found is not a backend, or refuses the options.
    """
    if isinstance(backend, str):
        backend, written = split_parameters("backend", backend)
        options = {**written, **options}
    return _build("backend", BACKEND_GROUP, Backend, backend, options)  # type: ignore[no-any-return]


def get_policy(policy: str | PrefixAttentionPolicy[Any], **parameters: Any) -> PrefixAttentionPolicy[Any]:
    """Return a policy by name.

    Parameters
    ----------
    policy : str or PrefixAttentionPolicy
        A registered name, ``"name:key=value,key=value"``, ``"module:attr"``, or an instance.
    **parameters
        The policy's parameters; they override those in the string.

    Raises
    ------
    UnknownNameError
        If the policy or a parameter is not known; it names the nearest one.
    UnavailableError
        If it is registered but cannot be loaded here.
    InvalidArgumentError, InvalidTypeError
        If a parameter's value breaks its rule.

    Examples
    --------
    >>> get_policy("losa:active=3,budget=64").active
    3
    """
    if isinstance(policy, str):
        policy, written = split_parameters("policy", policy)
        parameters = {**written, **parameters}
    return _build("policy", POLICY_GROUP, PrefixAttentionPolicy, policy, parameters)  # type: ignore[no-any-return]


def _plugins(kind: str, group: str) -> dict[str, Plugin]:
    found: dict[str, Plugin] = {}
    for entry in _entries(group):
        plugin = Plugin(kind, entry.name, entry.value, _distribution(entry))
        other = found.setdefault(entry.name, plugin)
        if other.target != plugin.target:
            found[entry.name] = dataclasses.replace(
                other,
                target=f"{other.target} | {plugin.target}",
                distribution=f"{other.distribution} and {plugin.distribution}",
            )
    return dict(sorted(found.items()))


def _entries(group: str) -> tuple[EntryPoint, ...]:
    found = _installed(group, tuple((folder, _changed(folder)) for folder in sys.path))
    if any(entry.dist is not None and entry.dist.name == __package__ for entry in found):
        return found
    return (*found, *_entries_of_checkout(group))


@functools.lru_cache(maxsize=64)
def _installed(group: str, folders: tuple[tuple[str, int], ...]) -> tuple[EntryPoint, ...]:
    """Return what is installed in ``folders`` as they stand; reading it takes tens of milliseconds."""
    return tuple(entry_points(group=group))


def _changed(folder: str) -> int:
    """Return when something was last installed into a folder, or removed from it, in nanoseconds."""
    try:
        return os.stat(folder or ".").st_mtime_ns
    except OSError:
        return 0


@functools.cache
def _entries_of_checkout(group: str) -> tuple[EntryPoint, ...]:
    """Return our own entry points where nothing is installed: a checkout on the Python path."""
    path = Path(__file__).parents[1] / "pyproject.toml"
    if not path.is_file():
        return ()
    import tomllib

    project = tomllib.loads(path.read_text(encoding="utf-8")).get("project", {})
    if project.get("name") != __package__:
        return ()
    entries = project.get("entry-points", {}).get(group, {})
    return tuple(EntryPoint(name, target, group) for name, target in entries.items())


def _distribution(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else "this checkout"


def _build(kind: str, group: str, base: type, name: Any, options: dict[str, Any]) -> Any:
    if isinstance(name, base):
        if options:
            raise InvalidTypeError(kind, f"must be a name when options are given ({', '.join(options)})", "an instance")
        return name
    if not isinstance(name, str):
        raise InvalidTypeError(kind, f"must be a name or a {base.__name__}", type(name).__name__)
    target = _find(kind, group, name)
    if isinstance(target, base):
        return _build(kind, group, base, target, options)
    if not callable(target):
        raise InvalidTypeError(kind, f"must name a {base.__name__} or a factory of one", repr(target))
    _check_options(kind, name, target, options)
    try:
        built = target(**options)
    except InvalidArgumentError as error:
        if not options:
            raise
        # Commands have options of the same names.
        raise error.said_of(f"{kind} {name!r}: {error.argument}") from error
    except SparseAttentionError:
        raise
    except ImportError as error:
        raise UnavailableError(f"{kind} {name!r}", [str(error)], "Install what is missing.") from error
    except (Exception, SystemExit) as error:
        raise InvalidTypeError(
            f"{kind} {name!r}",
            "must be constructible with these options",
            f"{options or 'no options'}: {type(error).__name__}: {error}",
        ) from error
    if not isinstance(built, base):
        raise InvalidTypeError(
            f"{kind} {name!r}",
            f"must give a {base.__name__}",
            type(built).__name__,
            f"Derive the class from sparse_dlm_attn.{base.__name__}.",
        )
    return built


def _plural(kind: str) -> str:
    return {"policy": "policies"}.get(kind, f"{kind}s")


def _find(kind: str, group: str, name: str) -> Any:
    plugin = _plugins(kind, group).get(name)
    if plugin is not None:
        if " | " in plugin.target:
            raise InvalidArgumentError(
                kind,
                "must be registered by one distribution",
                f"{name!r} by {plugin.distribution}",
                f"Ask for one of {plugin.target} by 'module:attr', or uninstall the other.",
            )
        return plugin.load()
    head, colon, attribute = name.partition(":")
    if head and not head.startswith(".") and attribute:
        try:
            return _import_target(f"{kind} {name!r}", name, repr(head))
        except UnavailableError as error:
            if head not in _plugins(kind, group):
                raise
            raise _unparsed(kind, name, head) from error
    if colon and head in _plugins(kind, group):
        raise _unparsed(kind, name, head)
    raise UnknownNameError(kind, name, _plugins(kind, group), f"A {kind} of your own is named 'module:attr'.")


def _unparsed(kind: str, name: str, head: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        kind,
        "must be written name:key=value,key=value",
        repr(name),
        f"{head!r} is registered; its parameters: `sparse-dlm-attn {_plural(kind)} {head}`.",
    )


def _import_target(what: str, target: str, source: str) -> Any:
    """Import ``module:attr``, turning any failure of foreign code into `UnavailableError`."""
    module, _, attribute = target.partition(":")
    loaded: Any = None
    try:
        loaded = importlib.import_module(module)
        for part in attribute.split("."):
            loaded = getattr(loaded, part)
    except (SparseAttentionError, KeyboardInterrupt):
        raise
    except ModuleNotFoundError as error:
        missing = error.name or module
        remedy = (
            f"Check the spelling of {module!r} and that it is on the Python path."
            if module == missing or module.startswith(f"{missing}.")
            else f"Install {missing!r}, which {source} needs."
        )
        raise UnavailableError(what, [str(error)], remedy) from error
    except BaseException as error:  # foreign code may raise anything while it is imported
        if isinstance(error, AttributeError) and loaded is not None:
            raise UnavailableError(what, [str(error)], f"Check the name after ':' in {target!r}.") from error
        reason = f"importing {module!r} raised {type(error).__name__}: {error}"
        raise UnavailableError(what, [reason], f"Repair or uninstall {source}.") from error
    return loaded


def _check_options(kind: str, name: str, target: Any, options: dict[str, Any]) -> None:
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):
        return
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return
    for option in options:
        if option not in parameters:
            hint = "It has no device to choose: leave --device out, or name another --backend."
            raise UnknownNameError(
                f"parameter of {kind} {name!r}", option, parameters, hint if option == "device" else ""
            )


def split_parameters(kind: str, text: str) -> tuple[str, dict[str, Any]]:
    """Split ``"name:key=value,..."`` at the colon before the first key; values may hold colons too.

    Parameters
    ----------
    kind : str
        What is named, for messages.
    text : str
        The text.

    Returns
    -------
    name : str
        What stands before the parameters.
    parameters : dict
        Values by name: numbers, bools, None or text.
    """
    before, equals, _ = text.partition("=")
    head, separator, _ = before.rpartition(":")
    if not separator or not equals:
        return text, {}
    tail = text[len(head) + 1 :]
    parameters: dict[str, Any] = {}
    for item in tail.split(","):
        key, equals, value = item.partition("=")
        if not equals or not key.strip() or not value.strip():
            raise InvalidArgumentError(kind, "must be written name:key=value,key=value", repr(text))
        if key.strip() in parameters:
            raise InvalidArgumentError(kind, "must give each parameter once", repr(text))
        parameters[key.strip()] = _literal(value.strip())
    return head, parameters


def _literal(text: str) -> Any:
    named = {"true": True, "false": False, "none": None}
    if text.lower() in named:
        return named[text.lower()]
    for convert in (int, float):
        try:
            return convert(text)
        except ValueError:
            continue
    return text
