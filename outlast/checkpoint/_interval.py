"""How far apart checkpoints should lie: Young's and Daly's answer, and what failures seen say of those to come.

Training for τ seconds and then paying δ for a save, with failures that come at random every M seconds on average, loses
about δ/τ of the time to saves and τ/2M to work done again. Young (CACM 17, 1974) sets both equal, τ = √(2δM); Daly
(Future Generation Computer Systems 22, 2006, eq. 37) carries the expansion further, for δ that is not small beside M.

δ is what a save *costs training*. A save that is written in the background is durable long after; a failure in between
loses that time as well, but no choice of τ changes it.
"""

from __future__ import annotations

import math

PRIOR_LIMIT_S = 3600.0
"""What is expected of failures beforehand counts as at most that much time of the run itself. Short, since errors do
not cost alike: saving too often loses δ/τ at most, saving too rarely loses τ at every failure until that is learned."""


def optimal_interval_s(cost_s: float, mtbf_s: float) -> float:
    """Daly's higher-order optimum: seconds of training between the end of one save and the begin of the next.

    τ = √(2δM) (1 + √(δ/2M)/3 + (δ/2M)/9) - δ for δ < 2M, else M.

    Args:
        cost_s: δ, seconds that a save takes from training, >= 0.
        mtbf_s: M, mean seconds between failures, > 0.
    """
    ratio = cost_s / (2 * mtbf_s)
    if ratio >= 1:
        return mtbf_s
    return math.sqrt(2 * cost_s * mtbf_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - cost_s


def expected_mtbf_s(prior_s: float, failures: int, trained_s: float) -> float:
    """Mean seconds between failures, from what was expected and what was seen.

    What is lost is linear in the failure rate, so the rate's posterior mean is what counts. Failures are a Poisson
    process, and the prior of its rate a Gamma distribution of mean ``1 / prior_s`` that counts as one failure in
    ``prior_s`` or, where that is longer than ``PRIOR_LIMIT_S``, as that fraction of a failure in ``PRIOR_LIMIT_S``:
    a run that fails every few minutes is soon believed. Where nothing has failed yet, the result is no longer than
    what was expected or seen.

    Args:
        prior_s: expected before anything was seen, > 0.
        failures: seen.
        trained_s: seconds of training in which they were seen.
    """
    weight_s = min(prior_s, PRIOR_LIMIT_S)
    posterior_s = (weight_s + trained_s) / (weight_s / prior_s + failures)
    return min(posterior_s, max(prior_s, trained_s))
