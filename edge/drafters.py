"""From what a user chose to an engine's speculation."""

from __future__ import annotations

from functools import partial

from edge.bundle import Bundle
from edge.errors import UsageError
from edge.memory.ledger import regions
from edge.plan import EngineOptions, Plan
from edge.speculation.acceptance import ChainAcceptance, TreeAcceptance
from edge.speculation.adaptive import Pace
from edge.speculation.eagle import EagleDrafter
from edge.speculation.speculator import LookupDrafter, Speculation, Way
from plugins import PAGE_TOKENS

MOST_DEPTH = 6  # of a tree that a draft model grows: each level is a step of the draft


def check_speculative(bundle: Bundle, speculative: str) -> None:
    """UsageError if this bundle cannot be decoded so."""
    if speculative not in ("off", "lookup", "eagle"):
        raise UsageError(f"unknown --speculative {speculative!r}; choose off, lookup or eagle")
    if speculative != "eagle":
        return
    if bundle.manifest.draft is None:
        raise UsageError(f"{bundle.path} has no draft model; export it again with --draft FOLDER, or choose lookup")
    if bundle.manifest.target != "onnxruntime":
        raise UsageError(
            f"{bundle.path} was exported for {bundle.manifest.target}, and draft models run on the CPU only as yet; "
            "choose --speculative lookup"
        )


def make_speculation(bundle: Bundle, options: EngineOptions, plan: Plan) -> Speculation | None:
    """What was checked, with its draft model; None for plain decoding."""
    if options.speculative == "off":
        return None
    if options.speculative == "lookup":
        return Speculation("lookup", (_lookup(shortest=2),))
    from edge.executors.draft import OnnxRuntimeDraft
    from edge.executors.ort_session import Reserved

    section = bundle.manifest.draft
    assert section is not None
    reserved = Reserved(*regions(plan.bytes("draft activations")), section.tree["top_k"])
    draft = OnnxRuntimeDraft(bundle, plan.num_pages, options.threads, reserved)
    top_k = section.tree["top_k"]
    reach = section.model.window * PAGE_TOKENS or plan.max_context
    drafter = partial(EagleDrafter, draft, top_k, reach + PAGE_TOKENS)
    ways = (Way(drafter, Pace(TreeAcceptance(MOST_DEPTH))), _lookup(shortest=3))
    return Speculation("eagle", ways, draft, top_k * (MOST_DEPTH - 1))


def _lookup(shortest: int) -> Way:
    pace = Pace(ChainAcceptance())
    return Way(partial(LookupDrafter, pace, shortest), pace)
