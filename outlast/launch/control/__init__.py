"""The control plane of a job on several nodes: who is in which generation, and who decides it.

All that was decided stands in one journal, as records with consecutive numbers. A number can be taken once (exclusive
creation in a folder, a conditional put in an object store, a transaction in etcd), so all readers see the same records
in the same order, and that is all the agreement there is. Whoever writes a ``lead`` record leads from then on: the
number of that record is the *epoch* of all that it orders. One that leads and finds a number taken has been replaced,
or reads on before it writes. So two that both believe they lead cannot both decide.

``records`` and ``journal`` say what was decided; ``messages`` what launchers and the controller tell each other;
``leader`` and ``follower`` decide, without clocks, threads or sockets; ``board`` and ``etcd`` keep the journal;
``node`` and ``leading`` run it all in a launcher, by the ``meeting``'s clock and connections; ``handler`` gives it to
torchelastic as a rendezvous.
"""
