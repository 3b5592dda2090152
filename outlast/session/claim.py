"""One start of a run in its directory, which rank 0 takes for all ranks."""

from __future__ import annotations

from contextlib import ExitStack

from outlast.errors import RunDirectoryError
from outlast.launch.attempt import Attempt
from outlast.launch.run_directory import RunDirectory
from outlast.session.agreement import StepAgreement


def claim_attempt(
    directory: RunDirectory,
    rank: int,
    agreement: StepAgreement,
    stack: ExitStack,
    *,
    resuming: bool,
    settings: str = "",
) -> Attempt:
    """Rank 0 takes the directory, and the next attempt's folder; if it cannot, all ranks raise. Collective.

    Args:
        directory: the run's.
        rank: this one.
        agreement: of all ranks.
        stack: gives the directory back.
        resuming, settings: see :meth:`RunDirectory.claim`.

    Raises:
        RunDirectoryError: see :meth:`RunDirectory.claim`; on other ranks, that rank 0 has been refused.
    """
    refusal: RunDirectoryError | None = None
    number = 0
    if rank == 0:
        try:
            number = directory.claim(stack, resuming=resuming, settings=settings).number
        except RunDirectoryError as error:
            refusal = error
    number = agreement.share(number)
    if refusal is not None:
        raise refusal
    if number == 0:
        raise RunDirectoryError(f"rank 0 cannot use the run directory {directory.path}", "see the message of rank 0")
    attempt = Attempt(directory.path, number)
    attempt.make_folders()
    return attempt
