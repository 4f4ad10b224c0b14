"""Accuracy, cost and confidence intervals of a policy, computed from the answers at every granularity.

A policy is given here as a table of weights (Q, G): the probability that a question is answered at a level. Legend: Q questions, G levels
coarse to fine, F families, I images, R resamples.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from llava.eval.report.answers import Record
from llava.messages import RoutingRequest
from llava.model.routing import allowed_levels, choose_levels

RESAMPLES = 2000
FEWEST_IMAGES = 20
"""A family with fewer images gets no interval: so small a sample says little about other images, and many resamples would lack it."""


def tail(images: int) -> float:
    """The share that a 95 % interval cuts off at each end of a bootstrap over this many images.

    It is below 2.5 %: a plain percentile interval is too narrow for small samples, by the factor sqrt((n - 1) / n) and because it has the
    tails of the normal distribution. The expanded percentile interval corrects both, with the quantile of Student's t in place of the
    normal one (Hesterberg 2015, The American Statistician 69, 371-386).
    """
    normal, freedom = statistics.NormalDist(), images - 1
    z = normal.inv_cdf(0.975)
    # Student's quantile by its expansion in 1 / freedom (Abramowitz and Stegun 26.7.5), accurate to 0.001 from 10 degrees of freedom on
    t = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    return normal.cdf(-t * math.sqrt(images / freedom))


class Outcomes:
    """Answers as arrays.

    Accuracy and cost are means over families: every family counts the same, however many questions it has. Accuracy is in percent.

    Args:
        records: answered questions.
        families: their families in the order of the table; by default in order of appearance.
    """

    def __init__(self, records: Sequence[Record], families: Sequence[str] | None = None) -> None:
        self.right = np.array([record.right for record in records], dtype=float)  # (Q, G)
        self.tokens = np.array([record.tokens for record in records], dtype=float)  # (Q, G)
        self.family = np.array([record.family for record in records])
        self.image = np.unique([record.image for record in records], return_inverse=True)[1]
        self.families = list(families) if families is not None else list(dict.fromkeys(record.family for record in records))
        self.levels = self.right.shape[1]

    # ---- policies ------------------------------------------------------------------------------------------------------------

    def fixed(self, level: int) -> np.ndarray:
        """One level for every question."""
        return np.tile(np.eye(self.levels)[level], (len(self.right), 1))

    def chosen(self, logits: np.ndarray) -> np.ndarray:
        """The level of the highest logit."""
        return self.at(logits.argmax(1))

    def at(self, levels: Sequence[int] | np.ndarray) -> np.ndarray:
        """A given level for each question."""
        return np.eye(self.levels)[np.asarray(levels)]

    def routed(self, logits: Sequence[Sequence[float] | None], granularities: Sequence[int], request: RoutingRequest) -> np.ndarray:
        """The levels that the model picks for a request, such as one with a bias or a budget.

        Args:
            logits: the router's, (G,) per question, or `None`. granularities: tokens per view of each level.

        Raises:
            ValueError: a bias without a router, or a budget below the coarsest level of some question.
        """
        has_router = all(scores is not None for scores in logits)
        allowed = allowed_levels(granularities, request, has_router)
        costs = self.tokens.astype(int).tolist()
        return self.at([choose_levels([scores], [cost], allowed, request)[0] for scores, cost in zip(logits, costs, strict=True)])

    def cheapest_right(self) -> np.ndarray:
        """The cheapest level that answers correctly; the cheapest of all where none does."""
        return self.at(self.right.argmax(1))

    def random_at(self, tokens: float) -> np.ndarray:
        """A random choice between the two fixed levels next to a mean cost, weighted so that its expected cost is the same."""
        costs = [self.mean_tokens(self.fixed(level)) for level in range(self.levels)]
        position = float(np.interp(tokens, costs, range(self.levels)))
        lower = min(int(position), max(self.levels - 2, 0))
        upper = min(lower + 1, self.levels - 1)
        return (1 - (position - lower)) * self.fixed(lower) + (position - lower) * self.fixed(upper)

    # ---- their results -------------------------------------------------------------------------------------------------------

    def of_families(self, values: np.ndarray) -> dict[str, float]:
        """Mean of per-question values in each family."""
        return {family: float(values[self.family == family].mean()) for family in self.families}

    def accuracy(self, weights: np.ndarray) -> dict[str, float]:
        """Accuracy of each family."""
        return self.of_families(100 * (self.right * weights).sum(1))

    def over_questions(self, weights: np.ndarray) -> float:
        """Accuracy where every question counts the same."""
        return float(100 * (self.right * weights).sum(1).mean())

    def mean_tokens(self, weights: np.ndarray) -> float:
        """Visual tokens, mean over families."""
        return statistics.mean(self.of_families((self.tokens * weights).sum(1)).values())

    def row(self, weights: np.ndarray) -> dict[str, Any]:
        """A row of the table."""
        families = self.accuracy(weights)
        tokens = self.of_families((self.tokens * weights).sum(1))
        mean_tokens = statistics.mean(tokens.values())
        return {
            "accuracy": statistics.mean(families.values()),
            "tokens": mean_tokens,
            "families": families,
            "family_tokens": tokens,
            "saved": 100 * (1 - mean_tokens / self.mean_tokens(self.fixed(self.levels - 1))),
            "choices": {family: (100 * weights[self.family == family].mean(0)).tolist() for family in self.families},
        }

    def interpolated(self, tokens: float) -> float:
        """Accuracy of the line through the fixed levels at a mean token count: what random choice between neighbours reaches."""
        fixed = [self.row(self.fixed(level)) for level in range(self.levels)]
        return float(np.interp(tokens, [row["tokens"] for row in fixed], [row["accuracy"] for row in fixed]))

    # ---- confidence intervals ------------------------------------------------------------------------------------------------

    def resampled(self, weights: np.ndarray, seed: int, resamples: int = RESAMPLES) -> np.ndarray:
        """(R,) accuracies of bootstrap resamples, see `resampled_means`."""
        return self.resampled_means(100 * (self.right * weights).sum(1), seed, resamples)

    def resampled_means(self, values: np.ndarray, seed: int, resamples: int = RESAMPLES) -> np.ndarray:
        """(R,) means over families of per-question values (Q,), for bootstrap resamples of the images.

        Images are drawn, not questions: questions about one image are not independent. The same seed draws the same images for all
        results on the same questions, so differences between two of them are paired. A resample that lacks a family estimates no mean
        over all families and is dropped, so R may be below `resamples`.
        """
        images, family = int(self.image.max()) + 1, np.array([self.families.index(name) for name in self.family])
        shape = (len(self.families), images)
        sums, counts = np.zeros(shape), np.zeros(shape)
        np.add.at(sums, (family, self.image), values)
        np.add.at(counts, (family, self.image), 1)
        draws = np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), size=resamples).astype(float)
        asked = draws @ counts.T  # (R, F)
        whole = (asked > 0).all(axis=1)
        return (draws[whole] @ sums.T / asked[whole]).mean(axis=1)

    @cached_property
    def images(self) -> dict[str, int]:
        """The number of images of each family."""
        return {family: len(np.unique(self.image[self.family == family])) for family in self.families}

    @property
    def rare_families(self) -> dict[str, int]:
        """The families with fewer than `FEWEST_IMAGES` images, and how many each has."""
        return {family: count for family, count in self.images.items() if count < FEWEST_IMAGES}

    def interval(self, values: np.ndarray) -> tuple[float, float] | None:
        """A 95 % interval from resampled values, widened for the family with the fewest images, see `tail`; `None` if it is a rare one."""
        if self.rare_families or not len(values):
            return None
        cut = 100 * tail(min(self.images.values()))
        low, high = np.percentile(values, [cut, 100 - cut])
        return float(low), float(high)
