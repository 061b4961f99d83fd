"""What a server refuses at start, and what it settles: each by making vLLM's configuration only.

One refusal also runs through the real command line, because a message there must not be buried.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from server import VllmServer  # examples/demo
from vllm import EngineArgs

from engine.engines import SPARSE
from vllm_adaspark import ARCHITECTURE
from vllm_adaspark.methods.adaspark.settings import AdaSparkConfig
from vllm_adaspark.settings import SettingsError

pytestmark = pytest.mark.engine
REFUSED_SECONDS = 600  # it takes about 12


def start(checkpoint, settings=None, overrides: dict | None = None, **options):
    """vLLM's configuration of a server with our architecture."""
    arguments = EngineArgs(
        model=str(checkpoint),
        hf_overrides={"architectures": [ARCHITECTURE]} | (overrides or {}),
        **{
            "max_model_len": 8192,
            "additional_config": {} if settings is None else {"adaspark": settings},
        }
        | options,
    )
    return arguments.create_engine_config()


def refusal(checkpoint, *args, **options) -> str:
    """The message of a start that must fail."""
    with pytest.raises(ValueError) as caught:
        start(checkpoint, *args, **options)
    message = str(caught.value)
    cause = caught.value.errors()[0]["ctx"]["error"]  # pydantic's wrapping keeps ours
    assert isinstance(cause, SettingsError), message
    # Ours opens the message: second line, after pydantic's "1 validation error for VllmConfig".
    assert message.splitlines()[1].strip().startswith(f"Value error, {cause}"[:60])
    return str(cause)


BAD_SETTINGS = {
    "p 0": ({"p_attn": 0}, ["p_attn=0", "above 0 and at most 1"]),
    "p 1.5": ({"p_attn": 1.5}, ["p_attn=1.5", "above 0 and at most 1"]),
    "p text": ({"p_attn": "x"}, ["p_attn='x'", "expected a number"]),
    "p_ffn 0": ({"p_ffn": 0}, ["p_ffn=0", "above 0 and at most 1"]),
    "unknown key": ({"p_atn": 0.5}, ["unknown key 'p_atn'", "did you mean 'p_attn'?", "p_ffn"]),
    "choice": ({"order": "hilbert"}, ["order='hilbert'", "'cube', 'raster'"]),
    "cube of two": ({"cube": [4, 4]}, ["cube=[4, 4]", "three integers [t, h, w]"]),
    "no object": (3, ["must be an object of settings", "got 3 (int)"]),
}


@pytest.mark.parametrize("settings, words", BAD_SETTINGS.values(), ids=BAD_SETTINGS)
def test_bad_server_setting(checkpoint, settings, words) -> None:
    message = refusal(checkpoint, settings)
    for word in ["--additional-config adaspark", *words]:
        assert word in message


@pytest.mark.parametrize("cube", [[4, 4, 1], [3, 4, 4], [8, 8, 4]], ids=["16", "48", "256"])
def test_cube_of_an_untested_volume(checkpoint, cube) -> None:
    message = refusal(checkpoint, {"cube": cube})
    volume = cube[0] * cube[1] * cube[2]
    for word in [f"cube={cube}", f"{volume} tokens", "allowed volumes: 32, 64, 128", "[4, 4, 4]"]:
        assert word in message


@pytest.mark.parametrize("wrong", [{"p_attn": 0.5}, {"AdaSpark": {}}, {"adaspak": {"p_attn": 0.5}}])
def test_settings_in_the_wrong_place(checkpoint, wrong) -> None:
    message = refusal(checkpoint, None, additional_config=wrong)
    assert f"{next(iter(wrong))!r} means nothing there" in message and '{"adaspark": ' in message


def test_cube_that_is_not_the_block_size(checkpoint) -> None:
    message = refusal(checkpoint, {"cube": [8, 4, 4]}, block_size=64)
    for word in ["--block-size 64", "cube=[8, 4, 4]", "128 tokens", "leave --block-size out"]:
        assert word in message


