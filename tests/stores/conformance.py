"""What every preference store must do; a store's test class inherits this and provides the fixture ``store``."""

from __future__ import annotations

import json
import threading

import pytest

from prefmw.errors import (
    ConflictError,
    UnknownConversationError,
    UnknownUserError,
    UnreadablePersonError,
    UsageError,
    UserExistsError,
)
from prefmw.preferences import Feedback, Message, PreferenceStore, Source, Stated, ToolCall, Turn

PERSONA = "I'm a nurse on night shifts; keep it short — 夜勤 🛌"


def turn(user_id: str = "alice", conversation_id: str | None = None, **changes) -> Turn:
    values = {
        "user_id": user_id,
        "conversation_id": conversation_id,
        "system": "",
        "history": (),
        "prompt": "How do I fall asleep faster?",
        "text": "Keep the room dark.",
        "finish_reason": "stop",
        "plan": {"method": "linear", "weights": {"humor": 1.0}, "candidates": {"top_k": None}},
        "plan_hash": "0" * 64,
        "method": "linear",
        "strength": 2.0,
        "revision": 1,
        "model": "toy",
        "model_revision": "abc",
        "seed": 2**63 - 1,
        "token_ids": (1, 2, 3),
        "input_tokens": 12,
        "replaces": None,
    }
    return Turn(**{**values, **changes})


def effective(profile) -> dict[str, tuple[float, str]]:
    return {key: (weight.value, weight.source.name) for key, weight in profile.weights.items()}


T = "2026-01-01T00:00:00+00:00"
LIKE = {"kind": "like", "prompt": "q?", "chosen": "yes.", "rejected": "", "created_at": T}
VECTOR = {"kind": "persona", "model": "m", "content": "h", "created_at": T}


def a_whole_person(store, user_id: str) -> None:
    """Something in every table."""
    store.add_user(user_id, persona=f"{user_id}'s persona", method="linear", strengths={"linear": 3.0}, actor="test")
    store.write_weights(user_id, {"humor": Stated(0.5)}, source=Source.user, actor="test")
    store.write_inferred(user_id, {"humor": Stated(-0.5, 0.8, ["because"])}, inferred_from="k", actor="test")
    recorded = store.record(turn(user_id, text=f"said to {user_id}"))
    store.record(turn(user_id, recorded.conversation_id))
    store.record(turn(user_id))
    scores = {"humor": (1.0, 0.5)}
    store.add_feedback(Feedback(user_id, "choice", "q?", f"{user_id} chose", "other", scores, recorded.turn_id))
    store.put_vector(user_id, "persona", "minilm", "hash", [0.5, 1.5])


