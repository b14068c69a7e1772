"""Adapters: prefmw where other frameworks expect a chat model. One file a framework."""
