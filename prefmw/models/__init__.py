"""Local chat models: loading them, their chat templates, and their tokens as text."""

from prefmw.models.chat_model import ChatModel, ModelSpec, check_transformers, load_chat_model
from prefmw.models.detokenize import Detokenizer
from prefmw.models.templating import ChatTemplate

__all__ = ["ChatModel", "ChatTemplate", "Detokenizer", "ModelSpec", "check_transformers", "load_chat_model"]
