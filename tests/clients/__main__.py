"""Other people's clients against `edge serve` with a tiny model, each as its users start it.

    python -m tests.clients --python .venv/clients/bin/python      # `make test-clients`

Each client's line says what was checked. What the server answered is compared with the engine in this process. Exit
code 1 if a client fails. Their packages (requirements.txt) are heavy, so they are in an environment of their own.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from bench.serving_client import server
from build_engine.checkpoint import open_checkpoint
from build_engine.export import ExportOptions, export_bundle
from build_engine.formats import WeightFormat
from edge.cli.generate import load_tokenizer
from edge.engine import Engine, open_engine
from edge.plan import EngineOptions
from edge.sampler import SamplingParams
from tests.synthetic import tiny_config, write_hf_checkpoint

HERE = Path(__file__).parent
KEY = "a key of theirs"
MODEL = "tiny"
PROMPT = "The quick brown"
MESSAGES = [{"role": "system", "content": "You watch."}, {"role": "user", "content": "The northern wind"}]
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


@dataclass(frozen=True)
class Place:
    """Where a client finds what it needs. python: the one with the clients' packages. folder: for its own files."""

    python: Path
    url: str
    bundle: Path
    folder: Path
    engine: Engine

    def run(self, command: list[str], *, text: str = "", cwd: Path | None = None, **variables: str) -> str:
        """What a client prints; AssertionError with the end of its complaint if it fails."""
        own = {"LLM_USER_PATH": str(self.folder), "HF_HOME": str(self.folder), "HOME": str(self.folder)}
        done = subprocess.run(
            [str(self.python.parent / command[0]), *command[1:]],
            input=text.encode(),
            capture_output=True,
            cwd=cwd or self.folder,
            env={**os.environ, **OFFLINE, **own, **variables, "PYTHONUTF8": "1"},
        )
        assert done.returncode == 0, done.stderr.decode(errors="replace")[-2000:]
        return done.stdout.decode()

    def reply(self, ids: list[int], tokens: int, *, ignore_eos: bool = False) -> str:
        """The engine's own greedy reply."""
        params = SamplingParams(max_tokens=tokens, ignore_eos=ignore_eos)
        events = list(self.engine.generate(ids, params))
        return load_tokenizer(self.engine).decode([event.token_id for event in events])


SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["fox", "dog"]}, "count": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["kind", "count"],
    "additionalProperties": False,
}


def check_llm(place: Place) -> str:
    """Simon Willison's `llm`, told of the server by extra-openai-models.yaml."""
    tokenizer = load_tokenizer(place.engine)
    common = f"model_name: {MODEL}\n  api_base: {place.url}\n  api_key_name: edge"
    chat = f"- model_id: edge\n  {common}\n  supports_schema: true\n  supports_tools: true\n"
    (place.folder / "extra-openai-models.yaml").write_text(
        f"{chat}- model_id: edge-text\n  {common}\n  completion: true\n"
    )
    place.run(["llm", "keys", "set", "edge", "--value", KEY])
    assert "edge-text" in place.run(["llm", "models", "list"])
    options = ["-o", "temperature", "0", "-o", "max_tokens", "20"]
    system, question = (message["content"] for message in MESSAGES)
    first = place.reply(tokenizer.encode_chat(MESSAGES), 20)
    for streaming in ([], ["--no-stream"]):
        asked = ["llm", "-m", "edge", *options, *streaming, "-s", system, question]
        assert place.run(asked) == f"{first}\n"
    history = [*MESSAGES, {"role": "assistant", "content": first}, {"role": "user", "content": "and then?"}]
    following = place.reply(tokenizer.encode_chat(history), 20)
    assert place.run(["llm", "-c", *options, "and then?"]) == f"{following}\n"
    found = json.loads(place.run(["llm", "-m", "edge", "-o", "temperature", "1", "--schema", json.dumps(SCHEMA), "x"]))
    assert set(found) == {"kind", "count"} and found["kind"] in ("fox", "dog")
    tool = "def water_level(river: str) -> str:\n    'How high a river is.'\n    return '3 m'\n"
    place.run(["llm", "-m", "edge", *options, "--functions", tool, question])
    completed = place.reply(tokenizer.encode(PROMPT, add_bos=True), 20)
    assert place.run(["llm", "-m", "edge-text", *options, PROMPT]) == f"{completed}\n"
    return "chat streamed and whole, a conversation, a schema, tools offered, completions, a key"


