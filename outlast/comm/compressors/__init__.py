"""Compressors: a tensor to a payload of bytes and back."""

from outlast.comm.compressors.base import Compressor, DenseMessage, Message, Shape, Slots, SparseMessage
from outlast.comm.compressors.compose import Gear, Sum
from outlast.comm.compressors.dense import Dense
from outlast.comm.compressors.lowrank import LowRank
from outlast.comm.compressors.make import make_compressor
from outlast.comm.compressors.quantise import Int4, Int8, Natural, Sign
from outlast.comm.compressors.randk import RandK
from outlast.comm.compressors.topk import BlockTopK, TopK
from outlast.comm.config import COMPRESSORS, VALUES

__all__ = [
    "COMPRESSORS",
    "VALUES",
    "BlockTopK",
    "Compressor",
    "Dense",
    "DenseMessage",
    "Gear",
    "Int4",
    "Int8",
    "LowRank",
    "Message",
    "Natural",
    "RandK",
    "Shape",
    "Sign",
    "Slots",
    "SparseMessage",
    "Sum",
    "TopK",
    "make_compressor",
]
