"""From prepared requests to rows that the language model can read: encode and route, batched."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llava.constants import IMAGE_TOKEN_INDEX
from llava.inference import Assistant
from llava.model.llava_arch import EncodedRow
from llava.model.routing import RoutingReport
from llava.model.splice import PromptRow, SplicedRow, prompt_rows, splice_rows
from llava.serve.engine.caches import TensorCache, prefix_key
from llava.serve.engine.prepare import plan_of, too_long
from llava.serve.engine.task import Encoded, Prepared, Unread
from llava.serve.protocol import GenerationRequest, ImageReport
from llava.timing import StageTimer
from llava.visualize import grid_of


class Encoder:
    """Encodes requests together; each picture once, whoever asks about it.

    Args:
        assistant: the loaded model.
        features: encoded pictures that are known. prefixes: keys and values of prompts' beginnings that are. revision: of the weights.
        longest_row: positions that one request may take, its answer included.
    """

    def __init__(self, assistant: Assistant, features: TensorCache, prefixes: TensorCache, revision: str, longest_row: int) -> None:
        self.assistant, self.model = assistant, assistant.model
        self.features, self.prefixes, self.revision, self.longest_row = features, prefixes, revision, longest_row

    def encode(self, requests: Sequence[GenerationRequest], prepared: Sequence[Prepared]) -> list[tuple[Encoded, Unread]]:
        """
        Raises:
            ServeError: a prompt that is too long at the granularity the router chose.
        """
        timer = StageTimer(self.model.device)
        features, cached = self._features(prepared, timer)
        plan = plan_of(self.assistant, requests, prepared, [len(each) for each in features])
        try:
            rows = self.model.encode_rows([each.prompt for each in prepared], features, plan, timer)
        except ValueError as error:  # a row that is longer than the context
            raise too_long(requests[0], self.longest_row) from error
        return [
            self._finished(request, each, [cached[image] for image in images], row, timer.milliseconds)
            for request, each, images, row in zip(requests, prepared, plan.owners, rows, strict=True)
        ]

    def encode_again(self, request: GenerationRequest, prepared: Prepared, encoded: Encoded, written: Sequence[int]) -> Unread:
        """The same row once more for one that was read before, at the granularities told then, and behind it what is written of the answer.

        Args:
            written: ids.
        """
        features, _ = self._features([prepared], StageTimer(self.model.device))
        plan = plan_of(self.assistant, [request], [prepared], [len(each) for each in features])
        names = [level.tokens for level in self.model.levels] if features else []
        levels = [names.index(report.granularity) for report in encoded.reports]
        tokens = [
            self.model.visual_tokens(image, level, layouts[level])
            for image, level, layouts in zip(features, levels, plan.layouts, strict=True)
        ]
        answer = torch.tensor([list(written)], device=prepared.prompt.ids.device)
        [behind] = prompt_rows(answer, None, None)
        whole = PromptRow(torch.cat([prepared.prompt.ids, behind.ids]), torch.cat([prepared.prompt.labels, behind.labels]))
        [row] = splice_rows([whole], tokens, self.model.get_input_embeddings(), self.model.config.context_length)
        return self._unread(row, encoded.beginnings)

    def _unread(self, row: SplicedRow, beginnings: Sequence[tuple[str, int]]) -> Unread:
        """A row without what is known of it."""
        known = next((kept for key, _ in beginnings if key in self.prefixes and (kept := self.prefixes.get(key))), ())
        skip = known[0].shape[1] if known else 0
        return Unread(SplicedRow(row.inputs_embeds[skip:], row.labels[skip:]), known)

    def _features(self, prepared: Sequence[Prepared], timer: StageTimer) -> tuple[list[Tensor], list[bool]]:
        """Features (C, P, D) of all pictures, in order, and whether they were known."""
        known: dict[str, Tensor] = {}
        missing: dict[str, Tensor] = {}
        cached: list[bool] = []
        for each in prepared:
            for key, picture, have in zip(each.keys, each.pictures, each.cached, strict=True):
                if not have and key not in missing and (kept := self.features.get(key)) is not None:
                    picture, have = kept[0], True  # another request brought it in the meantime
                (known if have else missing)[key] = picture
                cached.append(have)
        with timer("vision"):
            for key, features in zip(missing, self.model.encode_views(list(missing.values())), strict=True):
                known[key] = features
                if features.isfinite().all():  # what broke down once is not remembered
                    self.features.put(key, features)
        return [known[key] for each in prepared for key in each.keys], cached

    def _finished(
        self, request: GenerationRequest, prepared: Prepared, cached: Sequence[bool], encoded: EncodedRow, milliseconds: dict[str, float]
    ) -> tuple[Encoded, Unread]:
        row, room = encoded.row, self.longest_row - encoded.row.length
        if room < 1:
            raise too_long(request, self.longest_row)
        reports = tuple(
            self._plain(report, have, image.size) for report, have, image in zip(encoded.reports, cached, request.images, strict=True)
        )
        beginnings = self._beginnings(prepared, reports, row.length)
        known = Encoded(row.length, min(request.sampling.max_new_tokens, room), reports, beginnings, dict(milliseconds))
        return known, self._unread(row, beginnings)

    def _plain(self, report: RoutingReport, cached: bool, size: tuple[int, int]) -> ImageReport:
        return ImageReport(
            granularity=report.granularity,
            visual_tokens=report.num_visual_tokens,
            full_visual_tokens=report.full_visual_tokens,
            tokens_per_level=report.tokens_per_level,
            logits=() if report.logits is None else tuple(report.logits.tolist()),
            probabilities=() if report.probabilities is None else tuple(report.probabilities.tolist()),
            cached=cached,
            grid=grid_of(size, report.granularity, self.model.config),
        )

    def _beginnings(self, prepared: Prepared, reports: Sequence[ImageReport], length: int) -> tuple[tuple[str, int], ...]:
        """Key and length of the prompt up to the end of each of its pictures, longest first."""
        ids = prepared.prompt.ids.tolist()
        pictures = [(key, report.granularity) for key, report in zip(prepared.keys, reports, strict=True)]
        places = [place for place, token in enumerate(ids) if token == IMAGE_TOKEN_INDEX]
        found, visual = [], 0
        for count, (place, report) in enumerate(zip(places, reports, strict=True), start=1):
            visual += report.visual_tokens
            found.append((prefix_key(ids[: place + 1], pictures[:count], self.revision), place + 1 - count + visual))
        # The last position has to be read in any case: it says what comes first.
        return tuple((key, end) for key, end in reversed(found) if end < length)
