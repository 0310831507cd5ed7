"""Which document of a group stays, and what is removed."""

from __future__ import annotations

import dataclasses

import numpy as np

from megalith.curation.dedup.links import Groups
from megalith.curation.dedup.store import Store

STAYS, EXACT, NEAR = 0, 1, 2  # verdicts


@dataclasses.dataclass
class Verdicts:
    """verdict: uint8 [documents]. kept: int64, the document that stays of its group. similarity: float32, with that."""

    verdict: np.ndarray
    kept: np.ndarray
    similarity: np.ndarray


def choose(
    store: Store,
    groups: Groups,
    indexed: int,
    rule: str,
    source: np.ndarray,
    *,
    kind: str,
    threshold: float,
    direct: bool,
) -> Verdicts:
    """One document of each group stays.

    indexed: the first so many documents are those of an index, which stay before all others and are never removed.
    rule: first, longest, or source. source: int [documents], the place of its source in the list of the best ones.
    direct: what is not itself similar to the document that stays (a link of links) stays too.
    """
    number = len(store)
    label = groups.label
    size = np.bincount(label, minlength=number)
    members = np.flatnonzero(size[label] > 1)
    kept = np.arange(number)
    preference = {"first": members, "longest": -store.lengths[members].astype(np.int64), "source": source[members]}[
        rule
    ]
    digests = store.digests[members]
    # Ties of length or source go by content, so that the order of the input does not matter; of copies the first stays.
    tie = (members, digests["low"], digests["high"]) if rule == "longest" else (members,)
    order = np.lexsort((*tie, preference, members >= indexed, label[members]))
    in_order = members[order]
    if len(in_order):
        first = np.concatenate([[True], label[in_order][1:] != label[in_order][:-1]])
        kept[in_order] = in_order[first][np.cumsum(first) - 1]
    verdict = np.zeros(number, np.uint8)
    similarity = np.ones(number, np.float32)
    gone = np.flatnonzero((kept != np.arange(number)) & (np.arange(number) >= indexed))
    equal = store.digests[gone] == store.digests[kept[gone]]
    verdict[gone[equal]] = EXACT
    near = gone[~equal]
    if len(near):
        similarity[near] = store.similarity(near, kept[near], kind)
        verdict[near] = NEAR
        if direct:
            _keep_distant(
                store, near[similarity[near] < threshold], members[members < indexed], verdict, kept, similarity
            )
    return Verdicts(verdict, kept, similarity)


def _keep_distant(store: Store, distant, of_index, verdict, kept, similarity) -> None:
    """Documents that are not similar to the one that stays stay too, but of their exact copies only the first.

    distant, of_index: int, rising; documents of the index among them were there before.
    """
    pool = np.concatenate([of_index, distant])
    _, first, inverse = np.unique(store.digests[pool], return_index=True, return_inverse=True)
    twin = pool[first[inverse]][len(of_index) :]
    copies = twin != distant
    verdict[distant] = np.where(copies, EXACT, STAYS)
    kept[distant] = twin
    similarity[distant] = 1.0
