"""A lease on a place: one job at a time has it, renews it in the background, and gives it back.

::

    URL/lease_00000007.json     holder, since when, renewed when; the highest number is the one that counts

Who takes a place from another creates the next number. A file is created only once, on a shared disk (exclusive
creation) as in an object store (a conditional put), so of several that try, one succeeds; it alone writes its file from
then on. A holder whose file no longer has the highest number has lost the place, and finds out before it commits
anything. A lease that is given back is removed; but if the holder before may still be alive somewhere, it stays, and
says that it was given back, so that the number keeps rising.

No clocks are compared. Whoever finds the lease of a process on another machine watches the file: if it changes, its
holder is alive; if it does not for ``lease_s``, the place is free.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import threading
import time
import weakref
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from outlast.checkpoint.ownership.holder import Holder, local_time
from outlast.checkpoint.shortage import as_os_error, start
from outlast.checkpoint.storage.base import Store
from outlast.errors import CheckpointError, PlaceInUse

_log = logging.getLogger("outlast.checkpoint")

LONGEST_S = 600.0
"""No lease lasts longer without being renewed."""
_NAME = re.compile(r"lease_([0-9]{8,})\.json")
_VERSION = 1
_RECORD_BYTES = 2048
"""Records have one size, so that renewing one needs no room on a full disk."""
_RENEWALS = 6
"""How often a lease is renewed in the time after which it would end."""
_TRIES = 8
_RELEASE_S = 10.0
_UNREADABLE_S = 5.0
"""A file that cannot be read is being written, or was when its writer died. That takes no time."""
_OVER = {
    "over": "it has ended",
    "own": "it is this process, which opens the place again",
    "restarted": "its job was restarted, and goes on here",
}
_HELD: weakref.WeakValueDictionary[tuple[str, int], Lease] = weakref.WeakValueDictionary()
"""The leases of this process, by URL and number: a new one for the same place ends the one before."""


@dataclass(frozen=True)
class Record:
    """What a lease's file says."""

    holder: Holder
    token: str
    """Of this lease and no other."""
    since: float
    """Unix time, for people; likewise the next."""
    renewed: float
    renewals: int
    lease_s: float
    """Without a renewal for this long, the lease is over."""
    released: bool = False
    """Whether it was given back."""

    def encode(self) -> bytes:
        """The file's bytes."""
        text = json.dumps({"v": _VERSION, **asdict(self)}, indent=1)
        return text.encode().ljust(_RECORD_BYTES)

    def __str__(self) -> str:
        return f"{self.holder}, since {local_time(self.since)}"


def decode(data: bytes) -> Record | None:
    """The record in a file's bytes; None if it is half written, damaged, or of another version."""
    try:
        fields: Mapping[str, Any] = json.loads(data)
        return Record(
            holder=Holder.from_json(fields["holder"]),
            token=str(fields["token"]),
            since=float(fields["since"]),
            renewed=float(fields["renewed"]),
            renewals=int(fields["renewals"]),
            lease_s=min(max(float(fields["lease_s"]), 1.0), LONGEST_S),
            released=bool(fields["released"]),
        )
    except (ValueError, KeyError, TypeError, OverflowError):
        return None


def find_holder(store: Store) -> str | None:
    """Who holds the lease of a place, for people; None if nobody does, as far as can be told without waiting.

    Raises:
        OSError: the storage cannot be read.
    """
    top = _highest(store)
    record = _read(store, top)[1] if top else None
    if record is None or record.released:
        return None
    state = record.holder.state_for(Holder.this_process())
    return str(record) if state in ("held", "unknown", "own") else None


