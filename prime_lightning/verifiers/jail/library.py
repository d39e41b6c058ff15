"""The standard library, whole, for a jailed process that cannot get at its files by their paths.

The jailed user may pass no folder that is closed to others (a home of mode 700 above pyenv, conda or uv), and in the
tier `no-open` nothing may be opened. Two ways round, chosen before the zygote gives its rights up:
- the library's folder becomes the working folder, and imports go through `/proc/self/cwd`, which the kernel follows
  without looking at the folders above; which files may be read there is still for Landlock to say;
- the sources' bytecode is read into memory, mapped for reading, and extension modules are loaded beforehand.

Protects nothing by itself: neither way opens a file that the tier does not show anyhow, and no descriptor stays open.
Leaves out: `UNSEEN`, and third-party packages (`complete` loads what they load lazily).
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import importlib.util
import mmap
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

UNSEEN = frozenset(
    "antigravity idlelib lib2to3 nis ossaudiodev test this tkinter turtle turtledemo".split()  # noqa: SIM905
)
"""Top-level names that no tier promises: they want a screen, a sound card, a network service or a browser, test Python
itself, or read files of their own."""

_HERE = "/proc/self/cwd"
_FOREIGN = ("site-packages", "dist-packages", "__pycache__", "test", "tests")
_OTHERS_READ, _OTHERS_PASS = 4, 1


def open_up(tier: str, *, other_user: bool) -> None:
    """Make the standard library importable after the walls are up. Called with all rights, before other imports.

    Args:
        tier: The tier that is being built.
        other_user: Whether the jailed process will be another user than this one.
    """
    folder = os.path.dirname(os.__file__)
    if tier == "no-open":
        _from_memory(folder)
    elif other_user and not _open_to_others(folder, [*map(str, Path(folder).parents)]):
        if _open_to_others(folder, []) and os.path.isdir(_HERE):
            _from_working_folder(folder)
        else:
            _from_memory(folder)


def _open_to_others(folder: str, above: list[str]) -> bool:
    """Whether every user may read a folder's files, as far as their modes and those of the folders above tell."""
    can_read, can_pass = [folder, f"{folder}/os.py"], [folder, *above]
    return all(os.stat(path).st_mode & _OTHERS_READ for path in can_read) and all(
        os.stat(path).st_mode & _OTHERS_PASS for path in can_pass
    )


def _from_working_folder(folder: str) -> None:
    os.chdir(folder)

    def moved(path: str) -> str:
        return _HERE + path.removeprefix(folder) if path == folder or path.startswith(f"{folder}/") else path

    sys.path[:] = map(moved, sys.path)
    for module in list(sys.modules.values()):
        if isinstance(getattr(module, "__path__", None), list):
            module.__path__ = [*map(moved, module.__path__)]


def _from_memory(folder: str) -> None:
    sys.meta_path.insert(0, _MemoryLoader(folder))
    for name in _extensions(folder):
        with contextlib.suppress(ImportError):  # a library that it needs is not installed
            importlib.import_module(name)


class _MemoryLoader(importlib.machinery.SourceFileLoader):
    """Finder and loader of the modules below a folder, whose files it has read."""

    def __init__(self, folder: str) -> None:
        super().__init__("", folder)
        self._modules: dict[str, tuple[str, bool]] = {}
        self._stats: dict[str, dict[str, Any]] = {}
        self._places: dict[str, tuple[int, int]] = {}
        contents = []
        size = 0
        for name, path in _sources(folder):
            self._modules[name] = path, path.endswith("/__init__.py")
            stat = os.stat(path)
            self._stats[path] = {"mtime": stat.st_mtime, "size": stat.st_size}
            stored, content = _content(path, stat)
            self._places[stored] = size, size + len(content)
            size += len(content)
            contents.append(content)
        self._memory = _mapped(b"".join(contents))

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The import system's question for a module."""
        if fullname not in self._modules:
            return None
        source, package = self._modules[fullname]
        within = [os.path.dirname(source)] if package else None
        return importlib.util.spec_from_file_location(fullname, source, loader=self, submodule_search_locations=within)

    def get_filename(self, name: str | None = None) -> str:
        """Where a module's source stands."""
        return self._modules[str(name)][0]

    def path_stats(self, path: Any) -> dict[str, Any]:
        """What the source's bytecode must have been made from."""
        return self._stats[os.fspath(path)]

    def get_data(self, path: Any) -> bytes:
        """A file's content, as it was."""
        begin, end = self._places.get(os.fspath(path), (0, 0))
        if not end:
            raise FileNotFoundError(path)
        return self._memory[begin:end]


def names() -> list[str]:
    """Every module of the standard library but `UNSEEN`, submodules too; some are for other systems."""
    folder = os.path.dirname(os.__file__)
    found = {*sys.builtin_module_names, *_extensions(folder), *(name for name, _ in _sources(folder))}
    return sorted(found - {"__main__", "sitecustomize", "usercustomize"})  # those are a machine's own


def _extensions(folder: str) -> list[str]:
    found = (file.name.partition(".")[0] for file in sorted(Path(folder, "lib-dynload").glob("*.so")))
    tests = ("_test", "_ctypes_test", "_tkinter", "xx", "_xx")
    return [name for name in found if name not in UNSEEN and not name.startswith(tests)]


def _sources(folder: str) -> Iterator[tuple[str, str]]:
    """Modules written in Python, and where they stand."""
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in _FOREIGN and name.isidentifier()]
        for file in sorted(files):
            path = os.path.join(place, file)
            name = os.path.relpath(path, folder)[:-3].replace("/", ".").removesuffix(".__init__")
            if file.endswith(".py") and file != "__main__.py" and name.partition(".")[0] not in UNSEEN:
                yield name, path


def _content(path: str, stat: os.stat_result) -> tuple[str, bytes]:
    """The file that an import would read, and its content: bytecode if it is of this source, else the source."""
    with contextlib.suppress(OSError):
        compiled = importlib.util.cache_from_source(path)
        content = Path(compiled).read_bytes()
        made_from = (int(stat.st_mtime) & 0xFFFFFFFF).to_bytes(4, "little") + stat.st_size.to_bytes(8, "little")[:4]
        if content[:16] == importlib.util.MAGIC_NUMBER + bytes(4) + made_from:
            return compiled, content
    return path, Path(path).read_bytes()


def _mapped(content: bytes) -> mmap.mmap:
    """Memory that forks share without copying page tables, and that a child can change for itself only."""
    descriptor = os.memfd_create("library", os.MFD_CLOEXEC)
    with open(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        return mmap.mmap(descriptor, len(content), flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)


def complete(name: str) -> None:
    """Import a third-party package and what it loads when one of its names is first asked for (`numpy.random`)."""
    package = importlib.import_module(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for part in {*dir(package), *getattr(package, "__all__", ())}:
            with contextlib.suppress(Exception):  # a name on its way out, or whose own needs are not installed
                getattr(package, part)
