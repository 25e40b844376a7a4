"""The packages for a bare GPU host: each requirement is packed as well, or is on the host."""

from collections.abc import Iterable
from importlib.metadata import distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from benchmarks.pack_gpu_site import ON_THE_HOST, SOURCES, WHEELS

HOST = {"extra": "", "python_version": "3.12", "sys_platform": "linux", "platform_machine": "x86_64"}


def needs(name: str) -> set[str]:
    """Names of a package's requirements on the host, without extras."""
    asked = map(Requirement, distribution(name).requires or ())
    return {canonicalize_name(r.name) for r in asked if r.marker is None or r.marker.evaluate(HOST)}


def with_needs(names: Iterable[str]) -> set[str]:
    closure: set[str] = set()
    todo = list(names)
    while todo:
        name = todo.pop()
        if name not in closure:
            closure.add(name)
            todo += [n for n in needs(name) if not n.startswith(("nvidia-", "cuda-", "triton"))]
    return closure


def test_nothing_that_a_packed_package_needs_is_missing_on_the_host() -> None:
    packed = {canonicalize_name(name) for name in (*WHEELS.split(), *SOURCES)}
    available = packed | with_needs(ON_THE_HOST.split())
    missing = {f"{need} (of {name})" for name in packed for need in needs(name) - available}
    assert not missing
