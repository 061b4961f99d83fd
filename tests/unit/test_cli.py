"""The command line without an engine: help, exit codes, messages, and the command serve makes."""

from __future__ import annotations

import argparse
import base64
import json
import os
import shlex
import subprocess
import sys
import threading
from dataclasses import dataclass
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import video as demo_video  # examples/demo

from vllm_adaspark import ARCHITECTURE, __version__
from vllm_adaspark.cli import COMMANDS, doctor, main, media, serve, settings
from vllm_adaspark.methods import built_in, settings_class
from vllm_adaspark.methods.adaspark.settings import AdaSparkConfig
from vllm_adaspark.settings import Settings, setting

PROGRAM = "import sys; from vllm_adaspark.cli import main; sys.exit(main())"
TOY = "engine.sliding_window:SlidingWindow"
WRITTEN = ("serve", "ask", "inspect", "doctor")


def run(*arguments: str, code: str = PROGRAM, **env: str) -> subprocess.CompletedProcess:
    """The command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, **env},
    )


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return demo_video.write_mp4(tmp_path_factory.mktemp("cli") / "clip.mp4", seconds=10)


@pytest.fixture
def call(capsys):
    """The command in this process: (exit code, stdout, stderr)."""

    def call(*arguments):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


# -- help, version, unknown words -----------------------------------------------------------------


@pytest.mark.parametrize("command", ["", *WRITTEN])
def test_help_needs_neither_vllm_nor_torch(command):
    code = (
        "import sys; from vllm_adaspark.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'vllm', 'torch', 'transformers', 'cv2'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = run(*filter(None, [command]), "--help", code=code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: vllm-adaspark {command}".strip())
    if not command:
        assert all(name in done.stdout for name in WRITTEN)


def test_help_names_every_setting_of_the_method(call):
    """Those of the default method, and of the one that --method names."""
    for method in (None, *built_in(), TOY):
        cls = settings_class(method or "adaspark")
        for command in ("serve", "ask", "inspect"):
            _, text, _ = call(command, "--help", *(["--method", method] if method else []))
            for name in settings.names(cls) - {"enabled"}:
                assert "--" + name.replace("_", "-") in text, (command, method, name)
    assert "--window" in text and "--p-attn" not in text


def test_help_of_a_setting_may_hold_any_text(call, monkeypatch):
    @dataclass(frozen=True)
    class Percent(Settings):
        most: float = setting(40.0, "% of the cubes, 100 % at most", low=0, high=100)

    monkeypatch.setattr(settings, "settings_class", lambda method: Percent)
    code, text, _ = call("serve", "--help")
    assert code == 0 and "% of the cubes, 100 % at most (default: 40.0)" in " ".join(text.split())


def test_an_unknown_method_is_refused(call):
    no_methods = ("json:dumps", "json:JSONDecoder", "vllm_adaspark.methods.base:Method", "")
    for method in ("sparkle", "no.module:Class", "adaspark.settings", ".", *no_methods):
        code, _, err = call("serve", "m", "--method", method, "--print")
        assert code == 2 and f"method={method!r}: no such method" in err and "adaspark" in err
    for method in (5, 0, ["adaspark"], {}):
        named = json.dumps({"method": method})
        code, _, err = call("serve", "m", "--additional-config", named, "--print")
        assert code == 2 and f"method={method!r}: no such method" in err
    code, _, err = call(
        "serve", "m", "--method", TOY, "--additional-config", '{"method": "adaspark"}', "--print"
    )
    assert code == 2 and "leave one of them out" in err


def test_version(call):
    assert call("--version") == (0, f"vllm-adaspark {__version__}\n", "")


def test_without_a_command(call):
    code, out, _ = call()
    assert code == 2 and "commands:" in out


def test_unknown_command_gets_a_suggestion(call):
    code, _, err = call("srve", "model")
    assert code == 2 and "'srve' (did you mean 'serve'?)" in err
    code, _, err = call("--frobnicate")
    assert code == 2 and "--frobnicate" in err


def test_exit_code_of_a_process():
    assert run("--version").returncode == 0
    assert run("inspect", "missing.mp4").returncode == 2


# -- settings as flags ----------------------------------------------------------------------------


def parse(*arguments: str) -> dict:
    parser = argparse.ArgumentParser()
    settings.add_settings(parser, "adaspark")
    return settings.given_settings(parser.parse_args(arguments))


def test_unset_flags_set_nothing():
    assert parse() == {}


def test_every_flag_arrives():
    given = parse(*shlex.split(
        "--p-attn 0.7 --p-ffn 0.6 --selection top_p --min-cubes 2 --dense-layers 1 "
        "--text-queries dense --importance norm --compensation bypass --paper "
        "--cube 8x4x2 --order raster --trace "
        "--dense-below 3 --cube-queries 4 --tile-cubes 2 "
        "--encoder-patches 9 --trace-mb 5 --report-file r.jsonl"
    ))  # fmt: skip
    assert given == {
        "p_attn": 0.7,
        "p_ffn": 0.6,
        "selection": "top_p",
        "min_cubes": 2,
        "dense_layers": 1,
        "text_queries": "dense",
        "importance": "norm",
        "compensation": "bypass",
        "paper": True,
        "cube": [8, 4, 2],
        "order": "raster",
        "trace": True,
        "dense_below": 3,
        "cube_queries": 4,
        "tile_cubes": 2,
        "encoder_patches": 9,
        "trace_mb": 5,
        "report_file": "r.jsonl",
    }
    assert AdaSparkConfig().override(given).cube == (8, 4, 2)


def test_p_is_both_unless_one_is_named():
    assert parse("--p", "0.5") == {"p_attn": 0.5, "p_ffn": 0.5}
    assert parse("--p", "0.5", "--p-ffn", "1") == {"p_attn": 0.5, "p_ffn": 1.0}
    assert parse("--flops", "0.4") == {"flops": 0.4}
    assert parse("--off") == {"off": True}


# -- serve ----------------------------------------------------------------------------------------


@pytest.fixture
def served(call, monkeypatch):
    """What ``serve --print`` makes: (arguments of vllm, environment)."""
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)

    def served(*arguments):
        code, out, err = call("serve", *arguments, "--print")
        assert code == 0, err
        words = shlex.split(out)
        env = {}
        while "=" in words[0]:
            key, _, value = words.pop(0).partition("=")
            env[key] = value
        return words[words.index("serve") + 1 :], env

    return served


def value(arguments, option):
    return json.loads(arguments[arguments.index(option) + 1])


def test_serve_fills_in_the_architecture(served):
    arguments, env = served("some/model", "--no-http")
    assert arguments == ["some/model", "--hf-overrides", f'{{"architectures": ["{ARCHITECTURE}"]}}']
    assert env == {}


def test_serve_passes_on_what_is_not_ours_in_order(served):
    arguments, _ = served(
        "some/model", "-tp", "2", "--p", "0.5", "--chat-template", "it's {here}", "--no-http"
    )
    assert arguments[:5] == ["some/model", "-tp", "2", "--chat-template", "it's {here}"]
    assert value(arguments, "--additional-config") == {"adaspark": {"p_attn": 0.5, "p_ffn": 0.5}}


def test_serve_takes_the_settings_of_the_method(served, call):
    """The method is named by our flag, or as vLLM has it."""
    wanted = {"method": TOY, "adaspark": {"window": 8}}
    arguments, _ = served("m", "--method", TOY, "--window", "8")
    assert value(arguments, "--additional-config") == wanted
    arguments, _ = served("m", "--window", "8", "--additional-config.method", TOY)
    assert value(arguments, "--additional-config") == wanted
    code, _, err = call("serve", "m", "--method", TOY, "--window", "0", "--print")
    assert code == 2 and "window=0: expected an integer from" in err
    code, _, err = call("serve", "m", "--method", TOY, "--windw", "8", "--print")
    assert code == 2 and "--windw (did you mean --window?)" in err


def test_a_checkpoint_that_was_trained_for_a_method_runs_it(served, call, tuned):
    """By its config.json, or by its name where that is not at hand; nothing needs to be named."""
    model = tuned({}, architectures=["VideoNSAForConditionalGeneration"], block_counts=8)
    for named in (str(model), "Enxin/VideoNSA"):
        arguments, _ = served(named, "--window-size", "128")
        assert value(arguments, "--hf-overrides") == {
            "architectures": ["VideoNSAForConditionalGeneration"]
        }
        assert value(arguments, "--additional-config") == {"adaspark": {"window_size": 128}}
    told = json.loads(
        call("inspect", "--duration", "1m", "--size", "224x224", "--json", "--model", model)[1]
    )
    assert told["settings"]["block_counts"] == 8 and "p_attn" not in told["settings"]


def test_serve_takes_lists_and_switches_of_a_method(served):
    arguments, _ = served(
        "m", "--method", "adatp", "--layers", "2,6", "--keep", "0.5", "--no-keep-budget",
        "--tau-s", "0.9",
    )  # fmt: skip
    assert value(arguments, "--additional-config") == {
        "method": "adatp",
        "adaspark": {"layers": [2, 6], "keep": 0.5, "keep_budget": False, "tau_s": 0.9},
    }


def test_serve_merges_what_the_user_gives(served):
    arguments, _ = served(
        "m", "--hf_overrides={\"a\": {\"b\": 1}}", "--additional-config.adaspark.min_cubes", "2",
        "--additional-config", '{"other": 1, "adaspark": {"p_attn": 0.3, "p_ffn": 0.3}}',
        "--p-attn", "0.6", "--hf-overrides.a.c", "x",
    )  # fmt: skip
    assert value(arguments, "--hf-overrides") == {
        "a": {"b": 1, "c": "x"},
        "architectures": [ARCHITECTURE],
    }
    assert value(arguments, "--additional-config") == {
        "other": 1,
        "adaspark": {"p_attn": 0.6, "p_ffn": 0.3, "min_cubes": 2},
    }
    assert not any(word.startswith("--hf-overrides.") for word in arguments)


def test_serve_merges_a_config_file(served, call, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text('model: m\nadditional_config: \'{"adaspark": {"p_attn": 0.4}}\'\nport: 9\n')
    arguments, _ = served("--config", str(file), "--p-ffn", "0.5")
    assert arguments[:2] == ["--config", str(file)]
    assert value(arguments, "--additional-config") == {"adaspark": {"p_attn": 0.4, "p_ffn": 0.5}}
    file.write_text("model: m\nblock-size: 16\n")
    code, _, err = call("serve", "--config", file, "--print")
    assert code == 2 and "--block-size 16" in err
    code, _, err = call("serve", "--config", tmp_path / "none.yaml", "--print")
    assert code == 2 and "none.yaml: cannot be read" in err


def test_serve_trusts_requests_only_if_asked(served):
    assert "--trust-request-mm-kwargs" not in served("m")[0]
    assert served("m", "--request-settings")[0].count("--trust-request-mm-kwargs") == 1
    both = served("m", "--request-settings", "--trust-request-mm-kwargs")[0]
    assert both.count("--trust-request-mm-kwargs") == 1


def test_serve_names_plugins_and_keeps_others(served, monkeypatch):
    others = [SimpleNamespace(name=name) for name in ("adaspark", "resolver")]
    monkeypatch.setattr(
        serve, "entry_points", lambda group: others if group == "vllm.general_plugins" else []
    )
    # Unset, every general plugin is loaded, so naming ours must not turn those off.
    assert served("m")[1] == {"VLLM_PLUGINS": "adaspark,adaspark_http,resolver"}
    assert served("m", "--no-http")[1] == {}
    monkeypatch.setenv("VLLM_PLUGINS", "mine,adaspark_http")
    assert served("m")[1] == {"VLLM_PLUGINS": "adaspark,adaspark_http,mine"}
    assert served("m", "--no-http")[1] == {"VLLM_PLUGINS": "adaspark,mine"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("", "no MODEL given"),
        ("--p 0.9", "no MODEL given"),
        ("m --p 1.5", "p_attn=1.5: expected a number above 0 and at most 1"),
        ("m --p 0", "p_attn=0.0: expected a number above 0"),
        ("m --p x", "invalid float value: 'x'"),
        ("m --p-atn 0.5", "--p-atn (did you mean --p-attn?)"),
        ("m --flops 0.4 --p 0.5", "flops=0.4 and p_attn=0.5"),
        ("m --cube 4,4", "'4,4': expected three whole numbers"),
        ("m --selection best", "invalid choice: 'best'"),
        ("m --min-cubes 99", "min_cubes=99: expected an integer from 1 to 16"),
        ("m --block-size 32", "--block-size 32 does not match cube=[4, 4, 4]"),
        ("m --block-size=64 --cube 4,4,2", "--block-size 64 does not match cube=[4, 4, 2]"),
        ("m --hf-overrides x", "--hf-overrides 'x': expected a JSON object"),
        ("m --hf-overrides [1]", "--hf-overrides '[1]': expected a JSON object"),
        ("m --hf-overrides.architectures [\"A\"]", "architectures=['A']: it must be"),
        ("m --additional-config", "--additional-config: expected a value"),
        ("m --additional-config.adaspark.p 1", "unknown key 'p'"),
        ("m --additional-config.adaspark 3", "adaspark=3: expected an object"),
        ("m --additional-config.p_attn 0.5", "'p_attn' means nothing there; AdaSpark's settings"),
        ("m --additional-config.prune 0.5", "'prune' means nothing there; AdaSpark's settings"),
        ("m --additional-config.adaspak.p_attn 0.5", "'adaspak' means nothing there"),
        ("m --additional-config.prune 0.5", "'prune' means nothing there"),
        ("m --additional-config.off true", "'off' means nothing there"),
        ("m --additional-config.methd adatp", "'methd' means nothing there"),
        ("m --additional-config.Method adatp", "another method is named by 'method'"),
        ("m --cube 3,3,3", "cube=[3, 3, 3] holds 27 tokens; allowed volumes: 32, 64, 128"),
        ("m --request-setings", "--request-setings (did you mean --request-settings?)"),
    ],
)  # fmt: skip
def test_serve_refuses(call, arguments, message):
    code, out, err = call("serve", *arguments.split(), "--print")
    assert (code, out) == (2, "")
    assert message in err


@pytest.mark.parametrize(
    "model, told", [("./none", "no such folder"), ("FOLDER", "no config.json")]
)
def test_serve_refuses_a_path_that_is_no_checkpoint(call, served, tmp_path, model, told):
    model = str(tmp_path) if model == "FOLDER" else model
    code, out, err = call("serve", model)
    assert (code, out) == (2, "") and f"MODEL {model!r}: {told}" in err
    assert served(model)[0][0] == model  # --print may be meant for another machine


SECRET = "S3cr3t-of-the-test"


@pytest.mark.parametrize(
    "arguments",
    [
        f"--api-key {SECRET} {SECRET}2 --port 9",
        f"--api_key={SECRET}",
        f"--hf-token {SECRET}",
        f'--hf-overrides {{"a":[{{"api_key":"{SECRET}"}}]}}',
        f"--additional-config.other.auth_token {SECRET}",
        f'--model-loader-extra-config {{"env":{{"AWS_SECRET_ACCESS_KEY":"{SECRET}"}}}}',
    ],
)
def test_serve_shows_no_keys_but_passes_them_on(call, monkeypatch, arguments):
    became = []
    monkeypatch.setattr(serve.os, "execvpe", lambda program, words, env: became.extend(words))
    _, out, err = call("serve", "m", *arguments.split())
    assert SECRET not in out + err
    assert "***" in out and ("--port 9" in out) == ("--port 9" in arguments)
    assert SECRET in " ".join(became)


@pytest.mark.parametrize(
    "arguments",
    [
        ["serve", "m", "--additional-config", f'{{"token": "{SECRET}"'],
        ["inspect", "--api-key", SECRET],
        ["inspect", f"https://me:{SECRET}@localhost:1/a.mp4?token={SECRET}"],
        ["serve", "--api-key", SECRET],
    ],
)
def test_messages_show_no_keys(call, arguments):
    code, out, err = call(*arguments)
    assert code in (1, 2) and SECRET not in out + err


@pytest.fixture
def tuned(tmp_path):
    """A checkpoint's folder whose config.json has settings."""

    def make(settings, **more):
        model = {
            "model_type": "qwen2_5_vl",
            "hidden_size": 256,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "intermediate_size": 688,
            "num_hidden_layers": 4,
            "vision_config": {},
            "adaspark_config": settings,
        }
        (tmp_path / "config.json").write_text(json.dumps(model | more))
        return tmp_path

    return make