DRAFTS = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
UNSUPPORTED = {
    "EVS": ({"video_pruning_rate": 0.3}, "--video-pruning-rate"),
    "dropping tokens over pipeline stages": (
        {"additional_config": {"adaspark": {"prune": 0.5}}, "pipeline_parallel_size": 2},
        "prune=0.5 with --pipeline-parallel-size 2",
    ),
    "KV connector": (
        {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
        "--kv-transfer-config",
    ),
    "KV offloading": ({"kv_offloading_size": 1}, "--kv-offloading-size"),
    "speculation of another kind": (
        {
            "speculative_config": {
                "method": "custom_class",
                "model": "a.B",
                "num_speculative_tokens": 2,
            }
        },
        "--speculative-config method custom_class",
    ),
    "asynchronous speculation": (
        {"speculative_config": DRAFTS, "async_scheduling": True},
        "--async-scheduling with --speculative-config",
    ),
    "LoRA in the vision tower": (
        {"enable_lora": True, "enable_tower_connector_lora": True},
        "--enable-tower-connector-lora",
    ),
    "ubatching": ({"ubatch_size": 2}, "--ubatch-size"),
    "no language model": ({"mm_encoder_only": True}, "--mm-encoder-only"),
    "layers with another cache": (
        {"kv_cache_dtype": "fp8", "kv_cache_dtype_skip_layers": ["1"]},
        "--kv-cache-dtype-skip-layers",
    ),
    "attention that is not causal": (
        {"attention_config": {"use_non_causal": True}},
        "--attention-config use_non_causal",
    ),
    "context parallelism": (
        {"decode_context_parallel_size": 2, "tensor_parallel_size": 2},
        "--decode-context-parallel-size",
    ),
    "microbatches": ({"enable_dbo": True}, "--enable-dbo"),
    "fast prefill": ({"kv_sharing_fast_prefill": True}, "--kv-sharing-fast-prefill"),
    "fp8 per token": ({"kv_cache_dtype": "fp8_per_token_head"}, "--kv-cache-dtype fp8_per_token"),
    "int4 per token": (
        {"kv_cache_dtype": "int4_per_token_head"},
        "--kv-cache-dtype int4_per_token",
    ),
    "nvfp4": ({"kv_cache_dtype": "nvfp4"}, "--kv-cache-dtype nvfp4"),
    "server settings in the wrong option": (
        {"mm_processor_kwargs": {"adaspark": {"p_attn": 0.5}}},
        "--mm-processor-kwargs adaspark",
    ),
    "pooling": ({"runner": "pooling"}, "--runner pooling"),
    "sliding window": (
        {
            "overrides": {
                "text_config": {
                    "use_sliding_window": True,
                    "sliding_window": 64,
                    "max_window_layers": 1,
                }
            }
        },
        "use_sliding_window",
    ),
    "another patch size": (
        {"mm_processor_kwargs": {"videos_kwargs": {"merge_size": 4}}},
        '--mm-processor-kwargs {"merge_size": 4}',
    ),
    "a worker that does not exist": ({"worker_cls": "my.Worker"}, "--worker-cls my.Worker"),
    "the stock worker": (
        {"worker_cls": "vllm.v1.worker.cpu_worker.CPUWorker"},
        "--worker-cls vllm.v1.worker.cpu_worker.CPUWorker",
    ),
}


@pytest.mark.parametrize("options, name", UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_unsupported_option(checkpoint, options, name) -> None:
    """The message names the option and ends with what to do instead."""
    what, _, fix = refusal(checkpoint, **options).rpartition("; ")
    assert what.startswith("AdaSpark does not support ") and name in what
    assert fix.startswith(
        ("leave ", "use ", "set it to ", "merge ", "server-wide settings go into")
    )


def test_with_drafts_the_host_knows_how_long_requests_are(checkpoint) -> None:
    """vLLM makes scheduling asynchronous after our check, if it has not been said."""
    from vllm_adaspark.startup import _settle_speculation

    config = start(checkpoint)
    for drafts, asynchronous in ((None, None), (SimpleNamespace(method="eagle3"), False)):
        config.speculative_config, config.scheduler_config.async_scheduling = drafts, None
        _settle_speculation(config)
        assert config.scheduler_config.async_scheduling is asynchronous


@pytest.mark.parametrize(
    "option, settings, message",
    [
        ("drafts", {}, "--speculative-config method eagle3: a draft model reads"),
        ("sleep", {"encoder": "a folder"}, "encoder=a folder with --enable-sleep-mode"),
        (None, {}, None),
    ],
)
def test_what_adatp_cannot_do(checkpoint, monkeypatch, option, settings, message) -> None:
    """On a configuration that was changed, because a CPU takes neither."""
    from vllm_adaspark.methods.adatp import startup
    from vllm_adaspark.methods.adatp.settings import AdaTPSettings

    monkeypatch.setattr(startup, "check_encoder", lambda folder: None)
    settings = replace(AdaTPSettings().override({"layers": [2], "keep": 0.5}), **settings)
    config = start(checkpoint)
    config.speculative_config = SimpleNamespace(method="eagle3" if option == "drafts" else "ngram")
    config.model_config.enable_sleep_mode = option == "sleep"
    if message is None:
        startup.check_server(settings, config)
        return
    with pytest.raises(SettingsError, match=f"AdaTP does not support {message}.*; (use|leave) "):
        startup.check_server(settings, config)


def test_supported_kv_cache_types(checkpoint) -> None:
    for dtype in ("auto", "bfloat16", "fp8", "fp8_e5m2"):
        assert start(checkpoint, kv_cache_dtype=dtype).cache_config.cache_dtype == dtype


@pytest.mark.parametrize("cube, size", [([2, 4, 4], 32), (None, 64), ([8, 4, 4], 128)])
def test_block_size_follows_the_cube(checkpoint, cube, size) -> None:
    settings = {"cube": cube} if cube else None
    for options in ({}, {"block_size": size}):
        assert start(checkpoint, settings, **options).cache_config.block_size == size


def test_worker_is_ours_or_made_from_ours(checkpoint) -> None:
    ours = start(checkpoint).parallel_config.worker_cls
    assert ours.startswith("vllm_adaspark.worker.AdaSpark")
    assert start(checkpoint, worker_cls=ours).parallel_config.worker_cls == ours


def test_video_loader_is_ours_unless_the_user_has_one(checkpoint) -> None:
    def video(**options) -> dict:
        config = start(checkpoint, **options)
        return config.model_config.multimodal_config.media_io_kwargs["video"]

    assert video() == {"video_backend": "adaspark"}
    assert video(media_io_kwargs={"video": {"fps": 1}}) == {"video_backend": "adaspark", "fps": 1}
    chosen = {"video": {"video_backend": "opencv"}}
    assert video(media_io_kwargs=chosen) == chosen["video"]


@pytest.mark.parametrize(
    "video, words",
    [
        ({"num_frames": 16}, ["video.num_frames=16", "use fps or max_frames"]),
        ({"num_frames": 32}, ["video.num_frames=32", "use fps or max_frames"]),
        ({"fps": 100}, ["video.fps=100", "at most 30"]),
        ({"max_frames": 1}, ["video.max_frames=1", "from 2 to"]),
        ({"min_frames": 9, "max_frames": 8}, ["video.min_frames=9", "max_frames=8"]),
        ({"max_frame": 8}, ["video.max_frame=8", "unknown", "max_frames"]),
        ({"frames_indices": [0, 1]}, ["video.frames_indices=", "unknown"]),
        ({"video_backend": "adaspark_opencv", "fps": 0}, ["video.fps=0", "above 0"]),
        ({"video_backend": "adaspark_decrod"}, ["video_backend='adaspark_decrod'", "known: "]),
    ],
)
def test_what_would_refuse_every_video_is_refused_at_start(checkpoint, video, words) -> None:
    with pytest.raises(ValueError) as caught:
        start(checkpoint, media_io_kwargs={"video": video})
    for word in words:
        assert word in str(caught.value)


def test_options_of_a_loader_that_is_not_ours_are_its_own(checkpoint) -> None:
    video = {"video_backend": "opencv", "num_frames": 16, "fps": 100}
    config = start(checkpoint, media_io_kwargs={"video": video})
    assert config.model_config.multimodal_config.media_io_kwargs["video"] == video


def test_decord_is_asked_for_but_not_installed(checkpoint, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "decord", None)
    with pytest.raises(ValueError, match=r"needs decord, which is not installed.*\[video\]"):
        start(checkpoint, media_io_kwargs={"video": {"video_backend": "adaspark_decord"}})


def test_settings_travel_on_the_models_config(checkpoint) -> None:
    config = start(checkpoint, SPARSE)
    resolved = config.model_config.hf_config.adaspark_resolved["settings"]
    assert AdaSparkConfig().override(resolved) == AdaSparkConfig().override(SPARSE)


@pytest.fixture
def own_settings(checkpoint, tmp_path):
    """Makes a copy of the checkpoint whose config.json has an ``adaspark_config``."""

    def make(settings) -> str:
        folder = tmp_path / "checkpoint"
        shutil.copytree(checkpoint, folder)
        config = json.loads((folder / "config.json").read_text())
        config["adaspark_config"] = settings
        (folder / "config.json").write_text(json.dumps(config))
        return str(folder)

    return make


def test_the_operator_overrides_the_checkpoint(own_settings) -> None:
    checkpoint = own_settings({"p_attn": 0.7, "p_ffn": 0.3, "cube": [2, 4, 4]})
    config = start(checkpoint, {"p_attn": 0.5})
    resolved = config.model_config.hf_config.adaspark_resolved["settings"]
    assert (resolved["p_attn"], resolved["p_ffn"]) == (0.5, 0.3)
    assert config.cache_config.block_size == 32  # of the checkpoint's cube
    assert start(checkpoint, {"cube": [8, 4, 4]}).cache_config.block_size == 128
    message = refusal(checkpoint, block_size=64)
    assert "--block-size 64 does not match cube=[2, 4, 4] of config.json adaspark_config" in message


@pytest.mark.parametrize("off", ["off", {"off": True}])
def test_off_is_the_stock_model_whatever_the_checkpoint_says(own_settings, off) -> None:
    said = {"order": "cube", "enabled": True, "cube": [2, 4, 4], "p_atn": 0.5, "report_file": "x"}
    config = start(own_settings(said), off)
    resolved = config.model_config.hf_config.adaspark_resolved["settings"]
    assert AdaSparkConfig().override(resolved) == AdaSparkConfig(enabled=False, order="raster")
    assert config.cache_config.block_size == 64


def test_a_checkpoint_that_says_off_is_told(own_settings, monkeypatch) -> None:
    from vllm_adaspark import startup

    told = []
    monkeypatch.setattr(startup.logger, "warning", lambda text, *args: told.append(text % args))
    checkpoint = own_settings("off")
    assert not start(checkpoint).model_config.hf_config.adaspark_resolved["settings"]["enabled"]
    assert any("dense, since config.json adaspark_config says so" in text for text in told)
    on = start(checkpoint, {"enabled": True})
    assert on.model_config.hf_config.adaspark_resolved["settings"]["enabled"]


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"p_attn": 7}, ["p_attn=7", "above 0 and at most 1"]),
        ({"p_atn": 0.5}, ["unknown key 'p_atn'", "did you mean 'p_attn'?"]),
        ("sparse", ["must be an object of settings", "got 'sparse' (str)"]),
        ({"report_file": "/tmp/x"}, ["'report_file'", "cannot be set by a checkpoint"]),
    ],
    ids=["value", "key", "no object", "operator's"],
)
def test_bad_checkpoint_setting(own_settings, settings, words) -> None:
    message = refusal(own_settings(settings))
    for word in ["config.json adaspark_config", *words]:
        assert word in message


def test_command_line_ends_with_the_message(checkpoint, tmp_path) -> None:
    arguments = [
        *("--hf-overrides", json.dumps({"architectures": [ARCHITECTURE]})),
        *("--additional-config", json.dumps({"adaspark": {"p_attn": 1.5}})),
    ]
    started = time.monotonic()
    with VllmServer(checkpoint, *arguments, log=tmp_path / "server.log") as server:
        status = server.process.wait(REFUSED_SECONDS)
    assert status not in (0, None), f"after {time.monotonic() - started:.0f} s"
    message = "--additional-config adaspark: p_attn=1.5: expected a number above 0 and at most 1"
    assert message in server.log_tail(lines=4)
