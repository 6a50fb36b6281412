"""The light tiers: rows with the same bytes, and rows whose perceptual hashes differ in few bits."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from .components import Forest, Pairs, joined
from .rows import Rows


def exact_pairs(rows: Rows) -> Pairs:
    """Connect the rows with the same bytes."""
    codes = rows.table["sha256"].combine_chunks().dictionary_encode().indices.fill_null(-1).to_numpy()
    return _star(rows, np.flatnonzero(codes >= 0), codes, 1.0)[0]


def perceptual_pairs(rows: Rows, distance: int) -> Pairs:
    """Connect the rows whose hashes differ in at most `distance` bits; `near` is minus the number of bits."""
    hashes = rows.table["phash"].fill_null(0).to_numpy()
    there = np.flatnonzero(rows.table["phash"].is_valid().to_numpy())
    same, first = _star(rows, there, hashes, 0.0)
    if not distance:
        return same
    # One row represents all with the same hash.
    masks = hamming_masks(max(1, len(there)), distance)
    i, j, bits = hamming_pairs(hashes[first], masks, distance, first >= rows.ours)
    return joined([same, (first[i], first[j], -bits.astype(np.float32))])


def _star(rows: Rows, there: np.ndarray, keys: np.ndarray, near: float) -> tuple[Pairs, np.ndarray]:
    """Connect rows with equal keys to one of them, preferably of the reference; also returns these."""
    order = there[np.lexsort((rows.ids[there], there < rows.ours, keys[there]))]
    new = np.diff(keys[order], prepend=~keys[order[:1]]) != 0
    first = order[new]
    centre = first[np.cumsum(new) - 1]
    edge = (order != centre) & (order < rows.ours)
    return (order[edge], centre[edge], np.full(int(edge.sum()), near, np.float32)), first


def hamming_masks(n: int, distance: int) -> list[int]:
    """Choose the bits that define buckets of hashes, such that no pair within a distance is missed.

    The 64 bits are cut into b blocks. Two hashes that differ in at most k bits agree in at least b - k blocks, so each
    choice of b - k blocks gets a table whose buckets hold the hashes that agree there (Manku, Jain and Das Sarma 2007,
    "Detecting near-duplicates for web crawling"; b = k + 1 is the pigeonhole principle). There are C(b, k) tables, with
    about n / 2^(64 (b - k) / b) hashes per bucket; b minimises the total cost.
    """
    best: tuple[float, list[int]] | None = None
    for blocks in range(distance + 1, distance + 4):
        edges = [round(i * 64 / blocks) for i in range(blocks + 1)]
        block = [((1 << b) - 1) ^ ((1 << a) - 1) for a, b in itertools.pairwise(edges)]
        masks = [sum(chosen) for chosen in itertools.combinations(block, blocks - distance)]
        bits = min(mask.bit_count() for mask in masks)
        # Sorting a row into a table costs about as much as a hundred comparisons.
        cost = len(masks) * n * (200 + n / 2 / 2.0**bits)
        if best is None or cost < best[0]:
            best = cost, masks
    assert best is not None
    return best[1]


def hamming_pairs(
    hashes: np.ndarray, masks: Sequence[int], distance: int, reference: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find the pairs of hashes that differ in at most `distance` bits, except pairs within the reference.

    Returns i, j and the number of bits. A pair that shares buckets of several tables is found in the first of them.
    If there are n pairs or more, a `Forest` thins them out.
    """
    bits, forest = np.array(masks, np.uint64), Forest(len(hashes))
    for number, mask in enumerate(bits):
        order = np.lexsort((hashes, hashes & mask))
        value, ours = hashes[order], ~reference[order]
        key = value & mask
        left = np.arange(len(order))
        # Compare row r with row r + step, for step 1, 2, …, as long as any two of them share a bucket.
        for step in range(1, len(order)):
            left = left[left + step < len(order)]
            left = left[key[left] == key[left + step]]
            if not len(left):
                break
            differing = value[left] ^ value[left + step]
            count = np.bitwise_count(differing)
            hit = (count <= distance) & (ours[left] | ours[left + step])
            at, differing, count = left[hit], differing[hit], count[hit]
            first = np.ones(len(at), bool)
            for earlier in bits[:number]:
                first &= (differing & earlier) != 0
            forest.add(order[at[first]], order[at[first] + step], -count[first].astype(np.float32))
    i, j, negative = forest.pairs()
    return i, j, (-negative).astype(np.int64)
