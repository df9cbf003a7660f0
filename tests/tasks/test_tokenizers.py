import numpy as np
import pytest

from kvbind.tasks.tokenizers import Bytes, open_tokenizer


@pytest.mark.parametrize("text", ["", "plain", "Grüße, 世界 🎉", "a\x01b\r\n"])
def test_bytes_give_any_text_back(text):
    words = open_tokenizer("bytes")
    ids = words.encode(text)
    assert ids.dtype == np.int64
    assert words.decode(ids.tolist()) == text
    assert len(ids) == len(text.encode())
    assert words.end not in ids


def test_a_cut_character_decodes_to_a_mark():
    assert Bytes().decode([0xC3]) == "�"


@pytest.fixture
def saved(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"<end>": 0, "<unk>": 1, "so": 2, "it": 3, "goes": 4}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()

    def save(name, **special):
        PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", **special).save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return save


def test_a_pretrained_tokenizer_is_loaded_from_a_folder(saved):
    words = open_tokenizer(saved("words", eos_token="<end>"))
    assert (words.vocab_size, words.end) == (5, 0)
    assert words.encode("so it goes").tolist() == [2, 3, 4]
    assert words.decode([2, 4]) == "so goes"


def test_a_tokenizer_without_an_end_is_refused(saved):
    with pytest.raises(ValueError, match=r"data\.tokenizer must have an end-of-text token"):
        open_tokenizer(saved("endless"))
