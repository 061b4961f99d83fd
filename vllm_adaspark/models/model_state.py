"""Model runner V2: where the model learns which requests the next step runs, in row order.

Runner V1 has them in its ``input_batch`` when the model's forward runs, so the worker reads them
there.  Runner V2 makes a batch for every step and hands it to the model's state object; a model may
bring a class of its own for that.  Written for vLLM 0.32.0; runner V2 needs a CUDA GPU.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.default import DefaultModelState


class AdaSparkModelState(DefaultModelState):
    """Stock, but tells the model's runtime the requests of the step."""

    def prepare_attn(self, input_batch: InputBatch, *args: Any, **kwargs: Any) -> dict[str, Any]:
        runtime, ids = self.model.runtime, input_batch.req_ids
        # Captures and dummy runs have made-up requests, which the worker does not know.
        real = runtime.requests is not None and all(name in runtime.requests for name in ids)
        runtime.request_ids = (lambda: ids) if real else None
        return super().prepare_attn(input_batch, *args, **kwargs)
