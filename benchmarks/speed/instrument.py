"""What a server under test tells the benchmark: when it decoded, processed, encoded and computed.

Two plugins and a worker extension, by vLLM's own seams, the same for every contender:

* a video loader that notes its time (``--media-io-kwargs``, registered by a general plugin);
* ``GET /speed``: what was noted since the last call (an endpoint plugin);
* methods of the worker (``--worker-extension-cls``) that note the time of the vision tower, of the
  language model and of whole steps.

All clocks are the machine's monotonic one, so times of several processes can be compared.
"""

from __future__ import annotations

import time
from argparse import Namespace
from pathlib import Path
from typing import Any

PLUGIN = "adaspark_speed"  # in VLLM_PLUGINS, and the video loader's name
EXTENSION = "speed.instrument.Watch"

_decoded: list[float] = []  # seconds of each video, in the process that reads them


def install(folder: Path) -> Path:
    """Make a folder that, on PYTHONPATH, lets vLLM find the plugins.

    Returns:
        ``folder``.
    """
    info = folder / "adaspark_speed-0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: adaspark-speed\nVersion: 0\n")
    (info / "entry_points.txt").write_text(
        f"[vllm.general_plugins]\n{PLUGIN} = speed.instrument:register\n"
        f"[vllm.endpoint_plugins]\n{PLUGIN} = speed.instrument:SpeedHttp\n"
    )
    return folder


def register() -> None:
    """The general plugin: vLLM's loader for Qwen2-VL, timed."""
    from vllm.multimodal.video import VIDEO_LOADER_REGISTRY, Qwen2VLVideoBackend

    @VIDEO_LOADER_REGISTRY.register(PLUGIN)
    class TimedLoader(Qwen2VLVideoBackend):
        @classmethod
        def load_bytes(cls, data: bytes, *args: Any, **kwargs: Any):
            began = time.perf_counter()
            loaded = super().load_bytes(data, *args, **kwargs)
            _decoded.append(time.perf_counter() - began)
            return loaded


class SpeedHttp:
    """The endpoint plugin."""

    name = PLUGIN
    required_tasks = ("generate",)

    def attach_router(self, app: Any) -> None:
        from fastapi import Request

        async def speed(request: Request) -> dict[str, Any]:
            client = request.app.state.engine_client
            [worker] = await client.collective_rpc("speed_take")
            stages = client.renderer._mm_timing_registry.stat().values()
            processed = [stage["preprocessor_total_secs"] for stage in stages]
            answer = {"decode": list(_decoded), "processor": processed, **worker}
            _decoded.clear()
            return answer

        # The annotation must be resolvable where FastAPI looks for it.
        speed.__annotations__["request"] = Request
        app.get("/speed")(speed)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        from vllm.config import ObservabilityConfig
        from vllm.multimodal.registry import MultiModalTimingRegistry

        # vLLM can time its processor, but has no option for it.
        timing = ObservabilityConfig(enable_mm_processor_stats=True)
        engine_client.renderer._mm_timing_registry = MultiModalTimingRegistry(timing)
        await engine_client.collective_rpc("speed_watch")


class Watch:
    """Mixed into the worker by vLLM."""

    def speed_watch(self) -> None:
        """Begin to note times; and let EVS work on the CPU."""
        runner = self.model_runner
        model = runner.get_model()
        # vLLM 0.32.0: the CPU model runner does not set this when it has loaded the model, and EVS
        # then fails at its first video.
        runner.is_multimodal_pruning_enabled = model.is_multimodal_pruning_enabled
        self._speed: dict[str, list[float]] = {"vision": [], "language": [], "step": []}
        for part, owner, method in (
            ("vision", model, "embed_multimodal"),
            ("language", model, "forward"),
            ("step", runner, "execute_model"),
        ):
            setattr(owner, method, _timed(getattr(owner, method), self._speed[part]))

    def speed_take(self) -> dict[str, list[float]]:
        """Seconds of each call since the last take."""
        taken = {part: list(times) for part, times in self._speed.items()}
        for times in self._speed.values():
            times.clear()
        return taken


def _timed(method: Any, times: list[float]) -> Any:
    def timed(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        result = method(*args, **kwargs)
        times.append(time.perf_counter() - began)
        return result

    return timed
