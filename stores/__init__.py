"""Stores: preferences and conversations in SQL. Knows SQLAlchemy and the core's preferences; knows no model."""

from prefmw.stores.sql import SQLPreferenceStore

__all__ = ["SQLPreferenceStore"]
