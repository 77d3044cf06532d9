"""Documents' tokens into rows of equal length without padding. Pure functions on arrays; calls nothing.

T = sequence length. A row has T + 1 tokens: the first T are inputs, the last T their targets.
"""

from collections.abc import Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray

IGNORED = -100  # the label that torch's cross-entropy leaves out; in a row it marks "no token here"

Tokens = NDArray[np.int64]


def join(documents: Sequence[Sequence[int]], end_of_text: int) -> Tokens:
    """One stream out of several documents, each followed by the end-of-text token.

    Args:
        documents: Token ids of each document.
        end_of_text: Id put after each of them.

    Returns:
        Shape (sum of lengths + number of documents,).
    """
    count = sum(map(len, documents)) + len(documents)
    closing = (end_of_text,)
    parts = chain.from_iterable(chain(document, closing) for document in documents)
    return np.fromiter(parts, dtype=np.int64, count=count)


def pack(stream: Tokens, sequence_length: int) -> tuple[Tokens, Tokens]:
    """Cut a stream into rows which overlap by one token: row k is `stream[k*T : k*T + T + 1]`.

    The overlap makes every token but the stream's first a target exactly once. What does not fill a row is
    returned to be put before the next documents.

    Args:
        stream: Shape (tokens,).
        sequence_length: T.

    Returns:
        The rows, shape (rows, T + 1), and the rest of the stream, which starts with the last row's last token.
    """
    rows = max(0, (len(stream) - 1) // sequence_length)
    if rows == 0:
        return np.empty((0, sequence_length + 1), dtype=np.int64), stream
    windows = np.lib.stride_tricks.sliding_window_view(stream, sequence_length + 1)
    return windows[::sequence_length][:rows].copy(), stream[rows * sequence_length :]


def pack_all(stream: Tokens, sequence_length: int) -> Tokens:
    """Like `pack`, but the rest becomes one more row, filled up with `IGNORED`.

    Args:
        stream: Shape (tokens,).
        sequence_length: T.

    Returns:
        Shape (ceil((tokens - 1) / T), T + 1).
    """
    rows, rest = pack(stream, sequence_length)
    if len(rest) < 2:  # a lone token has nothing to predict
        return rows
    last = np.full((1, sequence_length + 1), IGNORED, dtype=np.int64)
    last[0, : len(rest)] = rest
    return np.concatenate([rows, last])


def pad(documents: Sequence[Sequence[int]], sequence_length: int, end_of_text: int) -> Tokens:
    """The papers' rows: one for each document, cut off at T tokens, the end-of-text among them, or filled up.

    Args:
        documents: Token ids of each document.
        sequence_length: T.
        end_of_text: Id put after each of them.

    Returns:
        Shape (documents, T + 1): at most T tokens, then `IGNORED`, so that at most T - 1 are predicted, as where a
        model shifts T tokens against themselves.
    """
    rows = np.full((len(documents), sequence_length + 1), IGNORED, dtype=np.int64)
    for row, document in zip(rows, documents, strict=True):
        kept = document[: sequence_length - 1]
        row[: len(kept)] = kept
        row[len(kept)] = end_of_text
    return rows


def restarting_positions(tokens: Tokens, end_of_text: int) -> Tokens:
    """Positions that begin anew at each end-of-text, by which attention tells documents apart.

    The end-of-text before a document is its beginning: its first token is predicted from that alone.

    Args:
        tokens: Shape (B, T).
        end_of_text: The id.

    Returns:
        Shape (B, T), 0 at the first token of each row.
    """
    index = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    return index - np.maximum.accumulate(np.where(tokens == end_of_text, index, 0), axis=1)


def share_of_rank(rows: Tokens, rank: int, world_size: int) -> Tokens:
    """Every `world_size`-th row, filled up with rows of `IGNORED` to the same number on each rank.

    Args:
        rows: Shape (rows, ...), the same on each rank.
        rank: This process.
        world_size: Number of processes.

    Returns:
        Shape (ceil(rows / world_size), ...); over all ranks each row once.
    """
    own = rows[rank::world_size]
    missing = -(-len(rows) // world_size) - len(own)
    return np.concatenate([own, np.full((missing, *rows.shape[1:]), IGNORED, dtype=np.int64)])
