"""What any way of choosing a granularity makes of the answers: accuracy, cost, choices, and how sure these are.

A way of choosing is a table of weights (Q, G): the probability that a question is asked at a level. Legend: Q questions, G levels
coarse to fine, F families, P pictures, R resamples.
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
FEWEST_PICTURES = 20
"""A family on fewer pictures gets no interval: drawing from so few says little about others, and many a draw would lack the family."""


def tail(pictures: int) -> float:
    """The share that a 95 % interval cuts off at each end of a bootstrap over so many pictures.

    Less than 2.5 %, because a bootstrap spreads by sqrt((n - 1) / n) too little and knows the normal distribution alone: the expanded
    percentile interval (Hesterberg 2015, The American Statistician 69, 371-386), at whose ends Student's t takes the normal's place.
    """
    normal, freedom = statistics.NormalDist(), pictures - 1
    z = normal.inv_cdf(0.975)
    # Student's quantile by its expansion in 1 / freedom (Abramowitz and Stegun 26.7.5), right to 0.001 from 10 degrees on
    t = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    return normal.cdf(-t * math.sqrt(pictures / freedom))


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
        self.picture = np.unique([record.image for record in records], return_inverse=True)[1]
        self.families = list(families) if families is not None else list(dict.fromkeys(record.family for record in records))
        self.levels = self.right.shape[1]

    # ---- ways of choosing ----------------------------------------------------------------------------------------------------

    def fixed(self, level: int) -> np.ndarray:
        """One level for every question."""
        return np.tile(np.eye(self.levels)[level], (len(self.right), 1))

    def chosen(self, logits: np.ndarray) -> np.ndarray:
        """The level of the highest logit."""
        return self.at(logits.argmax(1))

    def at(self, levels: Sequence[int] | np.ndarray) -> np.ndarray:
        """A given level for each question."""
        return np.eye(self.levels)[np.asarray(levels)]

    def wished(self, logits: Sequence[Sequence[float] | None], names: Sequence[int], request: RoutingRequest) -> np.ndarray:
        """What the model would choose under a bias or budget.

        Args:
            logits: the router's, (G,) per question, or `None`. names: tokens per view of each level.

        Raises:
            ValueError: a bias without a router, or a budget below the coarsest level of some question.
        """
        has_router = all(scores is not None for scores in logits)
        allowed = allowed_levels(names, request, has_router)
        costs = self.tokens.astype(int).tolist()
        return self.at([choose_levels([scores], [cost], allowed, request)[0] for scores, cost in zip(logits, costs, strict=True)])

    def cheapest_right(self) -> np.ndarray:
        """The cheapest level that answers rightly; the cheapest of all where none does."""
        return self.at(self.right.argmax(1))

    def random_at(self, tokens: float) -> np.ndarray:
        """A coin between the two fixed levels around a mean cost, weighted so that it costs as much."""
        costs = [self.mean_tokens(self.fixed(level)) for level in range(self.levels)]
        position = float(np.interp(tokens, costs, range(self.levels)))
        lower = min(int(position), max(self.levels - 2, 0))
        upper = min(lower + 1, self.levels - 1)
        return (1 - (position - lower)) * self.fixed(lower) + (position - lower) * self.fixed(upper)

    # ---- what comes of them --------------------------------------------------------------------------------------------------

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
        """A line of the table."""
        families = self.accuracy(weights)
        tokens = self.of_families((self.tokens * weights).sum(1))
        mean_tokens = statistics.mean(tokens.values())
        return {
            "accuracy": statistics.mean(families.values()),
            "tokens": mean_tokens,
            "families": families,
            "family_tokens": tokens,
            "saved": 100 * (1 - mean_tokens / self.mean_tokens(self.fixed(self.levels - 1))),
            "choices": {family: self.share(weights, family) for family in self.families},
        }

    def share(self, weights: np.ndarray, family: str) -> list[float]:
        """Percent of a family's questions at each level."""
        return [100 * float(value) for value in weights[self.family == family].mean(0)]

    def interpolated(self, tokens: float) -> float:
        """Accuracy of the line through the fixed levels at a mean token count: what random choice between neighbours reaches."""
        fixed = [self.row(self.fixed(level)) for level in range(self.levels)]
        return float(np.interp(tokens, [row["tokens"] for row in fixed], [row["accuracy"] for row in fixed]))

    # ---- how sure ------------------------------------------------------------------------------------------------------------

    @cached_property
    def _family_of_question(self) -> np.ndarray:
        return np.array([self.families.index(family) for family in self.family])

    def resampled(self, weights: np.ndarray, seed: int, resamples: int = RESAMPLES) -> np.ndarray:
        """(R,) accuracies when the images are drawn anew with replacement, see `resampled_means`."""
        return self.resampled_means(100 * (self.right * weights).sum(1), seed, resamples)

    def resampled_means(self, values: np.ndarray, seed: int, resamples: int = RESAMPLES) -> np.ndarray:
        """(R,) means over families of per-question values (Q,) when the images are drawn anew with replacement.

        Images are drawn, not questions: questions about one image are not independent. The same seed draws the same images for
        everything that was asked about the same questions, so differences of two results are paired. A draw that lacks a family is no
        estimate of a mean over all families and is left out, so R may be below `resamples`.
        """
        pictures = int(self.picture.max()) + 1
        shape = (len(self.families), pictures)
        sums, counts = np.zeros(shape), np.zeros(shape)
        np.add.at(sums, (self._family_of_question, self.picture), values)
        np.add.at(counts, (self._family_of_question, self.picture), 1)
        draws = np.random.default_rng(seed).multinomial(pictures, np.full(pictures, 1 / pictures), size=resamples).astype(float)
        asked = draws @ counts.T  # (R, F)
        whole = (asked > 0).all(axis=1)
        return (draws[whole] @ sums.T / asked[whole]).mean(axis=1)

    @cached_property
    def pictures(self) -> dict[str, int]:
        """On how many pictures each family is."""
        return {family: len(np.unique(self.picture[self.family == family])) for family in self.families}

    @property
    def rare_families(self) -> dict[str, int]:
        """The families on fewer than `FEWEST_PICTURES` pictures, and on how many each is."""
        return {family: count for family, count in self.pictures.items() if count < FEWEST_PICTURES}

    def interval(self, values: np.ndarray) -> tuple[float, float] | None:
        """A 95 % interval from resampled values, for the family on the fewest pictures; `None` where those are too few, see `tail`."""
        if self.rare_families or not len(values):
            return None
        cut = 100 * tail(min(self.pictures.values()))
        low, high = np.percentile(values, [cut, 100 - cut])
        return float(low), float(high)