def test_serve_knows_the_checkpoints_settings(call, served, tuned):
    model = tuned({"cube": [2, 4, 4], "p_attn": 0.3})
    arguments, _ = served(str(model), "--block-size", "32", "--p-ffn", "0.4")
    # What the operator named and no more: the plugin reads the rest from the checkpoint.
    assert value(arguments, "--additional-config") == {"adaspark": {"p_ffn": 0.4}}
    code, _, err = call("serve", model, "--block-size", "64", "--print")
    assert code == 2 and "does not match cube=[2, 4, 4]" in err
    served(str(model), "--block-size", "64", "--off")
    tuned({"trace": True})
    code, _, err = call("serve", model, "--print")
    assert code == 2 and "'trace' is a server setting and cannot be set by a checkpoint" in err
    served(str(model), "--off")


def test_inspect_counts_with_the_checkpoints_settings(call, tuned):
    model = tuned({"cube": [2, 4, 4], "p_attn": 0.3})
    where = ("--duration", "1m", "--size", "224x224", "--json", "--model", model)
    assert json.loads(call("inspect", *where)[1])["settings"]["p_attn"] == 0.3
    told = json.loads(call("inspect", *where, "--p", "0.6")[1])["settings"]
    assert (told["p_attn"], told["cube"]) == (0.6, [2, 4, 4])


