"""A worker for EVS on the CPU.  Imported by the server's own processes, never by the benchmark.

vLLM 0.32.0 prunes video tokens (``--video-pruning-rate``) in the model and corrects their positions
in the model runner, if ``is_multimodal_pruning_enabled`` says so.  The CPU runner's ``load_model``
does not set it, so the runner takes the four position channels for embedding and the request fails.
"""

from vllm.v1.worker.cpu_worker import CPUWorker


class PruningWorker(CPUWorker):
    """vLLM's CPU worker, whose runner knows that tokens are pruned."""

    def load_model(self, *arguments, **options) -> None:
        super().load_model(*arguments, **options)
        config = self.model_config.multimodal_config
        self.model_runner.is_multimodal_pruning_enabled = config.is_multimodal_pruning_enabled()
