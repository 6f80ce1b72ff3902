"""Whose turn it is: clients take turns, each client's requests come in order, and who was interrupted comes first."""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Iterator

from edge.serving.request import Ticket


class FairQueue:
    """Tickets that wait. A client with many requests delays another's by one request a turn, not by all of them."""

    def __init__(self) -> None:
        self._clients: dict[str, deque[Ticket]] = {}  # in the order of their turns; none is empty
        self._interrupted: list[Ticket] = []

    def __len__(self) -> int:
        return len(self._interrupted) + sum(map(len, self._clients.values()))

    def __iter__(self) -> Iterator[Ticket]:
        yield from self._interrupted
        for tickets in self._clients.values():
            yield from tickets

    def add(self, ticket: Ticket) -> None:
        """Behind all others of its client."""
        self._clients.setdefault(ticket.request.client, deque()).append(ticket)

    def interrupt(self, ticket: Ticket) -> None:
        """One that had been admitted before: it comes before all that have not, the oldest first."""
        insort(self._interrupted, ticket, key=lambda other: other.number)

    def head(self) -> Ticket | None:
        """The next one; it stays the next until it is removed. Those whose readers do not read are passed over."""
        ready = (ticket for ticket in self._interrupted if not ticket.outbox.full)
        return next(ready, None) or next((tickets[0] for tickets in self._clients.values()), None)

    def start(self, ticket: Ticket) -> None:
        """The head has been admitted: the next client's turn begins."""
        client = ticket.request.client
        is_turn = ticket not in self._interrupted
        self.remove(ticket)
        if is_turn and client in self._clients:
            self._clients[client] = self._clients.pop(client)

    def remove(self, ticket: Ticket) -> None:
        """Take out one that waits no longer; whose turn it is stays so."""
        if ticket in self._interrupted:
            self._interrupted.remove(ticket)
            return
        tickets = self._clients[ticket.request.client]
        tickets.remove(ticket)
        if not tickets:
            del self._clients[ticket.request.client]