class Lease:
    """A lease on the place of a store, which need not be taken yet. Methods may be called from several threads.

    Args:
        store: of the place.
        lease_s: after this many seconds without a renewal, others may take the place.
        token: of the attempt, used by no other; empty takes a random one.
        what: the place, in words; empty takes its URL.
        ways_out: what somebody who is refused can do besides waiting for the holder.
    """

    def __init__(
        self,
        store: Store,
        lease_s: float,
        *,
        token: str = "",
        what: str = "",
        ways_out: str = "choose another place",
    ) -> None:
        self._store = store
        self._what = what or store.url
        self._ways_out = ways_out
        self._lock = threading.RLock()
        self._lost: PlaceInUse | None = None
        self._epoch = 0
        """Of this lease; 0: not taken, or given back."""
        self._renewed_at = 0.0
        self._earlier_may_live = False
        """Whether an earlier holder may still be alive."""
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        now = time.time()
        self._record = Record(Holder.this_process(), token or secrets.token_hex(8), now, now, 0, lease_s)

    @property
    def taken(self) -> bool:
        """Whether the place was taken with this lease, and not given back."""
        return self._epoch > 0

    def take(self) -> None:
        """Take the place, and renew the lease from now on; harmless if it is taken.

        Where only waiting can tell whether the holder is alive, this blocks until its lease changes (then it is), or
        for the time that its record says (60 s by default, at most 600 s).

        Raises:
            PlaceInUse: another job has it; names its process.
            OSError: the storage fails.
        """
        with self._lock:
            self.raise_if_lost()
            if self.taken:
                self._start_keeping()
                return
            for _ in range(_TRIES):
                if self._try():
                    break
            else:
                raise PlaceInUse(f"{self._what} is being taken by others: {_TRIES} tries came too late", self._ways_out)
            self._start_keeping()

    def _start_keeping(self) -> None:
        """Have the lease renewed; raises OSError if there is no thread for that, and may be tried again."""
        if self._thread is None:
            self._stop = threading.Event()
            thread = threading.Thread(target=self._keep, args=(self._stop,), name="outlast-lease", daemon=True)
            start(thread)
            self._thread = thread

    def wait_taken(self, limit_s: float) -> None:
        """Wait until rank 0 has taken the place for this attempt; on other ranks, which have the same token.

        Raises:
            CheckpointError: it has not within the limit.
            OSError: the storage fails.
        """
        deadline, pause_s = time.monotonic() + limit_s, 0.01
        while not ((top := _highest(self._store)) and self._is_own(top)):
            if time.monotonic() > deadline:
                raise CheckpointError(f"rank 0 has not taken {self._what} within {limit_s:g} s", "see its log")
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.5)

    def confirm(self) -> None:
        """Make sure that the place is still this lease's; to be called before anything there counts or is removed.

        Raises:
            PlaceInUse: another job has taken it.
            OSError: the storage fails.
        """
        with self._lock:
            self.raise_if_lost()
            if not self.taken or self._record.holder.pid != os.getpid():
                return
            if _now() - self._renewed_at > self._record.lease_s / 2:
                # It may be about to end, or have ended: nobody may take it between this check and what comes after.
                self._renew()
            if not self._check():
                _log.warning("%s: the lease was removed while it was held; it is made again", self._what)
                self._store.create(_path(self._epoch), self._record.encode())

    def raise_if_lost(self) -> None:
        """Raise :class:`PlaceInUse` if another job was found to have the place; asks nobody."""
        if self._lost is not None:
            raise self._lost

    def close(self) -> None:
        """Give the place back; harmless if it was not taken, or is given back. What fails is logged."""
        thread, self._thread = self._thread, None
        self._stop.set()
        if thread is None and self.taken and self._record.holder.pid == os.getpid():
            self._keep(self._stop)  # there was no thread to be had
        if thread is None or self._record.holder.pid != os.getpid():  # a fork has the object, but not the place
            return
        # The thread writes it: a storage that hangs must not hold whoever ends.
        thread.join(_RELEASE_S)
        if thread.is_alive():
            _log.warning("%s is not given back, because its storage does not answer", self._what)

    def _try(self) -> bool:
        """Take the place if it is free; False: another was faster."""
        top = _highest(self._store)
        proven = not top or self._wait_free(top)
        record, epoch = replace(self._record, since=time.time(), renewed=time.time()), top + 1
        try:
            self._store.create(_path(epoch), record.encode())
        except FileExistsError:
            return False
        # If this process was held up for long, others may have come and gone: then a lower number could be free again.
        if not self._is_own(epoch):
            return False
        if _highest(self._store) != epoch:
            self._store.remove(_path(epoch))
            return False
        self._epoch, self._record, self._renewed_at = epoch, record, _now()
        self._earlier_may_live = not proven
        here = _HELD.get((self._store.url, top))
        if here is not None and here is not self:
            here._lost = here._taken_over(record)
        _HELD[self._store.url, epoch] = self
        for old in _epochs(self._store):
            if old < epoch:
                self._store.remove(_path(old))
        return True

    def _wait_free(self, epoch: int) -> bool:
        """Return once the lease of that number is over; whether it is certain that its holder will not come back.

        Raises:
            PlaceInUse: the holder is alive.
        """
        data, record = _read(self._store, epoch)
        began, told = time.monotonic(), False
        while True:
            lease_s = record.lease_s if record is not None else self._record.lease_s
            if record is not None:
                if record.released:
                    return False
                state = record.holder.state_for(self._record.holder)
                if state == "held":
                    raise self._refusal(record)
                if state != "unknown":
                    _log.info("%s was held by %s: %s", self._what, record, _OVER[state])
                    return state != "restarted"
            if not told and record is not None:
                _log.warning("%s is held by %s; %.0f s to see whether it is alive", self._what, record, lease_s)
                told = True
            time.sleep(min(1.0, lease_s / 20, _UNREADABLE_S / 2))
            if _highest(self._store) != epoch:
                return False  # whoever tries to create the next number finds that it is there, or that all are gone
            new, record = _read(self._store, epoch)
            if new != data and record is not None and not record.released:
                raise self._refusal(record)
            if new == data and time.monotonic() - began > lease_s and record is not None:
                _log.warning("%s: its holder has not renewed the lease for %.0f s: it is over", self._what, lease_s)
                return False
            if new == data and time.monotonic() - began > _UNREADABLE_S and record is None:
                # Whoever created it has died since, or will find that it was too late.
                _log.warning("%s: the lease cannot be read, and nobody is writing it: it is over", self._what)
                return False
            data = new

    def _refusal(self, record: Record) -> PlaceInUse:
        return PlaceInUse(
            f"{self._what} is in use by {record}",
            f"stop that job, or wait until it ends (if it dies, within {record.lease_s:g} s); or {self._ways_out}",
        )

    def _keep(self, stop: threading.Event) -> None:
        """Renew the lease until it is lost, or to be given back; then remove it."""
        told = False
        while not stop.wait(self._record.lease_s / _RENEWALS):
            try:
                with self._lock:
                    if stop.is_set():
                        break
                    self._renew()
                told = False
            except PlaceInUse:
                return
            except Exception as problem:
                error = as_os_error(problem)
                if error is None:
                    raise
                if not told:
                    # Nobody else can take it while the storage is away for all; and it is confirmed before a commit.
                    _log.warning("the lease of %s cannot be renewed now: %s", self._what, error)
                told = True
        try:
            with self._lock:
                epoch, self._epoch = self._epoch, 0
                if not self._is_own(epoch):
                    return
                if self._earlier_may_live:
                    self._store.overwrite(_path(epoch), replace(self._record, released=True).encode())
                else:
                    self._store.remove(_path(epoch))
        except OSError as error:
            _log.warning("%s could not be given back: %s", self._what, error)

    def _renew(self) -> None:
        """Raises :class:`PlaceInUse` if another has the place, OSError if that cannot be told."""
        if self._check():
            record = replace(self._record, renewed=time.time(), renewals=self._record.renewals + 1)
            self._store.overwrite(_path(self._epoch), record.encode())
            self._record, self._renewed_at = record, _now()

    def _check(self) -> bool:
        """Whether the lease's file is there; raises :class:`PlaceInUse` if another has the place."""
        top = _highest(self._store)
        if top == 0:
            return False  # somebody has removed it, or all of the place
        if top == self._epoch and self._is_own(top):
            return True
        self._lost = self._taken_over(_read(self._store, top)[1])
        raise self._lost

    def _taken_over(self, other: Record | None) -> PlaceInUse:
        who = str(other) if other is not None else "a job whose record cannot be read"
        return PlaceInUse(
            f"{self._what} was taken over by {who}: either this process did not renew its lease for "
            f"{self._record.lease_s:g} s, or its job was started again",
            "this process has saved nothing there since; start its job again when the other has ended, or elsewhere",
        )

    def _is_own(self, epoch: int) -> bool:
        record = _read(self._store, epoch)[1]
        return record is not None and record.token == self._record.token


def _now() -> float:
    """Seconds that also pass while the machine is suspended."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _path(epoch: int) -> str:
    return f"lease_{epoch:08d}.json"


def _epochs(store: Store) -> list[int]:
    return sorted(int(match[1]) for name in store.names("") if (match := _NAME.fullmatch(name)))


def _highest(store: Store) -> int:
    """The newest epoch; 0: there is none."""
    return max(_epochs(store), default=0)


def _read(store: Store, epoch: int) -> tuple[bytes, Record | None]:
    """A lease's file and what it says; no bytes if it is gone."""
    try:
        data = bytes(store.read(_path(epoch)))
    except FileNotFoundError:
        data = b""
    return data, decode(data)
