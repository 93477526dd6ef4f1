"""The files of `gpt2 batch`: input read lazily and not trusted, output that survives SIGKILL, and the manifest."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

if sys.platform != "win32":
    import fcntl

MAX_LINE = 2**20  # bytes: a prompt that fills GPT-2's 1024 positions with its longest tokens takes an eighth of it
CHUNK = 2**16
NOT_COMPARED = ("input", "model")  # names in a manifest, for people: the hashes beside them are compared


def read_lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file, one at a time, without their newline.

    A byte-order mark before the first is dropped. Of a line longer than MAX_LINE bytes only the first MAX_LINE + 1 are
    kept, so that memory use does not depend on the file's contents.
    """
    mark = b"\xef\xbb\xbf"
    while line := file.readline(MAX_LINE + 1):
        rest = line
        while not rest.endswith(b"\n") and (rest := file.readline(CHUNK)):
            pass
        yield line.removeprefix(mark).rstrip(b"\r\n")
        mark = b""


def parse(line: bytes) -> dict[str, Any]:
    """The JSON object on a line; ValueError says what is there instead."""
    if len(line) > MAX_LINE:
        raise ValueError(f"a line must be at most {MAX_LINE} bytes")
    try:
        content = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as e:
        raise ValueError(f"not valid UTF-8 (byte {e.start + 1} of the line)") from None
    except json.JSONDecodeError as e:
        raise ValueError(f"not valid JSON ({e.msg}, character {e.colno} of the line)") from None
    except RecursionError:
        raise ValueError("not valid JSON (nested too deeply)") from None
    if not isinstance(content, dict):
        raise ValueError(f"a line must be a JSON object, got {type(content).__name__}")
    return content


def digest_and_lines(path: Path) -> tuple[str, int]:
    """SHA-256 of a file and the number of its lines."""
    digest, lines, last = hashlib.sha256(), 0, b"\n"
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
            lines += chunk.count(b"\n")
            last = chunk[-1:]
    return digest.hexdigest(), lines + (last != b"\n")


class Journal:
    """A file of JSON objects that one process appends to, one object a line.

    What `append` has handed to the kernel outlives the process, whatever ends it: SIGKILL does not touch the page
    cache. So records are neither buffered here nor forced to disk with fsync, and a kill can leave at most one last
    line without its newline, which `repair` cuts off. A power failure can also lose the last seconds. Closing calls
    fsync once: some file systems report a full disk only then.

    create=False creates the file with its first record. Raises ValueError if another process is writing to the file.
    """

    def __init__(self, path: Path, *, create: bool = True) -> None:
        self.path = path
        self.size = 0  # bytes in whole lines, once `repair` has counted them
        self._file: io.FileIO | None = None
        if create or path.exists():
            self._file = self._open()

    def _open(self) -> io.FileIO:
        file = open(self.path, "a+b", buffering=0)
        if sys.platform != "win32":
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until the file is closed or the process ends
            except BlockingIOError:
                file.close()
                raise ValueError(f"{self.path}: another run is writing to it") from None
            except OSError:
                pass  # a file system without locks
        return file

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is None:
            return
        with self._file:
            try:
                os.fsync(self._file.fileno())
            except OSError as e:
                raise OSError(f"{self.path}: {e.strerror}") from e

    def repair(self) -> None:
        """Cut off a torn last line."""
        if self._file is None:
            return
        end = self._file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - CHUNK)
            self._file.seek(start)
            newline = self._file.read(end - start).rfind(b"\n")
            end = start + newline + 1
            if newline >= 0:
                break
        self._file.truncate(end)
        self.size = end

    def values(self, key: str) -> Iterator[Any]:
        """The value of `key` in each record. Raises ValueError if a line is not such a record."""
        if self._file is None:
            return
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    yield json.loads(line)[key]
                except (ValueError, KeyError, TypeError, RecursionError):
                    raise ValueError(
                        f"{self.path}: line {number} is not a record that this command wrote; without that line the "
                        "run can go on"
                    ) from None

    def append(self, record: dict[str, Any]) -> None:
        """Write a record: all of it or, where that fails, nothing."""
        if self._file is None:
            self._file = self._open()
        line = json.dumps(record).encode() + b"\n"  # ASCII: no reader mistakes a character of a text for a line end
        try:
            rest = line
            while rest:
                rest = rest[self._file.write(rest) :]
        except BaseException as e:
            with contextlib.suppress(OSError):  # what remains is a torn line
                self._file.truncate(self.size)
            if isinstance(e, OSError):
                raise OSError(f"{self.path}: {e.strerror}; what was written before is whole") from e
            raise
        self.size += len(line)


