"""What the launcher that leads decides; that whatever goes wrong comes out well, the simulation shows."""

from __future__ import annotations

from outlast.launch.control.journal import Journal
from outlast.launch.control.leader import Leader
from outlast.launch.control.messages import Report, State, Wish
from outlast.launch.control.records import Done, Evicted, Formed, Lead, Member, Over, Readmitted, Record
from outlast.launch.control.settings import ControlSettings


class Job:
    """A leader whose records are always written, and launchers that say what a test has them say."""

    def __init__(self, **settings: float) -> None:
        self.journal, self.now_s = Journal(), 0.0
        first = member("n0")
        self.journal.take(1, Lead(epoch=1, at=0.0, job="job", leader=first, port=1))
        self.settings = ControlSettings(**{"least": 2, "most": 2, **settings})  # type: ignore[arg-type]
        self.leader = Leader(self.settings, self.journal, 0.0)
        self._count = 0

    def hear(self, name: str, state: State, *, ran: int = -1, **more: object) -> None:
        self._count += 1
        report = Report(member=member(name), state=state, ran=ran, count=self._count, **more)  # type: ignore[arg-type]
        self.leader.hear(report, self.now_s)

    def decide(self) -> list[Record]:
        found = []
        while (record := self.leader.decide(self.now_s, self.now_s)) is not None:
            self.leader.wrote(self.journal.number + 1, record, self.now_s)
            found.append(record)
        return found

    def begin(self, *names: str) -> Formed:
        for name in names:
            self.hear(name, "waits")
        (formed,) = self.decide()
        assert isinstance(formed, Formed)
        for one in formed.members:
            self.hear(one.name, "runs", ran=formed.generation)
        return formed

    def wish(self, action: str, node: str, *, by_person: bool = False) -> tuple[Record | None, str]:
        wish = Wish(action=action, node=node, reason="a test", by_person=by_person)  # type: ignore[arg-type]
        record, text = self.leader.consider(wish, self.now_s, self.now_s)
        if record is not None:
            self.leader.wrote(self.journal.number + 1, record, self.now_s)
        return record, text


def member(name: str) -> Member:
    return Member(node=f"{name}/boot", agent=name, address=name, store_port=1)


def names(formed: Record) -> list[str]:
    assert isinstance(formed, Formed)
    return [one.name for one in formed.members]


def test_a_spare_takes_the_place_of_a_node_that_is_lost() -> None:
    job = Job()
    assert names(job.begin("n0", "n1", "n2")) == ["n0", "n1"]
    for now_s in (2.0, 4.0, 6.5):
        job.now_s = now_s
        job.hear("n0", "runs", ran=0)
        job.hear("n2", "waits")
    (over,) = job.decide()
    assert isinstance(over, Over)
    assert over.node == "n1/boot"
    assert "n1 is lost: its launcher was last heard of 6.5 s ago" in over.reason
    assert job.decide() == [], "n0 has not said yet that its ranks have ended"
    job.hear("n0", "waits", ran=0)
    (formed,) = job.decide()
    assert names(formed) == ["n0", "n2"]


def test_nothing_is_formed_while_the_last_generation_may_run() -> None:
    job = Job()
    job.begin("n0", "n1", "n2", "n3")
    job.now_s = 7.0
    job.hear("n2", "waits")
    job.hear("n3", "waits")
    assert isinstance(job.decide()[0], Over)
    ended_s = 7.0 + job.settings.fence_s
    while job.now_s < ended_s - 1.0:
        job.now_s += 1.0
        job.hear("n2", "waits")
        job.hear("n3", "waits")
        assert job.decide() == []
        assert "no launcher of generation 0 says that its ranks have ended" in job.leader.answer(member("n2")).told
    job.now_s = ended_s + 0.1
    job.hear("n2", "waits")
    job.hear("n3", "waits")
    (formed,) = job.decide()
    assert names(formed) == ["n2", "n3"]


