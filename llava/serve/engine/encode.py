"""From prepared requests to prefills: encode images, route and splice, batched over requests."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import torch

from llava.inference import Assistant
from llava.model.compose import ComposedRow, ImageInput
from llava.model.routing import RoutingReport
from llava.model.splice import ContextLengthError, SplicedRow
from llava.serve.engine.caches import TensorCache, prefix_key
from llava.serve.engine.prepare import too_long
from llava.serve.engine.task import Encoded, PendingPrefill, Prepared
from llava.serve.protocol import GenerationRequest, ImageReport
from llava.timing import StageTimer
from llava.visualize import grid_of


class ImageEncoder:
    """Encodes the images of a batch of requests; one that several of them ask about is encoded once.

    Args:
        assistant: the loaded model. features: cache of image features.
    """

    def __init__(self, assistant: Assistant, features: TensorCache) -> None:
        self.assistant, self.model, self.features = assistant, assistant.model, features

    def encoded_images(self, prepared: Sequence[Prepared], timer: StageTimer) -> tuple[list[ImageInput], list[bool]]:
        """All images in order, encoded, and whether each one's features were cached; those that were not are cached now."""
        by_key: dict[str, ImageInput] = {}
        cached: list[bool] = []
        for each in prepared:
            for key, image in zip(each.keys, each.images, strict=True):
                found = by_key.get(key)
                if not image.is_encoded and (found is None or found.is_encoded) and (kept := self.features.get(key)) is not None:
                    image = ImageInput(kept[0], image.size, is_encoded=True)  # encoded for another request in the meantime
                if found is None or image.is_encoded:
                    by_key[key] = image
                cached.append(image.is_encoded)
        with timer("vision"):
            encoded = dict(zip(by_key, self.model.with_features(list(by_key.values())), strict=True))
            for key, image in encoded.items():
                if not by_key[key].is_encoded and image.tensor.isfinite().all():  # broken numbers must not be served again
                    self.features.put(key, image.tensor)
        return [encoded[key] for each in prepared for key in each.keys], cached

    def plain(self, report: RoutingReport, cached: bool, size: tuple[int, int]) -> ImageReport:
        """A report as plain numbers.

        Args:
            cached: whether the image's features were cached. size: of the image, (width, height) in pixels.
        """
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


class Encoder(ImageEncoder):
    """From prepared requests to prefills, batched.

    Args:
        assistant: the loaded model.
        features: cache of image features. prefixes: cache of keys and values of prompt prefixes. revision: of the weights, for cache keys.
        longest_row: positions that one request may take, its answer included.
    """

    def __init__(self, assistant: Assistant, features: TensorCache, prefixes: TensorCache, revision: str, longest_row: int) -> None:
        super().__init__(assistant, features)
        self.prefixes, self.revision, self.longest_row = prefixes, revision, longest_row

    def encode(self, requests: Sequence[GenerationRequest], prepared: Sequence[Prepared]) -> list[tuple[Encoded, PendingPrefill]]:
        """
        Raises:
            ServeError: a prompt that is too long at the granularity the router chose.
        """
        timer = StageTimer(self.model.device)
        images, cached = self.encoded_images(prepared, timer)
        try:
            rows = self.model.compose([each.prompt for each in prepared], images, [request.routing for request in requests], timer)
        except ContextLengthError as error:
            raise too_long(requests[0], self.longest_row) from error
        each_cached = iter(cached)
        return [
            self._finished(request, each, list(islice(each_cached, len(each.keys))), row, timer.milliseconds)
            for request, each, row in zip(requests, prepared, rows, strict=True)
        ]

    def reencode(self, request: GenerationRequest, prepared: Prepared, encoded: Encoded, written: Sequence[int]) -> PendingPrefill:
        """The prefill of a preempted request: its prompt at the granularities reported before, followed by its answer so far.

        Args:
            written: ids of the answer so far.
        """
        images, _ = self.encoded_images([prepared], StageTimer(self.model.device))
        layouts = self.model.plan([prepared.prompt], images, request.routing).layouts
        levels = [self.model.level_of(report.granularity) for report in encoded.reports]
        whole = prepared.prompt.followed_by(torch.tensor(written, dtype=torch.long, device=prepared.prompt.ids.device))
        [row] = self.model.splice_at([whole], images, levels, layouts)
        return self._pending(row, encoded.prefixes)

    def _pending(self, row: SplicedRow, prefixes: Sequence[tuple[str, int]]) -> PendingPrefill:
        """The part of a row behind its longest cached prefix."""
        cached = next((kept for key, _ in prefixes if key in self.prefixes and (kept := self.prefixes.get(key))), ())
        skip = cached[0].shape[1] if cached else 0
        return PendingPrefill(SplicedRow(row.inputs_embeds[skip:], row.labels[skip:]), cached)

    def _finished(
        self, request: GenerationRequest, prepared: Prepared, cached: Sequence[bool], composed: ComposedRow, milliseconds: dict[str, float]
    ) -> tuple[Encoded, PendingPrefill]:
        row, room = composed.row, self.longest_row - composed.row.length
        if room < 1:
            raise too_long(request, self.longest_row)
        reports = tuple(
            self.plain(report, have, image.size) for report, have, image in zip(composed.reports, cached, request.images, strict=True)
        )
        prefixes = self._prefix_keys(prepared, reports, row.length)
        known = Encoded(row.length, min(request.sampling.max_new_tokens, room), reports, prefixes, dict(milliseconds))
        return known, self._pending(row, prefixes)

    def _prefix_keys(self, prepared: Prepared, reports: Sequence[ImageReport], length: int) -> tuple[tuple[str, int], ...]:
        """Cache key and length of the prompt up to the end of each of its images, longest first."""
        ids = prepared.prompt.ids.tolist()
        images = [(key, report.granularity) for key, report in zip(prepared.keys, reports, strict=True)]
        places = prepared.prompt.is_image.nonzero().flatten().tolist()
        found, visual = [], 0
        for count, (place, report) in enumerate(zip(places, reports, strict=True), start=1):
            visual += report.visual_tokens
            found.append((prefix_key(ids[: place + 1], images[:count], self.revision), place + 1 - count + visual))
        # The last position is always computed: its logits give the first token.
        return tuple((key, end) for key, end in reversed(found) if end < length)
