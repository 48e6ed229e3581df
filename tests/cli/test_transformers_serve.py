"""Our client against `transformers serve`, a server we did not write.

The model behind it says one thing whatever it is asked; that is what must arrive.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_chat import save_checkpoint

from l4cli.data.longcontext.sample import Question, Sample
from l4cli.errors import L4Error
from l4cli.evals.endpoint import Api, EndpointOptions, request_url
from l4cli.evals.endpoint_subject import EndpointSubject
from l4cli.text import load_tokenizer

SAYS = " 7391,num"  # no byte twice
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """The address of a running server, and the name of its model."""
    for name in ("fastapi", "uvicorn", "openai", "accelerate"):
        pytest.importorskip(name, reason=f"`transformers serve` needs {name}", exc_type=ImportError)
    folder = tmp_path_factory.mktemp("model") / "speaker"
    save_checkpoint(folder, says=SAYS, sees=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # The same preparation as in `conftest.py`, for a torchvision built for another torch.
    code = "import torchvision_schemas; torchvision_schemas.declare()\n"
    code += "from transformers.cli.transformers import main; main()"
    command = [sys.executable, "-c", code, "serve", str(folder), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--device", "cpu", "--dtype", "float32"]
    log = folder.parent / "log"
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=env)
    try:
        _await(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}/v1", str(folder)
    finally:
        process.terminate()
        process.wait(30)


def _await(url: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 600  # it imports a lot
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)


@pytest.mark.parametrize("api", list(Api))
def test_answers_arrive_and_tokens_are_counted_alike(server: tuple[str, str], api: Api) -> None:
    url, model = server
    options = EndpointOptions(
        request_url(url, api), model, api, num_jobs=2, timeout_s=60, max_tries=2
    )
    asking = EndpointSubject(options, tokenizer=load_tokenizer("bytes"), max_tokens=5000)
    question = Question("\nWhat is the number? The number is", (SAYS,))
    sample = Sample("single", ("The number is 7391. " * 5,), (question,) * 3)
    answers = asking.ask(sample)
    assert [answer.strip() for answer in answers] == [SAYS.strip()] * 3
    assert [question.score(answer) for answer in answers] == [1.0] * 3
    prompt = len(sample.text) + len(question.prompt)
    used = asking.report()["num_tokens_used"] / 3
    # A byte is a token; around it stand BOS, the chat format, and the end of the answer.
    assert prompt + len(SAYS) <= used <= prompt + len(SAYS) + 40


def test_its_refusals_are_passed_on(server: tuple[str, str]) -> None:
    url, _ = server
    options = EndpointOptions(request_url(url, Api.chat), "another", max_tries=2, timeout_s=60)
    sample = Sample("single", ("text",), (Question("question?", ("answer",)),))
    with pytest.raises(L4Error, match="the server answers 4"):
        EndpointSubject(options).ask(sample)
