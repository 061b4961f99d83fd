"""What a client may send to make a server work hard, answer at length, or keep what it sent."""

from __future__ import annotations

import errno
import json
import resource
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vllm_adaspark.accounts.flops import ModelShape
from vllm_adaspark.accounts.ledger import MOST_CHARACTERS, Ledger
from vllm_adaspark.accounts.reports import append_line
from vllm_adaspark.accounts.request_ids import LONGEST, brief
from vllm_adaspark.methods.adaspark.settings import AdaSparkConfig
from vllm_adaspark.methods.adatp.settings import AdaTPSettings
from vllm_adaspark.methods.videonsa.settings import VideoNSASettings
from vllm_adaspark.models.checks import check_processor_kwargs
from vllm_adaspark.models.qwen2_5_vl_checks import check_embeddings, check_sizes
from vllm_adaspark.paged.state import StepRows
from vllm_adaspark.settings import SettingsError
from vllm_adaspark.traces import frames as frames_module
from vllm_adaspark.traces.frames import FrameMaker, Frames
from vllm_adaspark.traces.store import MOST_TRACES, TraceStore
from vllm_adaspark.traces.trace import Trace, Video
from vllm_adaspark.video.order import cube_order
from vllm_adaspark.video.sampling import Evenly, Options

# -- errors are short -----------------------------------------------------------------------------


def nested(levels: int) -> object:
    """Far deeper than ``repr`` could follow."""
    inner: object = 0
    for _ in range(levels):
        inner = [inner]
    return inner


LARGE = {
    "text": "x" * 5_000_000,
    "list": list(range(500_000)),
    "object": {str(n): n for n in range(100_000)},
    "deep": nested(100_000),
    "number": 10**4000,
    "not a number": float("nan"),
}
LONGEST_ERROR = 2500  # it names the key, the value and all keys that are allowed


@pytest.mark.parametrize("value", LARGE.values(), ids=LARGE)
@pytest.mark.parametrize("settings", [AdaSparkConfig, AdaTPSettings, VideoNSASettings])
def test_errors_about_settings_are_short(settings: type, value) -> None:
    keys = [key for key in settings().to_dict() if key != "report_file"]
    refused = [{key: value} for key in [*keys, "flops", "keep", "off", "paper"]]
    refused += [{"flops": value, "keep": value}, {"p_attn": value, "flops": value}]
    refused += [value] if isinstance(value, str | list) else [{"flops": {"a": value}}]
    for one in refused:
        with pytest.raises(SettingsError) as error:
            settings().override(one, request=True)
        assert len(str(error.value)) < LONGEST_ERROR, one


def test_errors_about_keys_are_short() -> None:
    for key in ("p_attn" * 1_000_000, "\n" * 100_000):
        with pytest.raises(SettingsError, match="unknown key") as error:
            AdaSparkConfig().override({key: 1}, request=True)
        assert len(str(error.value)) < LONGEST_ERROR and "\n" not in str(error.value)


@pytest.mark.parametrize("value", LARGE.values(), ids=LARGE)
def test_errors_about_options_are_short(value) -> None:
    for key in ("max_pixels", "size", "fps", "videos_kwargs", "merge_size", "x" * 1_000_000):
        with pytest.raises(ValueError, match=r"mm_processor_kwargs\.") as error:
            check_processor_kwargs({key: value}, "adaspark", sizes=True)
        assert len(str(error.value)) < LONGEST_ERROR
    for options, key in ((Options, "max_frames"), (Evenly, "num_frames"), (Options, "x" * 10**6)):
        with pytest.raises(ValueError, match=r"media_io_kwargs\.video\.") as error:
            options.checked({key: value})
        assert len(str(error.value)) < LONGEST_ERROR


# -- what is not counted is not believed ----------------------------------------------------------


