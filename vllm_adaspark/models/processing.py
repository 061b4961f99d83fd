"""A request's settings and media: validated and attached to its videos, before the model runs.

What is the same for every model; a model's own processor adds it to the stock one, and says what
else must be checked.  This runs where vLLM preprocesses requests: in the API server's process, or
offline in the caller's.  Errors raised here are HTTP 400.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

from transformers import BatchFeature
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.platforms import current_platform

from ..methods import base as methods
from ..requests import FIELD, Prompt, pack_settings, with_settings
from ..settings import SERVER_KEY, Settings, shown
from .checks import check_processor_kwargs
from .layout import layout_of
from .sent_items import sent_items

REQUEST_KEY = SERVER_KEY  # in mm_processor_kwargs
LONGEST_CAUSE = 300  # characters of a message of Hugging Face's
LONGEST_UUID = 256  # characters of a name that a client gives its media; caches keep many of them


class OurInfo:
    """Mixed in before a stock ProcessingInfo: our request key is none of Hugging Face's."""

    def get_hf_processor(self, **kwargs: object):
        return super().get_hf_processor(**without_ours(kwargs))

    def get_image_processor(self, **kwargs: object):
        return super().get_image_processor(**without_ours(kwargs))


class OurProcessor:
    """Mixed in before a stock processor: checks a request, attaches its settings to its media.

    The settings stay part of ``mm_processor_kwargs``, which enter the multimodal hash: requests
    with different settings never share cached video blocks.
    """

    # Whether a request may say how large its frames are made.  Else it has nothing to tell Hugging
    # Face's processor, to which options of the video loader would mean other frames.
    any_size = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        hf_config = self.info.get_hf_config()
        self._layout = layout_of(hf_config)
        self._method = methods.of_model(hf_config, current_platform.device_type)
        # As startup.StartupCheck left it.
        self._no_prune = (getattr(hf_config, "adaspark_resolved", None) or {}).get("no_prune")

    def apply(self, inputs, timing_ctx):
        kwargs = inputs.hf_processor_mm_kwargs
        check_processor_kwargs(kwargs, REQUEST_KEY, sizes=self.any_size)
        config = self._settings(kwargs)
        if config.dropped_share and self._no_prune:
            raise ValueError(
                f"mm_processor_kwargs.{REQUEST_KEY}: this server does not support "
                f"prune={config.dropped_share} {self._no_prune}"
            )
        with sent_items.preparing() as prepared:
            processed = super().apply(inputs, timing_ctx)
            self._check_prompt(processed)
            tokens, places = len(processed["prompt_token_ids"]), processed["mm_placeholders"]
            prompt = Prompt(
                tokens,
                places,
                after_video=self._layout.after_video,
                dropped=self._dropped(processed),
            )
            self._method.refuse(config, kwargs.get(REQUEST_KEY), prompt)
            prepared.ok = not self._will_be_refused(processed)
        return processed

    def _settings(self, mm_kwargs: Mapping[str, object]) -> Settings:
        return self._method.settings.override(
            mm_kwargs.get(REQUEST_KEY), source=f"mm_processor_kwargs.{REQUEST_KEY}", request=True
        )

    def _check_prompt(self, processed: Any) -> None:
        """Refuse, with a ValueError, a whole prompt that the model's worker would stumble over."""

    def _dropped(self, processed: Any) -> int:
        """How many tokens of the prompt's videos were dropped."""
        return 0

    def _note_item(self, item: Any, modality: str, mm_hash: str) -> None:
        """Remember what checks need of a new image or video: later its data may be left out."""

    def _will_be_refused(self, processed: Any) -> bool:
        """Whether vLLM will find the prompt too long, which it looks at later."""
        return len(processed["prompt_token_ids"]) >= self.info.ctx.model_config.max_model_len

    # -- from processed media to what the engine gets ---------------------------------------------

    def _merge_mm_kwargs(
        self, cache, mm_hashes, mm_is_cached, mm_missing_kwargs, mm_missing_prompt_updates
    ):
        """As stock: puts new items into the cache, and from here on may leave out their data."""
        for modality, hashes in mm_hashes.items():
            new = iter(mm_missing_kwargs.get(modality, []))
            for mm_hash, is_cached in zip(hashes, mm_is_cached[modality], strict=True):
                if not is_cached:
                    self._note_item(next(new), modality, mm_hash)
                    sent_items.add(cache, mm_hash)
        return super()._merge_mm_kwargs(
            cache, mm_hashes, mm_is_cached, mm_missing_kwargs, mm_missing_prompt_updates
        )

    def _get_mm_hashes(self, inputs):
        """As stock, with the settings behind each hash; see requests.py."""
        settings = self._settings(inputs.hf_processor_mm_kwargs)
        named = super()._get_mm_hashes(inputs)
        for one in chain.from_iterable(named.values()):
            if len(one) > LONGEST_UUID:
                raise ValueError(f"uuid={shown(one)}: at most {LONGEST_UUID} characters")
        return {
            kind: [with_settings(one, settings) for one in hashes]
            if kind in self._method.media
            else hashes
            for kind, hashes in named.items()
        }

    def _apply_hf_processor_main(self, mm_items, hf_kwargs) -> BatchFeature:
        """As stock, without our key, and with the request's settings attached to each video.

        Stock processors call Hugging Face's in several places below this one.
        """
        named = without_ours(hf_kwargs) if self.any_size else {}
        try:
            data = super()._apply_hf_processor_main(mm_items, named)
        except ValueError as error:  # vLLM's, with all pixels of the request in its message
            cause = str(error.__cause__ or error)[:LONGEST_CAUSE]
            raise ValueError(f"these images or videos cannot be processed: {cause}") from error
        videos = mm_items.get_all_counts().get("video", 0)
        if videos:
            data[FIELD] = pack_settings(self._settings(hf_kwargs)).expand(videos, -1)
        return data

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        fields = dict(super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs))
        fields[FIELD] = MultiModalFieldConfig.batched("video", keep_on_cpu=True)
        return fields


def without_ours(kwargs: Mapping[str, object]) -> dict[str, object]:
    """Keywords of Hugging Face's alone."""
    return {key: value for key, value in kwargs.items() if key != REQUEST_KEY}
