"""Decoding: token ids in, token ids out. Knows views and combiners; knows no text, no template, no user, no method."""

from prefmw.decoding.engine import Engine
from prefmw.decoding.generation import FinishReason, Generation
from prefmw.decoding.linears import Adapter
from prefmw.decoding.request import Request, Sampling, View

__all__ = ["Adapter", "Engine", "FinishReason", "Generation", "Request", "Sampling", "View"]