def test_a_job_ends_when_all_its_ranks_have_done_their_work() -> None:
    job = Job()
    job.begin("n0", "n1")
    job.hear("n0", "left", ran=0, succeeded=True)
    job.now_s = 100.0
    job.hear("n1", "runs", ran=0)
    assert job.decide() == [], "who has done its work is not lost"
    job.hear("n1", "left", ran=0, succeeded=True)
    (done,) = job.decide()
    assert isinstance(done, Done)
    assert done.succeeded


def test_a_node_that_leaves_without_success_ends_a_job_without_spares() -> None:
    job = Job()
    job.begin("n0", "n1")
    job.hear("n1", "left", ran=0, reason="ChildFailedError: rank 1")
    (over,) = job.decide()
    assert isinstance(over, Over)
    job.hear("n0", "waits", ran=0)
    (done,) = job.decide()
    assert isinstance(done, Done)
    assert not done.succeeded
    assert "n1 left (ChildFailedError: rank 1)" in done.reason
    assert "1 of 2 nodes are left" in done.reason


def test_fewer_nodes_after_a_last_call_and_more_when_one_returns() -> None:
    job = Job(least=1, most=2, last_call_s=10.0, grow_after_s=20.0, silent_s=1000.0)
    job.begin("n0", "n1")
    job.leader.broke("n1", 0.0)
    job.now_s = 2.0
    (over,) = job.decide()
    assert "connection broke 2.0 s ago" in over.reason  # type: ignore[attr-defined]
    job.hear("n0", "waits", ran=0)
    assert job.decide() == []
    job.now_s = 13.0
    (formed,) = job.decide()
    assert names(formed) == ["n0"]
    job.hear("n0", "runs", ran=1)
    job.hear("n1", "waits", ran=0)
    job.now_s = 32.0
    assert job.decide() == []
    job.now_s = 33.5
    (over,) = job.decide()
    assert "n1 joins" in over.reason  # type: ignore[attr-defined]


def test_ten_evictions_in_an_hour() -> None:
    job = Job(least=1, most=2, evictions_per_hour=4)
    for number in range(12):
        job.hear(f"n{number}", "waits")
    found = [job.wish("evict", f"n{number}") for number in range(10)]
    assert [record is not None for record, _ in found] == [True] * 4 + [False] * 6
    assert "4 evictions in the last hour, at most 4 are allowed" in found[-1][1]
    assert job.wish("evict", "n9", by_person=True)[0] is not None
    job.now_s = 3700.0
    for number in range(12):
        job.hear(f"n{number}", "waits")
    assert isinstance(job.wish("evict", "n8")[0], Evicted)


def test_the_job_keeps_as_many_nodes_as_it_needs() -> None:
    job = Job()
    job.begin("n0", "n1")
    record, text = job.wish("evict", "n1")
    assert record is None
    assert "1 other nodes are fit, and the job needs 2" in text
    record, text = job.wish("evict", "n1", by_person=True)
    assert isinstance(record, Evicted)
    assert "it waits for more" in text
    (over,) = job.decide()
    assert "n1 is evicted: a test" in over.reason  # type: ignore[attr-defined]
    job.hear("n0", "waits", ran=0)
    job.hear("n1", "waits", ran=0)
    assert job.decide() == []
    assert job.wish("readmit", "nobody")[1] == "no node 'nobody' is evicted; evicted are n1"
    assert isinstance(job.wish("readmit", "n1")[0], Readmitted)
    (formed,) = job.decide()
    assert names(formed) == ["n0", "n1"]
    assert "known are n0, n1" in job.wish("evict", "elsewhere")[1]


def test_an_old_report_that_comes_late_says_nothing() -> None:
    job = Job()
    job.begin("n0", "n1")
    job.leader.hear(Report(member=member("n1"), state="waits", ran=0, count=0), job.now_s)
    assert job.decide() == []


def test_4096_nodes() -> None:
    """That they form a generation; how long it takes, the benchmark says."""
    job = Job(least=4096, most=4096)
    for number in range(4100):
        job.hear(f"n{number}", "waits")
    (formed,) = job.decide()
    assert len(names(formed)) == 4096
    assert job.leader.answer(member(names(formed)[4095])).rank == 4095
    assert job.leader.answer(member("n0")).pace_s >= 4.0, "launchers that wait do not ask more often than can be heard"