class Files:
    """The files of a job, checked before any work.

    Raises ValueError if the output could not be resumed (a pipe), is the input, or exists but is not this command's.
    """

    def __init__(self, source: str, output: str) -> None:
        self.input, self.output = Path(source), Path(output)
        if output == "-" or (self.output.exists() and not self.output.is_file()):
            raise ValueError(f"--output must be a file, which a run that was stopped can go on with, got {output!r}")
        if not self.output.parent.is_dir():
            raise ValueError(f"--output must lie in a folder that exists, got {output!r}")
        if source == "-" or (self.input.exists() and not self.input.is_file()):
            raise ValueError(f"the input must be a file, since it is read twice, got {source!r}")
        self.input.open("rb").close()  # an OSError names it
        stem = output.removesuffix(".jsonl")
        self.errors, self.manifest = Path(f"{stem}.errors.jsonl"), Path(f"{stem}.manifest.json")
        for path in (self.output, self.errors, self.manifest):
            if path.exists() and path.samefile(self.input):
                raise ValueError(f"--output {output!r} would write to the input, {source!r}")
        self._refuse_strangers()

    def _refuse_strangers(self) -> None:
        if self.manifest.exists():
            return
        for path in (self.output, self.errors):
            if path.exists() and path.stat().st_size:
                raise ValueError(
                    f"{path} is there, and no {self.manifest.name} that says what it holds: name another output, or "
                    "remove it"
                )

    @contextlib.contextmanager
    def begin(self, manifest: dict[str, Any]) -> Iterator[tuple[Journal, Journal, int]]:
        """Begin or resume the job that a manifest describes: (results, errors, seed), open within the context.

        Raises ValueError if another job was begun here. The lock on the output is taken first and the manifest appears
        atomically, so that at any moment either nothing has been written or the whole manifest is there.
        """
        with Journal(self.output) as results:
            self._refuse_strangers()
            if self.manifest.exists():
                manifest = _compare(self.manifest, manifest)
            else:
                seed = manifest["seed"]
                manifest = {**manifest, "seed": secrets.randbits(63) if seed is None else seed}
                draft = Path(f"{self.manifest}.tmp")
                draft.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
                draft.replace(self.manifest)
            results.repair()
            with Journal(self.errors, create=False) as errors:
                errors.repair()
                yield results, errors, manifest["seed"]


def _compare(path: Path, new: dict[str, Any]) -> dict[str, Any]:
    """The manifest of the run that was begun; ValueError names everything in which the new one differs."""
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(old, dict) or not isinstance(old.get("seed"), int):
            raise ValueError
    except (ValueError, RecursionError):
        raise ValueError(f"{path} is not a manifest that this command wrote; remove it and its output") from None
    if new["seed"] is None:  # not asked for
        new = {**new, "seed": old["seed"]}
    before, now = _flat(old), _flat(json.loads(json.dumps(new)))
    differing = [
        f"{key} was {before.get(key)!r} and is {now.get(key)!r}"
        for key in {**before, **now}
        if key not in NOT_COMPARED and before.get(key) != now.get(key)
    ]
    if differing:
        raise ValueError(f"{path} is of another run: {'; '.join(differing)}. Name another output to begin anew")
    return old


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