def check_langchain(place: Place) -> str:
    """langchain-openai: see with_langchain.py."""
    tokenizer = load_tokenizer(place.engine)
    # A random model thinks for long before it calls anything: its bias against h keeps it from <think>.
    bias = {str(token): -100 for text, token in tokenizer.model.get_vocab().items() if "h" in text}
    facts = {
        "url": place.url,
        "key": KEY,
        "model": MODEL,
        "messages": MESSAGES,
        "prompt": PROMPT,
        "bias": bias,
        "chat": place.reply(tokenizer.encode_chat(MESSAGES), 24, ignore_eos=True),
        "completion": place.reply(tokenizer.encode(PROMPT, add_bos=True), 24, ignore_eos=True),
    }
    place.run(["python", str(HERE / "with_langchain.py")], text=json.dumps(facts))
    return "invoke, stream, ainvoke, batch, log-probabilities, a tool and its result, structured output in two ways"


def check_lm_eval(place: Place) -> str:
    """EleutherAI's harness: log-probabilities of choices, and replies, of the tasks in tasks/."""
    arguments = f"model={MODEL},base_url={place.url}/completions,tokenizer={place.bundle},tokenizer_backend=huggingface"
    command = ["lm_eval", "run", "--model", "local-completions", "--include_path", ".", "--log_samples"]
    command += ["--model_args", f"{arguments},eos_string=<|im_end|>,num_concurrent=2,max_retries=1,max_length=2048"]
    command += ["--tasks", "edge_choice,edge_continue", "--batch_size", "2", "--output_path", str(place.folder)]
    place.run(command, cwd=HERE / "tasks", OPENAI_API_KEY=KEY)
    choices, greedy = _samples(place, "edge_choice"), 0
    for sample in choices:
        for request, response in zip(sample["arguments"].values(), sample["resps"], strict=True):
            total, is_greedy = _scored(place, request["arg_0"], request["arg_1"])
            (found, said_greedy) = response[0]
            assert abs(float(found) - total) < 1e-3 * max(1, abs(total)), (request, found, total)
            assert said_greedy == str(is_greedy), (request, response)
            greedy += is_greedy
    replies = _samples(place, "edge_continue")
    for sample in replies:
        (request,) = sample["arguments"].values()
        ids = load_tokenizer(place.engine).encode(request["arg_0"], add_bos=False)
        wanted = place.reply(ids, 24).split("fox")[0].split("\n")[0]
        assert sample["resps"] == [[wanted]], (sample["resps"], wanted)
    scored = sum(len(sample["resps"]) for sample in choices)
    return f"{scored} log-likelihoods ({greedy} greedy) and {len(replies)} replies are the engine's own"


def _samples(place: Place, task: str) -> list[dict[str, Any]]:
    (path,) = place.folder.rglob(f"samples_{task}_*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def _scored(place: Place, context: str, continuation: str) -> tuple[float, bool]:
    """The log-probability of a continuation by the engine, and whether it is what the engine would say."""
    tokenizer = load_tokenizer(place.engine)
    ids, start = tokenizer.encode(context + continuation, add_bos=False), len(tokenizer.encode(context, add_bos=False))
    logits = place.engine.logits(ids, len(ids)).astype(np.float64)[start - 1 : -1]
    targets = ids[start:]
    norms = logits.max(1) + np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1))
    chosen = logits[np.arange(len(targets)), targets]
    return math.fsum(chosen - norms), bool((logits.argmax(1) == targets).all())


CLIENTS: dict[str, Callable[[Place], str]] = {
    "llm": check_llm,
    "langchain-openai": check_langchain,
    "lm-eval": check_lm_eval,
}


def main(
    python: Annotated[Path, typer.Option(help="The Python that has the clients' packages.")],
    only: Annotated[list[str] | None, typer.Option(help="Of these clients.")] = None,
) -> None:
    """Check each client; exit code 1 if one fails."""
    failed = False
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_hf_checkpoint(folder / "checkpoint", tiny_config(tie_word_embeddings=False), tokenizer=True)
        exact = ExportOptions(weights=WeightFormat("exact"))
        bundle = export_bundle(open_checkpoint(folder / "checkpoint"), folder / "bundle", exact)
        engine = open_engine(bundle, EngineOptions(context=2048, chunk=256, threads=2, prefix_cache=False))
        options = ("--threads", 2, "--context", 2048, "--api-key", KEY, "--model-name", MODEL)
        with server(bundle, *options) as (port, _):
            for client in only or CLIENTS:
                own = folder / client
                own.mkdir()
                try:
                    place = Place(python.absolute(), f"http://127.0.0.1:{port}/v1", bundle, own, engine)
                    print(f"ok      {client}: {CLIENTS[client](place)}", flush=True)
                except AssertionError as error:
                    failed = True
                    print(f"FAILED  {client}: {error}", flush=True)
    raise typer.Exit(failed)


if __name__ == "__main__":
    typer.run(main)
