"""The bundled set and the two scores."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

import pytest
import torch

from lusifer import LusiferError
from lusifer.data.everyday_set import load_everyday
from lusifer.evaluation.everyday import embedder, language_bias, mean_score, score, topic_accuracy, translation_accuracy
from lusifer.model.backbone_alone import EncoderAlone

SCRIPTS = {
    "ru": "CYRILLIC", "fa": "ARABIC", "ar": "ARABIC", "ko": "HANGUL", "hi": "DEVANAGARI", "bn": "BENGALI",
    "te": "TELUGU", "th": "THAI", "zh": "CJK",
}  # fmt: skip
JAPANESE = ("HIRAGANA", "KATAKANA", "CJK", "KATAKANA-HIRAGANA")


def script(character):
    return unicodedata.name(character, "?").split(" ")[0]


def test_the_set_is_complete():
    data = load_everyday()
    assert len(data.names) == len(set(data.names)) == 64
    assert Counter(data.topics) == {topic: 8 for topic in set(data.topics)} and len(set(data.topics)) == 8
    # "id" is Indonesian, not an identifier.
    codes = "en es ru fr vi fa id ar fi ko hi bn te sw de it ja nl pl pt th tr zh"
    assert " ".join(data.sentences) == codes and len(data.sentences) == 23
    for language, sentences in data.sentences.items():
        assert len(sentences) == len(set(sentences)) == 64, language
        for sentence in sentences:
            assert sentence == unicodedata.normalize("NFC", sentence.strip()), (language, sentence)
            assert "\ufffd" not in sentence and "\n" not in sentence


def test_no_language_repeats_another_ones_sentences():
    data = load_everyday()
    everything = Counter(sentence for sentences in data.sentences.values() for sentence in set(sentences))
    # Close languages may share a short sentence, no more.
    assert sum(count > 1 for count in everything.values()) <= 2


def test_every_sentence_is_in_its_own_script():
    for language, sentences in load_everyday().sentences.items():
        for sentence in sentences:
            letters = [script(character) for character in sentence if unicodedata.category(character)[0] == "L"]
            wanted = JAPANESE if language == "ja" else (SCRIPTS.get(language, "LATIN"),)
            assert sum(letter in wanted for letter in letters) > 0.7 * len(letters), (language, sentence)
        if language == "ja":
            assert all(re.search(r"[\u3040-\u30ff]", sentence) for sentence in sentences)


def test_translation_accuracy_of_made_up_embeddings():
    eye = torch.eye(8)
    assert translation_accuracy(eye, 3 * eye) == 1.0
    assert translation_accuracy(eye, eye.roll(1, dims=0)) == 0.0
    half = eye.clone()
    half[:4] = half[:4].roll(1, dims=0)
    assert translation_accuracy(eye, half) == 0.5
    # All the same: argmax finds row 0 everywhere, which is right once in each direction.
    assert translation_accuracy(torch.ones(8, 4), torch.ones(8, 4)) == 1 / 8


def test_translation_accuracy_averages_two_different_directions():
    english = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    # Each side's first row is the nearest for both rows of the other only one way round.
    other = torch.tensor([[1.0, 0.1], [1.0, 0.2]])
    forward = [0, 1]  # Nearest to (1,0) is row 0; nearest to (0,1) is row 1.
    backward = [0, 0]  # Both rows are nearest to (1,0).
    expected = (sum(i == j for i, j in enumerate(forward)) + sum(i == j for i, j in enumerate(backward))) / 4
    assert translation_accuracy(english, other) == expected == 0.75
    assert translation_accuracy(other, english) == 0.75


def test_scores_near_chance_for_random_embeddings():
    generator = torch.Generator().manual_seed(0)
    found = [
        translation_accuracy(torch.randn(64, 32, generator=generator), torch.randn(64, 32, generator=generator))
        for _ in range(50)
    ]
    # Mean 1/64 = 0.0156, standard error about 0.0016 of 50 draws.
    assert abs(sum(found) / 50 - 1 / 64) < 0.006


def test_topic_accuracy_of_made_up_embeddings():
    topics = [topic for topic in "abcd" for _ in range(2)]
    same = torch.eye(4).repeat_interleave(2, dim=0)
    assert topic_accuracy(same, topics) == 1.0
    assert topic_accuracy(same, ["a", "b", "c", "d"] * 2) == 0.0
    half = ["a", "a", "b", "b", "c", "d", "c", "d"]
    assert topic_accuracy(same, half) == 0.5
    # A sentence is never its own neighbour, even where it is the only one on its side.
    assert topic_accuracy(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), ["a", "b"]) == 0.0
    assert topic_accuracy(5 * same, topics) == 1.0


def test_score_has_the_documented_keys():
    data = load_everyday()
    place = {s: row for sentences in data.sentences.values() for row, s in enumerate(sentences)}
    asked = []

    def perfect(texts):
        asked.append(list(texts))
        topics = sorted(set(data.topics))
        rows = torch.tensor([place[text] for text in texts])
        by_topic = torch.tensor([topics.index(data.topics[row]) for row in rows])
        return torch.cat([torch.eye(64)[rows], torch.eye(8)[by_topic]], dim=1)

    scores = score(perfect, progress=False)
    assert set(scores) == {"translation_retrieval", "topic_retrieval"}
    assert list(scores["topic_retrieval"]) == list(data.sentences)
    assert set(scores["translation_retrieval"]) == set(data.sentences) - {"en"}
    assert set(scores["topic_retrieval"].values()) == {1.0}
    assert set(scores["translation_retrieval"].values()) == {1.0}
    assert len(asked) == 23
    few = score(perfect, languages=["te", "en"], progress=False)
    assert list(few["topic_retrieval"]) == ["te", "en"] and list(few["translation_retrieval"]) == ["te"]


def test_the_english_side_can_be_that_of_another_model():
    """A system whose vectors are turned against the English ones finds nothing, though it agrees with itself."""
    data = load_everyday()
    vectors = torch.eye(64)
    place = {text: row for texts in data.sentences.values() for row, text in enumerate(texts)}

    def embed(texts):
        return vectors[[place[text] for text in texts]]

    itself = score(embed, languages=["de"], progress=False)
    other = score(embed, english=vectors.roll(1, dims=0), languages=["en", "de"], progress=False)
    assert itself["translation_retrieval"] == {"de": 1.0} and other["translation_retrieval"] == {"de": 0.0}
    assert other["topic_retrieval"]["de"] == itself["topic_retrieval"]["de"]


def test_unknown_languages_are_refused_before_any_work():
    def never(texts):
        raise AssertionError("embedded although a language is unknown")

    with pytest.raises(LusiferError, match="no language 'xx'; it has en, "):
        score(never, languages=["fr", "xx"], progress=False)


def test_mean_score():
    assert mean_score({"fr": 0.5, "ru": 0.7, "te": 0.1, "en": 1.0}, ["en", "fr", "ru", "zz"]) == pytest.approx(0.6)
    assert mean_score({"en": 1.0}, ["en"]) != mean_score({"en": 1.0}, ["en"])  # Not a number.


def test_embedder_gives_what_encode_gives(tiny_st):
    texts = ["the cat", "a small house stood near the river"]
    made = embedder(tiny_st)(texts)
    assert made.dtype == torch.float32 and made.shape == (2, 48)
    torch.testing.assert_close(made, torch.from_numpy(tiny_st.encode(texts)), atol=1e-6, rtol=0)


def test_an_encoder_alone_is_the_mean_of_its_states(tiny_encoder):
    from transformers import AutoModel, AutoTokenizer

    texts = ["the cat", "a small house stood near the river"]
    made = EncoderAlone.from_name(tiny_encoder).embed(texts)
    model, tokenizer = AutoModel.from_pretrained(tiny_encoder).eval(), AutoTokenizer.from_pretrained(tiny_encoder)
    with torch.no_grad():
        for row, text in enumerate(texts):
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state
            mean = torch.nn.functional.normalize(states[0].mean(dim=0), dim=0)
            torch.testing.assert_close(made[row], mean, atol=1e-5, rtol=1e-5)


def test_language_bias_tells_clusters_of_language_from_clusters_of_meaning():
    generator = torch.Generator().manual_seed(0)
    meaning = torch.nn.functional.normalize(torch.randn(20, 16, generator=generator), dim=1)
    offsets = {code: torch.eye(3)[number].expand(20, 3) for number, code in enumerate(("en", "de", "te"))}
    noise = {code: 0.02 * torch.randn(20, 16, generator=generator) for code in offsets}
    by_meaning = language_bias({code: meaning + noise[code] for code in offsets})
    assert set(by_meaning) == {"de", "te"}
    # Two translations are nearest; the other eight of ten come from anywhere.
    assert by_meaning["te"]["alone"] == by_meaning["te"]["mixed"] == 1.0
    assert 0.1 < by_meaning["te"]["same_language"] < 0.4
    by_language = language_bias({code: torch.cat([meaning + noise[code], 2 * offsets[code]], 1) for code in offsets})
    assert by_language["te"]["same_language"] == 1.0 and by_language["te"]["mixed"] == 0.0
    # Among English texts alone, the language is the same offset for all, and the meaning decides.
    assert by_language["te"]["alone"] == 1.0
