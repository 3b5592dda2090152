"""Standby processes: interpreters with the program's packages imported, which become ranks at a restart.

Each is a child of the launcher, started as a rank is (``parent_death.py``), so it dies with the launcher and keeps its
process id when it becomes a rank. :class:`~outlast.launch.standby.keeper.Standbys` is the launcher's side;
``python -m outlast.launch.standby`` is the process.
"""
