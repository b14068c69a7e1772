"""What a user likes: dimensions, weights, profiles, principle text. Knows no model and no database."""

from prefmw.preferences.dimensions import Dimension, Dimensions, default_dimensions, parse_dimensions
from prefmw.preferences.methods import AUTO, METHODS, STRENGTHS, check_method, check_strength
from prefmw.preferences.principle import principle_text
from prefmw.preferences.profile import (
    Message,
    Profile,
    Revision,
    Source,
    Stated,
    Weight,
    check_key,
    check_persona,
    check_reason,
    check_stated,
    check_text,
    check_user_id,
)
from prefmw.preferences.store import (
    UNCHANGED,
    Conversation,
    ConversationEntry,
    Feedback,
    PreferenceStore,
    Recorded,
    RecordedFeedback,
    RecordedTurn,
    Turn,
)

__all__ = [
    "AUTO",
    "METHODS",
    "STRENGTHS",
    "UNCHANGED",
    "Conversation",
    "ConversationEntry",
    "Dimension",
    "Dimensions",
    "Feedback",
    "Message",
    "PreferenceStore",
    "Profile",
    "Recorded",
    "RecordedFeedback",
    "RecordedTurn",
    "Revision",
    "Source",
    "Stated",
    "Turn",
    "Weight",
    "check_key",
    "check_method",
    "check_persona",
    "check_reason",
    "check_stated",
    "check_strength",
    "check_text",
    "check_user_id",
    "default_dimensions",
    "parse_dimensions",
    "principle_text",
]
