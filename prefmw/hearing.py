"""What people say of themselves written into their profiles: inferred from a persona, learned from a message."""

from __future__ import annotations

from prefmw.preferences import Dimensions, PreferenceStore, Profile, Source, Stated
from prefmw.preferences.inference import STRICT, Inference, Inferer
from prefmw.preferences.profile import MAX_PERSONA


def infer_persona(store: PreferenceStore, profile: Profile, inferer: Inferer) -> Profile:
    """The profile with its inferred layers read anew from its persona, unless they were read from that already.

    Raises:
        ConflictError: it changed meanwhile.
        MissingExtraError: there is no embedder.
    """
    if profile.inferred_from == inferer.key(profile.persona):
        return profile
    return store_inference(store, profile, inferer, inferer.infer(profile.persona))


def store_inference(store: PreferenceStore, profile: Profile, inferer: Inferer, found: Inference) -> Profile:
    """The profile with what its persona was ``found`` to state as its inferred layers.

    Raises:
        ConflictError: it changed meanwhile.
    """
    unread = {
        key: Stated(weight.value, weight.confidence, weight.evidence)
        for key, weight in profile.layer(Source.inferred).items()
        if key not in inferer.dimensions  # retired, say: what is stored on it is kept
    }
    return store.write_inferred(
        profile.user_id,
        {**unread, **{dimension: one.stated for dimension, one in found.weights.items()}},
        inferred_from=inferer.key(profile.persona),
        actor="prefmw",
        reason="inferred from the persona",
        expected_revision=profile.revision,
    )


def learn_from(
    store: PreferenceStore, profile: Profile, message: str, inferer: Inferer, dimensions: Dimensions
) -> tuple[Profile, list[str]]:
    """The profile with the preferences that a user's own message states plainly, learned, and a line for each.

    Raises:
        ConflictError: it changed meanwhile.
        MissingExtraError: there is no embedder.
    """
    if len(message) > MAX_PERSONA:  # a document is no wish
        return profile, []
    heard = inferer.infer(message, threshold=STRICT).weights
    heard = {key: one for key, one in heard.items() if _is_news(profile, key, one.value)}
    if not heard:
        return profile, []
    profile = store.write_weights(
        profile.user_id,
        {key: Stated(one.value, abs(one.value), {"quote": one.clause}) for key, one in heard.items()},
        source=Source.learned,
        actor="prefmw",
        reason="said in a conversation",
        expected_revision=profile.revision,
    )
    undo = f"undo: prefmw prefs revert {profile.user_id} {profile.revision - 1}"
    return profile, [
        f'heard {key} {one.value:+.2f}, {dimensions[key].pole(one.value).name}, in "{one.clause}" ({undo})'
        for key, one in heard.items()
    ]


def _is_news(profile: Profile, dimension: str, value: float) -> bool:
    """Whether a weight says other than what was learned before."""
    before = profile.layer(Source.learned).get(dimension)
    return before is None or before.value * value < 0 or abs(before.value - value) > 0.2
