"""What the command line prints holds no keys, and else what was given."""

from __future__ import annotations

import json
import shlex

import pytest

from vllm_adaspark.cli.redact import HIDDEN, is_secret, redact_arguments, redact_text

SECRET, OTHER = "s3cr3t", "0th3r"


@pytest.mark.parametrize(
    "line",
    [
        "m --api-key s3cr3t 0th3r --port 8000",
        "m --api-key=s3cr3t --port 8000",
        "m --api_key s3cr3t --port 8000",
        "m --api s3cr3t --port 8000",
        "m --hf-token s3cr3t --port 8000",
        "m --hf_token=s3cr3t --port 8000",
        "m --hf-tok s3cr3t --port 8000",
        "m --ssl-keyfile-password s3cr3t --port 8000",
        "m --kv-transfer-config.extra.api_key s3cr3t --port 8000",
        "m --kv-transfer-config.api_keys+ s3cr3t,0th3r --port 8000",
        "m --watermark-config.k s3cr3t --port 8000",
        """m --watermark-config '{"k": "s3cr3t"}' --port 8000""",
        """m --x '{"a": {"b": [{"apiKey": "s3cr3t"}]}}' --port 8000""",
        """m --x='{"token": ["s3cr3t", "0th3r"], "auth": {"user": "s3cr3t"}}' --port 8000""",
        """m --x '{"env": {"HF_TOKEN": "s3cr3t", "AWS_SECRET_ACCESS_KEY": "0th3r"}}' --port 8000""",
        """m --x '{"nested": "{\\"api_key\\": \\"s3cr3t\\"}"}' --port 8000""",
        """m --x '{"headers": {"Authorization": "Bearer s3cr3t"}}' --port 8000""",
        """m --x '{"args": ["HF_TOKEN=s3cr3t"], "u": "https://me:0th3r@host/"}' --port 8000""",
        "m --env HF_TOKEN=s3cr3t OPENAI_API_KEY=0th3r --port 8000",
        "m --header 'Authorization: Bearer s3cr3t' --port 8000",
        "m --url 'https://me:s3cr3t@host/?access_token=0th3r&a=1' --port 8000",
        """m --x '{"api_key": "s3cr3t 0th3r' --port 8000""",
        "m --x '{api_key: s3cr3t}' --port 8000",
    ],
)
def test_secrets_are_hidden_and_the_rest_is_shown(line):
    words = shlex.split(line)
    shown = redact_arguments(words)
    assert SECRET not in " ".join(shown) and OTHER not in " ".join(shown)
    assert HIDDEN in " ".join(shown)
    assert (len(shown), shown[0], shown[-2:]) == (len(words), "m", ["--port", "8000"])
    text = redact_text(f"vLLM's options: unrecognized arguments: {line}")
    assert SECRET not in text and OTHER not in text


@pytest.mark.parametrize(
    "line",
    [
        "m --tokenizer t --tokenizer-mode auto --max-num-batched-tokens 32k --watermark 0.01",
        "m --ssl-keyfile a.pem --served-model-name token --host 0.0.0.0",
        """m --hf-overrides '{"image_token": "<|image_pad|>",  "image_token_id": 5}'""",
        """m --additional-config '{"adaspark": {"p_attn": 0.5, "cube": [4, 4, 4]}}'""",
        """m --media-io-kwargs '{"video": {"fps": 1}}' --uds /tmp/a=b --x '[1'""",
        "data:video/mp4;base64,AAAA== https://example.com/lecture.mp4?start=5 C:/videos/a.mp4",
    ],
)
def test_what_is_no_secret_stays_as_it_was_written(line):
    words = shlex.split(line)
    assert redact_arguments(words) == words


def test_values_that_are_no_text_stay():
    words = ["--hf-overrides", json.dumps({"use_auth_token": True, "key": 5, "token": None})]
    assert redact_arguments(words) == words


def test_options_of_vllm_that_count_as_secret():
    """A new one here is to be looked at: is it a secret, and is vLLM's list ours?"""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.entrypoints.serve.utils import api_utils
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    theirs = make_arg_parser(FlexibleArgumentParser())
    names = {name for action in theirs._actions for name in action.option_strings}
    hidden = {n for n in names if n.startswith("--") and redact_arguments([n, "v"])[1] != "v"}
    listed = {"--" + field.replace("_", "-") for field in api_utils._SENSITIVE_ARG_FIELDS}
    assert listed <= hidden
    assert hidden - listed == {"--allow-credentials", "--no-allow-credentials"}  # take no value


@pytest.mark.parametrize(
    "name",
    ["api_key", "apiKey", "X-Api-Key", "HF_TOKEN", "auth_tokens", "db.password", "secretKey"],
)
def test_names_of_secrets(name):
    assert is_secret(name)


@pytest.mark.parametrize("name", ["tokenizer", "max_tokens", "keyfile", "monkey", "", "kv_cache"])
def test_names_that_are_none(name):
    assert not is_secret(name)
