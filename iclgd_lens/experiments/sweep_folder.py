"""The folder of a sweep: cells that are done, cells that failed, who runs what, and the studies that it holds.

    cells/       a parquet file per cell, as in `cells`
    packed.parquet   a copy of many cells' rows, for reading, as in `packs`
    failed/      a JSON file per cell that failed, with the reason
    running/     a lock per group that somebody is at, and which of its cells it is
    studies/     every study that was run here, with the digests of its cells
    jobs/        what the executor writes: logs, scripts

Several sweeps may run in one folder. A lock is let go of when its process ends, however it ends.
"""

from __future__ import annotations

import json
import os
import platform
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from iclgd_lens.experiments.cells import Cells
from iclgd_lens.experiments.packs import Pack
from iclgd_lens.files import write_text

MOST_DEATHS = 2
"""How often the process of a cell may be killed while it runs before it counts as failed: a cell for which memory does not suffice
would otherwise take one worker after the other with it."""


@dataclass(frozen=True)
class Failure:
    """Why a cell failed.

    Attributes:
        cell: The cell's digest.
        about: What it is, in words.
        reason: Why, in one line.
        trace: Where, for who mends it; empty if its process was killed.
        host: The machine.
        at: When, in UTC.
    """

    cell: str
    about: str
    reason: str
    trace: str
    host: str
    at: str


@dataclass(frozen=True)
class SweepFolder:
    """The folder of a sweep.

    Attributes:
        path: The folder.
    """

    path: Path

    @property
    def cells(self) -> Cells:
        """The cells that are done."""
        return Cells(self.path / "cells")

    @property
    def pack(self) -> Pack:
        """The copy of many cells in one file."""
        return Pack.open(self.path / "packed.parquet")

    @property
    def jobs(self) -> Path:
        """Where the executor writes."""
        return self.path / "jobs"

    def has_failed(self, digest: str) -> bool:
        """Whether a cell failed, when it was run last."""
        return self._failed(digest).exists()

    def failures(self) -> list[Failure]:
        """All cells that failed, in the order in which they did."""
        found = []
        for file in sorted(self.path.glob("failed/*/*.json")):
            try:
                found.append(Failure(**json.loads(file.read_text(encoding="utf-8"))))
            except (ValueError, TypeError, FileNotFoundError):  # damaged, or just done after all
                continue
        return sorted(found, key=lambda failure: failure.at)

    def record_failure(self, digest: str, about: str, error: BaseException | str) -> None:
        """Say why a cell failed."""
        if isinstance(error, str):
            reason, trace = error, ""
        else:
            said = str(error).strip().split("\n", maxsplit=1)[0]
            reason = f"{type(error).__name__}: {said}" if said else type(error).__name__
            trace = "".join(traceback.format_exception(error))
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        failure = Failure(digest, about, reason, trace, platform.node(), now)
        write_text(self._failed(digest), json.dumps(vars(failure), indent=2) + "\n")

    def forget_failure(self, digest: str) -> None:
        """Let a cell be run again."""
        self._failed(digest).unlink(missing_ok=True)

    @contextmanager
    def claimed(self, group: str) -> Iterator[Claim | None]:
        """Keep others off a group's cells; None if somebody is at it already."""
        file = self.path / "running" / f"{group}.lock"
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(file, blocking=False)
        try:
            lock.acquire()
        except Timeout:
            yield None
            return
        except NotImplementedError:  # this file system has no locks: at worst, a cell is made twice, and is the same both times
            yield Claim(file.with_suffix(".json"))
            return
        try:
            yield Claim(file.with_suffix(".json"))
        finally:
            # Before it is released. Who opened it before this gets a lock that means nothing, and then finds the cells done.
            file.unlink(missing_ok=True)
            lock.release()

    def is_claimed(self, group: str) -> bool:
        """Whether somebody is at a group."""
        if not (self.path / "running" / f"{group}.lock").exists():
            return False
        with self.claimed(group) as claim:
            return claim is None

    def running(self) -> list[str]:
        """What is being run, in words."""
        found = []
        for file in sorted(self.path.glob("running/*.json")):
            try:
                found.append(json.loads(file.read_text(encoding="utf-8"))["about"])
            except (FileNotFoundError, ValueError):  # it ended meanwhile
                continue
        return found

    def write_study(self, name: str, study: dict[str, Any], cells: Sequence[str]) -> None:
        """Keep a study, and which cells are its own."""
        write_text(self.path / "studies" / f"{name}.json", json.dumps({"study": study, "cells": cells}) + "\n")

    def is_one(self) -> bool:
        """Whether a sweep was run here."""
        return any(self.path.glob("studies/*.json"))

    def studies(self) -> dict[str, dict[str, Any]]:
        """The studies that were run here, by name, each with its `study` and `cells`.

        Raises:
            FileNotFoundError: If this is not the folder of a sweep.
            ValueError: If a study's file is damaged.
        """
        files = sorted(self.path.glob("studies/*.json"))
        if not files:
            raise FileNotFoundError(
                f"{self.path} is not the folder of a sweep: it holds no studies, which iclgd sweep writes there"
            )
        found = {}
        for file in files:
            try:
                found[file.stem] = json.loads(file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{file} is damaged ({error}); run its study again") from error
        return found

    def _failed(self, digest: str) -> Path:
        return self.path / "failed" / digest[:2] / f"{digest}.json"


@dataclass(frozen=True)
class Claim:
    """A group that is this process's own.

    Attributes:
        file: Where it says which cell it is at.
    """

    file: Path

    def begin(self, digest: str, about: str) -> int:
        """Say which cell is run now, and return how often its process was killed before."""
        try:
            left = json.loads(self.file.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            left = {}
        deaths = left["deaths"] + 1 if left.get("cell") == digest else 0
        says = {"cell": digest, "about": about, "deaths": deaths, "host": platform.node(), "process": os.getpid()}
        write_text(self.file, json.dumps(says) + "\n")
        return deaths

    def end(self) -> None:
        """Say that no cell is run any more. A process that is killed does not come to this."""
        self.file.unlink(missing_ok=True)
