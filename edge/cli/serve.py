"""`edge serve`: an OpenAI-compatible server."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from edge.cli import options as opt
from edge.cli.generate import load_tokenizer
from edge.errors import UsageError

if TYPE_CHECKING:
    from edge.server.service import ServerSettings

_ROWS = 64  # of logits in a step: of trees, and of prompts whose log-probabilities are wanted

Host = Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is all of them.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one, which the log names.")]
ModelName = Annotated[str | None, typer.Option(help="What clients call it. Default: the bundle's name.")]
ApiKey = Annotated[
    str | None, typer.Option(help="Clients must send it. Default: the environment's EDGE_API_KEY, else none.")
]
Queue = Annotated[int, typer.Option(min=0, max=2**20, help="Requests that may wait; more get 429.")]
Timeout = Annotated[float, typer.Option(min=1, help="Seconds a request may take, its wait included.")]
MaxTokens = Annotated[int | None, typer.Option(min=1, help="Longest reply. Default: what the context holds.")]
MaxBody = Annotated[str, typer.Option(metavar="SIZE", help="Largest body of a request.")]
Drain = Annotated[float, typer.Option(min=0, help="Seconds that replies may still take after SIGTERM.")]
LogPrompts = Annotated[bool, typer.Option("--log-prompts", help="Write prompts to the log, too.")]


def serve(
    bundle: opt.BundlePath,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    model_name: ModelName = None,
    api_key: ApiKey = None,
    sequences: opt.Sequences = 8,
    queue: Queue = 64,
    timeout: Timeout = 600,
    max_tokens: MaxTokens = None,
    max_body: MaxBody = "8MiB",
    drain: Drain = 30,
    log_prompts: LogPrompts = False,
    context: opt.Context = None,
    memory: opt.Memory = None,
    threads: opt.Threads = None,
    chunk: opt.Chunk = 512,
    attention: opt.Attention = None,
    sparse: opt.Sparse = None,
    offload: opt.Offload = None,
    speculative: opt.Speculative = None,
) -> None:
    """Serve a model to many clients by OpenAI's protocol: chat, completions, streaming, JSON schemas, metrics.

    --context is what one conversation may hold; all of them share the KV pages for which --memory has room. The log
    goes to standard error, a line of JSON for each request.

    Examples:

      edge serve bundle

      edge serve bundle --host 0.0.0.0 --api-key "$KEY" --sequences 16 --memory 6GiB

      edge serve bundle --speculative lookup --port 0

      curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json'
      -d '{"messages": [{"role": "user", "content": "Hello"}]}'
    """
    settings = _settings(model_name, api_key, timeout, drain, max_body, max_tokens, log_prompts)
    options = (context, memory, threads, chunk, attention, sparse, offload, speculative)
    _serve(bundle, settings, host, port, sequences, queue, options)


def _settings(
    model: str | None,
    api_key: str | None,
    timeout: float,
    drain: float,
    max_body: str,
    max_tokens: int | None,
    log_prompts: bool,
) -> ServerSettings:
    try:
        from edge.server.service import ServerSettings
    except ModuleNotFoundError as error:
        raise UsageError(f"`edge serve` needs {error.name}; run: pip install 'minicpm-edge[serve]'") from None
    key = api_key or os.environ.get("EDGE_API_KEY") or None
    return ServerSettings(model, key, timeout, drain, opt.parse_size(max_body), max_tokens, log_prompts)


def _serve(
    bundle: opt.BundlePath, settings: ServerSettings, host: str, port: int, sequences: int, queue: int, options: tuple
) -> None:
    from edge.server.run import listen, log_to_stderr
    from edge.server.run import serve as run_server
    from edge.server.service import Service
    from edge.serving.batcher import BatchLimits

    listening = listen(host, port)  # before the model is loaded, which takes longer
    engine = opt.load_engine(bundle, *options, sequences=sequences, logits_rows=max(_ROWS, 2 * sequences))
    service = Service(engine, load_tokenizer(engine), BatchLimits(sequences, queue), settings)
    log_to_stderr()
    run_server(service, listening, host)
