"""A model for lmms-eval: an OpenAI-compatible server that takes videos, and AdaSpark's settings.

    lmms-eval --model adaspark --tasks mlvu_dev --batch_size 1 --model_args \
        'base_url=http://localhost:8000/v1,frames=128,adaspark={"p_attn":0.5,"p_ffn":0.5}'

lmms-eval's own `openai` model does not do: it sends a video as a row of images, or asks for a
`num_frames` that Qwen2.5-VL's loader does not know; it cannot send `mm_processor_kwargs`; and it
counts a refused request as a wrong answer. This one sends the video as it is, fixes its frames, and
stops at a refusal. It works with a stock vLLM server, too.
"""

import base64
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages, ChatVideoContent
from tqdm import tqdm

ON_ERROR = ("stop", "wrong")
ANSWER_TOKENS = 1024  # for a task that sets no limit, as in lmms-eval's other models


class AdaSparkServer(lmms):
    """A running server, asked through `/v1/chat/completions`.

    Args:
        base_url: the server's API.
        model: as the server names it; by default the first it names.
        frames: of each video, evenly spread; all of a shorter one. With `fps`: at most so many.
        fps: frames a second instead of a fixed number.
        max_pixels: of a frame, after resizing.
        adaspark: the requests' settings, as a dict or as JSON; none: the server's own.
        concurrent: requests at a time.
        inline: send the file itself (base64) instead of its path; for a server elsewhere.
        on_error: "stop" at a request that fails, or count its question as "wrong".
        timeout: seconds for an answer.
        records_file: one JSON line per question: what it cost.
        batch_size, max_batch_size, device: lmms-eval passes them to every model; unused.

    Attributes:
        records: what each question cost, in the order of the answers: `task`, `doc_id`,
            `prompt_tokens`, `adaspark` (the server's account, None without one), `error` (or None).

    Raises:
        ValueError: an argument is out of its range.
        RuntimeError: no server there, or a request failed.
    """

    is_simple = False  # it takes messages, not a prompt with images

    def __init__(
        self,
        base_url: str = "http://localhost:8000/v1",
        model: str | None = None,
        frames: int | None = None,
        fps: float | None = None,
        max_pixels: int | None = None,
        adaspark: dict | str | None = None,
        concurrent: int = 8,
        inline: bool = False,
        on_error: str = "stop",
        timeout: float = 3600,
        records_file: str | None = None,
        batch_size: int | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        if on_error not in ON_ERROR:
            raise ValueError(f"on_error={on_error!r}: must be one of {', '.join(ON_ERROR)}")
        if not isinstance(concurrent, int) or concurrent < 1:
            raise ValueError(f"concurrent={concurrent!r}: must be a whole number, at least 1")
        self.fields = request_fields(frames, fps, max_pixels, adaspark)
        self.concurrent, self.inline, self.on_error = concurrent, inline, on_error
        self.records: list[dict] = []
        self.records_file = Path(records_file) if records_file else None
        self._lock = threading.Lock()
        self.client = openai.OpenAI(
            base_url=base_url, api_key=os.environ.get("OPENAI_API_KEY", "none"), timeout=timeout
        )
        try:
            self.model = model or self.client.models.list().data[0].id
        except openai.OpenAIError as error:
            raise RuntimeError(f"base_url={base_url!r}: no answer from a server: {error}") from None

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """The answers, in the order of the questions."""
        with ThreadPoolExecutor(self.concurrent) as pool:
            # A failure raises here, which cancels what has not been sent.
            return list(tqdm(pool.map(self._answer, requests), total=len(requests)))

    def _answer(self, request: Instance) -> GenerationResult:
        _, doc_to_messages, generation, doc_id, task, split = request.args
        record = {"task": task, "doc_id": doc_id}
        try:
            reply = self.client.chat.completions.create(
                model=self.model,
                messages=self._messages(doc_to_messages(self.task_dict[task][split][doc_id])),
                max_tokens=generation.get("max_new_tokens", ANSWER_TOKENS),
                temperature=generation.get("temperature") or 0,
                extra_body=self.fields,
            )
        except openai.OpenAIError as error:
            why = f"{task}, question {doc_id}: {getattr(error, 'message', error)}"
            if self.on_error == "stop":
                raise RuntimeError(why) from error
            self._keep({**record, "prompt_tokens": 0, "adaspark": None, "error": why})
            return GenerationResult("")
        usage = reply.usage
        account = (usage.model_extra or {}).get("adaspark")
        self._keep(
            {**record, "prompt_tokens": usage.prompt_tokens, "adaspark": account, "error": None}
        )
        counts = TokenCounts(usage.prompt_tokens, usage.completion_tokens)
        return GenerationResult(reply.choices[0].message.content or "", counts)

    def _messages(self, raw: list[dict]) -> list[dict]:
        """A task's messages as the API wants them, with videos as videos."""
        chat = ChatMessages(messages=raw)
        for message in chat.messages:
            for part in message.content:
                if part.type == "video":
                    part.url = video_url(part, self.inline)
        return chat.to_openai_messages(pass_video_url=True)

    def _keep(self, record: dict) -> None:
        with self._lock:
            self.records.append(record)
            if self.records_file:
                with self.records_file.open("a") as file:
                    file.write(json.dumps(record) + "\n")

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("a chat server answers; it does not score given answers")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("tasks of several rounds are not supported")


def request_fields(
    frames: int | None, fps: float | None, max_pixels: int | None, adaspark: dict | str | None
) -> dict:
    """vLLM's own fields of a request; empty if nothing was asked for. The server checks them.

    Raises:
        ValueError: `adaspark` is not a JSON object.
    """
    if isinstance(adaspark, str):
        try:
            adaspark = json.loads(adaspark)
        except json.JSONDecodeError as error:
            raise ValueError(f"adaspark={adaspark!r}: not JSON: {error}") from None
    if not isinstance(adaspark, dict | None):
        raise ValueError(f'adaspark={adaspark!r}: must be an object, like {{"p_attn": 0.5}}')
    video = {"fps": fps, "max_frames": frames, "min_frames": None if fps else frames}
    fields = {
        "media_io_kwargs": _given({"video": _given(video)}),
        "mm_processor_kwargs": _given({"max_pixels": max_pixels, "adaspark": adaspark}),
    }
    return _given(fields)


def _given(fields: dict) -> dict:
    return {name: value for name, value in fields.items() if value not in (None, {})}


def video_url(part: ChatVideoContent, inline: bool) -> str:
    """Where the server finds the video, or the video itself.

    Raises:
        ValueError: the task asks about a part of the file: a server reads all of it.
    """
    source = part.url
    if not isinstance(source, str) or part.start_time is not None or part.end_time is not None:
        raise ValueError(f"video={source!r}: clips of a file are not supported; cut them first")
    if source.startswith(("http://", "https://", "data:")):
        return source
    # Not resolved: the hub's cache links to files without a suffix.
    path = Path(os.path.abspath(source.removeprefix("file://")))
    if inline:
        return "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode()
    return path.as_uri()
