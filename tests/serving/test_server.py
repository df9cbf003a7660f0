"""The OpenAI-compatible server, started once by `vllm serve FOLDER` and asked by OpenAI's own client."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: make test-serving makes an environment with it")

import openai
import torch
from served import forced, saved, tokenizer

LENGTH = 512


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def model(folder):
    return saved(folder, "rung2", eos_token_id=None)


@pytest.fixture(scope="module")
def address(folder, model, tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("log") / "server.log"
    command = [
        *(str(Path(sys.executable).with_name("vllm")), "serve", str(folder), "--port", str(port), "--host", "127.0.0.1"),
        *("--dtype", "float32", "--max-model-len", str(LENGTH), "--max-num-batched-tokens", "100", "--max-num-seqs", "8"),
        *("--served-model-name", "tiny", "--kv-cache-memory-bytes", str(32 << 20), "--enforce-eager"),
    ]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with log.open("w") as out:
        server = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
    where = f"http://127.0.0.1:{port}"
    try:
        while True:
            try:
                urllib.request.urlopen(f"{where}/health", timeout=5)
                break
            except OSError:
                assert server.poll() is None, log.read_text()[-5000:]
                time.sleep(0.5)
        yield where
    finally:
        server.terminate()
        server.wait(60)


@pytest.fixture(scope="module")
def client(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", timeout=120)


def check(model, asked, text):
    """Bytes of a text are what greedy decoding chooses behind a prompt; what is no text counts as one replacement."""
    ids = tokenizer()(asked).input_ids
    with torch.no_grad():
        new = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=40, eos_token_id=None)[0, len(ids) :]
    assert tokenizer().decode(new, skip_special_tokens=True).startswith(text.rstrip("\N{REPLACEMENT CHARACTER}"))


def test_a_completion_is_what_the_model_generates(client, model):
    answer = client.completions.create(model="tiny", prompt="once upon a time", max_tokens=40, temperature=0, logprobs=3)
    (choice,) = answer.choices
    assert answer.usage.completion_tokens == 40
    check(model, "once upon a time", choice.text)
    ids = tokenizer()("once upon a time").input_ids
    first = forced(model, ids, [0]).log_softmax(-1).max().item()
    assert choice.logprobs.token_logprobs[0] == pytest.approx(first, abs=1e-4)
    assert len(choice.logprobs.token_logprobs) == 40


def test_a_chat_is_put_through_the_tokenizers_template(client, model):
    talk = [{"role": "user", "content": "hello"}]
    answer = client.chat.completions.create(model="tiny", messages=talk, max_tokens=30, temperature=0)
    check(model, "user: hello\nassistant: ", answer.choices[0].message.content)


def test_a_stream_says_the_same_in_pieces(client):
    ask = {"model": "tiny", "prompt": "streams", "max_tokens": 40, "temperature": 0}
    whole = client.completions.create(**ask).choices[0].text
    pieces = [part.choices[0].text for part in client.completions.create(**ask, stream=True) if part.choices]
    assert len(pieces) > 5
    assert "".join(pieces) == whole


def running(address):
    text = urllib.request.urlopen(f"{address}/metrics", timeout=30).read().decode()
    lines = [line for line in text.splitlines() if line.startswith("vllm:num_requests_running")]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def test_a_stream_that_is_left_ends_on_the_server(client, address):
    ask = {"model": "tiny", "prompt": "x" * 100, "max_tokens": LENGTH - 101, "temperature": 0}
    stream = client.completions.create(**ask, stream=True)
    next(iter(stream))
    assert running(address) == 1
    stream.close()
    end = time.monotonic() + 60
    while running(address) and time.monotonic() < end:
        time.sleep(0.1)
    assert running(address) == 0
    assert client.completions.create(model="tiny", prompt="x", max_tokens=3, temperature=0).usage.completion_tokens == 3


def test_a_prompt_that_is_too_long_is_refused_in_words(client):
    with pytest.raises(openai.BadRequestError, match=str(LENGTH)):
        client.completions.create(model="tiny", prompt="x" * (LENGTH + 1), max_tokens=1)


def test_stop_strings_end_a_stream(client):
    ask = {"model": "tiny", "prompt": "stop here", "max_tokens": 40, "temperature": 0}
    whole = client.completions.create(**ask).choices[0].text
    stop = whole[4:6]
    parts = list(client.completions.create(**ask, stop=stop, stream=True))
    assert "".join(part.choices[0].text for part in parts) == whole.split(stop)[0]
    assert parts[-1].choices[0].finish_reason == "stop"


def test_thirty_two_at_once_get_their_own_answers(client, model):
    prompts = [f"{'abc' * (5 * i % 37)} number {i}" for i in range(32)]

    def ask(prompt):
        return client.completions.create(model="tiny", prompt=prompt, max_tokens=20, temperature=0).choices[0].text

    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(ask, prompts))
    for prompt, answer in zip(prompts, answers, strict=True):
        check(model, prompt, answer)
