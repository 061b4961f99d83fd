"""The image's entry script and health check, run for real."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request

import checkpoint as demo_checkpoint  # examples/demo
import pytest
from deploy_servers import EntryServer
from deploy_tools import DEPLOY, enter, passes, run, serve_arguments, tool

from vllm_adaspark import ARCHITECTURE

HEALTH = DEPLOY / "docker" / "health.py"
KEY = "a-key-of-the-test"
START_SECONDS = 600
STOP_SECONDS = 60


def test_settings_become_what_vllm_reads():
    args = serve_arguments(MODEL="m", ADASPARK='{"p_attn": 0.8}', VLLM_ARGS="--max-model-len 64")
    assert args.model_tag == "m"
    assert args.hf_overrides == {"architectures": [ARCHITECTURE]}
    assert args.additional_config == {"adaspark": {"p_attn": 0.8}}
    assert (args.host, args.port, args.max_model_len) == ("0.0.0.0", 8000, 64)


def test_one_variable_goes_back_to_dense():
    args = serve_arguments("m", ADASPARK="off")
    assert args.additional_config == {"adaspark": {"off": True}}


@pytest.mark.parametrize(
    ("model", "method", "settings", "told"),
    [
        ("m", "adatp", '{"flops": 0.3, "encoder": "/encoder"}', {"flops": 0.3}),
        ("m", "adatp", "fastv", {"fastv": True}),
        ("m", "", "paper", {"paper": True}),
        ("VideoNSA-7B", "", '{"window_size": 128}', {"window_size": 128}),
    ],
)
def test_settings_are_those_of_the_method(model, method, settings, told):
    args = serve_arguments(model, METHOD=method, ADASPARK=settings)
    assert args.additional_config["adaspark"].items() >= told.items()
    assert args.additional_config.get("method", "") == method
    (architecture,) = args.hf_overrides["architectures"]
    assert (architecture == ARCHITECTURE) == (model == "m")


def test_empty_variables_are_unset_ones():
    names = (
        "MODEL",
        "METHOD",
        "ADASPARK",
        "HTTP",
        "HOST",
        "PORT",
        "VLLM_ARGS",
        "VLLM_API_KEY_FILE",
    )
    empty = enter("m", "--print", **dict.fromkeys(names, ""))
    assert empty.returncode == 0
    assert empty.stdout == enter("m", "--print").stdout


@pytest.mark.parametrize("http", ["1", "0"])
def test_http_plugin_is_named_unless_it_is_off(http):
    line = enter("m", "--print", HTTP=http).stdout
    assert ("adaspark_http" in line) == (http == "1")


@pytest.mark.parametrize(
    ("variable", "value", "told"),
    [
        ("ADASPARK", "{", "neither JSON nor 'off', 'paper'"),
        ("ADASPARK", "fastv", "neither JSON nor 'off', 'paper'"),
        ("METHOD", "adatpp", "expected one of adaspark, adatp, videonsa"),
        ("ADASPARK", '{"p_atn": 0.8}', "did you mean 'p_attn'"),
        ("ADASPARK", '{"p_attn": 2}', "above 0 and at most 1"),
        ("ADASPARK", "[1]", "object of settings"),
        ("HTTP", "yes", "expected 1 or 0"),
        ("PORT", "80000", "from 1 to 65535"),
        ("VLLM_ARGS", "'", "quote it"),
        ("MODEL", "other", "leave one of them out"),
        ("VLLM_API_KEY_FILE", "/nowhere/key", "cannot be read"),
        ("HF_TOKEN_FILE", os.devnull, "is empty"),
    ],
)
def test_a_wrong_variable_is_named_and_exits_with_2(variable, value, told):
    done = enter("m", **{variable: value})
    assert done.returncode == 2
    assert variable in done.stderr and told in done.stderr
    assert "Traceback" not in done.stderr


def test_wrong_arguments_exit_with_2(tmp_path):
    assert "set MODEL" in (done := enter("--max-model-len", "8")).stderr and done.returncode == 2
    assert "set PORT" in (done := enter("m", "--port=1")).stderr and done.returncode == 2
    method = enter("m", "--method=adatp", METHOD="adatp")
    assert "METHOD='adatp' and --method" in method.stderr and method.returncode == 2
    key = tmp_path / "key"
    key.write_text(KEY)
    twice = enter("m", VLLM_API_KEY="x", VLLM_API_KEY_FILE=str(key))
    assert twice.returncode == 2 and "leave one of them out" in twice.stderr


def test_messages_and_the_command_line_show_no_keys():
    broken = enter("m", VLLM_ARGS=f"--api-key {KEY} --chat-template '{{")
    assert broken.returncode == 2 and "quote it" in broken.stderr and KEY not in broken.stderr
    shown = enter("m", "--print", VLLM_ARGS=f"--hf-token {KEY} --api-key={KEY}").stdout
    assert "--hf-token" in shown and KEY not in shown


def test_shell_scripts_pass_the_linter():
    passes(tool("shellcheck"), *sorted(DEPLOY.rglob("*.sh")))


def get(url: str, key: str | None = None, body: dict | None = None):
    """(status, text) of a request."""
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    data = json.dumps(body).encode() if body else None
    try:
        request = urllib.request.Request(url, data, headers)
        with urllib.request.urlopen(request, timeout=120) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def check_series(status: int, exposition: str) -> None:
    """A real server exports what rules and dashboard ask for, vLLM's own series included."""
    assert status == 200
    rules = (DEPLOY / "prometheus" / "rules.yml").read_text()
    board = (DEPLOY / "grafana" / "adaspark.json").read_text()
    asked = set(re.findall(r"\bvllm(?:_adaspark)?:\w+", rules + board))
    asked -= set(re.findall(r"record: (\S+)", rules))
    exported = set(re.findall(r"(?m)^(vllm\w*:\w+)", exposition))
    # Of these there are samples once a request had video, or under another method.
    later = {name for name in asked if "density" in name or name == "vllm_adaspark:mean"}
    assert len(asked) > 12 and asked - later <= exported, asked - later - exported
    families = set(re.findall(r"(?m)^# TYPE (\S+)", exposition))
    assert {re.sub(r"_(bucket|sum|count)$", "", name) for name in later} <= families


