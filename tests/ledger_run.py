"""One run in a process of its own: the whole context is generated, then its ledger is printed as JSON.

python -m tests.ledger_run BUNDLE OPTIONS: OPTIONS are fields of EngineOptions as JSON.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from edge.engine import Engine, open_engine
from edge.plan import EngineOptions
from edge.sampler import SamplingParams
from edge.speculation.speculator import Choice, Pace, Speculation

REPLY = 3  # tokens; a prompt has the rest of the context


class Always:
    """A pace that does not wait for measurements: CPM.cu's tree of 12 nodes on two levels, wherever it fits."""

    def beside(self, sequences: int) -> Always:
        return self

    def choose(self, most_rows: int, most_depth: int) -> Choice:
        return Choice(min(most_rows, 11), min(most_depth, 2), 1.0)

    def plain(self, seconds: float) -> None:
        pass

    def verified(self, *what: object) -> None:
        pass


def paced(speculation: Speculation, pace: Pace) -> Speculation:
    """Its first way of guessing alone, at this pace."""
    return replace(speculation, ways=(replace(speculation.ways[0], pace=pace),))


def generate_all(engine: Engine, reply: int = REPLY) -> int:
    """Fill the context with a random prompt and a short reply -> tokens of the reply."""
    prompt = np.random.default_rng(0).integers(5, engine.vocab_size, engine.max_context - reply).tolist()
    params = SamplingParams(temperature=0, max_tokens=reply, ignore_eos=True)
    return len(list(engine.generate(prompt, params)))


def main() -> None:
    """Run, and print the engine's lines and what the process had at most."""
    options = json.loads(sys.argv[2])
    if "offload" in options:
        options["offload"] = Path(options["offload"])
    engine = open_engine(Path(sys.argv[1]), EngineOptions(**options))
    if engine.speculation is not None:
        engine.speculation = paced(engine.speculation, Always())
    replied = generate_all(engine, REPLY if engine.speculation is None else 10 * REPLY)
    rows = engine.plan.run.rows
    engine.logits(list(range(5, 5 + rows)), last=rows)
    if engine.max_context > engine.plan.run.chunk:  # a thread that has had no task has no buffers yet
        for _ in range(20):
            attention = next(row for row in engine.ledger() if row.name == "attention")
            if attention.measured is None or attention.measured >= 0.97 * attention.planned:
                break
            engine.logits(list(range(5, 5 + engine.max_context % 4096)), last=1)
            if engine.speculation is not None:  # the draft has threads of its own
                generate_all(engine, 10 * REPLY)
    rows_of = [asdict(row) for row in engine.ledger()]
    print(json.dumps({"replied": replied, "context": engine.max_context, "total": engine.plan.total, "lines": rows_of}))


if __name__ == "__main__":
    main()