@pytest.mark.parametrize(
    "grid", [[1, 2**32, 2**32], [1, 2**33, 2**31], [2**62, 2, 2], [2**40, 2**20, 16]]
)
def test_a_grid_whose_product_overflows(grid: list[int]) -> None:
    """As int64 these come to nothing, and a worker would allocate by what they say."""
    product = int(torch.tensor(grid).prod())
    data = {"video_embeds": torch.zeros(product // 4, 8), "video_grid_thw": torch.tensor([grid])}
    with pytest.raises(ValueError, match="video_embeds"):
        check_embeddings(data, "video", 2, 8)


def test_a_requests_own_sizes_are_counted_before_pixels_are_made() -> None:
    video, merged = [(10, 168 * 140)], 28 * 28
    check_sizes(video, {}, merged, 4096)  # the server's own sizes are its operator's business
    check_sizes(video, {"min_pixels": 4 * merged, "max_pixels": 16 * merged}, merged, 4096)
    check_sizes([(768, 8192 * 8192)], {"max_pixels": 8 * merged}, merged, 4096)
    for large in (
        {"min_pixels": 1 << 26},
        {"min_pixels": 1 << 26, "max_pixels": None},
        {"size": {"shortest_edge": 1 << 26, "longest_edge": 1 << 26}},
    ):
        with pytest.raises(ValueError, match="about 427990 tokens, and this server takes 4096"):
            check_sizes(video, large, merged, 4096)
    with pytest.raises(ValueError, match="max_pixels=67108864"):
        check_sizes([(768, 1920 * 1080)], {"max_pixels": 1 << 26}, merged, 4096)


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    """vLLM's own way to the processor of a server, without the server."""
    import checkpoint as demo_checkpoint  # examples/demo
    from vllm.config import ModelConfig
    from vllm.multimodal import MULTIMODAL_REGISTRY

    import vllm_adaspark

    vllm_adaspark.register()
    path = demo_checkpoint.build(tmp_path_factory.mktemp("tiny") / "checkpoint", dtype="float32")
    overrides = {"architectures": [vllm_adaspark.ARCHITECTURE]}
    config = ModelConfig(str(path), dtype="float32", max_model_len=4096, hf_overrides=overrides)
    return MULTIMODAL_REGISTRY.create_processor(config)


def tokens(processor, kind: str, uuid: str | None = None, **options) -> int:
    """Of a prompt with one image or video of 168 x 140 pixels."""
    frames = np.zeros((8, 140, 168, 3), np.uint8)
    metadata = {
        "fps": 2.0,
        "duration": 4.0,
        "total_num_frames": 8,
        "frames_indices": list(range(8)),
    }
    metadata |= {"video_backend": "adaspark", "do_sample_frames": False}
    item = frames[0] if kind == "image" else (frames, metadata)
    items = processor.info.parse_mm_data({kind: [item]})
    prompt = f"<|vision_start|><|{kind}_pad|><|vision_end|>"
    named = None if uuid is None else {kind: [uuid]}
    return len(processor(prompt, items, named, options)["prompt_token_ids"])


@pytest.mark.parametrize("kind, usual", [("image", 30), ("video", 120)])
def test_the_processor_makes_no_more_than_the_server_takes(processor, kind, usual) -> None:
    assert tokens(processor, kind) == usual + 2
    assert tokens(processor, kind, max_pixels=84 * 84) < usual
    assert tokens(processor, kind, uuid="x" * 256) == usual + 2
    for large in (
        {"min_pixels": 1 << 26},
        {f"{kind}s_kwargs": {"min_pixels": 1 << 26}},
        {"size": {"shortest_edge": 1 << 26, "longest_edge": 1 << 26}},
    ):
        with pytest.raises(ValueError, match="this server takes 4096 of a request"):
            tokens(processor, kind, **large)
    with pytest.raises(ValueError, match=r"uuid='xxx.*at most 256 characters") as error:
        tokens(processor, kind, uuid="x" * 1_000_000)
    assert len(str(error.value)) < 200


def test_decoded_frames_are_bounded(monkeypatch) -> None:
    from vllm_adaspark.video import load

    load.check_size(768, 2560, 1440)
    with pytest.raises(ValueError, match=r"768 frames of 3840x2160 take 17\.8 GiB.*max_frames"):
        load.check_size(768, 3840, 2160)
    with pytest.raises(ValueError, match="VLLM_MAX_IMAGE_PIXELS"):
        load.check_size(1, 20_000, 20_000)


# -- what a client chooses is not kept without bound ----------------------------------------------


def run_and_finish(ledger: Ledger, name: str) -> None:
    ledger.add_step([name], StepRows(np.array([0, 5]), np.array([5]), np.zeros((1, 1), int)), None)
    ledger.finish(name)


def test_long_ids_do_not_fill_the_ledger() -> None:
    ledger = Ledger(ModelShape(8, 4, 2, 2, 16), range(2), 2)
    for n in range(40):
        run_and_finish(ledger, f"{n}-{'x' * 100_000}")
    kept = [request["request_id"] for request in ledger.report()["requests"]]
    assert sum(map(len, kept)) <= MOST_CHARACTERS and len(kept) == 10
    assert kept[-1].startswith("39-"), "the latest"
    run_and_finish(ledger, "x" * (MOST_CHARACTERS + 1))
    assert ledger.report()["requests"] == []
    run_and_finish(ledger, "short")
    assert ledger.usage("short")["tokens"] == 5


def test_an_id_is_short_and_on_one_line_where_it_is_written_down() -> None:
    assert brief("chatcmpl-0123456789abcdef-01234567") == "chatcmpl-0123456789abcdef-01234567"
    assert brief("grün") == "grün"
    forged = brief("a\r\nWARNING forged\u2028\u202e\x1b[31m\ud800")
    assert forged == "a\\r\\nWARNING forged\\u2028\\u202e\\x1b[31m\\ud800"
    forged.encode()
    long = [brief(f"{'x' * 100_000}-{n:08x}") for n in range(2)]
    assert len(long[0]) == LONGEST and long[0] != long[1] and long[0].endswith("-00000000")


def test_thousands_of_distinct_cubes_keep_no_more_token_orders() -> None:
    for t in range(1, 65):
        for w in range(1, 65):
            cube_order((2, 3, 4), (t, 1, w))
    assert cube_order.cache_info().currsize <= 32


def tiny_trace(name: str, started: float = 0.0) -> Trace:
    return Trace(
        id=name, request_id=name, started=started, prompt_ids=np.zeros(4, np.int32),
        videos=[Video(0, (1, 2, 2), (4, 4, 4), "cube")], settings={}, block_size=64,
        layers=range(2),
    )  # fmt: skip


def test_thousands_of_small_traces() -> None:
    """Every step and every reader looks through them all, so their number is bounded, too."""
    store = TraceStore(64 << 20)
    for n in range(2000):
        assert store.start(tiny_trace(f"{n}"), 0)
        store.finish(f"{n}")
    kept = [trace.id for trace in store]
    assert kept == [f"{n}" for n in range(1999, 1999 - MOST_TRACES, -1)]
    store = TraceStore(64 << 20)
    started = [store.start(tiny_trace(f"{n}"), 0) for n in range(2 * MOST_TRACES)]
    assert sum(started) == len(list(store)) == MOST_TRACES, "running ones give way to none"


def test_a_long_id_counts_as_memory_of_its_trace() -> None:
    store = TraceStore(1 << 20)
    assert not store.start(tiny_trace("x" * (1 << 20)), 0)
    assert list(store) == []


def test_a_long_answer_of_a_trace_takes_four_bytes_a_token() -> None:
    trace = tiny_trace("a")
    trace.add_answer(list(range(100_000)))
    assert trace.answer_ids.itemsize * len(trace.answer_ids) == 400_000
    assert json.loads(json.dumps(trace.meta()))["answer_tokens"] == 100_000


def test_traces_of_long_videos_hold_on_to_few_pixels(monkeypatch) -> None:
    """32 at once: the pixels wait for a thread that makes frames of them one by one."""
    monkeypatch.setattr(FrameMaker, "_run", lambda self: None)
    monkeypatch.setattr(frames_module, "MAX_PIXEL_BYTES", 5000)
    shape = SimpleNamespace(size=lambda grid: (28, 28))
    maker = FrameMaker()
    waiting = [Frames([(np.zeros(500), (2, 1, 1))], shape, 1 << 20) for _ in range(4)]
    for frames in waiting:
        maker.submit(frames)
    assert [frames.pixel_bytes for frames in waiting] == [4000, 0, 0, 0]
    assert [frames.number(0) for frames in waiting] == [2, 0, 0, 0], "these stay without"
    waiting[0].forget()
    large = Frames([(np.zeros(5000), (2, 1, 1))], shape, 1 << 20)
    maker.submit(large)
    assert large.number(0) == 2, "one alone may be larger"


def test_grids_are_forgotten_by_their_last_use(monkeypatch) -> None:
    """As vLLM's cache does: what it still holds comes without data, also long after the first."""
    from vllm_adaspark.models import qwen2_5_vl_processing as processing

    class Item(dict):
        def __init__(self, t: int) -> None:
            super().__init__(image_grid_thw=SimpleNamespace(data=torch.tensor([t, 2, 2])))

    monkeypatch.setattr(processing, "GRIDS", 3)
    processor = processing.AdaSparkProcessor.__new__(processing.AdaSparkProcessor)
    processor._grids = processing.OrderedDict()
    vision = SimpleNamespace(spatial_merge_size=2)
    processor.info = SimpleNamespace(get_hf_config=lambda: SimpleNamespace(vision_config=vision))
    for n in range(50):
        assert processor._grid(Item(n), "image", f"{n}").frames == n
        assert processor._grid(None, "image", "0").frames == 0, "in use all the time"
    assert len(processor._grids) == 3
    assert all(len(key) <= 16 for key in processor._grids), "whatever a client calls its media"
    with pytest.raises(ValueError, match="send it again"):
        processor._grid(None, "image", "1")


def test_a_request_gets_no_more_blocks_than_the_server_has_memory_for() -> None:
    from vllm_adaspark.methods.videonsa.method import VideoNSA

    def refuse(method: VideoNSA, blocks: int, tokens: int) -> None:
        asked = method.settings.override({"block_counts": blocks}, request=True)
        method.refuse(asked, {}, SimpleNamespace(tokens=tokens))

    text_config = SimpleNamespace(hidden_size=8)
    method = VideoNSA(VideoNSASettings(block_counts=16), text_config, "cpu")
    for blocks, tokens in ((1, 100_000), (32, 100_000), (4096, 64 * 32)):
        refuse(method, blocks, tokens)
    with pytest.raises(SettingsError, match="block_counts=4096: this server has memory for 32"):
        refuse(method, 4096, 64 * 32 + 1)
    refuse(VideoNSA(VideoNSASettings(block_counts=128), text_config, "cpu"), 128, 100_000)
    off = method.settings.override({"off": True, "block_counts": 4096}, request=True)
    method.refuse(off, {}, SimpleNamespace(tokens=100_000))


# -- faults ---------------------------------------------------------------------------------------


def test_traces_stay_in_order_when_the_clock_is_set_back() -> None:
    store = TraceStore(1 << 20)
    for name, clock in (("a", 1000.0), ("b", 2000.0), ("c", 500.0), ("d", 501.0)):
        store.start(tiny_trace(name, clock), 0)
    assert [trace.id for trace in store] == ["d", "c", "b", "a"]
    started = {trace.id: trace.started for trace in store}
    assert started["b"] == 2000.0 < started["c"] < started["d"] < 2000.1
    late = tiny_trace("e", 4e9)  # set forward, and back while it runs
    store.start(late, 0)
    assert store.finish("e").finished >= late.started


def test_a_full_disk_leaves_whole_lines(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: writes end in the middle of a line."""
    path, line = tmp_path / "report.jsonl", json.dumps({"request": "x" * 3000})
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    append_line(path, line)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, old[1]))
    try:
        for _ in range(2):
            with pytest.raises(OSError) as full:
                append_line(path, line)
            assert full.value.errno in (errno.ENOSPC, errno.EFBIG)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    append_line(path, line)  # there is room again
    assert [json.loads(each) for each in path.read_text().splitlines()] == [json.loads(line)] * 2
    with pytest.raises(OSError, match="No space left"):
        append_line("/dev/full", line)