@pytest.mark.server
def test_serves_and_ends_by_a_signal(tmp_path):
    model = demo_checkpoint.build(tmp_path / "checkpoint")
    key_file = tmp_path / "key"
    key_file.write_text(f"{KEY}\n")
    env = {
        "MODEL": str(model),
        "ADASPARK": '{"p_attn": 0.7}',
        "VLLM_ARGS": "--served-model-name tiny --max-model-len 512",
        "VLLM_API_KEY_FILE": str(key_file),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_LOGGING_LEVEL": "INFO",
    }
    with EntryServer(tmp_path / "server.log", **env) as server:
        assert run(sys.executable, HEALTH, env={"PORT": server.port}).returncode == 1
        server.wait_until_ready(START_SECONDS)
        assert run(sys.executable, HEALTH, env={"PORT": server.port}).returncode == 0

        body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
        status, text = get(f"{server.url}/v1/chat/completions", KEY, body)
        assert status == 200 and json.loads(text)["usage"]["completion_tokens"] > 0
        assert get(f"{server.url}/v1/models")[0] == 401
        check_series(*get(f"{server.url}/metrics"))
        log = server.log.read_text()
        assert "p_attn=0.7" in log and KEY not in log
        # Only ours: an engine that ran in this process before may have left variables of its own.
        assert not env.keys() & set(re.findall(r"Unknown vLLM environment variable\D*: (\w+)", log))

        started = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        try:
            status = server.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still there {time.monotonic() - started:.0f} s after SIGTERM")
        assert status == 0, server.log_tail()
    assert run(sys.executable, HEALTH, env={"PORT": server.port}).returncode == 1