class StoreConformance:
    """The claims."""

    # Users

    def test_a_user_comes_back_as_added(self, store: PreferenceStore):
        store.add_user("alice", persona=PERSONA, method="linear", strengths={"linear": 3.0}, actor="test")
        profile = store.profile("alice")
        assert (profile.user_id, profile.persona, profile.method) == ("alice", PERSONA, "linear")
        assert (dict(profile.strengths), profile.revision, profile.weights) == ({"linear": 3.0}, 1, {})

    def test_a_taken_id_is_refused_and_the_first_user_stays(self, store):
        store.add_user("alice", persona="first", actor="test")
        with pytest.raises(UserExistsError):
            store.add_user("alice", persona="second", actor="test")
        assert store.profile("alice").persona == "first"

    def test_ids_that_differ_in_case_are_different_users(self, store):
        store.add_user("alice", persona="small", actor="test")
        store.add_user("Alice", persona="large", actor="test")
        assert store.profile("alice").persona == "small"

    @pytest.mark.parametrize(
        "user_id", ["", "  ", "a\nb", " alice", "x" * 300, "tab\there", "nul\0", "e\u0301", "\udc80"]
    )
    def test_an_id_that_is_none_is_refused(self, store, user_id):
        with pytest.raises(UsageError):
            store.add_user(user_id, actor="test")

    @pytest.mark.parametrize(
        "user_id", ["a", "alice@example.org", "名前", "with space", "'; DROP TABLE users; --", "x" * 128]
    )
    def test_an_odd_but_sound_id_is_taken(self, store, user_id):
        store.add_user(user_id, actor="test")
        assert [profile.user_id for profile in store.users()] == [user_id]

    @pytest.mark.parametrize("persona", ["x" * 1_000_000, "nul \0 inside", "\udcff"])
    def test_a_persona_that_no_store_holds_is_refused(self, store, persona):
        with pytest.raises(UsageError):
            store.add_user("alice", persona=persona, actor="test")
        assert list(store.users()) == []

    def test_users_come_in_order_each_with_their_own_weights(self, store):
        for name in ("carol", "alice", "bob"):
            store.add_user(name, actor="test")
        store.write_weights("bob", {"humor": Stated(1.0), "verbosity": Stated(-1.0)}, source=Source.user, actor="test")
        assert [(p.user_id, sorted(p.weights)) for p in store.users()] == [
            ("alice", []),
            ("bob", ["humor", "verbosity"]),
            ("carol", []),
        ]

    @pytest.mark.parametrize(
        "call",
        [
            lambda s: s.profile("nobody"),
            lambda s: s.edit_user("nobody", persona="x", actor="test"),
            lambda s: s.write_weights("nobody", {"humor": Stated(1.0)}, source=Source.user, actor="test"),
            lambda s: s.write_weights("nobody", {"humor": None}, source=Source.user, actor="test"),
            lambda s: s.revisions("nobody"),
            lambda s: s.record(turn("nobody")),
            lambda s: s.conversation("nobody", "latest"),
        ],
    )
    def test_an_unknown_user_is_an_error_everywhere(self, store, call):
        store.add_user("alice", actor="test")
        with pytest.raises(UnknownUserError, match="nobody"):
            call(store)

    # Editing and revisions

    def test_an_edit_changes_what_is_given_and_nothing_else(self, store):
        store.add_user("alice", persona=PERSONA, method="linear", strengths={"linear": 3.0}, actor="test")
        after = store.edit_user("alice", persona="new", actor="test")
        assert after == store.profile("alice")
        assert (after.persona, after.method, dict(after.strengths)) == ("new", "linear", {"linear": 3.0})
        assert store.edit_user("alice", method=None, actor="test").method is None

    def test_a_strength_is_set_for_its_method_and_the_others_keep_theirs(self, store):
        store.add_user("alice", strengths={"linear": 3.0}, actor="test")
        assert store.edit_user("alice", strengths={}, actor="test").strengths == {"linear": 3.0}
        assert store.edit_user("alice", strengths={"linear": 4.0}, actor="test").strengths == {"linear": 4.0}
        assert store.edit_user("alice", strengths={"linear": None}, actor="test").strengths == {}
        assert store.profile("alice").strengths == {}

    def test_every_change_makes_the_next_revision_with_who_when_why_and_what(self, store):
        store.add_user("alice", persona="a", actor="admin", reason="new here")
        store.write_weights("alice", {"humor": Stated(0.5)}, source=Source.user, actor="alice", reason="likes jokes")
        store.edit_user("alice", persona="b", actor="admin")
        store.write_weights("alice", {"humor": None}, source=Source.user, actor="alice")
        first, second, third, fourth = store.revisions("alice")
        assert [revision.number for revision in (first, second, third, fourth)] == [1, 2, 3, 4]
        assert (first.actor, first.reason, first.change) == ("admin", "new here", {"persona": ["", "a"]})
        assert second.change == {"weight.humor.user": [None, [0.5, 1.0]]}
        assert third.change == {"persona": ["a", "b"]}
        assert fourth.change == {"weight.humor.user": [[0.5, 1.0], None]}
        assert first.created_at <= fourth.created_at
        assert first.created_at.tzinfo is not None

    def test_a_change_of_nothing_makes_no_revision(self, store):
        store.add_user("alice", persona="a", actor="test")
        store.write_weights("alice", {"humor": Stated(0.5)}, source=Source.user, actor="test")
        before = store.profile("alice")
        store.edit_user("alice", persona="a", actor="test")
        store.write_weights("alice", {"humor": Stated(0.5)}, source=Source.user, actor="test")
        store.write_weights("alice", {"verbosity": None}, source=Source.user, actor="test")
        assert store.profile("alice") == before

    def test_a_change_of_an_outdated_profile_is_refused(self, store):
        store.add_user("alice", persona="a", actor="test")
        store.edit_user("alice", persona="b", actor="test", expected_revision=1)
        for change in (
            lambda: store.edit_user("alice", persona="c", actor="test", expected_revision=1),
            lambda: store.write_weights(
                "alice", {"humor": Stated(1.0)}, source=Source.user, actor="t", expected_revision=1
            ),
            lambda: store.write_weights("alice", {"humor": None}, source=Source.user, actor="t", expected_revision=1),
        ):
            with pytest.raises(ConflictError, match="revision 2"):
                change()
        assert store.profile("alice").persona == "b"

    @pytest.mark.parametrize(
        "change",
        [
            lambda s: s.write_weights("alice", {"humor": Stated(float("nan"))}, source=Source.user, actor="t"),
            lambda s: s.write_weights("alice", {"humor": Stated(1.1)}, source=Source.user, actor="t"),
            lambda s: s.write_weights("alice", {"humor": Stated(1.0, 2.0)}, source=Source.user, actor="t"),
            lambda s: s.write_weights("alice", {"x" * 65: Stated(1.0)}, source=Source.user, actor="t"),
            lambda s: s.write_weights("alice", {"a\nb": Stated(1.0)}, source=Source.user, actor="t"),
            lambda s: s.edit_user("alice", method="bogus", actor="t"),
            lambda s: s.edit_user("alice", strengths={"linear": 99.0}, actor="t"),
            lambda s: s.edit_user("alice", strengths={"none": 1.0}, actor="t"),
            lambda s: s.edit_user("alice", persona="x", actor="t", reason="\udcff"),
            lambda s: s.edit_user("\udcff", persona="x", actor="t"),
            lambda s: s.profile("\udcff"),
            lambda s: s.conversation("alice", "\udcff"),
        ],
    )
    def test_values_out_of_range_are_refused_and_nothing_changes(self, store, change):
        store.add_user("alice", actor="test")
        before = store.profile("alice")
        with pytest.raises(UsageError):
            change(store)
        assert store.profile("alice") == before

    # Weights in layers

    def test_some_layers_are_written_and_others_removed_in_one_revision(self, store):
        store.add_user("alice", actor="test")
        first = {"humor": Stated(0.5, 0.7), "verbosity": Stated(0.2, 0.9)}
        store.write_weights("alice", first, source=Source.inferred, actor="test")
        second = {"humor": None, "formality": Stated(-1.0, 0.4)}
        after = store.write_weights("alice", second, source=Source.inferred, actor="test")
        assert {key: (w.value, w.confidence) for key, w in after.weights.items()} == {
            "verbosity": (0.2, 0.9),
            "formality": (-1.0, 0.4),
        }
        assert after.revision == 3

    def test_the_strongest_source_is_in_effect_and_unset_uncovers_the_next(self, store):
        store.add_user("alice", actor="test")
        for source, value in zip(Source, (0.1, 0.2, 0.3, 0.4), strict=True):
            store.write_weights("alice", {"humor": Stated(value)}, source=source, actor="test")
        assert effective(store.profile("alice")) == {"humor": (0.4, "admin")}
        for source, left in zip(reversed(Source), ("user", "learned", "inferred"), strict=False):
            store.write_weights("alice", {"humor": None}, source=source, actor="test")
            assert effective(store.profile("alice"))["humor"][1] == left
        store.write_weights("alice", {"humor": None}, source=Source.inferred, actor="test")
        assert store.profile("alice").weights == {}

    def test_a_weaker_source_never_overwrites_a_stronger_one(self, store):
        store.add_user("alice", actor="test")
        store.write_weights("alice", {"humor": Stated(1.0)}, source=Source.user, actor="test")
        store.write_weights("alice", {"humor": Stated(-1.0, 0.5)}, source=Source.inferred, actor="test")
        assert effective(store.profile("alice")) == {"humor": (1.0, "user")}

    def test_setting_one_dimension_leaves_the_others(self, store):
        store.add_user("alice", actor="test")
        store.write_weights(
            "alice", {"humor": Stated(1.0), "verbosity": Stated(-0.5)}, source=Source.user, actor="test"
        )
        store.write_weights("alice", {"humor": Stated(0.0)}, source=Source.user, actor="test")
        assert effective(store.profile("alice")) == {"humor": (0.0, "user"), "verbosity": (-0.5, "user")}

    def test_one_user_s_change_leaves_another_as_they_were(self, store):
        store.add_user("alice", actor="test")
        store.add_user("bob", persona="b", actor="test")
        before = store.profile("bob")
        store.write_weights("alice", {"humor": Stated(1.0)}, source=Source.user, actor="test")
        store.write_weights("bob", {"verbosity": None}, source=Source.user, actor="test")
        assert store.profile("bob") == before

    def test_writers_at_once_lose_no_update(self, store):
        store.add_user("alice", actor="test")
        failures: list[BaseException] = []

        def write(index: int) -> None:
            try:
                for step in range(5):
                    store.write_weights(
                        "alice", {f"d{index}": Stated(step / 10 + 0.1)}, source=Source.user, actor=f"w{index}"
                    )
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=write, args=(index,)) for index in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert effective(store.profile("alice")) == {f"d{index}": (0.5, "user") for index in range(8)}
        assert [revision.number for revision in store.revisions("alice")] == list(range(1, 42))

    def test_what_a_weight_rests_on_comes_back(self, store):
        store.add_user("alice", actor="test")
        evidence = [{"anchor": "Keep it short.", "similarity": 0.8, "pole": "concise", "clause": "shorter, please"}]
        store.write_weights("alice", {"verbosity": Stated(-0.6, 0.9, evidence)}, source=Source.learned, actor="test")
        assert store.profile("alice").weights["verbosity"].evidence == evidence

    # Inference

    def test_inferred_layers_are_replaced_together_and_others_stay(self, store):
        store.add_user("alice", persona="p", actor="test")
        store.write_weights("alice", {"humor": Stated(1.0)}, source=Source.user, actor="test")
        first = {"humor": Stated(-0.5, 0.7), "verbosity": Stated(0.2, 0.9)}
        assert store.write_inferred("alice", first, inferred_from="a", actor="test").revision == 3
        after = store.write_inferred("alice", {"formality": Stated(0.4)}, inferred_from="b", actor="test")
        assert effective(after) == {"humor": (1.0, "user"), "formality": (0.4, "inferred")}
        assert (after, after.inferred_from) == (store.profile("alice"), "b")

    def test_inferring_nothing_is_noted_without_a_revision(self, store):
        store.add_user("alice", persona="p", actor="test")
        assert store.profile("alice").inferred_from is None
        store.write_inferred("alice", {}, inferred_from="a", actor="test")
        profile = store.profile("alice")
        assert (profile.revision, profile.inferred_from, len(store.revisions("alice"))) == (1, "a", 1)

    # Going back

    def test_revert_restores_every_layer_as_a_new_revision(self, store):
        store.add_user("alice", persona="a", method="linear", strengths={"linear": 3.0}, actor="test")
        store.write_weights("alice", {"humor": Stated(0.5, 0.6, {"why": 1})}, source=Source.inferred, actor="test")
        then = store.write_weights("alice", {"humor": Stated(-1.0)}, source=Source.admin, actor="test")
        store.edit_user("alice", persona="b", method=None, strengths={"linear": None}, actor="test")
        store.write_weights("alice", {"humor": None}, source=Source.admin, actor="test")
        store.write_inferred("alice", {"formality": Stated(1.0)}, inferred_from="x", actor="test")
        back = store.revert("alice", then.revision, actor="carol", reason="better before")
        assert back == store.profile("alice")
        assert {**vars(back), "revision": then.revision} == vars(then)
        last = store.revisions("alice")[-1]
        assert (last.number, last.actor, last.reason) == (7, "carol", "better before")

    def test_reverting_to_how_things_are_is_no_revision(self, store):
        store.add_user("alice", persona="a", actor="test")
        assert store.revert("alice", 1, actor="test").revision == 1
        store.write_weights("alice", {"humor": Stated(0.5)}, source=Source.user, actor="test")
        store.write_weights("alice", {"humor": None}, source=Source.user, actor="test")
        store.write_weights("alice", {"humor": Stated(0.5)}, source=Source.user, actor="test")
        assert store.revert("alice", 2, actor="test").revision == 4

    @pytest.mark.parametrize("number", [0, -1, 2, 10**9])
    def test_a_revision_that_never_was_is_refused(self, store, number):
        store.add_user("alice", persona="a", actor="test")
        with pytest.raises(UsageError, match=f"no revision {number}"):
            store.revert("alice", number, actor="test")

    def test_reverting_what_somebody_changed_meanwhile_is_refused(self, store):
        store.add_user("alice", persona="a", actor="test")
        store.edit_user("alice", persona="b", actor="test")
        with pytest.raises(ConflictError, match="revision 2"):
            store.revert("alice", 1, actor="test", expected_revision=1)

    # Feedback and vectors

    def test_feedback_comes_back_in_order_with_its_evidence(self, store):
        store.add_user("alice", actor="test")
        recorded = store.record(turn())
        chosen = Feedback("alice", "choice", "q?", "yes.", "no.", {"humor": (0.25, -1.5)}, recorded.turn_id)
        liked = Feedback("alice", "like", "q?", chosen="yes.")
        ids = [store.add_feedback(chosen), store.add_feedback(liked)]
        back = store.feedback("alice")
        assert [one.id for one in back] == ids
        assert [{name: getattr(one, name) for name in vars(chosen)} for one in back] == [vars(chosen), vars(liked)]
        assert back[0].created_at.tzinfo is not None

    def test_feedback_about_another_s_turn_is_refused(self, store):
        store.add_user("alice", actor="test")
        store.add_user("mallory", actor="test")
        hers = store.record(turn("alice")).turn_id
        for scores in ({"humor": (float("nan"), 0.0)}, {"": (1.0, 0.0)}):
            with pytest.raises(UsageError):
                store.add_feedback(Feedback("alice", "like", "q?", "yes.", scores=scores))
        with pytest.raises(UsageError, match="no feedback of the kind"):
            store.add_feedback(Feedback("alice", "love", "q?", "yes."))
        with pytest.raises(UsageError, match="no turn"):
            store.add_feedback(Feedback("mallory", "like", "q?", "yes.", turn_id=hers))
        assert store.feedback("mallory") == []

    def test_a_vector_comes_back_unless_it_is_stale(self, store):
        store.add_user("alice", actor="test")
        store.put_vector("alice", "persona", "minilm", "hash1", [0.5, -1.25, 3.0])
        assert store.vector("alice", "persona", "minilm", "hash1") == (0.5, -1.25, 3.0)
        assert store.vector("alice", "persona", "minilm", "hash2") is None
        assert store.vector("alice", "w_p", "minilm", "hash1") is None
        store.put_vector("alice", "persona", "minilm", "hash2", [1.0])
        assert store.vector("alice", "persona", "minilm", "hash1") is None
        assert store.vector("alice", "persona", "minilm", "hash2") == (1.0,)

    @pytest.mark.parametrize("numbers", [[], [float("nan")], [1.0, float("inf")], [1e39]])
    def test_a_vector_of_no_numbers_is_refused(self, store, numbers):
        store.add_user("alice", actor="test")
        with pytest.raises(UsageError, match="finite numbers"):
            store.put_vector("alice", "persona", "minilm", "hash", numbers)

    # Whole people

    def test_a_renamed_user_keeps_everything(self, store):
        a_whole_person(store, "alice")
        before = store.export("alice")
        store.rename_user("alice", "alicia", actor="test")
        after = store.export("alicia")
        assert after["revisions"][-1]["change"] == {"user": ["alice", "alicia"]}
        for name in ("persona", "layers", "conversations", "feedback", "vectors"):
            assert after[name] == before[name]
        with pytest.raises(UnknownUserError):
            store.profile("alice")

    def test_a_taken_id_is_no_new_name(self, store):
        store.add_user("alice", persona="a", actor="test")
        store.add_user("bob", persona="b", actor="test")
        with pytest.raises(UserExistsError, match="'bob' already"):
            store.rename_user("alice", "bob", actor="test")
        assert [profile.persona for profile in store.users()] == ["a", "b"]

    def test_erasing_leaves_nothing_of_one_and_all_of_another(self, store):
        a_whole_person(store, "alice")
        a_whole_person(store, "bob")
        bob = store.export("bob")
        store.erase("alice")
        with pytest.raises(UnknownUserError):
            store.profile("alice")
        assert store.export("bob") == bob
        store.add_user("alice", actor="test")
        again = store.export("alice")
        assert [again[name] for name in ("layers", "conversations", "feedback", "vectors")] == [[], [], [], []]
        assert len(again["revisions"]) == 1

    def test_what_was_exported_is_loaded_again_whole(self, store):
        a_whole_person(store, "alice")
        out = store.export("alice")
        assert json.loads(json.dumps(out)) == out
        store.erase("alice")
        assert store.load([out], actor="test") == 1
        back = store.export("alice")
        for person in (out, back):
            for talk in person["conversations"]:
                for one in talk["turns"]:
                    one.pop("id")
            person["feedback"][0].pop("turn_id")
        assert back == out

    def test_a_person_written_by_hand_is_loaded(self, store):
        people = [{"user": "alice", "persona": "p", "weights": {"humor": 0.5}}, {"user": "bob"}]
        assert store.load(people, actor="carol") == 2
        assert effective(store.profile("alice")) == {"humor": (0.5, "user")}
        (revision,) = store.revisions("alice")
        assert (revision.number, revision.actor, revision.change["persona"]) == (1, "carol", [None, "p"])
        assert store.revert("alice", 1, actor="test").revision == 1
        store.write_weights("alice", {"humor": Stated(0.5)}, source=Source.user, actor="test")
        store.write_weights("alice", {"humor": None}, source=Source.user, actor="test")
        store.write_weights("alice", {"humor": Stated(0.5)}, source=Source.user, actor="test")
        assert store.revert("alice", 2, actor="test").revision == 4

    @pytest.mark.parametrize(
        ("second", "message"),
        [
            ({}, "user: Field required"),
            ({"user": "a\nb"}, "printable"),
            ({"user": "alice"}, "stands twice"),
            ({"user": "bob", "weights": {"humor": 1.5}}, "weights.humor"),
            ({"user": "bob", "weights": {"humor": float("nan")}}, "weights.humor"),
            ({"user": "bob", "colour": "red"}, "colour"),
            ({"user": "bob", "method": "bogus"}, "no method 'bogus'"),
            ({"user": "bob", "strengths": {"linear": 99}}, "ratio"),
            ({"user": "bob", "persona": "x" * 5000}, "4000 characters"),
            ({"user": "bob", "revision": 3}, "without its history"),
            ({"user": "bob", "layers": [{"dimension": "humor", "source": "nobody", "value": 1}]}, "layers.0.source"),
            ({"user": "bob", "layers": [{"dimension": "d", "source": "user", "value": 1}] * 2}, "two weights"),
            ({"user": "bob", "conversations": [{"id": "c", "created_at": T, "updated_at": T, "turns": []}]}, "turns"),
            ({"user": "bob", "created_at": "0001-01-01T00:00:00+14:00"}, "created_at"),
            ({"user": "bob", "feedback": [{**LIKE, "turn_id": 7}]}, "turn 7, which is not there"),
            ({"user": "bob", "vectors": [{**VECTOR, "numbers": [1e39]}]}, "vectors.0.numbers"),
            ({"user": "bob", "vectors": [{**VECTOR, "numbers": []}]}, "vectors.0.numbers"),
            ({"user": "bob", "revision": 10**30}, "revision"),
            (["bob"], "the whole"),
        ],
    )
    def test_a_person_that_cannot_be_read_keeps_everybody_out(self, store, second, message):
        with pytest.raises(UnreadablePersonError, match=message) as caught:
            store.load([{"user": "alice"}, second], actor="test")
        assert caught.value.number == 2
        assert list(store.users()) == []

    def test_what_cannot_even_be_iterated_is_told(self, store):
        with pytest.raises(UnreadablePersonError, match="person 2"):
            store.load(map(json.loads, ['{"user": "alice"}', "{oops"]), actor="test")
        assert list(store.users()) == []

    def test_a_person_changed_by_hand_is_a_revision_of_its_own(self, store):
        a_whole_person(store, "alice")
        changed = store.export("alice") | {"persona": "by hand"}
        store.load([changed], existing="replace", actor="carol")
        last = store.revisions("alice")[-1]
        assert (last.number, last.actor, last.reason) == (4, "carol", "loaded")
        assert last.change == {"persona": ["alice's persona", "by hand"]}
        assert store.profile("alice").revision == 4

    def test_a_revision_that_holds_what_no_profile_takes_is_not_gone_back_to(self, store):
        store.add_user("alice", actor="test")
        store.edit_user("alice", persona="a", actor="test")
        person = store.export("alice")
        for snapshot in (
            {"persona": "x" * 9000},
            {"weight.humor.user": [99, 7], "updated_at": {"weight.humor.user": T}},
            {"weight.humor.user": "text", "updated_at": None},
            {"method": "magic"},
        ):
            person["revisions"][0]["snapshot"] |= snapshot
            store.load([person], existing="replace", actor="test")
            before = store.profile("alice")
            with pytest.raises(UsageError, match="revision 1 holds"):
                store.revert("alice", 1, actor="test")
            assert store.profile("alice") == before

    def test_loading_those_who_exist_fails_skips_or_replaces(self, store):
        store.add_user("alice", persona="old", actor="test")
        people = [{"user": "alice", "persona": "new"}, {"user": "bob", "persona": "b"}]
        with pytest.raises(UserExistsError, match="'alice' is stored already"):
            store.load(people, actor="test")
        assert [profile.user_id for profile in store.users()] == ["alice"]
        assert store.load(people, existing="skip", actor="test") == 1
        assert store.profile("alice").persona == "old"
        assert store.load(people, existing="replace", actor="test") == 2
        assert store.profile("alice").persona == "new"

    def test_another_s_conversation_is_not_loaded_over(self, store):
        a_whole_person(store, "alice")
        stolen = store.export("alice") | {"user": "mallory"}
        before = store.export("alice")
        with pytest.raises(UsageError, match="another user's"):
            store.load([stolen], actor="test")
        assert store.export("alice") == before

    # Conversations

    def test_conversations_are_listed_latest_first(self, store):
        store.add_user("alice", actor="test")
        store.add_user("bob", actor="test")
        first = store.record(turn(prompt="one?"))
        second = store.record(turn(prompt="two?"))
        store.record(turn("bob"))
        store.record(turn(prompt="three?", conversation_id=first.conversation_id))
        listed = [(entry.id, entry.turns, entry.first_prompt) for entry in store.conversations("alice")]
        assert listed == [(first.conversation_id, 2, "one?"), (second.conversation_id, 1, "two?")]

    def test_a_turn_comes_back_as_recorded(self, store):
        store.add_user("alice", actor="test")
        recorded = store.record(turn(system="Be kind.", text="smile 🙂"))
        (back,) = store.turns("alice", recorded.conversation_id)
        expected = turn(system="Be kind.", text="smile 🙂", conversation_id=recorded.conversation_id)
        assert {name: getattr(back, name) for name in vars(expected)} == vars(expected)
        assert (back.id, back.output_tokens) == (recorded.turn_id, 3)
        assert back.created_at.tzinfo is not None

    def test_turns_follow_each_other_in_a_conversation(self, store):
        store.add_user("alice", actor="test")
        first = store.record(turn(prompt="one?", text="one.", system="s"))
        second = store.record(turn(prompt="two?", text="two.", conversation_id=first.conversation_id, system="t"))
        assert first.conversation_id == second.conversation_id
        conversation = store.conversation("alice", first.conversation_id)
        assert conversation.system == "t"
        assert [back.system for back in store.turns("alice", first.conversation_id)] == ["s", "t"]
        assert conversation.messages == (
            Message("user", "one?"),
            Message("assistant", "one."),
            Message("user", "two?"),
            Message("assistant", "two."),
        )

    def test_history_that_an_application_kept_comes_before_its_turn(self, store):
        store.add_user("alice", actor="test")
        earlier = (Message("user", "zero?"), Message("assistant", "zero."))
        recorded = store.record(turn(prompt="one?", text="one.", history=earlier))
        assert store.turns("alice", recorded.conversation_id)[0].history == earlier
        assert store.conversation("alice", recorded.conversation_id).messages[:2] == earlier

    def test_calls_of_tools_and_their_answers_are_kept_and_travel(self, store):
        store.add_user("alice", actor="test")
        earlier = (
            Message("user", "what is the weather?"),
            Message("assistant", "", (ToolCall("weather", '{"place": "town"}', "1"),)),
            Message("tool", "sunny", answers="1"),
        )
        recorded = store.record(turn(prompt="", text="Sunny.", history=earlier))
        assert store.turns("alice", recorded.conversation_id)[0].history == earlier
        said = store.conversation("alice", recorded.conversation_id).messages
        assert said == (*earlier, Message("assistant", "Sunny."))
        person = json.loads(json.dumps(store.export("alice")))
        store.erase("alice")
        store.load([person], actor="test")
        assert store.conversation("alice", recorded.conversation_id).messages == said

    def test_a_turn_without_a_reply_is_kept_and_passed_over(self, store):
        store.add_user("alice", actor="test")
        recorded = store.record(turn(text="", token_ids=(), finish_reason="interrupted"))
        assert store.conversation("alice", recorded.conversation_id).messages == ()
        assert len(store.turns("alice", recorded.conversation_id)) == 1

    def test_a_turn_that_was_replaced_is_kept_and_passed_over(self, store):
        store.add_user("alice", actor="test")
        first = store.record(turn(text="one."))
        again = store.record(turn(text="two.", conversation_id=first.conversation_id, replaces=first.turn_id))
        said = store.conversation("alice", first.conversation_id).messages
        assert [message.content for message in said][1:] == ["two."]
        assert store.turns("alice", first.conversation_id)[1].replaces == first.turn_id
        store.record(turn(text="three.", conversation_id=first.conversation_id, replaces=again.turn_id))
        assert [m.content for m in store.conversation("alice", first.conversation_id).messages][1:] == ["three."]

    def test_a_turn_whose_replacement_said_nothing_stays(self, store):
        store.add_user("alice", actor="test")
        first = store.record(turn(text="one."))
        store.record(turn(text="", conversation_id=first.conversation_id, replaces=first.turn_id))
        conversation = store.conversation("alice", first.conversation_id)
        assert [message.content for message in conversation.messages][1:] == ["one."]
        assert conversation.last_turn == first.turn_id

    def test_an_id_that_was_given_out_is_no_other_turn_s(self, store):
        store.add_user("alice", actor="test")
        store.add_user("bob", actor="test")
        erased = store.record(turn("bob")).turn_id
        store.erase("bob")
        assert store.record(turn("alice")).turn_id > erased

    def test_the_latest_conversation_is_the_one_last_spoken_in(self, store):
        store.add_user("alice", actor="test")
        first = store.record(turn())
        second = store.record(turn())
        assert store.conversation("alice", "latest").id == second.conversation_id
        store.record(turn(conversation_id=first.conversation_id))
        assert store.conversation("alice", "latest").id == first.conversation_id

    def test_a_user_without_conversations_has_no_latest(self, store):
        store.add_user("alice", actor="test")
        with pytest.raises(UnknownConversationError, match="no conversation yet"):
            store.conversation("alice", "latest")

    def test_nobody_reads_or_continues_another_s_conversation(self, store):
        store.add_user("alice", actor="test")
        store.add_user("mallory", actor="test")
        hers = store.record(turn("alice")).conversation_id
        for call in (
            lambda: store.conversation("mallory", hers),
            lambda: store.turns("mallory", hers),
            lambda: store.record(turn("mallory", hers)),
        ):
            with pytest.raises(UnknownConversationError):
                call()
        assert len(store.turns("alice", hers)) == 1

    def test_a_nul_that_a_model_emits_does_not_lose_the_turn(self, store):
        store.add_user("alice", actor="test")
        recorded = store.record(turn(text="a\0b"))
        assert store.turns("alice", recorded.conversation_id)[0].text == "a\ufffdb"
