"""What a journal's records add up to."""

from __future__ import annotations

from dataclasses import dataclass, field

from outlast.launch.control.records import (
    Done,
    Evicted,
    Formed,
    Lead,
    Left,
    Member,
    Over,
    Readmitted,
    Record,
)


@dataclass
class Journal:
    """All records up to a number, folded. Pure: the same records give the same journal."""

    number: int = 0
    """Of the newest record that was taken."""
    lead: Lead | None = None
    formed: Formed | None = None
    over: Over | None = None
    """Of the generation ``formed``, if that has ended."""
    over_number: int = 0
    """Of that record."""
    left: frozenset[str] = frozenset()
    """Of the newest generation, launchers that are known to have done their work."""
    evicted: dict[str, Evicted] = field(default_factory=dict)
    """By node."""
    evicted_at: list[float] = field(default_factory=list)
    """When nodes were evicted, readmitted ones included."""
    done: Done | None = None
    generations: int = 0
    """Formed so far by this job."""
    _ranks: dict[str, int] = field(default_factory=dict)
    fenced: bool = True
    """Whether ranks of the newest generation, if it has ended, may still run. They do not after a job's end."""

    @property
    def epoch(self) -> int:
        """Of the newest leader; 0 before the first."""
        return self.lead.epoch if self.lead is not None else 0

    @property
    def next_generation(self) -> int:
        """The number of a generation that is formed next; numbers go on over jobs."""
        return 0 if self.formed is None else self.formed.generation + 1

    @property
    def running(self) -> Formed | None:
        """The generation that has begun and has not ended."""
        return None if self.over is not None or self.done is not None else self.formed

    def rank_of(self, member: Member) -> int:
        """The member's place in the newest generation; -1: none."""
        return self._ranks.get(member.agent, -1)

    def take(self, number: int, record: Record) -> None:
        """Take the next record.

        A record of an epoch that is not the newest is passed over: one that does not lead any more has written it, and
        nobody obeys.

        Raises:
            ValueError: it is not the next one.
        """
        if number != self.number + 1:
            raise ValueError(f"record {number} follows {self.number}")
        self.number = number
        if isinstance(record, Lead):
            if self.lead is None or record.job != self.lead.job:
                self._begin(record)
            self.lead = record
        elif record.epoch != self.epoch or self.done is not None:
            return
        elif isinstance(record, Formed):
            if self.formed is None or record.generation == self.next_generation:
                self.formed, self.over, self.left = record, None, frozenset()
                self._ranks = {member.agent: rank for rank, member in enumerate(record.members)}
                self.generations += 1
                self.fenced = True
        elif isinstance(record, Over):
            if self.formed is not None and record.generation == self.formed.generation:
                self.over, self.over_number = record, number
        elif isinstance(record, Left):
            if self.formed is not None and record.generation == self.formed.generation:
                self.left |= set(record.agents)
        elif isinstance(record, Evicted):
            self.evicted[record.node] = record
            self.evicted_at.append(record.at)
        elif isinstance(record, Readmitted):
            self.evicted.pop(record.node, None)
        elif isinstance(record, Done):
            self.done = record

    def _begin(self, record: Lead) -> None:
        """Another job begins; a generation of the one before has ended with it."""
        formed, self.fenced = self.formed, self.done is None
        if formed is not None and self.over is None:
            over = Over(epoch=record.epoch, at=record.at, generation=formed.generation, reason="another job began")
            self.over, self.over_number = over, self.number
        self.done, self.evicted, self.evicted_at, self.generations = None, {}, [], 0
