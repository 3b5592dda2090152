"""What goes wrong in a simulated cluster, and what must be so once all is well again."""

from __future__ import annotations

from outlast.launch.control.messages import Wish

from .simulated_node import Node
from .simulated_world import Violation, World


def faults(world: World, for_s: float) -> None:
    """Let things go wrong for a while; then all is well again, but for machines that died for good."""
    rng = world.rng
    end = world.now + for_s
    world.trouble = rng.choice([0.0, 0.02, 0.1, 0.3])
    while world.now < end:
        world.run(rng.expovariate(0.3))
        node, other = rng.sample(world.nodes, 2)
        kind = rng.choice(["crash", "crash", "stop", "stop", "cut", "alone", "no board", "trouble", "ranks", "word"])
        if kind == "crash" and node.alive:
            node.crash()
            world.at(rng.uniform(0.5, 20.0), node.boot)
        elif kind == "stop" and node.alive:
            node.stop(rng.choice([rng.uniform(0.1, 3.0), rng.uniform(3.0, 25.0)]))
        elif kind == "cut":
            pair = frozenset((node.name, other.name))
            world.say(f"{node.name} - {other.name} is cut")
            world.cut.add(pair)
            world.at(rng.uniform(1.0, 25.0), lambda pair=pair: world.cut.discard(pair))  # type: ignore[misc]
        elif kind in ("alone", "no board"):
            group = rng.sample(world.nodes, rng.randint(1, len(world.nodes) - 1))
            _part(world, group, rng.uniform(1.0, 30.0), board=kind == "no board" or rng.random() < 0.5)
        elif kind == "trouble":
            world.trouble = rng.choice([0.0, 0.05, 0.3])
        elif kind == "ranks" and node.ranks is not None and not node.stopping:
            node.stopping = True
            life = node.life
            world.at(0.1, lambda node=node, life=life: node._stopped(life))  # type: ignore[misc]
        elif kind == "word":
            leading = next((one.leading for one in world.nodes if one.leading is not None), None)
            if leading is not None:
                action = rng.choice(["evict", "readmit", "readmit"])
                leading.wish(Wish(action=action, node=node.name, by_person=rng.random() < 0.5))
    world.cut.clear()
    world.no_board.clear()
    world.trouble = 0.0
    world.run(26.0)
    world.say("all is well")


def _part(world: World, group: list[Node], for_s: float, *, board: bool) -> None:
    inside = {node.name for node in group}
    pairs = {frozenset((a, b.name)) for a in inside for b in world.nodes if b.name not in inside}
    world.say(f"{sorted(inside)} are cut off, the journal too: {board}")
    world.cut |= pairs
    world.no_board |= inside if board else set()

    def heal() -> None:
        world.cut -= pairs
        world.no_board -= inside

    world.at(for_s, heal)


def settle(world: World, for_s: float) -> None:
    """Readmit whoever was evicted, give the job time, and check that all that live have a place in it."""
    world.run(for_s / 2)
    for node in world.nodes:
        leading = node.leading
        if leading is not None and not leading.lost:
            for name in world.log().evicted:
                leading.wish(Wish(action="readmit", node=name, by_person=True))
    world.run(for_s / 2)
    journal = world.log()
    formed = journal.running
    if formed is None:
        raise Violation(f"no generation runs: {journal.over}, {journal.done}; {_states(world)}")
    members = {one.agent for one in formed.members}
    fit = [node for node in world.nodes if node.alive and f"{node.name}/boot" not in journal.evicted]
    for node in fit:
        assert node.control is not None
        inside = node.control.member.agent in members
        runs = node.ranks is not None and node.ranks[0] == formed.generation
        if inside != runs:
            raise Violation(f"{node.name} is {'' if inside else 'not '}in {formed.generation}: {_states(world)}")
    wanted = min(world.settings.most, len(fit))
    if len(formed.members) != wanted:
        raise Violation(f"{len(formed.members)} nodes run, {len(fit)} are fit: {_states(world)}")


def _states(world: World) -> str:
    return ", ".join(
        f"{node.name}: {'alive' if node.alive else 'dead'} {node.ranks} "
        f"{node.control.newest if node.control is not None else ''}"
        for node in world.nodes
    )
