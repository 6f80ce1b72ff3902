"""Which pages of the KV cache may be shared by content: found by a hash, taken only if the tokens are the same."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, eq=False)
class PublishedPage:
    """A complete page: its token ids, how they were computed (`salt`), and the page before it in the sequence."""

    page: int
    key: bytes
    parent: PublishedPage | None
    ids: bytes
    salt: bytes


def page_key(parent: bytes, ids: bytes, salt: bytes) -> bytes:
    """Hash of a page and, through its parent's, of all pages before it; both texts are of a fixed length."""
    return hashlib.blake2b(parent + ids + salt, digest_size=16).digest()


def pack_ids(tokens: Sequence[int]) -> bytes:
    """Token ids as bytes that are the same for the same ids only."""
    return array("i", tokens).tobytes()


class PublishedPages:
    """A forest: every published page is at its key, and its parent is published as long as it is itself."""

    def __init__(self) -> None:
        self._by_key: dict[bytes, PublishedPage] = {}
        self._by_page: dict[int, PublishedPage] = {}

    def __contains__(self, page: int) -> bool:
        return page in self._by_page

    def __getitem__(self, page: int) -> PublishedPage:
        return self._by_page[page]

    def find(self, parent: PublishedPage | None, ids: bytes, salt: bytes) -> PublishedPage | None:
        """The page with these tokens after `parent`. A hash alone is not believed: another page's would be wrong."""
        found = self._by_key.get(_key(parent, ids, salt))
        is_it = found is not None and found.parent is parent and found.ids == ids and found.salt == salt
        return found if is_it else None

    def add(self, page: int, parent: PublishedPage | None, ids: bytes, salt: bytes) -> bool:
        """Publish a page; False if its key is taken by another one, which then stays the only one."""
        key = _key(parent, ids, salt)
        if key in self._by_key:
            return False
        self._by_key[key] = self._by_page[page] = PublishedPage(page, key, parent, ids, salt)
        return True

    def remove(self, page: int) -> None:
        """It can no longer be found. No published page may have it as its parent."""
        del self._by_key[self._by_page.pop(page).key]


def _key(parent: PublishedPage | None, ids: bytes, salt: bytes) -> bytes:
    return page_key(bytes(16) if parent is None else parent.key, ids, salt)
