"""``/v1/completions``, ``/v1/responses``, and requests for more than an answer."""

from __future__ import annotations

import json
from pathlib import Path

import openai
import pytest
from serving import Served, about

pytestmark = pytest.mark.server
WORDS = "Which number is shown on the card? " * 12
# Of a usage: the Responses API has other names than the others.
INPUT, OUTPUT = ("prompt_tokens", "input_tokens"), ("completion_tokens", "output_tokens")


def completion(served: Served, prompt=WORDS, **options):
    options = {"max_tokens": 6, "temperature": 0, "extra_body": {"ignore_eos": True}} | options
    return served.client.completions.create(model="tiny", prompt=prompt, **options)


def response(served: Served, content, **options):
    content = content if isinstance(content, str) else [{"role": "user", "content": content}]
    return served.client.responses.create(
        model="tiny", input=content, max_output_tokens=6, temperature=0, **options
    )


def account(usage) -> dict | None:
    return (usage.model_extra or {})["adaspark"]


def is_text(told: dict, usage) -> None:
    """A dense account of as many tokens as the usage says ran."""
    assert (told["mode"], told["reason"], told["video_tokens"]) == ("dense", "no_video", 0)
    given, said = (
        next(getattr(usage, name) for name in names if hasattr(usage, name))
        for names in (INPUT, OUTPUT)
    )
    assert told["tokens"] + told["cached_tokens"] == given + said - 1
    assert told["flops_ratio"] == 1 and told["flops"]["dense"]["total"] > 0


# -- completions -----------------------------------------------------------------------------------


def test_a_completion_says_what_it_cost(served: Served) -> None:
    whole = completion(served)
    *chunks, last = completion(served, stream=True, stream_options={"include_usage": True})
    for reply in (whole, last):
        served.answered.append(f"{reply.id}-0")
        is_text(account(reply.usage), reply.usage)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    line = served.reports(len(served.answered))[f"{whole.id}-0"]
    assert line["tokens"] == account(whole.usage)["tokens"]
    tokens = completion(served, prompt=[1, 2, 3])  # one prompt of three tokens
    served.answered.append(f"{tokens.id}-0")
    is_text(account(tokens.usage), tokens.usage)


def test_several_answers_to_a_prompt_add_up_and_several_prompts_do_not(served: Served) -> None:
    reply = completion(served, n=2, temperature=1)
    served.answered += [f"{nth}_{reply.id}-0" for nth in range(2)]
    told, tokens = account(reply.usage), reply.usage
    each = tokens.prompt_tokens * 2 + tokens.completion_tokens - 2
    assert told["mode"] == "dense" and told["tokens"] + told["cached_tokens"] == each
    several = completion(served, prompt=["a b c", WORDS])
    served.answered += [f"{several.id}-{nth}" for nth in range(2)]
    assert account(several.usage) is None and len(several.choices) == 2


def test_echo_and_logprobs_of_the_prompt(served: Served) -> None:
    reply = completion(served, echo=True, logprobs=2)
    served.answered.append(f"{reply.id}-0")
    assert reply.choices[0].text.startswith(WORDS)
    assert len(reply.choices[0].logprobs.tokens) == reply.usage.total_tokens
    is_text(account(reply.usage), reply.usage)


# -- responses -------------------------------------------------------------------------------------


def test_a_response_says_what_it_cost(served: Served) -> None:
    whole = response(served, WORDS)
    *_, last = response(served, WORDS, stream=True)
    assert last.type == "response.completed"
    for reply in (whole, last.response):
        served.answered.append(f"{reply.id}_0")
        is_text(account(reply.usage), reply.usage)
    assert last.response.output_text == whole.output_text


def test_a_response_to_an_image(served: Served, media: Path) -> None:
    image = {"type": "input_image", "image_url": (media / "frame.png").as_uri()}
    reply = response(served, [image, {"type": "input_text", "text": "What is shown?"}])
    served.answered.append(f"{reply.id}_0")
    is_text(account(reply.usage), reply.usage)


# -- a chat about a video that asks for more -------------------------------------------------------


def test_logprobs_of_a_prompt_with_video(served: Served, media: Path, still_serves) -> None:
    options = {"max_tokens": 6, "temperature": 0}
    reply = served.client.chat.completions.create(
        model="tiny",
        messages=about(media / "clip.mp4"),
        extra_body={"ignore_eos": True, "cache_salt": "logprobs", "prompt_logprobs": 1},
        **options,
    )
    served.answered.append(reply.id)
    assert account(reply.usage)["mode"] == "sparse"
    assert len(reply.model_extra["prompt_logprobs"]) == reply.usage.prompt_tokens


@pytest.mark.parametrize("path", ["embeddings", "pooling", "score", "rerank", "classify"])
def test_routes_of_other_tasks_are_not_there(served: Served, path) -> None:
    with pytest.raises(openai.NotFoundError):
        served.client.post(f"/{path}", body={"model": "tiny", "input": "a"}, cast_to=object)


# -- below the server ------------------------------------------------------------------------------


def test_what_a_route_asks_for() -> None:
    from vllm_adaspark.server.usage import _number

    for prompt, number in ((None, 0), ("a", 1), ([1, 2], 1), (["a", "b"], 2), ([[1], [2, 3]], 2)):
        assert _number(prompt) == number


def test_only_the_last_event_of_a_response_is_touched() -> None:
    import asyncio
    from types import SimpleNamespace

    from vllm_adaspark.server.usage import LAST_EVENT, _with_account

    other = 'event: response.output_text.delta\ndata: {"delta":"event: response.completed"}\n\n'
    last = {"type": "response.completed", "response": {"id": "resp_1", "usage": {"x": 1}}}
    state = SimpleNamespace(adaspark_accounts=False)

    async def events():
        yield other
        yield f"{LAST_EVENT}{json.dumps(last)}\n\n"

    async def collect():
        return [chunk async for chunk in _with_account(events(), state, suffix="_0")]

    got = asyncio.run(collect())
    assert got[0] == other
    told = json.loads(got[1].removeprefix(LAST_EVENT))
    assert told["response"].pop("usage") == {"x": 1, "adaspark": None}
