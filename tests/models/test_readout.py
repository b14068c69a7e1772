"""The read-out on a small random encoder: what it learns, what it keeps, and that the embedder stays as it was."""

from __future__ import annotations

import random
import tomllib

import numpy as np
import pytest
import torch

from prefmw.errors import UsageError
from prefmw.models.embedder import Embedder
from prefmw.models.packing import Packed
from prefmw.models.readout import ReadOut, adapted, changes, linear_layers, load_readout
from prefmw.preferences import default_dimensions, parse_dimensions
from prefmw.preferences.anchors import Anchor, anchor_bank
from prefmw.training import readout as training
from prefmw.training import unfinished
from prefmw.training.readout import Example, fit_readout

WORDS = "long short jokes tea a b c d e f g h i j k l m n o p q r s t u v w x y z".split()
ANCHORS = [Anchor("short", "verbosity", -1), Anchor("long", "verbosity", 1), Anchor("tea", None, 0)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A sentence embedder of one block of width 32."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    home = tmp_path_factory.mktemp("embedder")
    (home / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    tokenizer = BertTokenizerFast(str(home / "vocab.txt"))
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = BertConfig(vocab_size=len(WORDS) + 5, **shape)
    BertModel(config).save_pretrained(home / "bert")
    tokenizer.save_pretrained(home / "bert")
    transformer = Transformer(str(home / "bert"))
    SentenceTransformer(modules=[transformer, Pooling(32)], device="cpu").save(str(home / "model"))
    return str(home / "model")


@pytest.fixture(scope="module")
def embedder(folder) -> Embedder:
    return Embedder(folder)


MADE = [
    Example(f"{word} {filler}", sides, 1.0, True, held_out=filler in "jt")
    for word, sides in (
        ("short", {"verbosity": -1}),
        ("long", {"verbosity": 1}),
        ("jokes", {"humor": 1}),
        ("tea", {}),
    )
    for filler in WORDS[4:]
    for _ in range(6)
]


def read_instead(patch, examples):
    patch.setattr(training, "written_examples", lambda *_: examples)
    patch.setattr(training, "foreign_examples", lambda *_: [])
    patch.setattr(training, "composed_examples", lambda *_: [])


@pytest.fixture(scope="module")
def fitted(embedder) -> tuple[ReadOut, dict]:
    """Fitted to a handful of words, many times over."""
    with pytest.MonkeyPatch.context() as patch:
        read_instead(patch, MADE)
        return fit_readout(embedder, ANCHORS, default_dimensions(), epochs=40)


def test_it_learns_which_side_a_word_is_on(fitted):
    readout, measured = fitted
    values = dict(
        zip(readout.dimensions, readout.read(["short a", "long b", "jokes c", "tea d"]).values.T, strict=True)
    )
    assert values["verbosity"].round().tolist() == [-1, 1, 0, 0]
    assert values["humor"].round().tolist() == [0, 0, 1, 0]
    assert measured["right_side"] > 0.95
    assert 0.15 <= readout.threshold < 0.95
    assert measured["held_out"] > 30


# A fit that is killed


@pytest.fixture
def few(monkeypatch):
    """Texts for a fit of 27 steps."""
    read_instead(monkeypatch, MADE)
    monkeypatch.setattr(unfinished, "EVERY", 0.0)


def killed_at(limit):
    def progress(what, share):
        if share > limit:
            raise KeyboardInterrupt

    return progress


def test_a_killed_fit_goes_on_and_comes_to_what_an_unbroken_one_does(embedder, few, tmp_path):
    whole, broken = tmp_path / "whole.safetensors", tmp_path / "broken.safetensors"
    unbroken, measured = fit_readout(embedder, ANCHORS, default_dimensions(), epochs=3, out=whole)
    for limit in (0.3, 0.5, 0.9):
        with pytest.raises(KeyboardInterrupt):
            fit_readout(embedder, ANCHORS, default_dimensions(), epochs=3, out=broken, progress=killed_at(limit))
        assert not broken.exists()
    shares = []
    arguments = {"epochs": 3, "out": broken, "progress": lambda what, share: shares.append(share)}
    _, again = fit_readout(embedder, ANCHORS, default_dimensions(), **arguments)
    assert shares[0] > 0.85
    assert again == measured
    assert load_readout(broken, embedder).version() == load_readout(whole, embedder).version() == unbroken.version()
    assert {path.name for path in tmp_path.iterdir()} == {"whole.safetensors", "broken.safetensors"}


@pytest.mark.parametrize("other", [{"seed": 1}, {"epochs": 4}])
def test_a_fit_does_not_go_on_with_another_s_steps(embedder, few, tmp_path, other):
    out = tmp_path / "readout.safetensors"
    with pytest.raises(KeyboardInterrupt):
        fit_readout(embedder, ANCHORS, default_dimensions(), epochs=3, out=out, progress=killed_at(0.3))
    with pytest.raises(UsageError, match="unfinished work with other settings or data; name another --out"):
        fit_readout(embedder, ANCHORS, default_dimensions(), **{"epochs": 3, "out": out, **other})


def test_a_fit_goes_on_from_a_read_out(fitted, embedder, few):
    """One pass from what 40 taught still knows it; one from nothing does not."""
    asked = ["long", "short"]
    known = fitted[0].read(asked).values[:, 0]
    further, _ = fit_readout(embedder, ANCHORS, default_dimensions(), epochs=1, start=fitted[0])
    begun, _ = fit_readout(embedder, ANCHORS, default_dimensions(), epochs=1)
    assert np.abs(further.read(asked).values[:, 0] - known).max() < np.abs(begun.read(asked).values[:, 0] - known).max()
    assert further.version() not in (fitted[0].version(), begun.version())


def test_a_fit_goes_on_from_a_read_out_of_its_own_dimensions_alone(fitted, embedder):
    fewer = parse_dimensions("[humor]\nretired = true", default_dimensions())
    with pytest.raises(UsageError, match="to start from reads verbosity"):
        fit_readout(embedder, ANCHORS, fewer, epochs=1, start=fitted[0])


def test_it_comes_back_as_saved(fitted, embedder, tmp_path):
    readout, _ = fitted
    file = tmp_path / "readout.safetensors"
    readout.save(file)
    back = load_readout(file, embedder)
    texts = ["short a", "long b"]
    np.testing.assert_array_equal(back.read(texts).values, readout.read(texts).values)
    assert (back.dimensions, back.threshold, back.version()) == (
        readout.dimensions,
        readout.threshold,
        readout.version(),
    )
    assert (back.anchors, back.poles) == (tuple(ANCHORS), readout.poles)
    np.testing.assert_array_equal(back.vectors, readout.vectors)
    assert back.read([]).values.shape == (0, len(back.dimensions))


def test_anchors_are_kept_as_it_reads_them(fitted, embedder):
    readout, _ = fitted
    texts = [anchor.text for anchor in ANCHORS]
    np.testing.assert_allclose(readout.vectors, readout.read(texts).vectors, atol=1e-3)
    assert not np.allclose(readout.vectors, embedder(texts), atol=0.05)


def test_a_full_stop_changes_nothing(fitted):
    for with_it, without in zip(fitted[0].read(["short a."]), fitted[0].read(["short a"]), strict=True):
        np.testing.assert_array_equal(with_it, without)


def test_the_embedder_s_encoder_stays_as_it_was_and_shares_its_other_weights(fitted, embedder):
    readout, _ = fitted
    readout.read(["short a"])
    theirs = embedder.encoder
    assert not any(isinstance(module, Packed) for module in theirs.modules())
    assert readout._reader.encoder.embeddings.word_embeddings.weight is theirs.embeddings.word_embeddings.weight
    states = theirs(**embedder.tokens(["short a"], 8)).last_hidden_state
    assert states.requires_grad


def test_a_read_out_of_an_earlier_form_is_refused(fitted, embedder, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("prefmw.models.readout.FORM", "1")
        fitted[0].save(tmp_path / "former.safetensors")
    with pytest.raises(UsageError, match="made by an earlier version"):
        load_readout(tmp_path / "former.safetensors", embedder)


def test_an_embedder_without_an_encoder_cannot_be_adapted():
    embedder = Embedder("static")
    embedder._model = [object()]
    with pytest.raises(UsageError, match="no transformers encoder"):
        _ = embedder.encoder


def test_what_stands_beside_a_text_in_a_batch_changes_nothing(fitted):
    readout, _ = fitted
    alone = readout.read(["short a"]).values
    among = readout.read(["short a", "long " * 90]).values[:1]
    np.testing.assert_allclose(alone, among, atol=1e-5)


def test_an_adapter_that_learned_nothing_changes_nothing(embedder):
    encoder = adapted(embedder.encoder, rank=2)
    tokens = embedder.tokens(["short a"], 16)
    with torch.no_grad():
        assert torch.equal(encoder(**tokens).last_hidden_state, embedder.encoder(**tokens).last_hidden_state)
    assert {weight.shape[0] for name, weight in changes(encoder).items() if name.endswith(".a")} == {2}
    learning = {id(weight) for weight in encoder.parameters() if weight.requires_grad}
    assert learning == {id(weight) for weight in changes(encoder).values()}


def test_the_embedder_stays_as_it_was(fitted, folder, embedder):
    np.testing.assert_array_equal(embedder(["short a"]), Embedder(folder)(["short a"]))
    assert not changes(embedder.encoder)
    assert len(list(linear_layers(embedder.encoder))) == 6


def test_a_read_out_of_another_embedder_is_refused(fitted, tmp_path):
    fitted[0].save(tmp_path / "r.safetensors")
    with pytest.raises(UsageError, match="was fitted to"):
        load_readout(tmp_path / "r.safetensors", Embedder("another"))


@pytest.mark.parametrize("content", [None, b"", b"no safetensors at all"])
def test_a_file_that_is_no_read_out_is_told(tmp_path, embedder, content):
    file = tmp_path / "readout.safetensors"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UsageError, match="fit-readout"):
        load_readout(file, embedder)


def test_an_embedder_that_is_none_is_told(tmp_path):
    from prefmw.errors import ModelNotFoundError

    with pytest.raises(ModelNotFoundError, match="no sentence embedder"):
        Embedder(str(tmp_path / "nothing"))(["a"])


# What it is fitted on


def test_a_tenth_of_what_people_wrote_is_held_out_and_in_no_pair():
    dimensions = default_dimensions()
    found = training.written_examples(anchor_bank(dimensions), dimensions, 0)
    written = [one for one in found if one.written]
    assert 0.08 < sum(one.held_out for one in written) / len(written) < 0.12
    assert not any(one.held_out for one in found if not one.written)
    pairs = [one for one in composed(found, dimensions) if len(one.sides) > 1]
    assert len(pairs) > 2500
    held_out = [one._replace(held_out=True) for one in found]
    assert all(len(one.sides) <= 1 for one in composed(held_out, dimensions))


def test_every_pass_composes_anew():
    dimensions = default_dimensions()
    written = training.written_examples(anchor_bank(dimensions), dimensions, 0)
    one, other = ({example.text for example in composed(written, dimensions, seed)} for seed in (0, 1))
    assert one == {example.text for example in composed(written, dimensions, 0)}
    assert len(one & other) < 0.3 * len(one)


def composed(written, dimensions, seed=0):
    return training.composed_examples(written, dimensions, random.Random(seed))


@pytest.mark.parametrize(
    "text",
    [
        '[humor]\nnegative = { name = "dry", principle = "D." }\npositive = { name = "witty", principle = "W." }',
        '[neutral]\nnegative = { name = "a", principle = "A." }\npositive = { name = "b", principle = "B." }',
        "[humor]\nretired = true",
    ],
)
def test_a_deployments_own_dimensions_bring_their_own_texts(text):
    dimensions = parse_dimensions(text, default_dimensions())
    written = training.written_examples(anchor_bank(dimensions), dimensions, 0)
    found = [*written, *composed(written, dimensions)]
    assert not {key for one in found for key in one.sides} & set(tomllib.loads(text))


def test_a_temperature_makes_values_as_sure_as_they_are_right():
    torch.manual_seed(0)
    logits = torch.randn(4000, 2, 3)
    targets = torch.distributions.Categorical(logits=logits).sample() - 1  # as likely as the logits say
    for factor in (0.4, 1.0, 5.0):
        assert training._temperature(logits * factor, targets) == pytest.approx(factor, rel=0.1)


@pytest.mark.parametrize("understands", [True, False])
def test_other_languages_are_read_only_by_an_embedder_that_knows_them(understands):
    numbers: dict[str, int] = {}

    def embed(texts):
        """The same vectors for every language in turn, or the same vector for every text."""
        rows = [numbers.setdefault(text, len(numbers) % 25) for text in texts] if understands else [0] * len(texts)
        return np.eye(25, dtype=np.float32)[rows]

    found = training.foreign_examples(embed, default_dimensions(), 0)
    assert len(found) == 250
    assert any(one.held_out for one in found)
    assert any(one.sides for one in found) == understands


def test_without_a_style_dimension_nothing_is_fitted(embedder):
    retired = "".join(f"[{key}]\nretired = true\n" for key, one in default_dimensions().items() if one.kind == "style")
    with pytest.raises(UsageError, match="no style dimension"):
        fit_readout(embedder, [], parse_dimensions(retired, default_dimensions()))
