"""A sentencepiece model file -> what it says of itself, which its library does not tell: kinds of
pieces, kind of model, what is done to a text before it is cut.

in: the bytes of tokenizer.model. Source of the field numbers: sentencepiece_model.proto
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from sentencepiece import SentencePieceProcessor


class PieceKind(IntEnum):
    """ModelProto.SentencePiece.Type"""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class PieceModelKind(IntEnum):
    """TrainerSpec.ModelType"""

    UNIGRAM = 1
    BPE = 2
    WORD = 3
    CHAR = 4


@dataclass(frozen=True)
class Piece:
    """A row of the vocabulary; its id is its place."""

    text: str
    score: float
    kind: PieceKind


@dataclass(frozen=True)
class PieceModel:
    """A whole tokenizer.model."""

    pieces: list[Piece]
    kind: PieceModelKind
    has_charsmap: bool  # characters are replaced first, as nmt_nfkc does
    has_dummy_prefix: bool  # a blank is put in front
    has_blank_behind: bool  # ... or rather behind: treat_whitespace_as_suffix
    is_trimmed: bool  # blanks at the ends go, runs of them become one
    unk_id: int
    bos_id: int
    eos_id: int

    def ids_of(self, *kinds: PieceKind) -> list[int]:
        """The ids of all pieces of these kinds."""
        return [i for i, piece in enumerate(self.pieces) if piece.kind in kinds]


def _varint(message: bytes, i: int) -> tuple[int, int]:
    """(a number of 7 bits a byte that starts at i, where it ends)"""
    value = 0
    shift = 0
    while True:
        byte = message[i]
        i += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, i


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value) of a protobuf message: a number, or bytes for everything else."""
    i = 0
    while i < len(message):
        key, i = _varint(message, i)
        wire_type = key & 7
        if wire_type == 0:
            value, i = _varint(message, i)
            yield key >> 3, value
            continue
        if wire_type == 2:
            size, i = _varint(message, i)
        else:
            # 1: a double, 5: a float
            size = {1: 8, 5: 4}[wire_type]
        yield key >> 3, message[i : i + size]
        i += size


def _read_piece(message: bytes) -> Piece:
    values = dict(_fields(message))
    (score,) = struct.unpack("<f", values.get(2, bytes(4)))
    return Piece(values[1].decode(), score, PieceKind(values.get(3, PieceKind.NORMAL)))


def read_pieces(sp: SentencePieceProcessor) -> PieceModel:
    """What a loaded sentencepiece model says of itself."""
    pieces = []
    trainer = {}
    normalizer = {}
    for number, value in _fields(sp.serialized_model_proto()):
        if number == 1:
            pieces.append(_read_piece(value))
        elif number == 2:
            trainer = dict(_fields(value))
        elif number == 3:
            normalizer = dict(_fields(value))
    return PieceModel(
        pieces,
        kind=PieceModelKind(trainer.get(3, PieceModelKind.UNIGRAM)),
        has_charsmap=bool(normalizer.get(2)),
        has_dummy_prefix=bool(normalizer.get(3, True)),
        has_blank_behind=bool(trainer.get(24, False)),
        is_trimmed=bool(normalizer.get(4, True)),
        unk_id=sp.unk_id(),
        bos_id=sp.bos_id(),
        eos_id=sp.eos_id(),
    )