@pytest.mark.parametrize(
    "arguments",
    ["--block-size 64", "--block-size 32 --cube 4,4,2", "--additional-config.adaspark off"],
)  # fmt: skip
def test_serve_lets_pass(served, arguments):
    served("m", *arguments.split())


def test_none_of_our_flags_is_vllms():
    """Nor so near one that it would be taken for a misspelling."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    theirs = make_arg_parser(FlexibleArgumentParser())
    names = {name for action in theirs._actions for name in action.option_strings}
    assert {"--max-model-len", "--trust-request-mm-kwargs"} <= names
    for method in built_in():
        parser = argparse.ArgumentParser(add_help=False)
        serve.add_parser(parser.add_subparsers(), ["serve", "m", "--method", method])
        ours = parser._subparsers._group_actions[0].choices["serve"]
        mine = {name for action in ours._actions for name in action.option_strings}
        assert names & mine == {"-h", "--help"}, method
        assert settings.misspelt(sorted(names), settings_class(method)) is None


def test_serve_becomes_the_command():
    """Its exit code is that of the command, which gets the arguments and the environment."""
    child = (
        "import os, sys; print(os.getpid(), os.environ['VLLM_PLUGINS'], *sys.argv[1:3]); "
        "sys.exit(7)"
    )
    code = (
        "import os, sys; from vllm_adaspark.cli import main, serve\n"
        f"serve._executable = lambda: ([sys.executable, '-c', {child!r}], ['vllm'])\n"
        "print(os.getpid(), flush=True); sys.exit(main())"
    )
    done = run("serve", "some/model", code=code, VLLM_PLUGINS="mine")
    before, line, after = done.stdout.splitlines()
    assert done.returncode == 7
    assert line.startswith("VLLM_PLUGINS=adaspark,adaspark_http,mine vllm serve some/model --hf-")
    assert after == f"{before} adaspark,adaspark_http,mine serve some/model"


def test_serve_without_vllm(call, monkeypatch):
    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    code, _, err = call("serve", "m")
    assert code == 1 and "vLLM is not installed; pip install" in err


# -- videos, models, inspect ----------------------------------------------------------------------


def test_inspect_tells_cost_and_flags(call, clip):
    code, out, _ = call("inspect", clip, "--model", "7b", "--p", "0.5")
    assert code == 0
    assert "20 frames of 224x224" in out and "640 = 10 x 8 x 8" in out
    assert "--max-num-batched-tokens 1024" in out and "an estimate" in out


def test_inspect_as_json(call, clip):
    code, out, _ = call("inspect", clip, "--json", "--fps", "1", "--max-frames", "8")
    told = json.loads(out)
    assert code == 0
    assert told["cost"]["frames"] == 8 and told["cost"]["video_tokens"] == 256
    assert told["video"] == {"frames": 80, "fps": 8.0, "seconds": 10.0, "size": [224, 224]}
    assert '--media-io-kwargs \'{"video": {"fps": 1.0, "max_frames": 8}}\'' in told["flags"]


def test_inspect_of_another_method(call, clip):
    """Tokens, dense FLOPs, memory and flags are the same; nobody estimates what it spends."""
    told = json.loads(call("inspect", clip, "--method", TOY, "--window", "3", "--json")[1])
    assert told["settings"]["window"] == 3
    assert told["cost"]["video_tokens"] == 640 and told["cost"]["flops"] is None
    assert told["cost"]["dense_flops"] > 0
    assert "not estimated for this method" in call("inspect", clip, "--method", TOY)[1]


def test_inspect_of_adatp_is_exact_and_holds_the_prompt_in_a_step(call):
    about = ["--duration", "3m", "--size", "640x360", "--method", "adatp"]
    told = json.loads(call("inspect", *about, "--model", "onevision-7b", "--json")[1])["cost"]
    assert told["flops_ratio"] == pytest.approx(0.273, abs=1e-4) and told["key_sum_bytes"] == 0
    assert told["one_step"] and told["max_num_batched_tokens"] >= told["prompt_tokens"]
    # After layer 3 of 28, half the tokens: what is linear in them costs 15.5 of 28 layers.
    told = json.loads(call("inspect", *about, "--layers", "3", "--keep", "0.5", "--json")[1])
    assert 3 / 28 + 0.25 * 25 / 28 < told["cost"]["flops_ratio"] < 15.5 / 28
    shown = call("inspect", *about, "--fastv", "--flops", "0.01")[1]
    assert "cannot be met, the least is 0.08" in shown and "where frames are alike" in shown
    assert "key sums" not in shown and "cubes" not in shown
    code, _, err = call("inspect", *about, "--layers", "2,40", "--keep", "0.5")
    assert code == 2 and "layers=[2, 40]: this model has 28 layers" in err


def test_inspect_of_videonsa_tells_each_branch(call):
    """Of dense attention: text about nothing, and a window of 256 twice as many keys as of 128."""
    about = ["inspect", "--duration", "10m", "--size", "640x360", "--method", "videonsa"]
    cost = json.loads(call(*about, "--json")[1])["cost"]
    parts = cost["flops_by_part"]
    assert set(parts) == {"qkvo", "text", "cmp", "slc", "swa", "gates", "ffn"}
    assert sum(parts.values()) == pytest.approx(cost["flops"])
    narrow = json.loads(call(*about, "--window-size", "128", "--json")[1])["cost"]["flops_by_part"]
    assert parts["swa"] / narrow["swa"] == pytest.approx(2, rel=0.01)
    attention = sum(parts.values()) - parts["qkvo"] - parts["ffn"]
    share = attention / cost["dense_attention_flops"]
    shown = call(*about)[1]
    assert f"of attention     {share:.1%} of dense attention: text 0.1%, cmp" in shown
    assert "of attention" not in call(*about, "--off")[1]
    faithful = json.loads(call(*about, "--mode", "faithful", "--json")[1])["cost"]
    assert faithful["flops_by_part"]["cmp"] > parts["cmp"]  # of 16 query rows a KV head, not 7
    code, _, err = call(*about, "--flops", "0.5")
    assert code == 2 and "flops=0.5: what VideoNSA spends follows from block_counts" in err


def test_inspect_an_hour_without_a_file(call):
    code, out, _ = call("inspect", "--duration", "1h", "--size", "1280x720", "--fps", "0.5")
    assert code == 0
    assert "1:00:00.0, 1280x720, 108,000 frames" in out
    assert "does not fit: the model has 128,000 positions" in out and "--max-pixels" in out
    code, out, _ = call(
        "inspect", "--duration", "1h", "--size", "1280x720", "--max-pixels", "200704", "--json",
    )  # fmt: skip
    told = json.loads(out)
    assert told["cost"]["fits"] and told["video"]["seconds"] == 3600
    assert any(flag.startswith("--mm-processor-kwargs") for flag in told["flags"])


@pytest.mark.parametrize("text, seconds", [("90", 90), ("90s", 90), ("10m", 600), ("1h30m", 5400)])
def test_inspect_reads_durations(call, text, seconds):
    _, out, _ = call("inspect", "--duration", text, "--size", "64x64", "--json")
    assert json.loads(out)["video"]["seconds"] == seconds


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("missing.mp4", "VIDEO 'missing.mp4': no such file"),
        ("m" * 5000, "no such file"),
        ("~nobody-here/x.mp4", "VIDEO '~nobody-here/x.mp4': no such file"),
        (f"CLIP --model {'m' * 5000}", "no such folder"),
        ("FOLDER", "not a file"),
        ("EMPTY", "empty, 0 bytes"),
        ("TEXT", "not a video"),
        ("data:video/mp4,abc", "not a base64 data URL"),
        ("data:video/mp4;base64,a*c", "not a base64 data URL"),
        ("CLIP --fps -1", "--fps -1: expected a number above 0 and at most 30"),
        ("CLIP --fps nan", "--fps nan: expected a number above 0"),
        ("CLIP --max-frames 1", "--max-frames 1: expected a whole number from 2 to 32768"),
        ("CLIP --max-pixels 10", "--max-pixels 10: expected at least 3136"),
        ("CLIP --text-tokens 0", "--text-tokens 0: expected 1 or more"),
        ("CLIP --p 2", "p_attn=2.0: expected"),
        ("CLIP --model 9b", "--model '9b': no such folder"),
        ("CLIP --model FOLDER", "no config.json"),
        ("CLIP --unknown", "unrecognized arguments: --unknown"),
        (
            "CLIP --modl 7b",
            "inspect: error: unrecognized arguments: --modl 7b (did you mean --model?)",
        ),
        ("CLIP --size 3x3", "give a video, or both"),
        ("", "give a VIDEO, or --duration and --size"),
        ("--duration 1h", "give a VIDEO, or --duration and --size"),
        ("--duration 1h --size 3", "--size '3': expected width x height"),
        ("--duration soon --size 3x3", "--duration 'soon': expected a length"),
        ("--duration 0s --size 3x3", "--duration '0s': expected a length"),
        ("--duration 1h --size 9000x9", "at most 200:1"),
        ("--duration 99999h --size 99x99", "1.08e+10 frames are more than any file's"),
        ("--duration 1h --size 99x99 --source-fps inf", "inf frames are more than any file's"),
        ("CLIP --text-tokens 999999999", "more than the model's 128,000 positions"),
        ("CLIP --model onevision-7b --prune 0.5", "prune=0.5: not for llava-hf/llava-onevision"),
        ("CLIP --model onevision-7b --method videonsa", "this method is for qwen2_5_vl only"),
    ],
)
def test_inspect_refuses(call, clip, tmp_path, arguments, message):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("no video " * 100)
    names = {
        "CLIP": clip,
        "FOLDER": tmp_path,
        "EMPTY": tmp_path / "empty.mp4",
        "TEXT": tmp_path / "text.mp4",
    }
    code, out, err = call("inspect", *(names.get(word, word) for word in arguments.split()))
    assert (code, out) == (2, "")
    assert message in err


def test_a_file_that_may_not_be_read_is_told(call, clip, monkeypatch):
    def denied(*_):
        raise PermissionError(13, "Permission denied", str(clip))

    monkeypatch.setattr("pathlib.Path.read_bytes", denied)
    for command in (["inspect", clip], ["ask", clip, "q", "--model", "7b"]):
        code, _, err = call(*command)
        assert code == 1 and f"{command[0]}: [Errno 13] Permission denied: '{clip}'" in err


def test_videos_come_from_files_urls_and_data_urls(clip):
    data = clip.read_bytes()
    with ThreadingHTTPServer(("127.0.0.1", 0), _quiet(clip.parent)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        assert media.read_video(f"{url}/{clip.name}") == data
        with pytest.raises(media.CommandError, match="could not be fetched: HTTP Error 404"):
            media.read_video(f"{url}/none.mp4")
        server.shutdown()
    assert media.read_video(clip.as_uri()) == data
    encoded = base64.b64encode(data).decode()
    assert media.read_video(f"data:video/mp4;base64,{encoded}") == data


def _quiet(folder):
    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=folder)

        def log_message(self, *arguments):
            pass

    return Handler


def test_a_hub_out_of_reach_is_named_with_a_way_out(call, clip):
    """Tests run with HF_HUB_OFFLINE=1."""
    code, _, err = call("inspect", clip, "--model", "Qwen/Qwen2.5-VL-7B-Instruct")
    if code == 0:
        pytest.skip("the model's files are in the local cache")
    assert code == 1
    assert "config.json could not be fetched" in err and "--model 7b" in err


# -- ask, as far as it goes without an engine -----------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["CLIP", "q"], "--model"),
        (["CLIP", "--model", "7b"], "QUESTION"),
        (["CLIP", " ", "--model", "7b"], "QUESTION is empty"),
        (["missing.mp4", "q", "--model", "7b"], "no such file"),
        (["CLIP", "q", "--model", "7b", "--p", "7"], "p_attn=7.0"),
        (["CLIP", "q", "--model", "7b", "--fps", "0"], "--fps 0"),
        (["CLIP", "q", "--model", "7b", "--max-tokens", "0"], "--max-tokens 0"),
        (["CLIP", "q", "--model", "7b", "--off", "--dense"], "nothing to compare"),
        (["CLIP", "q", "--model", "7b", "--off", "--picture", "a.png"], "leave --off out"),
        (["CLIP", "q", "--model", "7b", "--picture", "a.txt"], "ends in .png"),
        (["CLIP", "q", "--model", "7b", "--picture", "no/where/a.png"], "no such folder"),
        (["CLIP", "q", "--model", "nowhere"], "--model 'nowhere': no such folder"),
        (["CLIP", "q", "--model", "7b", "--p-atn", "1"], "--p-atn (did you mean --p-attn?)"),
    ],
)
def test_ask_refuses_before_it_starts(call, clip, arguments, message):
    code, out, err = call("ask", *(clip if word == "CLIP" else word for word in arguments))
    assert (code, out) == (2, "")
    assert message in err


def test_ask_says_how_a_long_video_would_fit(call, clip, tmp_path):
    config = {
        "model_type": "qwen2_5_vl",
        "hidden_size": 256,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "intermediate_size": 688,
        "num_hidden_layers": 4,
        "max_position_embeddings": 512,
        "vision_config": {},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, _, err = call("ask", clip, "q", "--model", tmp_path, "--max-tokens", "16")
    assert code == 2
    assert "more than the model's 512 positions" in err and "--max-frames" in err
    code, _, err = call("ask", clip, "q", "--model", "7b", "--max-tokens", "200000")
    assert code == 2 and "what fits: a shorter answer" in err


# -- doctor ---------------------------------------------------------------------------------------


def test_doctor_finds_this_installation_sound(call, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "adaspark,adaspark_http")
    code, out, _ = call("doctor", "--json")
    told = json.loads(out)
    found = {finding["name"]: finding for finding in told["findings"]}
    assert {"python", "torch", "vllm", "av", "architecture", "method adaspark"} <= found.keys()
    assert found["attention backend"]["value"] in ("CPU_ATTN", "FLASH_ATTN", "TRITON_ATTN")
    broken = [finding for finding in told["findings"] if finding["state"] == "broken"]
    assert (code, broken) == (0, [])


def test_doctor_names_what_is_broken_and_how_to_mend_it():
    done = run("doctor", VLLM_PLUGINS="other", VLLM_CPU_KVCACHE_SPACE="lots")
    assert done.returncode == 1
    assert "BROKEN  VLLM_PLUGINS" in done.stdout
    assert "mend: export VLLM_PLUGINS=adaspark,adaspark_http,other" in done.stdout
    assert "is not registered" in done.stdout


def test_doctor_judges_versions(monkeypatch):
    assert doctor.pinned_vllm() == "0.32.0"
    assert doctor.vllm_version("0.32.0+cpu", "0.32.0").state == "ok"
    other = doctor.vllm_version("0.33.1", "0.32.0")
    assert other.state == "broken" and "exactly 0.32.0" in other.value
    assert "pip install vllm==0.32.0" in other.mend
    assert "without its metadata" in doctor.vllm_version(None, "0.32.0").value
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    assert doctor.vllm_version(None, "0.32.0").value == "not installed"
    assert not any(finding.name == "architecture" for finding in doctor.examine())


def test_doctor_judges_the_environment():
    assert doctor.allow_list(None).state == "ok"
    assert doctor.allow_list(["adaspark"]).state == "ok"
    assert doctor.allow_list([""]).state == "broken"  # VLLM_PLUGINS= lets nothing in
    assert "spaces" in doctor.allow_list(["x", " adaspark"]).mend
    assert doctor.free_memory(15.5, 16).state == "ok"
    assert "--gpu-memory-utilization 0.6" in doctor.free_memory(12, 16).mend
    assert doctor.kv_space(None, 16).state == "ok"
    assert doctor.kv_space("4", 16).state == "ok"
    assert all("fewer than the machine's 16" in doctor.kv_space(n, 16).value for n in ("40", "x"))


def test_doctor_goes_on_where_a_check_fails(monkeypatch):
    def fails():
        raise OSError("disk on fire")
        yield

    monkeypatch.setattr(doctor, "_media", fails)
    findings = {finding.value: finding.state for finding in doctor.examine()}
    assert findings["OSError: disk on fire"] == "broken"


def test_every_command_has_a_module_or_is_left_out(call):
    _, out, _ = call("--help")
    for name in COMMANDS:
        listed = f"\n    {name} " in out
        assert listed == (serve.find_spec(f"vllm_adaspark.cli.{name}") is not None), name
